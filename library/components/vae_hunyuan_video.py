"""HunyuanVideo's autoencoder (Tencent, 2024): 16 channels, 8x smaller, 4x in time, causal, 4k + 1 frames.

Tencent's file has diffusers' names; ComfyUI's repack has those of an LDM autoencoder with 3-d convolutions.

Its norms take their statistics over the whole clip, so that no cutting of a clip is exact. Up to WHOLE pixels a clip
is made in one pass, exactly; a larger one in the overlapping, blended tiles of space and time (256 x 256 pixels, 16
frames) that diffusers' pipelines use. Which of the two depends on the clip's size alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import vae_ldm
from library.components.video import as_video, check_frames
from library.families.family import Part
from library.layout import Op, Row, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALE = 0.476986  # `scaling_factor` of Tencent's published VAE configuration; there is no shift
TIME = 4  # frames of a latent frame after the first
WHOLE = 2**21  # pixels of all frames together; one activation of 128 channels is then 1 GiB in float32

conv1x1x1 = Op(
    "conv1x1x1",
    lambda t: t[:, :, None, None, None] if t.ndim == 2 else t,
    lambda t, shape: t.reshape(shape),
    lambda shape: (*shape, 1, 1, 1) if len(shape) == 2 else shape,
)


def comfy_rows(ours: Mapping[str, Shape]) -> list[Row]:
    return vae_ldm.ldm_rows(ours, conv1x1x1)


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Causal convolutions are `conv.weight` below their name; group norms have a weight, HunyuanVideo-1.5's a gamma."""
    for layout, block in (("comfy", "encoder.down.0.block.0"), ("diffusers", "encoder.down_blocks.0.resnets.0")):
        if len(shapes.get(f"{block}.conv1.conv.weight", ())) == 5 and f"{block}.norm1.weight" in shapes:
            return layout
    return None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, from the shapes of either layout. Both compressions are the published ones."""
    sizes = vae_ldm.level_sizes(shapes, metadata)
    levels = len(sizes["block_out_channels"])
    return sizes | {
        "in_channels": shapes["encoder.conv_in.conv.weight"][1],
        "out_channels": shapes["decoder.conv_out.conv.weight"][0],
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        "down_block_types": ("HunyuanVideoDownBlock3D",) * levels,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * levels,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": TIME,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    model = vae_ldm.class_of("AutoencoderKLHunyuanVideo")(**configuration)
    for side in (model.encoder, model.decoder):
        side.mid_block.forward = partial(_middle, side.mid_block)
    return model


def part(title: str = "a HunyuanVideo VAE") -> Part:
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"comfy": comfy_rows, "diffusers": vae_ldm.identity},
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "vae.", "first_stage_model."),
        diffusers_folder="vae",
    )


def _middle(block: torch.nn.Module, x: Tensor) -> Tensor:
    """The middle block as diffusers computes it, without its mask of every position against every other."""
    x = block.resnets[0](x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = resnet(x + _attend(attention, x))
    return x


def _attend(attention: torch.nn.Module, x: Tensor) -> Tensor:
    """Attention over [B,C,F,H,W] in which a frame sees itself and the frames before it."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    frames, height, width = x.shape[2:]
    tokens = attention.group_norm(x.flatten(2)).transpose(1, 2)
    q, k, v = (
        project(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    area, seen = height * width, []
    for frame in range(frames):
        until = (frame + 1) * area
        query = q[:, :, frame * area : until]
        seen.append(scaled_dot_product_attention(query, k[:, :, :until], v[:, :, :until]))
    out = attention.to_out[0](torch.cat(seen, dim=2).transpose(1, 2).flatten(2))
    return out.transpose(1, 2).unflatten(2, (frames, height, width))


def _tile(vae: torch.nn.Module, pixels: int) -> None:
    """One pass for a clip of that many pixels, or tiles; diffusers' own default would cut time at 16 frames."""
    vae.use_tiling = vae.use_framewise_encoding = vae.use_framewise_decoding = pixels > WHOLE


def encode(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Clips [B,3,4k+1,H,W] -> [B,16,k+1,H/8,W/8], pictures [B,3,H,W] -> [B,16,H/8,W/8], pixels in -1..1; float32.

    The posterior's mean, scaled. Raises ConfigError for another number of frames.
    """
    video, still = as_video(pixels)
    check_frames(video, TIME, "HunyuanVideo's VAE")
    _tile(vae, video.shape[2:].numel())
    latents = vae.encode(video.to(vae.dtype)).latent_dist.mean.float() * SCALE
    return latents.squeeze(2) if still else latents


def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Latents [B,16,f,h,w] or [B,16,h,w] -> pixels [B,3,4(f-1)+1,8h,8w] or [B,3,8h,8w] in about -1..1, float32."""
    video, still = as_video(latents)
    frames, height, width = video.shape[2:]
    _tile(vae, (TIME * (frames - 1) + 1) * height * width * vae.spatial_compression_ratio**2)
    pixels = vae.decode((video / SCALE).to(vae.dtype)).sample.float()
    return pixels.squeeze(2) if still else pixels
