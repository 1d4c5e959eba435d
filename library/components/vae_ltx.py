"""LTX-Video's autoencoder (Lightricks, 2024-2025): 128 channels, 32x smaller, 8x in time, 8k + 1 frames.

Three versions: 0.9.0; 0.9.1, whose decoder is told a time and finishes the denoising; 0.9.5 and later, whose encoder
moves pixels into channels. The published single file holds the transformer and, under `vae.`, this model.

Original names are one flat list of blocks each for encoder and decoder; diffusers groups them. What a block is shows in
its keys. The encoder is causal and made eight frames at a time with what the convolutions remember: exact, in memory
that does not grow with the clip. The decoder looks into the future; beyond WHOLE pixels it is made in diffusers' tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import vae_ldm
from library.components.video import as_video, check_frames, pieces, remembering, with_past
from library.families.family import Part
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIME = 8  # frames of a latent frame after the first
PATCH = 4  # side of the patches of pixels that the encoder begins with; `patch_size` of the published configurations
WHOLE = 2**25  # pixels of all frames together; one activation of 128 channels is then 1 GiB in float32
# What the decoder of 0.9.1 and later is told, and the share of noise that is mixed into its latents; ComfyUI's and the
# published pipelines' `decode_timestep` and `decode_noise_scale`.
DECODE_TIME, DECODE_NOISE = 0.05, 0.025
CARRIED = tuple(
    f"per_channel_statistics.{name}" for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
)
STATISTICS = {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}


@dataclass(frozen=True)
class Block:
    """One entry of the original list under the name `at`: "stage" (residual blocks of one width, below `blocks`),
    "widen" (one residual block), "strided" (a convolution) or "shuffle" (one that moves pixels to or from channels)."""

    kind: str
    at: str
    blocks: str = ""

    def convolution(self, shapes: Mapping[str, Shape]) -> Shape:
        """Shape of its first convolution."""
        inner = {"stage": f".{self.blocks}.0.conv1.conv", "strided": ".conv", "shuffle": ".conv.conv"}
        return shapes[f"{self.at}{inner.get(self.kind, '.conv1.conv')}.weight"]

    def layers(self, shapes: Mapping[str, Shape]) -> int:
        count = 0
        while f"{self.at}.{self.blocks}.{count}.conv1.conv.weight" in shapes:
            count += 1
        return count


def _block(shapes: Mapping[str, Shape], at: str, blocks: str) -> Block | None:
    """What is under this name; None = nothing."""
    if f"{at}.{blocks}.0.conv1.conv.weight" in shapes:
        return Block("stage", at, blocks)
    for kind, key in (("shuffle", "conv.conv"), ("strided", "conv"), ("widen", "conv1.conv")):
        if f"{at}.{key}.weight" in shapes:
            return Block(kind, at)
    return None


def _original(shapes: Mapping[str, Shape], side: str) -> list[Block]:
    """The original list of `encoder` or `decoder`."""
    found: list[Block] = []
    name = "down_blocks" if side == "encoder" else "up_blocks"
    while block := _block(shapes, f"{side}.{name}.{len(found)}", "res_blocks"):
        found.append(block)
    return found


def _grouped(shapes: Mapping[str, Shape], side: str) -> list[Block]:
    """The same list from diffusers' names."""
    middle, found, level = Block("stage", f"{side}.mid_block", "resnets"), [], 0
    group = f"{side}.down_blocks" if side == "encoder" else f"{side}.up_blocks"
    order = ("", ".downsamplers.0", ".conv_out") if side == "encoder" else (".conv_in", ".upsamplers.0", "")
    while stage := _block(shapes, f"{group}.{level}", "resnets"):
        found += [stage if not end else _block(shapes, f"{group}.{level}{end}", "") for end in order]
        level += 1
    found = [block for block in found if block]
    return [*found, middle] if side == "encoder" else [middle, *found]


def original_rows(ours: Mapping[str, Shape]) -> list[Row]:
    """The table for a model with these names."""
    rows = [row(f"per_channel_statistics.{theirs}", name) for theirs, name in STATISTICS.items()]
    rows += [row(f"decoder.last_{name}", f"decoder.{name}") for name in ("time_embedder", "scale_shift_table")]
    rows.append(row("decoder.timestep_scale_multiplier"))
    for side, name in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        rows += [row(f"{side}.conv_in"), row(f"{side}.conv_out")]
        for n, block in enumerate(_grouped(ours, side)):
            theirs = f"{side}.{name}.{n}"
            if block.kind == "stage":
                rows.append(row(f"{theirs}.time_embedder", f"{block.at}.time_embedder"))
                for i in range(block.layers(ours)):
                    rows += _resnet(f"{theirs}.res_blocks.{i}", f"{block.at}.resnets.{i}")
            else:
                rows += _resnet(theirs, block.at) if block.kind == "widen" else [row(theirs, block.at)]
    return rows


