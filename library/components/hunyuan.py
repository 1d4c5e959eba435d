"""The names of Tencent's Hunyuan models, for pictures and for videos, which are the same but for the outermost modules.

Released files have Tencent's names, ComfyUI's LoRAs (and some of its files) ComfyUI's; the tensors are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from library.layout import Row, Shape, block, count, row, swap_halves

Names = tuple[str, ...]  # (ComfyUI's name, Tencent's, ours ...)

REFINE = "context_embedder"
ROPE_THETA = 256.0  # of Tencent's configurations
REFINER = [
    ("input_embedder", "input_embedder", "proj_in"),
    ("t_embedder.in_layer", "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.out_layer", "t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("c_embedder.in_layer", "c_embedder.linear_1", "time_text_embed.text_embedder.linear_1"),
    ("c_embedder.out_layer", "c_embedder.linear_2", "time_text_embed.text_embedder.linear_2"),
]
REFINER_BLOCK = [
    ("norm1", "norm1", "norm1"),
    ("norm2", "norm2", "norm2"),
    ("adaLN_modulation.1", "adaLN_modulation.1", "norm_out.linear"),
    ("self_attn.qkv", "self_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("self_attn.proj", "self_attn_proj", "attn.to_out.0"),
    ("mlp.0", "mlp.fc1", "ff.net.0.proj"),
    ("mlp.2", "mlp.fc2", "ff.net.2"),
]
DOUBLE = [
    ("img_mod.lin", "img_mod.linear", "norm1.linear"),
    ("txt_mod.lin", "txt_mod.linear", "norm1_context.linear"),
    ("img_attn.qkv", "img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("txt_attn.qkv", "txt_attn_qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("img_attn.norm.query_norm.scale", "img_attn_q_norm.weight", "attn.norm_q.weight"),
    ("img_attn.norm.key_norm.scale", "img_attn_k_norm.weight", "attn.norm_k.weight"),
    ("txt_attn.norm.query_norm.scale", "txt_attn_q_norm.weight", "attn.norm_added_q.weight"),
    ("txt_attn.norm.key_norm.scale", "txt_attn_k_norm.weight", "attn.norm_added_k.weight"),
    ("img_attn.proj", "img_attn_proj", "attn.to_out.0"),
    ("txt_attn.proj", "txt_attn_proj", "attn.to_add_out"),
    ("img_mlp.0", "img_mlp.fc1", "ff.net.0.proj"),
    ("img_mlp.2", "img_mlp.fc2", "ff.net.2"),
    ("txt_mlp.0", "txt_mlp.fc1", "ff_context.net.0.proj"),
    ("txt_mlp.2", "txt_mlp.fc2", "ff_context.net.2"),
]
SINGLE = [
    ("modulation.lin", "modulation.linear", "norm.linear"),
    ("linear1", "linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("linear2", "linear2", "proj_out"),
    ("norm.query_norm.scale", "q_norm.weight", "attn.norm_q.weight"),
    ("norm.key_norm.scale", "k_norm.weight", "attn.norm_k.weight"),
]


def times(part: str, theirs: str, ours: str) -> list[Names]:
    """One embedding of a time or of guidance."""
    return [
        (f"{theirs}.in_layer", f"{theirs}.mlp.0", f"{part}.{ours}.linear_1"),
        (f"{theirs}.out_layer", f"{theirs}.mlp.2", f"{part}.{ours}.linear_2"),
    ]


GLYPHS = [
    ("byt5_in.layernorm", "byt5_in.layernorm", "context_embedder_2.norm"),
    *((f"byt5_in.fc{n}", f"byt5_in.fc{n}", f"context_embedder_2.linear_{n}") for n in (1, 2, 3)),
]
# In names of every layout.
MODULATION = ("_mod.lin", "modulation.lin", "norm1.linear", "norm1_context.linear", "norm.linear")


def table(column: int, outside: Sequence[Names], apart: bool = False) -> list[Row]:
    """The rows of ComfyUI's names (column 0) or Tencent's (1); `apart`: the double blocks' q, k and v are three."""

    def rows(names: Sequence[Names]) -> list[Row]:
        return [row(name[column], *name[2:]) for name in names]

    double = rows(DOUBLE)
    if apart:
        fused = [r for r in double if len(r.ours) == 3]
        parts = [row(r.theirs.removesuffix("qkv") + x, o) for r in fused for x, o in zip("qkv", r.ours, strict=True)]
        double = [*(r for r in double if len(r.ours) == 1), *parts]
    refiner = "txt_in.individual_token_refiner.blocks.{i}"
    return [
        *rows(outside),
        *block("txt_in", REFINE, *rows(REFINER)),
        *block(refiner, REFINE + ".token_refiner.refiner_blocks.{i}", *rows(REFINER_BLOCK)),
        *block("double_blocks.{i}", "transformer_blocks.{i}", *double),
        *block("single_blocks.{i}", "single_transformer_blocks.{i}", *rows(SINGLE)),
        row("img_in.proj", "x_embedder.proj"),
        row("final_layer.linear", "proj_out"),
        row("final_layer.adaLN_modulation.1", "norm_out.linear", op=swap_halves),
    ]


# The key by which each layout is told; the refiner's, as diffusers' other models have transformer blocks too.
FIRST = {
    "comfy": "double_blocks.0.img_attn.qkv.weight",
    "original": "double_blocks.0.img_attn_qkv.weight",
    "split": "double_blocks.0.img_attn_q.weight",
    "diffusers": f"{REFINE}.token_refiner.refiner_blocks.0.attn.to_q.weight",
}


def layout_of(shapes: Mapping[str, Shape], dimensions: int, layouts: Iterable[str]) -> str | None:
    """Which of these layouts a model is in whose patches have so many dimensions: pictures 2, videos 3."""
    embed = shapes.get("img_in.proj.weight") or shapes.get("x_embedder.proj.weight") or ()
    if len(embed) != 2 + dimensions:
        return None
    return next((layout for layout in layouts if FIRST[layout] in shapes), None)


def sizes(ours: Mapping[str, Shape], patch: int) -> dict[str, Any]:
    """What the configurations of the video models share, from shapes under our names."""
    width, channels = ours["x_embedder.proj.weight"][:2]
    head = ours["transformer_blocks.0.attn.norm_q.weight"][0]
    side = head * 7 // 32 * 2  # of the rotary axes; time has the rest: 16, 56 and 56 of 128
    return {
        "in_channels": channels,
        "out_channels": ours["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "patch_size_t": 1,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count(ours, "transformer_blocks"),
        "num_refiner_layers": count(ours, f"{REFINE}.token_refiner.refiner_blocks"),
        "mlp_ratio": ours["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "text_embed_dim": ours[f"{REFINE}.proj_in.weight"][1],
        "rope_theta": ROPE_THETA,
        "rope_axes_dim": (head - 2 * side, side, side),
    }
