"""Chroma (lodestones, 2025): Flux schnell without CLIP and guidance, its modulation made by one small network.

Facts: as Flux: the model is given sigma and multiplies by 1000 itself, in its own number format, and returns
noise - x0; latents are [B,16,h,w], 2x2 patches. Text is T5-XXL's last states, of which padding does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import few_steps, flux_blocks, ragged, t5, tokens, vae_ldm
from library.components.tokenizers import ended
from library.families.family import Cond, Family, Part, Text
from library.layout import Shape, block, count, identity, our_view, row
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODULATION = "distilled_guidance_layer"
COMFY = [
    *flux_blocks.ROWS,
    row(f"{MODULATION}.in_proj"),
    row(f"{MODULATION}.out_proj"),
    *block(
        MODULATION,
        MODULATION,
        row("layers.{i}.in_layer", "layers.{i}.linear_1"),
        row("layers.{i}.out_layer", "layers.{i}.linear_2"),
        row("norms.{i}.scale", "norms.{i}.weight"),
    ),
]
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")
TOKENS = 512  # of T5 (diffusers' ChromaPipeline)


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if f"{MODULATION}.in_proj.weight" not in shapes:
        return None
    if "img_in.weight" in shapes:
        return "comfy"
    return "diffusers" if "x_embedder.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(COMFY, shapes) if layout == "comfy" else shapes
    width, channels = ours["x_embedder.weight"]
    head = ours["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "num_layers": count(ours, "transformer_blocks"),
        "num_single_layers": count(ours, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": ours["context_embedder.weight"][1],
        "axes_dims_rope": tokens.rope_axes(head),
        "approximator_num_channels": ours[f"{MODULATION}.in_proj.weight"][1],
        "approximator_hidden_dim": ours[f"{MODULATION}.in_proj.weight"][0],
        "approximator_layers": count(ours, f"{MODULATION}.layers"),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models import chroma

    return chroma.build(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Chroma denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
)


def channels_of(denoiser: torch.nn.Module) -> int:
    return denoiser.config.in_channels // 4


def tokenize(tokenizers: list[Any], caption: str, *, length: int = TOKENS) -> tuple[list[int], str]:
    """T5's ids with its end token, at most `length`, and the end of the caption that did not fit."""
    return ended(tokenizers[0], caption, length)


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, length: int = TOKENS
) -> Cond:
    """{"text": [T,D]}: T5's last states of the caption and of one token of padding, which T5 itself does not look at.

    So the model was trained: its mask leaves out all padding but the first token. A caption of full length has none.
    """
    import torch

    ids, _ = tokenize(tokenizers, text.caption, length=length)
    padding = [tokenizers[0].pad_token_id][: length - len(ids)]
    mask = [1] * len(ids) + [0] * len(padding)
    whole = (torch.tensor([each], device=device) for each in (ids + padding, mask))
    return {"text": t5.states(encoders[0], *whole)[0]}


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], each as long as it is."""
    import torch

    from library.checkpointing import exact_times

    dtype, device, (height, width) = denoiser.x_embedder.weight.dtype, noisy.device, noisy.shape[-2:]
    texts = [cond["text"].to(dtype) for cond in conds]
    text, hidden = ragged.pad(texts), tokens.pack(noisy).to(dtype)
    keys = tokens.key_mask(ragged.mask(texts), hidden)
    with exact_times(denoiser.time_text_embed.time_proj, [sigma.float() * 1000]):
        out = denoiser(
            hidden,
            text,
            sigma,
            tokens.grid(height // 2, width // 2, device),
            torch.zeros(text.shape[1], 3, device=device),
            joint_attention_kwargs=None if keys is None else {"keys": keys},
            return_dict=False,
        )[0]
    return tokens.unpack(out, height, width).float()


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, *vae_ldm.FLUX)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, *vae_ldm.FLUX)


def sampling_shift(tokens: int, steps: int) -> float:
    from library import flow

    return flow.flux_shift(tokens)


def variant_of(options: Any) -> Family:
    """The record with the run's text length."""
    length = options.t5xxl_max_token_length
    if length == TOKENS:
        return CHROMA
    cut = {"tokenize": partial(tokenize, length=length), "encode": partial(encode, length=length)}
    return replace(CHROMA, **cut, recipe=f"t5 {length}")


LENGTH = Option("t5xxl_max_token_length", "int", TOKENS, "T5 tokens of a caption", low=1)

CHROMA = Family(
    name="chroma",
    title="Chroma",
    denoiser=DENOISER,
    vae=vae_ldm.part("a Flux-type VAE", channels=16),
    text_encoders=(t5.xxl(folder="text_encoder"),),
    tokenize=tokenize,
    encode=encode,
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    # diffusion-pipe's example (the seed's system): sigma from a logit-normal distribution on Flux's line.
    defaults={"timestep_sampling": "flux_shift"},
    options=(
        LENGTH,
        # diffusion-pipe and sd-scripts compute it without gradients.
        Option("distilled_guidance_lr", "float", 0.0, "learning rate of the distilled guidance layer, 0 = not trained",
               low=0),
    ),
    own_rates=(("distilled_guidance_lr", f"{MODULATION}."),),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="chroma",
    base_model_version="chroma",
    resolution=1024,
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "flash turbo"),
    channels_of=channels_of,
    inference_options=(LENGTH,),
    sampling={"sample_steps": 35, "scale": 5.0},  # diffusers' ChromaPipeline, which shifts by the size of the picture
    sampling_shift=sampling_shift,
    text_widths=lambda denoiser: (denoiser["joint_attention_dim"],),
    released={"denoiser": "chroma", "vae": "vae_flux", "t5xxl": "te_t5xxl"},
)  # fmt: skip
