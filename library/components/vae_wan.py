"""The Wan 2.1 autoencoder, which is Qwen-Image's too, and Wan 2.2's of 48 channels: causal in time, 4k + 1 frames.

Original names: encoder.downsamples and decoder.upsamples are flat lists in 2.1 and lists of levels in 2.2, a residual
block is a numbered sequence. A latent frame is made from the first picture alone, each further one from four more with
what the convolutions remember of the frames before, so that a long video needs no more memory than four frames, and
the result is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import chunks, vae_ldm
from library.components.sizes import stated
from library.components.video import as_video, check_frames
from library.errors import ConfigError
from library.families.family import Part
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Mean and deviation of each latent channel, published in Wan's own code: `Wan2_1_VAE` (wan/modules/vae2_1.py; the same
# sixteen are `latents_mean`, `latents_std` of Qwen-Image's VAE configuration) and `Wan2_2_VAE` (vae2_2.py).
STATISTICS = {
    16: (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
    48: (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
         0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
         -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}  # fmt: skip
MEAN_KEY, STD_KEY = "latents_mean", "latents_std"  # header metadata (JSON lists) of a file with other channels
TIME = 4  # frames of a latent frame after the first; `vae_stride` of Wan's configurations
PATCH = 2  # Wan 2.2 encodes 2x2 patches of pixels

RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
RESAMPLE = {"resample": "resample", "time_conv": "time_conv"}
# Names of a residual block's first convolution and of a level's resampling in the encoder: flat (2.1), by level (2.2).
FLAT = {
    "wan": ("encoder.downsamples.{n}.residual.2", "encoder.downsamples.{n}"),
    "diffusers": ("encoder.down_blocks.{n}.conv1", "encoder.down_blocks.{n}"),
}
NESTED = {
    "wan": (
        "encoder.downsamples.{level}.downsamples.{block}.residual.2",
        "encoder.downsamples.{level}.downsamples.{block}",
    ),
    "diffusers": ("encoder.down_blocks.{level}.resnets.{block}.conv1", "encoder.down_blocks.{level}.downsampler"),
}


def _named(theirs: str, ours: str, names: Mapping[str, str]) -> list[Row]:
    return [row(f"{theirs}.{a}", f"{ours}.{b}") for a, b in names.items()]


def _ends(side: str) -> list[Row]:
    """What both versions share: first and last convolution, the middle."""
    middle = f"{side}.mid_block"
    return [
        row(f"{side}.conv1", f"{side}.conv_in"),
        row(f"{side}.head.0", f"{side}.norm_out"),
        row(f"{side}.head.2", f"{side}.conv_out"),
        *_named(f"{side}.middle.0", f"{middle}.resnets.0", RESNET),
        row(f"{side}.middle.1", f"{middle}.attentions.0"),
        *_named(f"{side}.middle.2", f"{middle}.resnets.1", RESNET),
    ]


def _numbers(ours: Mapping[str, Shape], prefix: str) -> list[int]:
    return sorted({int(key.removeprefix(prefix).split(".")[0]) for key in ours if key.startswith(prefix)})


def wan_rows(ours: Mapping[str, Shape]) -> list[Row]:
    """The table of either version for a model with these names."""
    rows = [row("conv1", "quant_conv"), row("conv2", "post_quant_conv"), *_ends("encoder"), *_ends("decoder")]
    nested = any(key.startswith("encoder.down_blocks.0.resnets.") for key in ours)
    return rows + (_nested_rows(ours) if nested else _flat_rows(ours))


def _flat_rows(ours: Mapping[str, Shape]) -> list[Row]:
    rows, n = [], 0
    for i in _numbers(ours, "encoder.down_blocks."):
        rows += _named(f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}", RESNET | RESAMPLE)
    for level in _numbers(ours, "decoder.up_blocks."):
        up = f"decoder.up_blocks.{level}"
        for block in _numbers(ours, f"{up}.resnets."):
            rows += _named(f"decoder.upsamples.{n}", f"{up}.resnets.{block}", RESNET)
            n += 1
        rows += _named(f"decoder.upsamples.{n}", f"{up}.upsamplers.0", RESAMPLE)
        n += len(_numbers(ours, f"{up}.upsamplers."))
    return rows


def _nested_rows(ours: Mapping[str, Shape]) -> list[Row]:
    rows = []
    for theirs, inner, ours_, sampler in (
        ("encoder.downsamples", "downsamples", "encoder.down_blocks", "downsampler"),
        ("decoder.upsamples", "upsamples", "decoder.up_blocks", "upsampler"),
    ):
        for level in _numbers(ours, f"{ours_}."):
            blocks = _numbers(ours, f"{ours_}.{level}.resnets.")
            for block in blocks:
                rows += _named(f"{theirs}.{level}.{inner}.{block}", f"{ours_}.{level}.resnets.{block}", RESNET)
            rows += _named(f"{theirs}.{level}.{inner}.{len(blocks)}", f"{ours_}.{level}.{sampler}", RESAMPLE)
    return rows


def recognise(shapes: Mapping[str, Shape], nested: bool) -> str | None:
    """2.2 nests its levels. Norms that have only a `gamma` are not HunyuanVideo's in diffusers' names."""
    for layout, (convolution, _) in (NESTED if nested else FLAT).items():
        first = convolution.format(n=0, level=0, block=0)
        norm = "encoder.head.0.gamma" if layout == "wan" else "encoder.norm_out.gamma"
        if len(shapes.get(f"{first}.weight", ())) == 5 and norm in shapes:
            return layout
    return None


def _levels(shapes: Mapping[str, Shape], layout: str, nested: bool) -> tuple[list[int], list[bool], int]:
    """Width of each level, whether it halves time (all but the last), residual blocks in one."""
    convolution, sampler = (NESTED if nested else FLAT)[layout]
    widths, halves, count, n, block = [], [], 0, 0, 0
    while True:
        at = {"n": n, "level": len(halves), "block": block}
        if f"{convolution.format(**at)}.weight" in shapes:
            widths[len(halves) :] = [shapes[f"{convolution.format(**at)}.weight"][0]]
            block += 1
            count = max(count, block)
        elif f"{sampler.format(**at)}.resample.1.weight" in shapes:
            halves.append(f"{sampler.format(**at)}.time_conv.weight" in shapes)
            block = 0
        else:
            return widths, halves, count
        n += 1


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str, nested: bool) -> dict[str, Any]:
    """diffusers' configuration, from the shapes of either layout.

    Raises ConfigError if the latent channels are those of no published model and the header does not tell their
    statistics (JSON lists `latents_mean` and `latents_std`).
    """
    widths, halves, blocks = _levels(shapes, layout, nested)
    first, last = ("conv1", "head.2") if layout == "wan" else ("conv_in", "conv_out")
    channels = shapes["conv2.weight" if layout == "wan" else "post_quant_conv.weight"][0]
    mean, deviation = statistics(channels, metadata)
    base = shapes[f"encoder.{first}.weight"][0]
    return {
        "base_dim": base,
        "decoder_base_dim": shapes[f"decoder.{last}.weight"][1] * base // widths[0],
        "z_dim": channels,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": blocks,
        "temperal_downsample": halves,
        "in_channels": shapes[f"encoder.{first}.weight"][1],
        "out_channels": shapes[f"decoder.{last}.weight"][0],
        "latents_mean": list(mean),
        "latents_std": list(deviation),
        "is_residual": nested,
        "patch_size": PATCH if nested else None,
        "scale_factor_spatial": 2 ** len(halves) * (PATCH if nested else 1),
        "scale_factor_temporal": 2 ** sum(halves),
    }


def statistics(channels: int, metadata: Mapping[str, str]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the latents, from the header or the published table."""
    if MEAN_KEY in metadata and STD_KEY in metadata:
        mean, deviation = stated(metadata, MEAN_KEY, None), stated(metadata, STD_KEY, None)
    else:
        mean, deviation = STATISTICS.get(channels, ((), ()))
    if not len(mean) == len(deviation) == channels:
        raise ConfigError(
            f"the VAE has {channels} latent channels, whose mean and deviation are not known (16 and 48 are); "
            f"state them in its header metadata as JSON lists '{MEAN_KEY}' and '{STD_KEY}'"
        )
    return list(mean), list(deviation)


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    return vae_ldm.class_of("AutoencoderKLWan")(**configuration)


