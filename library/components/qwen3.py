"""Qwen3 as a text encoder (0.6B, 4B, 8B): ComfyUI's single files and transformers folders, sizes from the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import decoder
from library.components.sizes import finish
from library.families.family import Part, Tokenizer
from library.layout import Shape

if TYPE_CHECKING:
    import torch

# Qwen3's published configuration (all sizes): what no shape shows.
ROPE_THETA, NORM_EPS, MAX_POSITIONS = 1_000_000.0, 1e-6, 40_960


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Qwen3 has q_norm and, unlike Qwen2.5, no bias in its projections, nor Gemma 3's norms before the feed-forward."""
    layout = decoder.spelling(shapes)
    first = decoder.first_layer(shapes, layout) if layout else {}
    foreign = ("self_attn.q_proj.bias", "pre_feedforward_layernorm.weight")
    is_qwen3 = "self_attn.q_norm.weight" in first and not any(key in first for key in foreign)
    return layout if is_qwen3 else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    return decoder.sizes(shapes, metadata, layout, theta=ROPE_THETA) | {
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": MAX_POSITIONS,
        "attention_bias": False,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**configuration))


def part(title: str, hub: str, option: str = "text_encoder") -> Part:
    return Part(
        name="text_encoder",
        title=title,
        option=option,
        layouts=decoder.LAYOUTS,
        recognise=recognise,
        config=config,
        build=build,
        prefixes=decoder.names("qwen3_4b", "qwen3_8b", "qwen3_06b"),
        carried=decoder.CARRIED,
        diffusers_folder="text_encoder",
        finish=finish,
        tokenizer=Tokenizer("tokenizer", hub),
        precision_options="llm",
    )