def _resnet(theirs: str, ours: str) -> list[Row]:
    same = ("conv1", "conv2", "scale_shift_table", "per_channel_scale1", "per_channel_scale2")
    renamed = [
        row(f"{theirs}.norm3.norm", f"{ours}.norm3"),
        row(f"{theirs}.conv_shortcut", f"{ours}.conv_shortcut.conv"),
    ]
    return [row(f"{theirs}.{name}", f"{ours}.{name}") for name in same] + renamed


def version(shapes: Mapping[str, Shape]) -> str:
    """ "0.9.0", "0.9.1" or "0.9.5", of a file with either names; "" = not this model."""
    list_of = _original if "per_channel_statistics.mean-of-means" in shapes else _grouped
    if list_of is _grouped and "latents_mean" not in shapes:
        return ""
    encoder = list_of(shapes, "encoder")
    if not encoder or encoder[0].kind != "stage" or "encoder.conv_in.conv.weight" not in shapes:
        return ""
    if any(block.kind == "shuffle" for block in encoder):
        return "0.9.5"
    return "0.9.1" if "decoder.timestep_scale_multiplier" in shapes else "0.9.0"


def recognise(shapes: Mapping[str, Shape], versions: tuple[str, ...]) -> str | None:
    found = version(shapes)
    if not found or found not in versions:
        return None
    return "original" if "per_channel_statistics.mean-of-means" in shapes else "diffusers"


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, from the shapes of either layout."""
    list_of = _original if layout == "original" else _grouped
    return {
        "in_channels": shapes["encoder.conv_in.conv.weight"][1] // PATCH**2,
        "out_channels": shapes["decoder.conv_out.conv.weight"][0] // PATCH**2,
        "latent_channels": shapes["encoder.conv_out.conv.weight"][0] - 1,
        "patch_size": PATCH,
        "timestep_conditioning": "decoder.timestep_scale_multiplier" in shapes,
        "spatial_compression_ratio": 32,  # both published, of all versions
        "temporal_compression_ratio": TIME,
        **_encoder(shapes, list_of(shapes, "encoder")),
        **_decoder(shapes, list_of(shapes, "decoder")),
    }


def _encoder(shapes: Mapping[str, Shape], blocks: list[Block]) -> dict[str, Any]:
    """Stages from the pixels; each but the last is a level, with what follows it; the last is the middle."""
    stages = [block for block in blocks if block.kind == "stage"]
    widths = [stage.convolution(shapes)[0] for stage in stages]
    after = {block.at: then for block, then in zip(blocks, blocks[1:], strict=False) if block.kind == "stage"}
    follows = [after[stage.at] for stage in stages[:-1]]
    sizes = {
        "layers_per_block": tuple(stage.layers(shapes) for stage in stages),
        "spatio_temporal_scaling": tuple(then.kind in ("strided", "shuffle") for then in follows),
        "block_out_channels": tuple(widths[:-1]),
    }
    if not any(block.kind == "shuffle" for block in blocks):
        return sizes | {"down_block_types": ("LTXVideoDownBlock3D",) * len(follows)}
    # As many pixels become one as the convolution makes fewer channels than there are after it.
    kinds = {4: "spatial", 2: "temporal", 8: "spatiotemporal"}
    moved = [width // then.convolution(shapes)[0] for width, then in zip(widths[1:], follows, strict=True)]
    return sizes | {
        "block_out_channels": tuple(widths),
        "down_block_types": ("LTXVideo095DownBlock3D",) * len(follows),
        "downsample_type": tuple(kinds[n] for n in moved),
    }


def _decoder(shapes: Mapping[str, Shape], blocks: list[Block]) -> dict[str, Any]:
    """Stages from the latents; the first is the middle, each other a level with what precedes it. diffusers' lists run
    from the pixels. An upsampling that makes fewer channels than its 8 pixels need adds its input (0.9.1 and later)."""
    stages = [block for block in blocks if block.kind == "stage"]
    factors, last = [], 0
    for n, block in enumerate(blocks):
        if block.kind == "stage" and n:
            samplers = [one.convolution(shapes) for one in blocks[last:n] if one.kind == "shuffle"]
            factors.append(samplers[0][1] * 8 // samplers[0][0] if samplers else 0)
            last = n
    widths = [stage.convolution(shapes)[0] * max(n, 1) for stage, n in zip(stages[1:], factors, strict=True)]
    noisy = [f"{stage.at}.{stage.blocks}.0.per_channel_scale1" in shapes for stage in stages]
    return {
        "decoder_block_out_channels": tuple(widths[::-1]),
        "decoder_layers_per_block": tuple(stage.layers(shapes) for stage in stages[::-1]),
        "decoder_spatio_temporal_scaling": tuple(n > 0 for n in factors[::-1]),
        "decoder_inject_noise": tuple(noisy[::-1]),
        "upsample_residual": tuple(n > 1 for n in factors[::-1]),
        "upsample_factor": tuple(max(n, 1) for n in factors[::-1]),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    return vae_ldm.class_of("AutoencoderKLLTXVideo")(**configuration)


VERSIONS = ("0.9.0", "0.9.1", "0.9.5")


def part(title: str = "an LTX-Video VAE", versions: tuple[str, ...] = VERSIONS) -> Part:
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"original": original_rows, "diffusers": vae_ldm.identity},
        recognise=partial(recognise, versions=versions),
        config=config,
        build=build,
        prefixes=("", "vae.", "first_stage_model."),
        carried=CARRIED,
        diffusers_folder="vae",
    )


# ---------------------------------------------------------------- layers that remember


def _convolve(module: torch.nn.Module, memory: dict[str, Tensor], x: Tensor) -> Tensor:
    return module.conv(with_past(memory, x, module.kernel_size[0], module.conv.stride[0]))


def _downsample(module: torch.nn.Module, memory: dict[str, Tensor], x: Tensor) -> Tensor:
    """Pixels into channels; the first frame is doubled where each two frames become one."""
    if not memory:
        memory["begun"] = x[:0]
        return type(module).forward(module, x)

    def moved(x: Tensor) -> Tensor:
        t, h, w = module.stride
        x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)

    return moved(module.conv(x)) + moved(x).unflatten(1, (-1, module.group_size)).mean(dim=2)


def _statistics(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    return tuple(values.float().view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))


def encode(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Clips [B,3,8k+1,H,W] -> [B,128,k+1,H/32,W/32], pictures [B,3,H,W] -> [B,128,H/32,W/32], pixels in -1..1; float32.

    Normalised by the file's mean and deviation of each channel, of the posterior's mean. Raises ConfigError for another
    number of frames.
    """
    import torch
    from diffusers.models.autoencoders import autoencoder_kl_ltx as theirs

    video, still = as_video(pixels)
    check_frames(video, TIME, "LTX-Video's VAE")
    layers = {theirs.LTXVideoCausalConv3d: _convolve, theirs.LTXVideoDownsampler3d: _downsample}
    with remembering(vae.encoder, layers):
        made = torch.cat([vae.encoder(piece) for piece in pieces(video.to(vae.dtype), TIME)], dim=2)
    mean, deviation = _statistics(vae)
    latents = (made.chunk(2, dim=1)[0].float() - mean) / deviation
    return latents.squeeze(2) if still else latents


