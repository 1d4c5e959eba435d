"""Qwen3 as a text encoder: ComfyUI's single files and transformers folders, sizes from the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.families.family import Part, Tokenizer
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch

# Qwen3's published configuration (all sizes): what no shape shows.
ROPE_THETA, NORM_EPS, MAX_POSITIONS = 1_000_000.0, 1e-6, 40_960
LAYERS = "model.layers."


def rows(ours: Mapping[str, Shape]) -> Sequence[Row]:
    """Files have `model.` before every name, transformers' Qwen3Model has not."""
    return [row("model.embed_tokens", "embed_tokens"), row("model.layers", "layers"), row("model.norm", "norm")]


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Qwen3 has q_norm and, unlike Qwen2.5, no bias in its projections; it is no vision model."""
    first = LAYERS + "0."
    is_qwen3 = first + "self_attn.q_norm.weight" in shapes and first + "self_attn.q_proj.bias" not in shapes
    return "original" if is_qwen3 and "model.embed_tokens.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    first, head = LAYERS + "0.", shapes[LAYERS + "0.self_attn.q_norm.weight"][0]
    layers = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith(LAYERS))
    return {
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": shapes["model.embed_tokens.weight"][1],
        "intermediate_size": shapes[first + "mlp.gate_proj.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": shapes[first + "self_attn.q_proj.weight"][0] // head,
        "num_key_value_heads": shapes[first + "self_attn.k_proj.weight"][0] // head,
        "head_dim": head,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**configuration))


def finish(model: torch.nn.Module, device: Any) -> None:
    """Compute the rotary frequencies, which no file holds and which a model built on the meta device lacks."""
    import torch

    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(model.config)


def part(title: str, hub: str, option: str = "text_encoder") -> Part:
    return Part(
        name="text_encoder",
        title=title,
        option=option,
        layouts={"original": rows},
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "text_encoders.qwen3_4b.transformer.", "text_encoder."),
        carried=("lm_head.weight",),
        diffusers_folder="text_encoder",
        finish=finish,
        tokenizer=Tokenizer("tokenizer", hub),
    )
