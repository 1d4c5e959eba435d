"""Stable Diffusion 1.x and 2.x (CompVis, Stability AI, 2022) and their fine-tunes: one UNet, one CLIP encoder.

SD 1 reads the last layer of CLIP-L (or an earlier one, `--clip_skip`), SD 2 the next-to-last of OpenCLIP H, both after
the final norm; 77 states for every 75 tokens. Which of the two a file is, it shows; what an SD 2 file predicts, it does
not: 768-pixel models predict v (`--v_parameterization`), 512-pixel ones the noise.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.components import clip, few_steps, unet, vae_ldm
from library.components import clip_prompts as prompts
from library.components import stable_diffusion as sd
from library.errors import ConfigError
from library.families.family import Cond, Family, Text
from library.objective import ddpm
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DENOISER = unet.part("an SD 1.x or 2.x UNet", ("sd1", "sd2"), kohya="diffusers")
LARGE, HUGE = clip.large(), clip.huge()
WHOLE_H = 24  # layers of OpenCLIP H; diffusers' folders leave out the last one, which is not read
OPTIONS = (
    Option("v2", "flag", False, "the model is an SD 2.x; known by itself", sd.TEXT),
    Option("clip_h", "path", None, f"SD 2's text encoder, {HUGE.title}, where it is no part of the model's file"),
    Option("tokenizer_clip_h", "path", None, f"tokenizer of SD 2 ({HUGE.tokenizer.hub}): a folder or a hub id"),
    Option("clip_skip", "int", None, "layer of the text encoder, counted from the end; 1 if not set", sd.TEXT, low=1),
)


def encode(
    encoders: list[torch.nn.Module],
    tokenizers: list[Any],
    text: Text,
    device: Any,
    *,
    most: int,
    weighted: bool,
    skip: int,
    pad: int | None,
) -> Cond:
    """{"text": [77 chunks, D]} of the first `most` tokens; `pad` None = filled up with the end token."""
    (tokenizer,), (encoder,) = tokenizers, encoders
    tokens = prompts.tokens_of(tokenizer, text.caption, most, weighted)
    rows = prompts.rows_for(tokens, tokenizer, device, pad)
    # Of SD 2's encoder all but the last layer count, whether the file holds that one or not.
    unread = pad is not None and len(encoder.text_model.encoder.layers) != WHOLE_H - 1
    states = clip.hidden(encoder, rows, layer=-skip - unread, final_norm=True)
    return {"text": prompts.weighed(states, tokens).flatten(0, 1)}


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """The noise or v, [B,C,h,w] float32."""
    from library.diffusion import timestep

    return unet.call(denoiser, noisy, timestep(sigma), conds)


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, *vae_ldm.SD)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, *vae_ldm.SD)


def is_sd2(path: str) -> bool:
    """Whether the file is an SD 2.x, read from its header."""
    from library.checkpoints import find_part

    checkpoint, layout = find_part(DENOISER, path)
    return unet.kind_of(checkpoint.shapes, layout) == "sd2"


def variant_of(options: Any) -> Family:
    """The record for the file, what it predicts and how much text the options want. Raises ConfigError."""
    path = options.pretrained_model_name_or_path
    second = is_sd2(path)
    if options.v2 and not second:
        raise ConfigError(f"--v2: {Path(path).name} is an SD 1.x, its text is {LARGE.title}'s; remove the option")
    if options.clip_h and not second:
        raise ConfigError(f"--clip_h: {Path(path).name} is an SD 1.x, which has {LARGE.title}; remove the option")
    settings = sd.text_settings(options) | {"skip": options.clip_skip or 1, "pad": 0 if second else None}
    objective = sd.objective_of(options)
    shown = {key: settings[key] for key in ("most", "weighted")}
    words = f"tokens {settings['most']} skip {settings['skip']}{' weighted' if settings['weighted'] else ''}"
    variant = replace(
        SD,
        tokenize=partial(prompts.tokenize, **shown),
        encode=partial(encode, **settings),
        objective=objective,
        recipe=words,
        base_model_version=("sd_v2" if second else "sd_v1") + ("_v" if objective.prediction_type == "v" else ""),
    )
    if not second:
        return variant
    kind = "768-v" if objective.prediction_type == "v" else "512"
    encoder = ("cond_stage_model.model.", "open_clip")
    return replace(
        variant,
        title="Stable Diffusion 2",
        text_encoders=(HUGE,),
        architecture=f"stable-diffusion-v2-{kind}",
        resolution=768 if kind == "768-v" else 512,
        container={**{name: place for name, place in SD.container.items() if name != LARGE.name}, HUGE.name: encoder},
    )


SD = Family(
    name="sd",
    title="Stable Diffusion 1",
    denoiser=DENOISER,
    vae=vae_ldm.part("a Stable Diffusion VAE", channels=4),
    text_encoders=(LARGE,),
    tokenize=prompts.tokenize,
    encode=partial(encode, most=prompts.CHUNK, weighted=False, skip=1, pad=None),
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    blocks=unet.BLOCKS,
    # As for SDXL, see there.
    adapted=("input_blocks.*.1.", "middle_block.1.", "output_blocks.*.1."),
    adapted_with_convs=("input_blocks.*.0.", "middle_block.", "output_blocks."),
    pixel_multiple=64,  # sd-scripts' bucket steps; the UNet halves the latents three times
    latent_channels=4,
    latent_downscale=8,
    options=(*OPTIONS, *sd.MODEL, *sd.TRAINING),
    inference_options=(*OPTIONS, *sd.MODEL),
    sampling=sd.SAMPLING,
    save_formats=("kohya", "comfy", "diffusers"),
    architecture="stable-diffusion-v1",
    base_model_version="sd_v1",
    resolution=512,
    objective=ddpm(),
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "turbo lightning lcm hyper-sd hyper_sd"),
    text_prefixes=("lora_te",),
    container={
        DENOISER.name: ("model.diffusion_model.", "ldm"),
        "vae": ("first_stage_model.", "ldm"),
        LARGE.name: ("cond_stage_model.transformer.", "original"),
    },
)
