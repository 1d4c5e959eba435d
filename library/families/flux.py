"""FLUX.1 dev, schnell and Kontext (Black Forest Labs, 2024-2025), and what is made of them: Flex.1 and Flex.2, for one.

Facts: the model is given sigma and multiplies by 1000 itself, in its own number format, and returns noise - x0.
Latents are [B,16,h,w], 2x2 patches. Text is T5-XXL's last states without a mask and CLIP-L's pooled vector. All but
schnell also embed a guidance. Kontext sees reference pictures as more tokens, one further on the index axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import clip, few_steps, flux_text, ragged, t5, tokens, vae_ldm
from library.components.flux_blocks import FLUX as COMFY
from library.components.flux_blocks import TIMES
from library.errors import ConfigError
from library.families.family import Cond, Family, ItemInput, Part
from library.layout import Shape, count, identity, our_view
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")
FLEX2_CONTROLS = 33  # channels of Flex.2 for a masked picture, its mask and a control picture: all 0 = none of them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """HunyuanVideo has these names too, but embeds patches of a video; Chroma has no modulation in its blocks."""
    if "vector_in.in_layer.weight" in shapes and "double_blocks.0.img_mod.lin.weight" in shapes:
        return "comfy" if "img_in.weight" in shapes else None
    guided = f"{TIMES}.text_embedder.linear_1.weight" in shapes and "x_embedder.weight" in shapes
    return "diffusers" if guided and "single_transformer_blocks.0.proj_mlp.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(COMFY, shapes) if layout == "comfy" else shapes
    width, channels = ours["x_embedder.weight"]
    head, out = ours["transformer_blocks.0.attn.norm_q.weight"][0], ours["proj_out.weight"][0]
    if channels not in (out, out + 4 * FLEX2_CONTROLS):
        raise ConfigError(
            f"this Flux model takes {channels} channels of input, which are made for filling or for control pictures; "
            f"give one that takes {out} (dev, schnell, Kontext, Flex.1) or {out + 4 * FLEX2_CONTROLS} (Flex.2)"
        )
    return {
        "in_channels": channels,
        "out_channels": out,
        "num_layers": count(ours, "transformer_blocks"),
        "num_single_layers": count(ours, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": ours["context_embedder.weight"][1],
        "pooled_projection_dim": ours[f"{TIMES}.text_embedder.linear_1.weight"][1],
        "guidance_embeds": f"{TIMES}.guidance_embedder.linear_1.weight" in ours,
        "axes_dims_rope": tokens.rope_axes(head),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Flux denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
)


def channels_of(denoiser: torch.nn.Module) -> int:
    return denoiser.config.out_channels // 4


def placing(pictures: list[Tensor], method: str) -> list[tuple[int, int, int]]:
    """(index, row, column) of the first token of each reference picture."""
    placed, height, width = [], 0, 0
    for k, picture in enumerate(pictures, 1):
        if method == "index":
            placed.append((k, 0, 0))
            continue
        rows, columns = picture.shape[-2] // 2, picture.shape[-1] // 2
        top, left = (0, width) if rows + height > columns + width else (height, 0)
        height, width = max(height, top + rows), max(width, left + columns)
        placed.append((1, top, left))
    return placed


def predict(
    denoiser: torch.nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    conds: list[Cond],
    *,
    guidance: float = 1.0,
    bypass_guidance_embedding: bool = False,
    references: str = "offset",
) -> Tensor:
    """Velocity [B,C,h,w] float32.

    Conds: "text" [T,D], "pooled" [D]; "control.0", .. [C,h,w] for Kontext; "guidance" [] where an item's differs from
    `guidance`. `references` places several references as ComfyUI's methods of these names do: "offset" side by side
    at index 1, "index" at 1, 2, .. `bypass_guidance_embedding` leaves the guidance out, as Flex.1-alpha is trained.
    """
    run = partial(_of_one_size, denoiser, guidance, bypass_guidance_embedding, references)
    return tokens.in_groups(run, noisy, sigma, conds)


def _of_one_size(
    denoiser: torch.nn.Module, guidance: float, bypass: bool, method: str, noisy: Tensor, sigma: Tensor, conds: list
) -> Tensor:
    import torch

    from library.checkpointing import exact_times

    dtype, device, (height, width) = denoiser.x_embedder.weight.dtype, noisy.device, noisy.shape[-2:]
    texts, others = [cond["text"].to(dtype) for cond in conds], tokens.references(conds)
    text = ragged.pad(texts)
    controls = noisy.new_zeros(len(noisy), denoiser.config.in_channels // 4 - noisy.shape[1], height, width)
    hidden = torch.cat([tokens.pack(torch.cat([noisy, controls], 1)), *map(tokens.pack, others)], 1).to(dtype)
    keys = tokens.key_mask(ragged.mask(texts), hidden)
    places = [tokens.grid(height // 2, width // 2, device)]
    for picture, (index, top, left) in zip(others, placing(others, method), strict=True):
        rows, columns = picture.shape[-2] // 2, picture.shape[-1] // 2
        places.append(tokens.grid(rows, columns, device, index=index, row=top, column=left))
    guided = denoiser.config.guidance_embeds
    scale = ragged.scalars(conds, "guidance", guidance, sigma) if guided else None
    times = [sigma.float() * 1000, scale * 1000] if guided else [sigma.float() * 1000]
    embed = denoiser.time_text_embed
    with exact_times(embed.time_proj, times), _silent(embed.guidance_embedder if guided and bypass else None):
        out = denoiser(
            hidden,
            text,
            torch.stack([cond["pooled"] for cond in conds]).to(dtype),
            sigma,
            torch.cat(places),
            torch.zeros(text.shape[1], 3, device=device),
            scale,
            None if keys is None else {"attention_mask": keys},
            return_dict=False,
        )[0]
    return tokens.unpack(out, height, width).float()


@contextlib.contextmanager
def _silent(module: torch.nn.Module | None) -> Iterator[None]:
    """Inside, the module gives zeros."""
    if module is None:
        yield
        return
    handle = module.register_forward_hook(lambda module, args, out: out.new_zeros(out.shape))
    try:
        yield
    finally:
        handle.remove()


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, *vae_ldm.FLUX)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, *vae_ldm.FLUX)


def encode_item(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], item: ItemInput) -> Cond:
    """{"control.k": [C,h,w]}, the reference pictures of Kontext; nothing for text-to-image."""
    return {f"control.{k}": encode_image(vae, picture[None])[0] for k, picture in enumerate(item.controls)}


def sampling_shift(tokens: int, steps: int) -> float:
    from library import flow

    return flow.flux_shift(tokens)


def variant_of(options: Any) -> Family:
    """The record with the run's text length, mask, guidance and references; schnell's, if the file has no guidance."""
    from library.checkpoints import find_part, path_of

    checkpoint, layout = find_part(DENOISER, path_of(DENOISER, options))
    is_guided = DENOISER.config(checkpoint.shapes, checkpoint.metadata, layout)["guidance_embeds"]
    bypass, is_training = options.bypass_guidance_embedding, hasattr(options, "given")
    if bypass and not is_guided:
        raise ConfigError(f"--bypass_guidance_embedding: {checkpoint.path} embeds no guidance; remove the option")
    if is_training and options.given("guidance_scale") and (bypass or not is_guided):
        why = "--bypass_guidance_embedding is set" if bypass else f"{checkpoint.path} embeds no guidance"
        raise ConfigError(f"--guidance_scale {options.guidance_scale:g} has no effect: {why}; remove it")
    length = options.t5xxl_max_token_length or (T5_TOKENS if is_guided else T5_TOKENS_SCHNELL)
    masked = options.apply_t5_attn_mask
    family = replace(
        FLUX,
        tokenize=partial(flux_text.tokenize, length=length),
        encode=partial(flux_text.encode, length=length, masked=masked),
        predict=partial(
            predict,
            guidance=options.guidance_scale if is_training else 1.0,
            bypass_guidance_embedding=bypass,
            references=options.reference_latents_method,
        ),
        recipe=f"t5 {length}{' masked' if masked else ''}",
    )
    if is_guided:
        return replace(family, sampling={"sample_steps": FLUX.sampling["sample_steps"]}) if bypass else family
    advice = partial(few_steps.sentence, f"{checkpoint.path} embeds no guidance, like FLUX.1 schnell")
    return replace(family, title="FLUX.1 schnell", sampling=SCHNELL, architecture="flux-1-schnell", advice=advice)


# T5 tokens of the published models, and of schnell (Black Forest Labs' code).
T5_TOKENS, T5_TOKENS_SCHNELL = 512, 256
SCHNELL = {"sample_steps": 4, "flow_shift": 1.0}  # Black Forest Labs' code: its sigmas are not shifted

OPTIONS = (
    Option("bypass_guidance_embedding", "flag", False, "leave the embedded guidance out, as Flex.1-alpha is trained"),
    Option("apply_t5_attn_mask", "flag", False, "the model sees the caption's own tokens and no padding"),
    Option("t5xxl_max_token_length", "int", None, "T5 tokens of a caption; 512, for schnell 256, if not set", low=1),
    Option(
        "reference_latents_method", "str", "offset", "places of several control pictures, as ComfyUI calls them: side "
        "by side, or one behind the other", choices=("offset", "index"),
    ),
)  # fmt: skip

FLUX = Family(
    name="flux",
    title="FLUX.1",
    denoiser=DENOISER,
    vae=vae_ldm.part("a Flux-type VAE", channels=16),
    text_encoders=(clip.large(), t5.xxl()),
    tokenize=partial(flux_text.tokenize, length=T5_TOKENS),
    encode=partial(flux_text.encode, length=T5_TOKENS, masked=False),
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    # The advice of musubi-tuner and, at 1024 pixels where shift 3.1582 is the same, of sd-scripts; diffusion-pipe's.
    # sd-scripts' names, which ComfyUI takes; no text encoder is trained unless --text_encoder_lr says so.
    text_prefixes=("lora_te1", "lora_te3"),
    defaults={"text_encoder_lr": [0.0, 0.0], "timestep_sampling": "flux_shift"},
    options=(
        Option("guidance_scale", "float", 1.0, "guidance that the model is given in training", low=0),  # the same three
        *OPTIONS,
    ),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="flux-1-dev",
    base_model_version="flux1",
    resolution=1024,
    encode_item=encode_item,
    max_controls=8,
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "turbo hyper-flux hyper_flux"),
    channels_of=channels_of,
    inference_options=OPTIONS,
    sampling={"sample_steps": 28, "guidance_scale": 3.5},  # diffusers' FluxPipeline
    text_widths=lambda denoiser: (None, denoiser["joint_attention_dim"]),
    sampling_shift=sampling_shift,
)
