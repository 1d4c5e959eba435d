"""Stable Diffusion 3 medium and 3.5 medium and large (Stability AI, 2024): the first multimodal diffusion transformer.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,16,h,w]; patches of 2x2 and a table of
positions, of which the middle is used, are parts of the model. Text is the states of CLIP-L and CLIP-G side by side,
then those of T5-XXL, without a mask, and both CLIPs' pooled vectors. 3.5 normalises queries and keys; 3.5 medium has a
second attention in its first blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.components import clip, few_steps, sd3_text, t5, tokens, vae_ldm
from library.errors import ConfigError
from library.families.family import Cond, Family, Part
from library.layout import Row, Shape, block, count, identity, our_view, row, swap_halves
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD = 64  # Stability's code; where queries and keys are normalised, the norms tell
ATTENTION = [  # theirs below x_block or context_block, ours below attn
    ("attn.qkv", ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")),
    ("attn.ln_q", ("norm_q",), ("norm_added_q",)),
    ("attn.ln_k", ("norm_k",), ("norm_added_k",)),
    ("attn.proj", ("to_out.0",), ("to_add_out",)),
]
TIMES = "time_text_embed"
SHARED = [
    row("pos_embed", "pos_embed.pos_embed"),
    row("x_embedder.proj", "pos_embed.proj"),
    row("context_embedder"),
    row("t_embedder.mlp.0", f"{TIMES}.timestep_embedder.linear_1"),
    row("t_embedder.mlp.2", f"{TIMES}.timestep_embedder.linear_2"),
    row("y_embedder.mlp.0", f"{TIMES}.text_embedder.linear_1"),
    row("y_embedder.mlp.2", f"{TIMES}.text_embedder.linear_2"),
    row("final_layer.linear", "proj_out"),
    row("final_layer.adaLN_modulation.1", "norm_out.linear", op=swap_halves),
    *block(
        "joint_blocks.{i}",
        "transformer_blocks.{i}",
        *(row(f"x_block.{theirs}", *(f"attn.{name}" for name in ours)) for theirs, ours, _ in ATTENTION),
        *(row(f"context_block.{theirs}", *(f"attn.{name}" for name in ours)) for theirs, _, ours in ATTENTION),
        *(
            row(f"x_block.{theirs.replace('attn', 'attn2')}", *(f"attn2.{name}" for name in ours))
            for theirs, ours, _ in ATTENTION
        ),
        row("x_block.mlp.fc1", "ff.net.0.proj"),
        row("x_block.mlp.fc2", "ff.net.2"),
        row("context_block.mlp.fc1", "ff_context.net.0.proj"),
        row("context_block.mlp.fc2", "ff_context.net.2"),
        row("x_block.adaLN_modulation.1", "norm1.linear"),
    ),
]
BLOCKS = ("transformer_blocks",)
ADAPTED = ("joint_blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def comfy(ours: Mapping[str, Shape]) -> list[Row]:
    """Stability's own names. The text's last modulation is (shift, scale) there and (scale, shift) in diffusers."""
    last, rows = count(ours, "transformer_blocks") - 1, list(SHARED)
    for i in range(last + 1):
        theirs, own = (
            f"joint_blocks.{i}.context_block.adaLN_modulation.1",
            f"transformer_blocks.{i}.norm1_context.linear",
        )
        rows.append(row(theirs, own, op=swap_halves if i == last else None))
    return rows


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if "joint_blocks.0.x_block.attn.qkv.weight" in shapes:
        return "comfy"
    return "diffusers" if {"pos_embed.pos_embed", "context_embedder.weight"} <= shapes.keys() else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(SHARED, shapes) if layout == "comfy" else shapes
    width, channels, patch, _ = ours["pos_embed.proj.weight"]
    head = ours.get("transformer_blocks.0.attn.norm_q.weight", (HEAD,))[0]
    return {
        "in_channels": channels,
        "out_channels": ours["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": count(ours, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": ours["context_embedder.weight"][1],
        "caption_projection_dim": ours["context_embedder.weight"][0],
        "pooled_projection_dim": ours[f"{TIMES}.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(ours["pos_embed.pos_embed"][1]),
        "dual_attention_layers": [
            i for i in range(count(ours, "transformer_blocks")) if f"transformer_blocks.{i}.attn2.to_q.weight" in ours
        ],
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in ours else None,
    }


MEDIUM = {  # 3.5, as released
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**(MEDIUM | configuration))


DENOISER = Part(
    name="denoiser",
    title="a Stable Diffusion 3 denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": comfy, "diffusers": identity},
    recognise=recognise,
    view=lambda shapes, layout: our_view(SHARED, shapes) if layout == "comfy" else shapes,
    config=config,
    build=build,
    prefixes=("model.diffusion_model.", "", "diffusion_model."),
    diffusers_folder="transformer",
)


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], "pooled" [D]."""
    # The model has no text mask, as its padding is read too; texts are of one length but for a run that changes it.
    return tokens.in_groups(partial(_of_one_length, denoiser), noisy, sigma, conds, lambda cond: len(cond["text"]))


def _of_one_length(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    import torch

    dtype = denoiser.context_embedder.weight.dtype
    return denoiser(
        noisy.to(dtype),
        torch.stack([cond["text"] for cond in conds]).to(dtype),
        torch.stack([cond["pooled"] for cond in conds]).to(dtype),
        sigma.float() * 1000,
        return_dict=False,
    )[0].float()


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, *vae_ldm.SD3)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, *vae_ldm.SD3)


