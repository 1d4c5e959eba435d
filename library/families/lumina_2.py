"""Lumina Image 2.0 (Alpha-VLLM, 2025): a single-stream transformer on Flux latents with a Gemma-2-2B encoder.

Facts: the model is given 1 - sigma, without a factor, and returns x0 - noise. Latents are Flux's, [B,16,h,w], 2x2
patches. Keys and values have a third of the queries' heads, so the fused qkv is cut in unequal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import decoder, gemma2, vae_ldm
from library.components.tokenizers import ended
from library.families.family import Cond, Family, Part, Text
from library.layout import Shape, block, count, identity, row
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = [
    row("attention.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    row("attention.out", "attn.to_out.0"),
    row("attention.q_norm", "attn.norm_q"),
    row("attention.k_norm", "attn.norm_k"),
    row("feed_forward.w1", "feed_forward.linear_1"),
    row("feed_forward.w2", "feed_forward.linear_2"),
    row("feed_forward.w3", "feed_forward.linear_3"),
    row("attention_norm2", "norm2"),
    row("ffn_norm1"),
    row("ffn_norm2"),
]
MODULATED = [*BLOCK, row("attention_norm1", "norm1.norm"), row("adaLN_modulation.1", "norm1.linear")]
EMBED = "time_caption_embed"
COMFY = [
    row("x_embedder"),
    row("t_embedder.mlp.0", f"{EMBED}.timestep_embedder.linear_1"),
    row("t_embedder.mlp.2", f"{EMBED}.timestep_embedder.linear_2"),
    row("cap_embedder", f"{EMBED}.caption_embedder"),
    row("final_layer.linear", "norm_out.linear_2"),
    row("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    *block("context_refiner.{i}", "context_refiner.{i}", *BLOCK, row("attention_norm1", "norm1")),
    *block("noise_refiner.{i}", "noise_refiner.{i}", *MODULATED),
    *block("layers.{i}", "layers.{i}", *MODULATED),
]
# The prompt of diffusers' Lumina2Pipeline, and what separates it from the caption. Negative prompts have neither.
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
START = "<Prompt Start>"
LAYER, MAX_TOKENS = -2, 256  # of the hidden states; tokens with the system prompt (the same pipeline)
BLOCKS = ("layers", "noise_refiner", "context_refiner")
# All of JointTransformerBlock, refiners and modulation included, as diffusion-pipe trains it (the seed's system).
ADAPTED = ("layers.", "noise_refiner.", "context_refiner.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Z-Image has the same names and pad tokens besides; OmniGen2 has diffusers' names and reference pictures."""
    if "cap_pad_token" in shapes or "image_index_embedding" in shapes:
        return None
    if "layers.0.attention.qkv.weight" in shapes and "cap_embedder.1.weight" in shapes:
        return "comfy"
    ours = f"{EMBED}.caption_embedder.1.weight" in shapes and "layers.0.attn.to_q.weight" in shapes
    return "diffusers" if ours else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    caption = "cap_embedder" if layout == "comfy" else f"{EMBED}.caption_embedder"
    out = "final_layer.linear" if layout == "comfy" else "norm_out.linear_2"
    if layout == "comfy":
        head = shapes["layers.0.attention.q_norm.weight"][0]
        rows, width = shapes["layers.0.attention.qkv.weight"]
        inner = shapes["layers.0.feed_forward.w1.weight"][0]
        keys = (rows - width) // 2
    else:
        head = shapes["layers.0.attn.norm_q.weight"][0]
        keys, width = shapes["layers.0.attn.to_k.weight"]
        inner = shapes["layers.0.feed_forward.linear_1.weight"][0]
    side = head // 6 * 2  # three even axes share a head; what is left goes to the first
    return {
        "patch_size": 2,
        "hidden_size": width,
        "num_attention_heads": width // head,
        "num_kv_heads": keys // head,
        "axes_dim_rope": (head - 2 * side, side, side),
        # diffusers takes 4 * width times a factor and rounds it up to a multiple: half of `inner`, rounded up to it.
        "multiple_of": inner,
        "ffn_dim_multiplier": inner / (8 * width),
        "in_channels": shapes["x_embedder.weight"][1] // 4,
        "out_channels": shapes[f"{out}.weight"][0] // 4,
        "cap_feat_dim": shapes[f"{caption}.1.weight"][1],
        "num_layers": count(shapes, "layers"),
        "num_refiner_layers": count(shapes, "noise_refiner"),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.lumina import Lumina2

    return Lumina2(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Lumina 2 denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    carried=("norm_final.weight",),
    diffusers_folder="transformer",
    high_precision=("adaLN_modulation", "norm1.linear"),
)


def caption_text(caption: str, *, system_prompt: str) -> str:
    """The caption behind the system prompt. Nothing is put before an empty caption, or one that has its own."""
    if not caption or not system_prompt or START in caption:
        return caption
    return f"{system_prompt} {START} {caption}"


def tokenize(tokenizers: list[Any], caption: str, *, length: int = MAX_TOKENS) -> tuple[list[int], str]:
    """Gemma's ids with <bos>, at most `length`, and the end of the caption that did not fit."""
    return ended(tokenizers[0], caption, length)


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, length: int = MAX_TOKENS
) -> Cond:
    """{"text": [T,D]}: the next-to-last layer's states, unpadded."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption, length=length)
    return {"text": decoder.states(encoders[0], torch.tensor([ids], device=device), LAYER)[0]}


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], ragged."""
    dtype = denoiser.x_embedder.weight.dtype
    texts = [cond["text"].to(dtype) for cond in conds]
    return -denoiser(noisy.to(dtype), 1.0 - sigma.float(), texts).float()


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, *vae_ldm.FLUX)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, *vae_ldm.FLUX)


