"""LTX-Video 0.9.x, 2B and 13B (Lightricks, 2024 and 2025): cross attention to T5 states on 32x latents.

Facts: the model is given sigma * 1000, one for each token, and returns noise - x0. Latents are [B,128,F,h,w], one
token each. Positions are seconds and pixels, so the frame rate counts; from 0.9.5 on a frame's time is that of the
last of its 8 pixel frames but for the first ("causal"), before that of the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import few_steps, frames, ragged, t5, vae_ltx
from library.components.tokenizers import ended
from library.families.family import Cond, Family, FrameRule, ItemInput, Part, Text
from library.layout import Shape, block, count, identity, our_view, row
from library.objective import flow_from, flow_linear_quadratic
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# All published models have 32 heads. No shape shows it, so files of other sizes say theirs in their header metadata.
HEADS, HEADS_KEY = 32, "num_attention_heads"
CONFIG_KEY = "config"  # header metadata of the released single files: JSON with a configuration of each part
CAUSAL_WIDTH = 4096  # of the 13B model, all releases of which are causal; 2B files without metadata are taken as 0.9.1
FRAME_RATE = 25.0
PER_FRAME, PER_TOKEN = 8, 32  # pixel frames of a latent frame, pixels of a latent
TOKENS = 256  # of text, in Lightricks' own inference; diffusers' pipeline cuts at 128
TERMINAL = 0.1  # sigma at which the last step starts: `shift_terminal` of the scheduler that 0.9.0 and 0.9.1 have
NEWER = "LTXConditionPipeline"  # diffusers' class for 0.9.5 and later, which a folder names
# Lightricks' own negative prompt.
NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"

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


def is_newer(path: str) -> bool:
    """Whether a file or diffusers folder is 0.9.5 or later, whose frames have causal times."""
    from library.checkpoints import configuration_of, pipeline_facts

    return pipeline_facts(path).get("_class_name") == NEWER or configuration_of(DENOISER, path)["causal"]


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


def tokenize(tokenizers: list[Any], caption: str, *, length: int = TOKENS) -> tuple[list[int], str]:
    """T5's ids of the caption and its end token, at most `length`, and the end of the caption that did not fit."""
    return ended(tokenizers[0], caption, length)


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, length: int = TOKENS
) -> Cond:
    """{"text": [T,D]}: T5's last states, unpadded, which is what it makes of the caption with a mask."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption, length=length)
    return {"text": t5.states(encoders[0], torch.tensor([ids], device=device))[0]}


def encode_item(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput) -> Cond:
    return frames.begun(partial(vae_ltx.encode, vae), given)


def sampling_shift(tokens: int, steps: int) -> float:
    """e^mu, mu linear from 0.95 at 1024 tokens of the video to 2.05 at 4096: the scheduler of 0.9.0 and 0.9.1."""
    return math.exp(0.95 + (2.05 - 0.95) * (tokens - 1024) / (4096 - 1024))


def variant_of(options: Any) -> Family:
    """The record with the run's length of texts, and with the times and the steps of the release that the file is."""
    from library.checkpoints import path_of

    length, newer = options.t5xxl_max_token_length, is_newer(path_of(DENOISER, options))
    steps = {"objective": flow_linear_quadratic(), "sampling_shift": lambda tokens, steps: 1.0} if newer else {}
    return replace(
        LTX_VIDEO,
        tokenize=partial(tokenize, length=length),
        encode=partial(encode, length=length),
        predict=partial(predict, causal=newer),
        recipe=f"tokens {length}",
        **steps,
    )


LENGTH = Option("t5xxl_max_token_length", "int", TOKENS, "T5 tokens of a caption", low=1)
LTX_VIDEO = Family(
    name="ltx_video",
    title="LTX-Video",
    denoiser=DENOISER,
    vae=vae_ltx.part(),
    text_encoders=(t5.xxl(folder="text_encoder"),),
    tokenize=tokenize,
    encode=encode,
    encode_image=vae_ltx.encode,
    decode_latents=vae_ltx.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=PER_TOKEN,
    latent_channels=128,
    latent_downscale=PER_TOKEN,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # diffusion-pipe (the seed's system) draws sigma from a logit-normal distribution and has no shift for this model.
    defaults={"timestep_sampling": "sigmoid"},
    options=(
        Option("first_frame_conditioning_p", "float", 0.0, "share of steps in which a clip's first frame is given",
               low=0, high=1),
        LENGTH,
    ),
    save_formats=("comfy", "kohya", "diffusers"),
    container={"denoiser": ("model.diffusion_model.", "comfy"), "vae": ("vae.", "original")},
    architecture="ltx-video",
    base_model_version="ltx_video",
    resolution=640,  # an area about that of 768 x 512
    objective=flow_from(TERMINAL),
    frames=FrameRule(PER_FRAME, 1, FRAME_RATE, first_frame="possible"),
    encode_item=encode_item,
    vary=frames.vary,
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "distilled"),
    inference_options=(LENGTH,),
    # Lightricks' 40 steps and guidance of 3 for the models that are not distilled.
    sampling={"sample_steps": 40, "scale": 3.0, "frame_count": 121, "negative_prompt": NEGATIVE},
    sampling_shift=sampling_shift,
    text_widths=lambda denoiser: (denoiser["caption_channels"],),
    released={"denoiser": "ltx_video", "vae": "vae_ltx", "t5xxl": "te_t5xxl"},
)  # fmt: skip
