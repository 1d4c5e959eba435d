"""HunyuanVideo-1.5's autoencoder (Tencent, 2025): 32 channels, 16x smaller, 4x in time, causal, 4k + 1 frames.

Original names are an LDM autoencoder's with `conv.weight` below each causal convolution; a level of the decoder is
counted from the latents. Everything in it looks at one frame or at frames before it, so that a video is made four
frames at a time with what the layers remember, exactly, in memory that grows with its length only by the keys and
values of the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components.vae_ldm import class_of, count, identity
from library.components.video import as_video, check_frames, pieces, remembering, with_past
from library.families.family import Part
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALE = 1.03682  # `scaling_factor` of Tencent's published VAE configuration; there is no shift
TIME = 4  # frames of a latent frame after the first
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "proj_out"}


def comfy_rows(ours: Mapping[str, Shape]) -> list[Row]:
    rows = []
    for side, direction in (("encoder", "down"), ("decoder", "up")):
        middle, blocks = f"{side}.mid_block", f"{side}.{direction}_blocks"
        rows += [row(f"{side}.{name}") for name in ("conv_in", "norm_out", "conv_out")]
        rows += [row(f"{side}.mid.block_{k + 1}", f"{middle}.resnets.{k}") for k in (0, 1)]
        rows += [row(f"{side}.mid.attn_1.{a}", f"{middle}.attentions.0.{b}") for a, b in ATTENTION.items()]
        for level in range(count(ours, f"{blocks}.{{}}.resnets.0.norm1.gamma")):
            for i in range(count(ours, f"{blocks}.{level}.resnets.{{}}.norm1.gamma")):
                theirs, block = f"{side}.{direction}.{level}.block.{i}", f"{blocks}.{level}.resnets.{i}"
                rows += [row(f"{theirs}.{a}", f"{block}.{b}") for a, b in RESNET.items()]
            rows.append(row(f"{side}.{direction}.{level}.{direction}sample", f"{blocks}.{level}.{direction}samplers.0"))
    return rows


NAMES = {  # of a block of the encoder, of a level's downsampling
    "comfy": ("encoder.down.{}.block.{}", "encoder.down.{}.downsample"),
    "diffusers": ("encoder.down_blocks.{}.resnets.{}", "encoder.down_blocks.{}.downsamplers.0"),
}


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Causal convolutions as HunyuanVideo's, with norms that have only a gamma."""
    for layout, (block, _) in NAMES.items():
        first = block.format(0, 0)
        if f"{first}.norm1.gamma" in shapes and len(shapes.get(f"{first}.conv1.conv.weight", ())) == 5:
            return layout
    return None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, from the shapes of either layout. A level that halves time moves 8 pixels, not 4, into
    channels, which its convolution's width shows."""
    block, sampler = NAMES[layout]
    levels = count(shapes, block.format("{}", 0) + ".norm1.gamma")
    widths = [shapes[f"{block.format(level, 0)}.conv1.conv.weight"][0] for level in range(levels)]
    made = [shapes[f"{sampler.format(level)}.conv.conv.weight"][0] for level in range(levels - 1)]
    return {
        "in_channels": shapes["encoder.conv_in.conv.weight"][1],
        "out_channels": shapes["decoder.conv_out.conv.weight"][0],
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        "block_out_channels": tuple(widths),
        "layers_per_block": count(shapes, block.format(0, "{}") + ".norm1.gamma"),
        "spatial_compression_ratio": 2 ** len(made),
        "temporal_compression_ratio": 2 ** sum(width == 8 * n for width, n in zip(widths[1:], made, strict=True)),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    return class_of("AutoencoderKLHunyuanVideo15")(**configuration)


def part(title: str = "a HunyuanVideo-1.5 VAE") -> Part:
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"comfy": comfy_rows, "diffusers": identity},
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "vae.", "first_stage_model."),
        diffusers_folder="vae",
    )


# ---------------------------------------------------------------- layers that remember


