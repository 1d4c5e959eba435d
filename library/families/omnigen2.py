"""OmniGen2 (VectorSpaceLab, 2025): Lumina 2's blocks on Flux latents, Qwen2.5-VL-3B states and reference pictures.

Facts: the model is given 1 - sigma (times 1000 inside) and returns x0 - noise. Reference pictures are latents of any
size, put between text and picture. diffusers has its blocks, not the model
(library/models/lumina.py); released files have our names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import qwen25_vl, vae_ldm
from library.components.tokenizers import wrapped
from library.families.family import Cond, Family, ItemInput, Part, Text, Tokenizer
from library.layout import Shape, count, identity
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS = ("layers", "noise_refiner", "context_refiner", "ref_image_refiner")
# All of OmniGen2TransformerBlock, refiners and modulation included, as diffusion-pipe trains it (the seed's system).
ADAPTED = ("layers.", "noise_refiner.", "context_refiner.", "ref_image_refiner.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """The released file's names are the model's own, so a folder and a single file look the same."""
    return "comfy" if "image_index_embedding" in shapes and "ref_image_patch_embedder.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    keys, width = shapes["layers.0.attn.to_k.weight"]
    head, inner = shapes["layers.0.attn.norm_q.weight"][0], shapes["layers.0.feed_forward.linear_1.weight"][0]
    side = head // 6 * 2  # three even axes share a head; what is left goes to the first
    return {
        "patch_size": 2,
        "in_channels": shapes["x_embedder.weight"][1] // 4,
        "out_channels": shapes["norm_out.linear_2.weight"][0] // 4,
        "hidden_size": width,
        "num_attention_heads": width // head,
        "num_kv_heads": keys // head,
        "axes_dim_rope": (head - 2 * side, side, side),
        # diffusers takes 4 * width times a factor and rounds it up to a multiple: half of `inner`, rounded up to it.
        "multiple_of": inner,
        "ffn_dim_multiplier": inner / (8 * width),
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
        "num_layers": count(shapes, "layers"),
        "num_refiner_layers": count(shapes, "noise_refiner"),
        "references": shapes["image_index_embedding"][0],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.lumina import OmniGen2

    return OmniGen2(**configuration)


DENOISER = Part(
    name="denoiser",
    title="an OmniGen2 denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
    high_precision=("norm1.linear",),
)


def references_of(cond: Cond) -> list[Tensor]:
    """ "control.0", "control.1", ... in order."""
    found = []
    while f"control.{len(found)}" in cond:
        found.append(cond[f"control.{len(found)}"])
    return found


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], ragged; "control.0", ... [C,h,w] of any number and size."""
    dtype = denoiser.x_embedder.weight.dtype
    texts = [cond["text"].to(dtype) for cond in conds]
    references = [[picture.to(dtype) for picture in references_of(cond)] for cond in conds]
    return -denoiser(noisy.to(dtype), 1.0 - sigma.float(), texts, references).float()


# Of OmniGen2's published inference code, as all that follows: chat, tokens, sizes, guidance.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user instructions."
    "<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n",
)
TOKENS = 1024  # with the chat
SIDE = 1024  # of a reference picture at most, and its area is at most the square of it
NEGATIVE = (
    "(((deformed))), blurry, over saturation, bad anatomy, disfigured, poorly drawn face, mutation, mutated, "
    "(extra_limb), (ugly), (poorly drawn hands), fused fingers, messy drawing, broken legs censor, censored, censor_bar"
)


def tokenize(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """Ids of the chat, at most 1024, and the end of the caption that did not fit."""
    return wrapped(tokenizers[0], caption, TOKENS, CHAT)


def encode(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [T,D]}, the whole chat's states. The pictures go to the denoiser alone."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption)
    return {"text": qwen25_vl.states(encoders[0], torch.tensor([ids], device=device))[0]}


encode_image = partial(vae_ldm.encode, shift=vae_ldm.FLUX[0], scale=vae_ldm.FLUX[1])


def encode_item(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], item: ItemInput) -> Cond:
    """{"control.k": [C,h,w]}, the reference pictures."""
    return {f"control.{k}": encode_image(vae, picture[None])[0] for k, picture in enumerate(item.controls)}


def reference_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in about the picture's proportions and never larger, in multiples of 16."""
    scale = min(SIDE / math.sqrt(size[0] * size[1]), SIDE / max(size), 1.0)
    return tuple(max(16, int(side * scale) // 16 * 16) for side in size)


def sampling_shift(tokens: int, steps: int) -> float:
    """1 at 320 x 320 pixels, 3.2 at 1024 x 1024."""
    return math.sqrt(tokens) / 20


def unprompted(settings: Mapping[str, Any], uncond: Cond) -> list[Cond]:
    """The negative prompt with the references, if these are guided, and without them."""
    bare = {name: value for name, value in uncond.items() if not name.startswith("control.")}
    return [bare] if settings["image_guidance_scale"] <= 1 or len(bare) == len(uncond) else [uncond, bare]


def guide(settings: Mapping[str, Any], cond: Cond) -> Callable[..., Tensor]:
    """Two scales: from nothing to the references, and from these to the prompt."""

    def joined(whole: Tensor, others: Tensor, scale: float, step: int) -> Tensor:
        seen, bare = others[:1], others[-1:]
        return bare + settings["image_guidance_scale"] * (seen - bare) + scale * (whole - seen)

    return joined


TEXT_ENCODER = replace(
    qwen25_vl.part("a Qwen2.5-VL 3B text encoder"),
    diffusers_folder="mllm",
    tokenizer=Tokenizer("tokenizer", "Qwen/Qwen2.5-VL-3B-Instruct", beside=("tokenizer", "processor")),
)
OMNIGEN2 = Family(
    name="omnigen2",
    title="OmniGen2",
    denoiser=DENOISER,
    vae=vae_ldm.part("a Flux-type VAE", channels=16),
    text_encoders=(TEXT_ENCODER,),
    tokenize=tokenize,
    encode=encode,
    encode_image=encode_image,
    decode_latents=partial(vae_ldm.decode, shift=vae_ldm.FLUX[0], scale=vae_ldm.FLUX[1]),
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # OmniGen2's own fine-tuning: logit-normal with Flux's shift by tokens (options/ft_lora.yml, its transport).
    defaults={"timestep_sampling": "flux_shift"},
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="omnigen2",
    base_model_version="omnigen2",
    resolution=1024,
    encode_item=encode_item,
    max_controls=5,  # as many as the released model has embeddings for
    control_size=reference_size,
    inference_options=(
        Option("image_guidance_scale", "float", 2.0, "guidance towards the control pictures; 1 = none", low=1),
    ),
    sampling={"sample_steps": 50, "scale": 5.0, "negative_prompt": NEGATIVE},
    sampling_shift=sampling_shift,
    unprompted=unprompted,
    guide=guide,
    text_widths=lambda denoiser: (denoiser["cap_feat_dim"],),
    released={"denoiser": "omnigen2", "vae": "vae_flux", "text_encoder": "te_qwen25_3b"},
)
