"""The Cosmos 1.0 tokenizer CV8x8x8 (NVIDIA, 2025): 16 channels, 8x smaller in space and time, causal, 8k + 1 frames.

It has no posterior: what the encoder gives is the latent. It is normalised by a mean and a deviation for each channel
AND each of 16 latent frames, which the file holds (latent_mean, latent_std), and scaled by one half.

A clip is made in one pass, exactly: the wavelets that it begins with make 64 pixels one position, so that all
activations together are smaller than the clip's in the other autoencoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components.vae_ldm import class_of, count, identity
from library.components.video import as_video, check_frames
from library.families.family import Part
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALE = 0.5  # sigma_data of the Cosmos 1.0 diffusion models
TIME = 8  # frames of a latent frame after the first
PATCH = 4  # side of the cubes of pixels that the wavelets fold; `patch_size` of the published configuration
# Constants that the published file holds as tensors and every implementation builds itself.
CARRIED = tuple(
    f"{side}.{name}"
    for side in ("encoder.patcher3d", "decoder.unpatcher3d")
    for name in ("wavelets", "_arange", "patch_size_buffer")
)
PROJECTION = {"0.conv3d": "conv_s", "1.conv3d": "conv_t"}
ATTENTION = {
    "norm": "norm",
    "q.conv3d": "to_q",
    "k.conv3d": "to_k",
    "v.conv3d": "to_v",
    "proj_out.conv3d": "to_out.0",
}
RESNET = {
    "norm1": "norm1",
    "norm2": "norm2",
    "nin_shortcut.conv3d": "conv_shortcut",
    **{f"conv{k}.{a}": f"conv{k}.{b}" for k in (1, 2) for a, b in PROJECTION.items()},
}


def _named(theirs: str, ours: str, names: Mapping[str, str]) -> list[Row]:
    return [row(f"{theirs}.{a}", f"{ours}.{b}") for a, b in names.items()]


def original_rows(ours: Mapping[str, Shape]) -> list[Row]:
    """The table for a model with these names; the original counts the decoder's levels from the pixels."""
    rows = [row("latent_mean"), row("latent_std")]
    rows += [row(f"{name}.conv3d", name) for name in ("quant_conv", "post_quant_conv")]
    levels = count(ours, "encoder.down_blocks.{}.resnets.0.norm1.norm.weight")
    for side, direction in (("encoder", "down"), ("decoder", "up")):
        middle = f"{side}.mid_block"
        for name in ("conv_in", "conv_out"):
            rows += _named(f"{side}.{name}", f"{side}.{name}", PROJECTION)
        rows.append(row(f"{side}.norm_out"))
        for k in (0, 1):
            rows += _named(f"{side}.mid.block_{k + 1}", f"{middle}.resnets.{k}", RESNET)
            rows += _named(f"{side}.mid.attn_1.{k}", f"{middle}.{('attentions', 'temp_attentions')[k]}.0", ATTENTION)
        for level in range(levels):
            theirs = f"{side}.{direction}.{level}"
            block = f"{side}.{direction}_blocks.{level if side == 'encoder' else levels - 1 - level}"
            for i in range(count(ours, f"{block}.resnets.{{}}.norm1.norm.weight")):
                rows += _named(f"{theirs}.block.{i}", f"{block}.resnets.{i}", RESNET)
            sampler = {f"conv{k}.conv3d": f"conv{k}" for k in (1, 2, 3)}
            rows += _named(f"{theirs}.{direction}sample", f"{block}.{direction}samplers.0", sampler)
    return rows


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Convolutions are split into one over space and one over time."""
    if "encoder.conv_in.0.conv3d.weight" in shapes and "encoder.mid.attn_1.1.q.conv3d.weight" in shapes:
        return "original"
    known = ("encoder.conv_in.conv_s.weight", "encoder.mid_block.temp_attentions.0.to_q.weight")
    return "diffusers" if all(key in shapes for key in known) else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, from the shapes of either layout. No level has attention, as in the published model."""
    original = layout == "original"
    first, down, time = (
        ("encoder.conv_in.0.conv3d.weight", "encoder.down.{}.block.{}.conv1.0.conv3d.weight", "1.conv3d.weight")
        if original
        else ("encoder.conv_in.conv_s.weight", "encoder.down_blocks.{}.resnets.{}.conv1.conv_s.weight", "conv_t.weight")
    )
    up = down.replace("encoder.down", "decoder.up")
    sampler = "encoder.down.{}.downsample" if original else "encoder.down_blocks.{}.downsamplers.0"
    convolution = ".conv{}.conv3d.weight" if original else ".conv{}.weight"
    levels, end = range(count(shapes, down.format("{}", 0))), convolution.format
    widths = [shapes[first][0], *(shapes[down.format(level, 0)][0] for level in levels)]
    # The original counts the decoder's levels from the pixels, as diffusers' list of widths runs; its blocks do not.
    outer = [shapes[up.format(level, 0)][0] for level in (levels if original else reversed(levels))]
    return {
        "in_channels": shapes[first][1] // PATCH**3,
        "out_channels": shapes[f"decoder.conv_out.{time}"][0] // PATCH**3,
        "latent_channels": shapes[f"encoder.conv_out.{time}"][0],
        "encoder_block_out_channels": tuple(widths),
        "decode_block_out_channels": (*outer, shapes[f"decoder.conv_in.{time}"][0]),
        "attention_resolutions": (),
        "num_layers": count(shapes, down.format(0, "{}")),
        "patch_size": PATCH,
        "spatial_compression_ratio": PATCH * 2 ** sum(sampler.format(level) + end(1) in shapes for level in levels),
        "temporal_compression_ratio": PATCH * 2 ** sum(sampler.format(level) + end(2) in shapes for level in levels),
        "statistics": shapes["latent_mean"][0] if original else 0,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    """diffusers' class; the statistics of the file, of which diffusers keeps a copy in its code, become buffers."""
    import torch

    rest = {key: value for key, value in configuration.items() if key != "statistics"}
    model = class_of("AutoencoderKLCosmos")(**rest)
    if configuration["statistics"]:
        for name in ("latent_mean", "latent_std"):
            model.register_buffer(name, torch.ones(configuration["statistics"]))
    return model


def finish(model: torch.nn.Module, device: Any) -> None:
    """The wavelets, which no file needs to hold."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosPatchEmbed3d, CosmosUnpatcher3d

    for module in model.modules():
        if isinstance(module, (CosmosPatchEmbed3d, CosmosUnpatcher3d)):
            module.wavelets = torch.tensor([0.5, 0.5], device=device).sqrt()  # Haar's
            module._arange = torch.arange(2, device=device)


def part(title: str = "a Cosmos 1.0 VAE") -> Part:
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"original": original_rows, "diffusers": identity},
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "vae.", "first_stage_model."),
        carried=CARRIED,
        diffusers_folder="vae",
        finish=finish,
    )


def _statistics(vae: torch.nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel and frame, [1,C,f,1,1] float32; beyond the last known frame they repeat, as
    in ComfyUI. A diffusers folder has them in its configuration; CV8x8x8-1.0's are taken."""
    import torch

    channels, frames = latents.shape[1:3]
    known = "latent_mean" in vae._buffers
    pair = (vae.latent_mean, vae.latent_std) if known else (vae.config.latents_mean, vae.config.latents_std)
    tables = (torch.as_tensor(values).float().to(latents.device).view(channels, -1) for values in pair)
    return tuple(t.repeat(1, -(-frames // t.shape[1]))[:, :frames].view(1, channels, frames, 1, 1) for t in tables)


def encode(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Clips [B,3,8k+1,H,W] -> [B,16,k+1,H/8,W/8], pictures [B,3,H,W] -> [B,16,H/8,W/8], pixels in -1..1; float32.

    Raises ConfigError for another number of frames.
    """
    video, still = as_video(pixels)
    check_frames(video, TIME, "the Cosmos VAE")
    latents = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    mean, deviation = _statistics(vae, latents)
    latents = (latents - mean) / deviation * SCALE
    return latents.squeeze(2) if still else latents


def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Latents [B,16,f,h,w] or [B,16,h,w] -> pixels [B,3,8(f-1)+1,8h,8w] or [B,3,8h,8w] in about -1..1, float32."""
    video, still = as_video(latents)
    mean, deviation = _statistics(vae, video)
    pixels = vae.decode((video.float() / SCALE * deviation + mean).to(vae.dtype)).sample.float()
    return pixels.squeeze(2) if still else pixels
