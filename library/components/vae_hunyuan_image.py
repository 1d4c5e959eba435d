"""HunyuanImage-2.1's autoencoder (Tencent, 2025): 32x smaller latents of 64 channels.

Original names follow the LDM autoencoder, but a level of the decoder is counted from the latents, and down- and
upsampling move pixels into channels. diffusers flattens the blocks of all levels into one list. Tencent's own
checkpoint holds the convolutions as 3-d ones over a single frame; ComfyUI's file is 2-d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import chunks, vae_ldm
from library.families.family import Part
from library.layout import Op, Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALE = 0.75289  # `scaling_factor` of Tencent's published VAE configuration; there is no shift
TILE = 384  # side from which diffusers' tiling would begin (`sample_size` of the published configuration); not used

one_frame = Op(  # a 2-d convolution that the file holds as a 3-d one over one frame
    "one_frame",
    lambda t: t.unsqueeze(2) if t.ndim == 4 else t,
    lambda t, shape: t.reshape(shape),
    lambda shape: (*shape[:2], 1, *shape[2:]) if len(shape) == 4 else shape,
)
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "proj"}


def comfy_rows(ours: Mapping[str, Shape], op: Op | None = None) -> list[Row]:
    """The table for a model with these names; which of its flat blocks resample tells where a level ends."""
    rows = []
    for side, samplers in (("encoder", ("down", "downsample")), ("decoder", ("up", "upsample"))):
        rows += [row(f"{side}.{name}", op=op) for name in ("conv_in", "norm_out", "conv_out")]
        rows += _resnet(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", op)
        rows += _resnet(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", op)
        attention = f"{side}.mid_block.attentions.0"
        rows += [row(f"{side}.mid.attn_1.{a}", f"{attention}.{b}", op=op) for a, b in ATTENTION.items()]
        level = block = 0
        for i in range(_count(ours, f"{side}.{samplers[0]}_blocks.")):
            flat = f"{side}.{samplers[0]}_blocks.{i}"
            if f"{flat}.conv.weight" in ours:
                rows.append(row(f"{side}.{samplers[0]}.{level}.{samplers[1]}", flat, op=op))
                level, block = level + 1, 0
            else:
                rows += _resnet(f"{side}.{samplers[0]}.{level}.block.{block}", flat, op)
                block += 1
    return rows


def tencent_rows(ours: Mapping[str, Shape]) -> list[Row]:
    return comfy_rows(ours, one_frame)


def _resnet(theirs: str, ours: str, op: Op | None) -> list[Row]:
    return [row(f"{theirs}.{a}", f"{ours}.{b}", op=op) for a, b in RESNET.items()]


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in shapes if key.startswith(prefix))


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """The first level of the decoder upsamples; in an LDM autoencoder it is the last, full-sized one."""
    conv = shapes.get("encoder.down.0.block.0.conv1.weight", ())
    if conv and "decoder.up.0.upsample.conv.weight" in shapes:
        # HunyuanVideo-1.5's names differ by ".conv" after every convolution.
        return "comfy" if len(conv) == 4 else "tencent"
    return "diffusers" if len(shapes.get("encoder.down_blocks.0.conv1.weight", ())) == 4 else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, from the shapes of any layout."""
    widths: list[int] = []
    if layout == "diffusers":
        blocks, level = 0, 0
        for i in range(_count(shapes, "encoder.down_blocks.")):
            if f"encoder.down_blocks.{i}.conv.weight" in shapes:
                level += 1
                continue
            blocks += level == 0
            widths[level:] = [shapes[f"encoder.down_blocks.{i}.conv1.weight"][0]]
    else:
        while f"encoder.down.{len(widths)}.block.0.conv1.weight" in shapes:
            widths.append(shapes[f"encoder.down.{len(widths)}.block.0.conv1.weight"][0])
        blocks = _count(shapes, "encoder.down.0.block.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "spatial_compression_ratio": 2 ** (len(widths) - 1),  # every level but the last halves
        "sample_size": TILE,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    return vae_ldm.class_of("AutoencoderKLHunyuanImage")(**configuration)


def part(title: str = "a HunyuanImage-2.1 VAE") -> Part:
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"comfy": comfy_rows, "tencent": tencent_rows, "diffusers": vae_ldm.identity},
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "vae.", "first_stage_model."),
        diffusers_folder="vae",
    )


def encode(vae: torch.nn.Module, pixels: Tensor, chunk: int = 0) -> Tensor:
    """[B,3,H,W] in -1..1 -> normalised latents [B,64,H/32,W/32] float32: the posterior's mean.

    `chunk` > 0 convolves at most that many rows at a time (`library.components.chunks`), the same to rounding.
    """
    with chunks.convolutions(vae, chunk):
        return vae.encode(pixels.to(vae.dtype)).latent_dist.mean.float() * SCALE


def decode(vae: torch.nn.Module, latents: Tensor, chunk: int = 0) -> Tensor:
    """Normalised latents [B,64,h,w] -> [B,3,32h,32w] in about -1..1, float32. `chunk` as for `encode`."""
    with chunks.convolutions(vae, chunk):
        return vae.decode((latents / SCALE).to(vae.dtype)).sample.float()
