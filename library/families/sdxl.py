"""Stable Diffusion XL (Stability AI, 2023) and its fine-tunes: a UNet on DDPM noise with CLIP-L and OpenCLIP bigG.

Text is the next-to-last layer's states of both encoders side by side, 77 of them for every 75 tokens; beside it the
vector of bigG's first chunk and six numbers, size and crop of the picture. The model predicts the noise, or v where
the file or the user says so.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import clip, few_steps, unet, vae_ldm
from library.components import clip_prompts as prompts
from library.components import stable_diffusion as sd
from library.families.family import Cond, Family, ItemInput, Text
from library.objective import ddpm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DENOISER = unet.part("an SDXL UNet", ("sdxl",))
# Both encoders have one vocabulary and, the padding apart, one tokenizer; bigG's padding is token 0.
ENCODERS = (clip.large(), replace(clip.big(), tokenizer=None))


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, most: int, weighted: bool
) -> Cond:
    """{"text": [77 chunks, D1 + D2], "pooled": [D2]} of the first `most` tokens."""
    import torch

    (tokenizer,), (first, second) = tokenizers, encoders
    tokens = prompts.tokens_of(tokenizer, text.caption, most, weighted)
    large = clip.hidden(first, prompts.rows_for(tokens, tokenizer, device))
    big, pooled = clip.hidden_and_pooled(second, prompts.rows_for(tokens, tokenizer, device, pad=0))
    states = torch.cat([large, big], dim=-1)
    return {"text": prompts.weighed(states, tokens).flatten(0, 1), "pooled": pooled[0]}


def encode_item(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], item: ItemInput) -> Cond:
    return sd.sized(SDXL, item)


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """The noise or v, [B,C,h,w] float32."""
    from library.diffusion import timestep

    return unet.call(denoiser, noisy, timestep(sigma), conds)


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, *vae_ldm.SDXL)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, *vae_ldm.SDXL)


def variant_of(options: Any) -> Family:
    """The record for what the file predicts and how much text the options want. Raises ConfigError."""
    settings = sd.text_settings(options)
    return replace(
        SDXL,
        tokenize=partial(prompts.tokenize, **settings),
        encode=partial(encode, **settings),
        objective=sd.objective_of(options),
        recipe=f"tokens {settings['most']}{' weighted' if settings['weighted'] else ''}",
    )


SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser=DENOISER,
    vae=vae_ldm.part("an SDXL VAE", channels=4),
    text_encoders=ENCODERS,
    tokenize=prompts.tokenize,
    encode=partial(encode, most=prompts.CHUNK, weighted=False),
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    blocks=unet.BLOCKS,
    # sd-scripts trains the attention blocks, and with conv_dim what is around them, without the first convolution.
    adapted=("input_blocks.*.1.", "middle_block.1.", "output_blocks.*.1."),
    adapted_with_convs=("input_blocks.*.0.", "middle_block.", "output_blocks."),
    pixel_multiple=32,
    latent_channels=4,
    latent_downscale=8,
    options=(*sd.MODEL, *sd.TRAINING),
    inference_options=sd.MODEL,
    sampling=sd.SAMPLING,
    save_formats=("kohya", "comfy", "diffusers"),
    architecture="stable-diffusion-xl-v1-base",
    base_model_version="sdxl_base_v1-0",
    resolution=1024,
    objective=ddpm(),
    encode_item=encode_item,
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "turbo lightning lcm hyper-sd hyper_sd dmd2"),
    text_prefixes=("lora_te1", "lora_te2"),
    container={
        DENOISER.name: ("model.diffusion_model.", "ldm"),
        "vae": ("first_stage_model.", "ldm"),
        ENCODERS[0].name: ("conditioner.embedders.0.transformer.", "original"),
        ENCODERS[1].name: ("conditioner.embedders.1.model.", "open_clip"),
    },
    markers=sd.new_markers,
)
