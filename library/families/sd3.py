"""Stable Diffusion 3 medium and 3.5 medium and large (Stability AI, 2024): the first multimodal diffusion transformer.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,16,h,w]; patches of 2x2 and a table of
positions, of which the middle is used, are parts of the model. Text is the states of CLIP-L and CLIP-G side by side,
then those of T5-XXL, without a mask, and both CLIPs' pooled vectors. 3.5 normalises queries and keys; 3.5 medium has a
second attention in its first blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import tokens
from library.families.family import Cond, Part
from library.layout import Row, Shape, block, count, identity, our_view, row, swap_halves

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