def _convolve(module: torch.nn.Module, memory: dict[str, Tensor], x: Tensor) -> Tensor:
    """The causal convolution: edges repeated in space, the first frame in time."""
    from torch.nn.functional import pad

    around = module.time_causal_padding  # width, height, frames; the frames come from the memory
    frames = with_past(memory, x, module.conv.kernel_size[0], module.conv.stride[0])
    return module.conv(pad(frames, (*around[:4], 0, 0), mode=module.pad_mode))


def _attend(module: torch.nn.Module, memory: dict[str, Tensor], x: Tensor) -> Tensor:
    """Attention of each frame of the piece over itself and all frames before it."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    normed, made = module.norm(x), []
    q, k, v = (project(normed) for project in (module.to_q, module.to_k, module.to_v))
    for frame in range(x.shape[2]):
        for name, new in (("keys", k), ("values", v)):
            tokens = new[:, :, frame].flatten(2).transpose(1, 2)
            memory[name] = torch.cat([memory[name], tokens], dim=1) if name in memory else tokens
        query = q[:, :, frame].flatten(2).transpose(1, 2)
        out = scaled_dot_product_attention(
            query.unsqueeze(1), memory["keys"].unsqueeze(1), memory["values"].unsqueeze(1)
        )
        made.append(out.squeeze(1).transpose(1, 2).unflatten(2, x.shape[3:]))
    return module.proj_out(torch.stack(made, dim=2)) + x


def _downsample(module: torch.nn.Module, memory: dict[str, Tensor], x: Tensor) -> Tensor:
    """The first frame stays alone in time; of later ones each two become one."""
    if not module.add_temporal_downsample or not memory:
        memory["begun"] = x[:0]
        return type(module).forward(module, x)
    made = module._dcae_downsample_rearrange(module.conv(x), r1=2, r2=2, r3=2)
    moved = module._dcae_downsample_rearrange(x, r1=2, r2=2, r3=2)
    return made + moved.unflatten(1, (made.shape[1], module.group_size)).mean(dim=2)


def _upsample(module: torch.nn.Module, memory: dict[str, Tensor], x: Tensor) -> Tensor:
    """The first latent frame stays one frame; each later one becomes two."""
    if not module.add_temporal_upsample or not memory:
        memory["begun"] = x[:0]
        return type(module).forward(module, x)
    made = module._dcae_upsample_rearrange(module.conv(x), r1=2, r2=2, r3=2)
    moved = module._dcae_upsample_rearrange(x, r1=2, r2=2, r3=2)
    return made + moved.repeat_interleave(module.repeats, dim=1)


def _in_pieces(coder: torch.nn.Module, video: Tensor, step: int) -> Tensor:
    """What `coder(video)` gives, `step` frames at a time."""
    import torch
    from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as theirs

    layers = {
        theirs.HunyuanVideo15CausalConv3d: _convolve,
        theirs.HunyuanVideo15AttnBlock: _attend,
        theirs.HunyuanVideo15Downsample: _downsample,
        theirs.HunyuanVideo15Upsample: _upsample,
    }
    with remembering(coder, layers):
        return torch.cat([coder(piece) for piece in pieces(video, step)], dim=2)


def encode(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Clips [B,3,4k+1,H,W] -> [B,32,k+1,H/16,W/16], pictures [B,3,H,W] -> [B,32,H/16,W/16], pixels in -1..1; float32.

    The posterior's mean, scaled. Raises ConfigError for another number of frames.
    """
    video, still = as_video(pixels)
    check_frames(video, TIME, "HunyuanVideo-1.5's VAE")
    mean, _ = _in_pieces(vae.encoder, video.to(vae.dtype), vae.temporal_compression_ratio).float().chunk(2, dim=1)
    latents = mean * SCALE
    return latents.squeeze(2) if still else latents


def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Latents [B,32,f,h,w] or [B,32,h,w] -> pixels [B,3,4(f-1)+1,16h,16w] or [B,3,16h,16w] in about -1..1, float32."""
    video, still = as_video(latents)
    pixels = _in_pieces(vae.decoder, (video / SCALE).to(vae.dtype), 1).float()
    return pixels.squeeze(2) if still else pixels
