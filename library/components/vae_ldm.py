"""The LDM autoencoder (SD, SDXL, SD3, Flux): original names, sizes from the file, latents by shift and scale.

Original names: encoder.down.N.block.M, encoder.mid.attn_1.q as 1x1 convolutions, decoder.up counted from the
output; diffusers' AutoencoderKL counts its up blocks from the latents and has Linear attention projections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from library.families.family import Part
from library.layout import Row, Shape, conv1x1, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The published VAEs all have 32 norm groups (ComfyUI and BFL hard-code it); it is not visible in any shape, so files of
# other sizes say theirs in the header metadata.
GROUPS, GROUPS_KEY = 32, "norm_num_groups"


def ldm_rows(ours: Mapping[str, Shape]) -> list[Row]:
    """The table for a model with these names: the number of levels decides how decoder blocks are counted."""
    levels = 1 + max(int(key.split(".")[2]) for key in ours if key.startswith("encoder.down_blocks."))
    rows = [row("quant_conv"), row("post_quant_conv")]
    for side in ("encoder", "decoder"):
        mid, theirs = f"{side}.mid_block", f"{side}.mid"
        rows += [row(f"{side}.conv_in"), row(f"{side}.conv_out"), row(f"{side}.norm_out", f"{side}.conv_norm_out")]
        rows += [row(f"{theirs}.block_{k + 1}", f"{mid}.resnets.{k}") for k in (0, 1)]
        rows.append(row(f"{theirs}.attn_1.norm", f"{mid}.attentions.0.group_norm"))
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            rows.append(row(f"{theirs}.attn_1.{a}", f"{mid}.attentions.0.{b}", op=conv1x1))
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


def recognise(shapes: Mapping[str, Shape], channels: int) -> str | None:
    """Files of this kind are told apart by their latent channels: 4 (SD, SDXL), 16 (SD3, Flux), 32 (Flux 2)."""
    latent = shapes.get("decoder.conv_in.weight", ())
    if len(latent) != 4 or latent[1] != channels:
        return None
    if "encoder.down.0.block.0.conv1.weight" in shapes and len(shapes["encoder.down.0.block.0.conv1.weight"]) == 4:
        return "ldm"
    down = shapes.get("encoder.down_blocks.0.resnets.0.conv1.weight")
    return "diffusers" if down is not None and len(down) == 4 else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' AutoencoderKL configuration, from the shapes of either layout."""
    pattern = (
        "encoder.down.{}.block.{}.conv1.weight" if layout == "ldm" else "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    )
    widths, blocks = [], 0
    while pattern.format(len(widths), 0) in shapes:
        widths.append(shapes[pattern.format(len(widths), 0)][0])
    while pattern.format(0, blocks) in shapes:
        blocks += 1
    groups = int(metadata.get(GROUPS_KEY) or math.gcd(GROUPS, *widths))
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": tuple(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": blocks,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": groups,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**configuration)


def part(title: str, channels: int) -> Part:
    """The VAE part of a family; the normalisation is the family's."""
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"ldm": ldm_rows, "diffusers": identity},
        recognise=partial(recognise, channels=channels),
        config=config,
        build=build,
        prefixes=("", "first_stage_model.", "vae."),
        diffusers_folder="vae",
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
