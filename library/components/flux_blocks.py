"""The name table of Flux's blocks, which Chroma has too: Black Forest Labs' names, also ComfyUI's, and diffusers'."""

from __future__ import annotations

from library.layout import block, row

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
