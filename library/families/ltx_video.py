"""LTX-Video 0.9.x, 2B and 13B (Lightricks, 2024 and 2025): cross attention to T5 states on 32x latents.

Facts: the model is given sigma * 1000, one for each token, and returns noise - x0. Latents are [B,128,F,h,w], one
token each. Positions are seconds and pixels, so the frame rate counts; from 0.9.5 on a frame's time is that of the
last of its 8 pixel frames but for the first ("causal"), before that of the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import frames, ragged
from library.families.family import Cond, Part
from library.layout import Shape, block, count, identity, our_view, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# All published models have 32 heads. No shape shows it, so files of other sizes say theirs in their header metadata.
HEADS, HEADS_KEY = 32, "num_attention_heads"
CONFIG_KEY = "config"  # header metadata of the released single files: JSON with a configuration of each part
CAUSAL_WIDTH = 4096  # of the 13B model, all releases of which are causal; 2B files without metadata are taken as 0.9.1
FRAME_RATE = 25.0
PER_FRAME, PER_TOKEN = 8, 32  # pixel frames of a latent frame, pixels of a latent

BLOCK = [row("scale_shift_table"), row("ff")]
for _attention in ("attn1", "attn2"):
    BLOCK += [row(f"{_attention}.{_a}_norm", f"{_attention}.norm_{_a}") for _a in "qk"]
    BLOCK += [row(f"{_attention}.{_name}") for _name in ("to_q", "to_k", "to_v", "to_out")]
COMFY = [
    row("patchify_proj", "proj_in"),
    row("adaln_single", "time_embed"),
    row("caption_projection"),
    row("scale_shift_table"),
    row("proj_out"),
    *block("transformer_blocks.{i}", "transformer_blocks.{i}", *BLOCK),
]
BLOCKS = ("transformer_blocks",)
ADAPTED = ("transformer_blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """LTX-2 has these names too, and parts for sound."""
    if "caption_projection.linear_1.weight" not in shapes or any(key.startswith("audio_") for key in shapes):
        return None
    if "patchify_proj.weight" in shapes and "adaln_single.linear.weight" in shapes:
        return "comfy"
    ours = ("time_embed.linear.weight", "transformer_blocks.0.attn2.norm_k.weight", "proj_in.weight")
    return "diffusers" if all(key in shapes for key in ours) else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(COMFY, shapes) if layout == "comfy" else shapes
    width, channels = ours["proj_in.weight"]
    heads = int(metadata.get(HEADS_KEY) or HEADS)
    said = json.loads(metadata.get(CONFIG_KEY) or "{}").get("transformer", {})
    return {
        "in_channels": channels,
        "out_channels": ours["proj_out.weight"][0],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": ours["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": count(ours, "transformer_blocks"),
        "caption_channels": ours["caption_projection.linear_1.weight"][1],
        "causal": bool(said.get("causal_temporal_positioning", width >= CAUSAL_WIDTH)),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(**{k: v for k, v in configuration.items() if k != "causal"})
    model.causal = configuration.get("causal", False)
    return model


DENOISER = Part(
    name="denoiser",
    title="an LTX-Video denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("model.diffusion_model.", "", "diffusion_model."),
    diffusers_folder="transformer",
)


def coordinates(video: Tensor, rate: Tensor, is_causal: bool) -> Tensor:
    """[B, 3, F*h*w] float32: seconds, pixel row and pixel column of each token; `rate` is [B]."""
    import torch

    count_of = [torch.arange(n, device=video.device, dtype=torch.float32) for n in video.shape[2:]]
    when, rows, columns = torch.meshgrid(*count_of, indexing="ij")
    when = when * PER_FRAME
    if is_causal:
        when = (when + 1 - PER_FRAME).clamp(min=0)
    grid = torch.stack([when, rows * PER_TOKEN, columns * PER_TOKEN]).flatten(1)
    return torch.stack([grid[0] / rate[:, None], *(axis.expand(len(rate), -1) for axis in grid[1:])], 1)


def predict(
    denoiser: torch.nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    conds: list[Cond],
    *,
    frame_rate: float = FRAME_RATE,
    causal: bool | None = None,
) -> Tensor:
    """Velocity [B,C,F,h,w] float32.

    Conds: "text" [T,D], ragged; "first_frame" [C,1,h,w], whose tokens are given the time 0; "fps" [], else
    `frame_rate`. `causal` overrides what the file says of its positions.
    """
    dtype = denoiser.proj_in.weight.dtype
    video, sigma = frames.with_first_frames(noisy, sigma, conds)
    if sigma.ndim == 2:  # a time per frame -> per token
        sigma = sigma.repeat_interleave(noisy.shape[-2] * noisy.shape[-1], 1)
    texts = [cond["text"].to(dtype) for cond in conds]
    is_causal = denoiser.causal if causal is None else causal
    out = denoiser(
        video.to(dtype).flatten(2).transpose(1, 2),
        ragged.pad(texts),
        sigma * 1000,
        ragged.mask(texts),
        video_coords=coordinates(noisy, ragged.scalars(conds, "fps", frame_rate, sigma), is_causal),
        return_dict=False,
    )[0]
    return out.float().transpose(1, 2).unflatten(2, noisy.shape[2:])
