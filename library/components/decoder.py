"""What the language models have in common that serve as text encoders: Qwen3, Qwen2.5, Llama 3, Mistral, Gemma 2.

Files have `model.` before every name (transformers' ForCausalLM), folders of the bare model have not. What is read is
the state after some layers: `states`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.components.sizes import count, stated
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD = 128  # width of a head in Qwen, Llama 3 and Mistral; toy files are as wide as this divides them
PREFIX = {"original": "model.", "flat": ""}
LAYOUTS: dict[str, list[Row]] = {
    name: [row(prefix + module, module) for module in ("embed_tokens", "layers", "norm")]
    for name, prefix in PREFIX.items()
}


def spelling(shapes: Mapping[str, Shape]) -> str | None:
    """The layout's name if this is a language model at all."""
    for layout, prefix in PREFIX.items():
        if {f"{prefix}embed_tokens.weight", f"{prefix}layers.0.self_attn.q_proj.weight"} <= shapes.keys():
            return layout
    return None


def first_layer(shapes: Mapping[str, Shape], layout: str) -> dict[str, Shape]:
    """Shapes below the first layer, without its prefix."""
    prefix = PREFIX[layout] + "layers.0."
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def sizes(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str, head: int = HEAD, theta: float = 1e6
) -> dict[str, Any]:
    """The part of the configuration that all share, from the shapes; `head` and `theta` are the published ones."""
    prefix, first = PREFIX[layout], first_layer(shapes, layout)
    queries, keys = first["self_attn.q_proj.weight"][0], first["self_attn.k_proj.weight"][0]
    known = first["self_attn.q_norm.weight"][0] if "self_attn.q_norm.weight" in first else math.gcd(head, queries, keys)
    head = stated(metadata, "head_dim", known)
    return {
        "vocab_size": shapes[f"{prefix}embed_tokens.weight"][0],
        "hidden_size": shapes[f"{prefix}embed_tokens.weight"][1],
        "intermediate_size": first["mlp.gate_proj.weight"][0],
        "num_hidden_layers": count(shapes, f"{prefix}layers."),
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
        "head_dim": head,
        "rope_parameters": {"rope_type": "default", "rope_theta": stated(metadata, "rope_theta", theta)},
        "use_cache": False,
    }


def states(
    model: torch.nn.Module,
    ids: Tensor | None,
    layers: int | Sequence[int] = -1,
    mask: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """States [B,T,D] of token ids [B,T], or of `inputs_embeds`, after `layers`; of several layers [B,N,T,D].

    Counted as transformers counts hidden states: 0 the embeddings, k after layer k, the last (-1) after the final norm.
    `mask` [B,T] hides padding (0) from every token; without one all tokens are real.
    """
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **inputs)
    if isinstance(layers, int):
        return out.hidden_states[layers]
    import torch

    return torch.stack([out.hidden_states[layer] for layer in layers], dim=1)


def inside(*names: str) -> tuple[str, ...]:
    """Prefixes in ComfyUI's all-in-one files, and in a whole pipeline saved as one file."""
    return (*(f"text_encoders.{name}.transformer." for name in names), "text_encoder.")


def names(*inside_of: str) -> tuple[str, ...]:
    """Container prefixes: none, a vision model's text half, all-in-one files."""
    return ("", "language_model.", "model.language_model.", *inside(*inside_of))


# What files hold besides: the output head, and the picture half of LLaVA and Mistral.
CARRIED = ("lm_head.weight", "vision_tower.", "multi_modal_projector.")


def plain(shapes: Mapping[str, Shape], others: tuple[int, ...]) -> str | None:
    """The spelling of a language model without anything special, like Llama's and Mistral's; None for another.

    They are told apart by `others`: the published vocabularies of those that it is not.
    """
    layout = spelling(shapes)
    if not layout or shapes[f"{PREFIX[layout]}embed_tokens.weight"][0] in others:
        return None
    special = ("self_attn.q_norm.weight", "self_attn.q_proj.bias", "pre_feedforward_layernorm.weight")
    first = first_layer(shapes, layout)
    return None if any(key in first for key in special) else layout