def kind_of(config: Mapping[str, Any]) -> str:
    """sd-scripts' name of the model that has this configuration."""
    if config["qk_norm"] is None:
        return "3-medium"
    return "3-5-medium" if config["dual_attention_layers"] else "3-5-large"


def variant_of(options: Any) -> Family:
    """The record for the model in this file and the encoders that there are. Raises ConfigError."""
    from library.checkpoints import configuration_of, find_part, path_of
    from library.components.sizes import width_of

    checkpoint, layout = find_part(DENOISER, path_of(DENOISER, options))
    config = DENOISER.config(checkpoint.shapes, checkpoint.metadata, layout)
    kind, width = kind_of(config), config["joint_attention_dim"]
    first = path_of(ENCODERS[0], options)  # checked after this
    large = width_of(configuration_of(ENCODERS[0], first)) if first and Path(first).exists() else 0
    has_t5 = path_of(ENCODERS[2], options) is not None
    without = [name for name in T5_OPTIONS if getattr(options, "given", lambda name: False)(name)]
    if without and not has_t5:
        raise ConfigError(f"--{without[0]} has no effect: there is no T5 in this run; give --t5xxl or remove it")
    length, masks = options.t5xxl_max_token_length, (options.apply_lg_attn_mask, options.apply_t5_attn_mask)
    settings = {"length": length, "width": width, "clip_masked": masks[0], "t5_masked": masks[1]}
    marks = (
        f"t5 {length if has_t5 else 'none'}",
        *(m for m, on in zip(("lg mask", "t5 mask"), masks, strict=True) if on),
    )
    return replace(
        SD3,
        title=TITLES[kind],
        text_encoders=ENCODERS[: 2 + has_t5],
        text_prefixes=SD3.text_prefixes[: 2 + has_t5],
        text_widths=lambda denoiser: (None, None, width)[: 2 + has_t5],
        tokenize=partial(sd3_text.tokenize, length=length),
        encode=partial(sd3_text.encode, **settings),
        sampling=SAMPLING[kind],
        architecture=f"stable-diffusion-{kind}",
        base_model_version=kind,
        vary=partial(sd3_text.vary, large=large),
        recipe=" ".join(marks),
        advice=few_steps.joined(SD3.advice, lambda options: () if has_t5 else (NO_T5,)),
    )


# Stability's model cards; the shift of the published schedulers.
SAMPLING = {
    "3-medium": {"sample_steps": 28, "scale": 7.0, "flow_shift": 3.0},
    "3-5-medium": {"sample_steps": 40, "scale": 4.5, "flow_shift": 3.0},
    "3-5-large": {"sample_steps": 28, "scale": 3.5, "flow_shift": 3.0},
}
TITLES = {kind: f"Stable Diffusion {kind.replace('3-5', '3.5').replace('-', ' ')}" for kind in SAMPLING}
# Both CLIPs have one vocabulary and, the padding apart, one tokenizer; CLIP-G's padding is token 0.
ENCODERS = (clip.large(), replace(clip.big(), tokenizer=None), t5.xxl(folder="text_encoder_3"))
T5_OPTIONS = ("t5xxl_max_token_length", "apply_t5_attn_mask", "t5_dropout_rate")
NO_T5 = "no T5 in this run: its part of the text is zeros, as the model knows it; --t5xxl names a file"
TEXT = (
    Option("t5xxl_max_token_length", "int", sd3_text.TOKENS, "T5 tokens of a caption", low=1),
    Option("apply_lg_attn_mask", "flag", False, "zeros instead of the states of both CLIPs' padding"),
    Option("apply_t5_attn_mask", "flag", False, "T5 sees no padding, whose states are zeros"),
)
SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3",
    denoiser=DENOISER,
    vae=vae_ldm.part("an SD3 VAE", channels=16),
    text_encoders=ENCODERS,
    tokenize=partial(sd3_text.tokenize, length=sd3_text.TOKENS),
    encode=partial(sd3_text.encode, width=4096),
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    text_prefixes=("lora_te1", "lora_te2", "lora_te3"),  # sd-scripts' names, which ComfyUI takes
    # The paper's logit-normal distribution, also diffusion-pipe's; no text encoder is trained unless the run says so.
    defaults={"timestep_sampling": "sigmoid", "text_encoder_lr": [0.0]},
    options=(
        *TEXT,
        Option("clip_l_dropout_rate", "float", 0.0, "how often an item has zeros for what CLIP-L gives", low=0, high=1),
        Option("clip_g_dropout_rate", "float", 0.0, "how often an item has zeros for what CLIP-G gives", low=0, high=1),
        Option("t5_dropout_rate", "float", 0.0, "how often an item has zeros for what T5 gives", low=0, high=1),
    ),
    # diffusers' names, which ComfyUI takes too, are what the seed's system saves.
    save_formats=("diffusers", "comfy", "kohya"),
    architecture="stable-diffusion-3-medium",
    base_model_version="3-medium",
    resolution=1024,
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "turbo lightning"),
    inference_options=TEXT,
    sampling=SAMPLING["3-medium"],
    released={"denoiser": "sd3", "vae": "vae_sd3", "clip_l": "te_clip_l", "clip_g": "te_clip_g", "t5xxl": "te_t5xxl"},
)