def guide(settings: Mapping[str, Any], cond: Cond) -> Callable[..., Tensor]:
    """Classifier-free guidance with the norms of the prompt's prediction, up to a part of the steps."""
    from library import guidance

    join = guidance.norm_of_rows_kept if settings["cfg_normalization"] == "rows" else guidance.guided
    return guidance.until(int(settings["cfg_trunc_ratio"] * settings["sample_steps"] + 1e-6), join)


def variant_of(options: Any) -> Family:
    """The record with the run's system prompt and text length."""
    length = options.gemma2_max_token_length
    return replace(
        LUMINA_2,
        caption_text=partial(caption_text, system_prompt=options.system_prompt),
        tokenize=partial(tokenize, length=length),
        encode=partial(encode, length=length),
        recipe="" if length == MAX_TOKENS else f"gemma2 {length}",
    )


TEXT_OPTIONS = (
    Option("system_prompt", "str", SYSTEM_PROMPT, "put before every caption, as the model was trained; '' = nothing"),
    Option("gemma2_max_token_length", "int", MAX_TOKENS, "tokens of a caption, with the system prompt", low=1),
)

LUMINA_2 = Family(
    name="lumina_2",
    title="Lumina Image 2.0",
    denoiser=DENOISER,
    vae=vae_ldm.part("a Flux-type VAE", channels=16),
    text_encoders=(gemma2.part(option="gemma2"),),
    tokenize=tokenize,
    encode=encode,
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    caption_text=partial(caption_text, system_prompt=SYSTEM_PROMPT),
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # diffusion-pipe's `lumina_shift`, as its documentation advises: Flux's line through the tokens.
    defaults={"timestep_sampling": "flux_shift"},
    options=TEXT_OPTIONS,
    # diffusers' names are read by diffusers alone: ComfyUI takes them for Z-Image's, of other shapes.
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="lumina-2",
    base_model_version="lumina2",
    resolution=1024,
    variant_of=variant_of,
    # diffusers' Lumina2Pipeline; the shift of the published scheduler and of ComfyUI.
    sampling={"sample_steps": 30, "scale": 4.0, "flow_shift": 6.0},
    inference_options=(
        *TEXT_OPTIONS,
        Option("cfg_trunc_ratio", "float", 1.0, "part of the steps, from the first on, with guidance", low=0, high=1),
        Option(
            "cfg_normalization", "str", "rows", "give each row of latents the norm that it has without guidance",
            choices=("rows", "none"),
        ),
    ),
    guide=guide,
    text_widths=lambda denoiser: (denoiser["cap_feat_dim"],),
    released={"denoiser": "lumina_2", "vae": "vae_flux", "text_encoder": "te_gemma2_2b"},
)  # fmt: skip