def _part(title: str, nested: bool) -> Part:
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"wan": wan_rows, "diffusers": vae_ldm.identity},
        recognise=partial(recognise, nested=nested),
        config=partial(config, nested=nested),
        build=build,
        prefixes=("", "vae.", "first_stage_model."),
        diffusers_folder="vae",
    )


def part(title: str = "a Wan 2.1 or Qwen-Image VAE") -> Part:
    """16 channels, 8x smaller: Wan 2.1, Wan 2.2 A14B, Qwen-Image, Cosmos-Predict2, Anima. diffusers' Qwen-Image class
    has the same names and computes the same; a VAE of pictures with transparency has four colour channels."""
    return _part(title, nested=False)


def part22(title: str = "a Wan 2.2 VAE (48 channels)") -> Part:
    """48 channels, 16x smaller: Wan 2.2 TI2V-5B."""
    return _part(title, nested=True)


def _statistics(vae: torch.nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    pair = (torch.tensor(values, dtype=torch.float32) for values in (vae.config.latents_mean, vae.config.latents_std))
    return tuple(values.to(like.device).view(1, -1, 1, 1, 1) for values in pair)


def encode(vae: torch.nn.Module, pixels: Tensor, chunk: int = 0) -> Tensor:
    """Pictures [B,3,H,W] -> [B,C,h,w], videos [B,3,4k+1,H,W] -> [B,C,k+1,h,w], pixels in -1..1; float32.

    Normalised by the channels' mean and deviation, of the posterior's mean. `chunk` > 0 convolves at most that many
    rows at a time. Raises ConfigError for another number of frames, of which the model would drop the last ones
    without a word.
    """
    video, still = as_video(pixels)
    check_frames(video, TIME, "Wan's VAE")
    with chunks.convolutions(vae, chunk):
        latents = vae.encode(video.to(vae.dtype)).latent_dist.mean.float()
    mean, deviation = _statistics(vae, latents)
    latents = (latents - mean) / deviation
    return latents.squeeze(2) if still else latents


def decode(vae: torch.nn.Module, latents: Tensor, chunk: int = 0) -> Tensor:
    """Normalised latents [B,C,h,w] or [B,C,f,h,w] -> pixels [B,3,H,W] or [B,3,4(f-1)+1,H,W], cut to -1..1, float32."""
    video, still = as_video(latents)
    mean, deviation = _statistics(vae, video)
    with chunks.convolutions(vae, chunk):
        pixels = vae.decode((video.float() * deviation + mean).to(vae.dtype)).sample.float()
    return pixels.squeeze(2) if still else pixels
