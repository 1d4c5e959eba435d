"""The name tables of Flux, whose blocks Chroma has too: Black Forest Labs' names, also ComfyUI's, and diffusers'."""

from __future__ import annotations

from library.layout import block, row, swap_halves

DOUBLE = [
    row("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    row("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    row("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    row("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    row("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    row("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    row("img_attn.proj", "attn.to_out.0"),
    row("txt_attn.proj", "attn.to_add_out"),
    row("img_mlp.0", "ff.net.0.proj"),
    row("img_mlp.2", "ff.net.2"),
    row("txt_mlp.0", "ff_context.net.0.proj"),
    row("txt_mlp.2", "ff_context.net.2"),
]
SINGLE = [
    row("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    row("linear2", "proj_out"),
    row("norm.query_norm.scale", "attn.norm_q.weight"),
    row("norm.key_norm.scale", "attn.norm_k.weight"),
]
ROWS = [
    row("img_in", "x_embedder"),
    row("txt_in", "context_embedder"),
    row("final_layer.linear", "proj_out"),
    *block("double_blocks.{i}", "transformer_blocks.{i}", *DOUBLE),
    *block("single_blocks.{i}", "single_transformer_blocks.{i}", *SINGLE),
]

TIMES = "time_text_embed"
FLUX = [
    *ROWS,
    row("time_in.in_layer", f"{TIMES}.timestep_embedder.linear_1"),
    row("time_in.out_layer", f"{TIMES}.timestep_embedder.linear_2"),
    row("guidance_in.in_layer", f"{TIMES}.guidance_embedder.linear_1"),
    row("guidance_in.out_layer", f"{TIMES}.guidance_embedder.linear_2"),
    row("vector_in.in_layer", f"{TIMES}.text_embedder.linear_1"),
    row("vector_in.out_layer", f"{TIMES}.text_embedder.linear_2"),
    row("final_layer.adaLN_modulation.1", "norm_out.linear", op=swap_halves),
    *block(
        "double_blocks.{i}",
        "transformer_blocks.{i}",
        row("img_mod.lin", "norm1.linear"),
        row("txt_mod.lin", "norm1_context.linear"),
    ),
    *block("single_blocks.{i}", "single_transformer_blocks.{i}", row("modulation.lin", "norm.linear")),
]