def decode(
    vae: torch.nn.Module, latents: Tensor, time: float = DECODE_TIME, noise: float = DECODE_NOISE, seed: int = 0
) -> Tensor:
    """Latents [B,128,f,h,w] or [B,128,h,w] -> pixels [B,3,8(f-1)+1,32h,32w] or [B,3,32h,32w] in about -1..1, float32.

    A decoder that finishes the denoising is told `time` (0 = clean) after the share `noise` of noise is mixed into its
    latents; what it draws, there and in its layers, follows from `seed` and leaves the caller's generators alone.
    Convolutions pad with zeros, as Lightricks' code and diffusers do; ComfyUI reflects.
    """
    import torch

    video, still = as_video(latents.float())
    frames, height, width = video.shape[2:]
    ratio = vae.spatial_compression_ratio
    vae.use_tiling = vae.use_framewise_decoding = (TIME * (frames - 1) + 1) * height * width * ratio**2 > WHOLE
    with torch.random.fork_rng([video.device] if video.device.type == "cuda" else []):
        torch.manual_seed(seed)
        told = None
        if vae.config.timestep_conditioning:
            told = torch.full((len(video),), time, device=video.device, dtype=vae.dtype)
            if noise:
                video = (1 - noise) * video + noise * torch.randn(video.shape).to(video.device)
        mean, deviation = _statistics(vae)
        pixels = vae.decode((video * deviation + mean).to(vae.dtype), told).sample.float()
    return pixels.squeeze(2) if still else pixels
