"""The LDM autoencoder (SD, SDXL, SD3, Flux): original names, sizes from the file, latents by shift and scale.

Original names: encoder.down.N.block.M, encoder.mid.attn_1.q as 1x1 convolutions, decoder.up counted from the
output; diffusers' AutoencoderKL counts its up blocks from the latents and has Linear attention projections. Diffusers
folders of before 2023 (SD 1.x) spell these projections query, key, value, proj_attn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from library.families.family import Part
from library.layout import Op, Row, Shape, conv1x1, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The published VAEs all have 32 norm groups (ComfyUI and BFL hard-code it); it is not visible in any shape, so files of
# other sizes say theirs in the header metadata.
GROUPS, GROUPS_KEY = 32, "norm_num_groups"
# (shift, scale) of the latents as published with each model: `scale_factor` of the SD 1.x/2.x and SDXL configurations,
# `shift_factor` and `scaling_factor` of the VAE configurations of SD3 and FLUX.1. Latents are (z - shift) * scale.
SD, SDXL, SD3, FLUX = (0.0, 0.18215), (0.0, 0.13025), (0.0609, 1.5305), (0.1159, 0.3611)
CARRIED = ("model_ema.decay", "model_ema.num_updates", "loss.")  # left from training in published SD 1.x VAE files
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def ldm_rows(ours: Mapping[str, Shape], op: Op = conv1x1) -> list[Row]:
    """The table for a model with these names: the number of levels decides how decoder blocks are counted.

    `op` turns an attention projection, a convolution with a kernel of one in the file, into our Linear.
    """
    levels = 1 + max(int(key.split(".")[2]) for key in ours if key.startswith("encoder.down_blocks."))
    rows = [row("quant_conv"), row("post_quant_conv")]
    for side in ("encoder", "decoder"):
        mid, theirs = f"{side}.mid_block", f"{side}.mid"
        rows += [row(f"{side}.conv_in"), row(f"{side}.conv_out"), row(f"{side}.norm_out", f"{side}.conv_norm_out")]
        rows += [row(f"{theirs}.block_{k + 1}", f"{mid}.resnets.{k}") for k in (0, 1)]
        rows.append(row(f"{theirs}.attn_1.norm", f"{mid}.attentions.0.group_norm"))
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            rows.append(row(f"{theirs}.attn_1.{a}", f"{mid}.attentions.0.{b}", op=op))
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        rows += _resnets(f"encoder.down.{level}.block", f"{down}.resnets")
        rows += _resnets(f"decoder.up.{level}.block", f"{up}.resnets")
        rows.append(row(f"encoder.down.{level}.downsample", f"{down}.downsamplers.0"))
        rows.append(row(f"decoder.up.{level}.upsample", f"{up}.upsamplers.0"))
    return rows


def _resnets(theirs: str, ours: str) -> list[Row]:
    names = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
    # The shortcut exists only where the width changes, so its blocks are counted out, not expanded until one lacks.
    return [row(f"{theirs}.{i}.{a}", f"{ours}.{i}.{b}") for i in range(4) for a, b in names.items()]


def old_rows(ours: Mapping[str, Shape]) -> list[Row]:
    """The table of a diffusers folder with the attention names of before 2023."""
    rows = []
    for key in ours:
        theirs = key
        for new, old in OLD_NAMES.items():
            theirs = theirs.replace(new, old) if ".attentions." in key else theirs
        rows.append(row(theirs, key))
    return rows


def recognise(shapes: Mapping[str, Shape], channels: int) -> str | None:
    """Files of this kind are told apart by their latent channels: 4 (SD, SDXL), 16 (SD3, Flux)."""
    latent = shapes.get("decoder.conv_in.weight", ())
    # Flux 2 has statistics; HunyuanImage counts its decoder's levels from the latents, so that the first one upsamples.
    if (
        len(latent) != 4
        or latent[1] != channels
        or {"bn.running_mean", "decoder.up.0.upsample.conv.weight"} & set(shapes)
    ):
        return None
    return names(shapes)


def names(shapes: Mapping[str, Shape]) -> str | None:
    """Which spelling of an LDM autoencoder of pictures these keys are, whatever its size."""
    if len(shapes.get("encoder.down.0.block.0.conv1.weight", ())) == 4:
        return "ldm"
    if len(shapes.get("encoder.down_blocks.0.resnets.0.conv1.weight", ())) != 4:
        return None
    return "diffusers_old" if "encoder.mid_block.attentions.0.query.weight" in shapes else "diffusers"


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' AutoencoderKL configuration, from the shapes of any layout."""
    sizes = level_sizes(shapes, metadata)
    levels = len(sizes["block_out_channels"])
    return sizes | {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def level_sizes(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Width of each level, blocks in one and norm groups, of pictures' and videos' LDM encoders in either spelling."""
    original = "encoder.down.0.block.0.norm1.weight" in shapes
    pattern = "encoder.down.{}.block.{}.norm2.weight" if original else "encoder.down_blocks.{}.resnets.{}.norm2.weight"
    widths = [shapes[pattern.format(level, 0)][0] for level in range(count(shapes, pattern.format("{}", 0)))]
    return {
        "block_out_channels": tuple(widths),
        "layers_per_block": count(shapes, pattern.format(0, "{}")),
        "norm_num_groups": int(metadata.get(GROUPS_KEY) or math.gcd(GROUPS, *widths)),
    }


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many keys `pattern.format(0)`, `pattern.format(1)`, ... there are without a gap."""
    n = 0
    while pattern.format(n) in shapes:
        n += 1
    return n


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    return class_of("AutoencoderKL")(**configuration)


def class_of(name: str) -> type:
    """A class of diffusers, imported with tensors on the CPU.

    `build` runs on the meta device, where a module that makes tensors when it is first imported (Cosmos's wavelets)
    would keep them for good.
    """
    import torch

    with torch.device("cpu"):
        import diffusers

        return getattr(diffusers, name)


def part(title: str, channels: int) -> Part:
    """The VAE part of a family; the normalisation is the family's."""
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"ldm": ldm_rows, "diffusers": identity, "diffusers_old": old_rows},
        recognise=partial(recognise, channels=channels),
        config=config,
        build=build,
        prefixes=("", "first_stage_model.", "vae."),
        carried=CARRIED,
        diffusers_folder="vae",
        stated=(GROUPS_KEY,),
    )


def identity(ours: Mapping[str, Shape]) -> Sequence[Row]:
    return [Row(key, (key,)) for key in ours]


def encode(vae: torch.nn.Module, pixels: Tensor, shift: float, scale: float) -> Tensor:
    """[B,3,H,W] in -1..1 -> normalised latents [B,C,h,w] float32: the posterior's mean, as ComfyUI's encode gives it.

    diffusion-pipe draws a sample instead; the mean is deterministic, so a cached and a live run are the same run.
    """
    mean = vae.encode(pixels.to(vae.dtype)).latent_dist.mean
    return (mean.float() - shift) * scale


def decode(vae: torch.nn.Module, latents: Tensor, shift: float, scale: float) -> Tensor:
    """Normalised latents -> [B,3,H,W] in about -1..1, float32."""
    return vae.decode((latents / scale + shift).to(vae.dtype)).sample.float()
