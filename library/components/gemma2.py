"""Gemma 2 2B as Lumina 2's text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import decoder, tokenizers
from library.components.sizes import finish, stated
from library.families.family import Part, Tokenizer
from library.layout import Shape

if TYPE_CHECKING:
    import torch

# google/gemma-2-2b's published configuration: what no shape shows.
HEAD, ROPE_THETA, NORM_EPS, MAX_POSITIONS, WINDOW = 256, 10_000.0, 1e-6, 8192, 4096
SOFT_CAP = 50.0  # attention logits go through 50 tanh(x / 50). ComfyUI leaves it out; Lumina 2 was trained with it


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Gemma 2 has four norms a layer and, unlike Gemma 3, no q_norm."""
    layout = decoder.spelling(shapes)
    first = decoder.first_layer(shapes, layout) if layout else {}
    is_gemma2 = "pre_feedforward_layernorm.weight" in first and "self_attn.q_norm.weight" not in first
    return layout if is_gemma2 else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    out = decoder.sizes(shapes, metadata, layout, head=HEAD, theta=ROPE_THETA)
    return out | {
        "query_pre_attn_scalar": out["head_dim"],
        "attn_logit_softcapping": stated(metadata, "attn_logit_softcapping", SOFT_CAP),
        "sliding_window": WINDOW,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": MAX_POSITIONS,
        "attn_implementation": "eager",  # the only one that caps the logits
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**configuration))


def part(title: str = "a Gemma 2 text encoder", option: str = "text_encoder") -> Part:
    """Lumina 2: read at decoder.states(..., -2)."""
    return Part(
        name="text_encoder",
        title=title,
        option=option,
        layouts=decoder.LAYOUTS,
        recognise=recognise,
        config=config,
        build=build,
        prefixes=decoder.names("gemma2_2b"),
        carried=(*decoder.CARRIED, tokenizers.SPIECE),
        diffusers_folder="text_encoder",
        finish=finish,
        stated=("head_dim", "attn_logit_softcapping"),
        tokenizer=Tokenizer(
            "tokenizer",
            "Alpha-VLLM/Lumina-Image-2.0",
            subfolder="tokenizer",
            inside=tokenizers.SPIECE,
            load=tokenizers.load_gemma,
        ),
        precision_options="llm",
    )
