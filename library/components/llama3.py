"""Llama 3 8B as a text encoder: HunyuanVideo's LLaVA (its text half) and HiDream's Llama 3.1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import decoder
from library.components.sizes import finish, stated
from library.families.family import Part, Tokenizer
from library.layout import Shape

if TYPE_CHECKING:
    import torch

# Llama 3's published configuration.
ROPE_THETA, NORM_EPS, MAX_POSITIONS = 500_000.0, 1e-5, 8192
# Llama 3.1 stretches its long wavelengths. ComfyUI does not; HiDream was trained with it.
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": MAX_POSITIONS,
}
STRETCHED_POSITIONS = 131_072
TEKKEN_VOCABULARY = 131072  # Mistral's


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    return decoder.plain(shapes, (TEKKEN_VOCABULARY,)) if _normed(shapes) else None


def _normed(shapes: Mapping[str, Shape]) -> bool:
    return "model.norm.weight" in shapes or "norm.weight" in shapes


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str, rope: str) -> dict[str, Any]:
    """LlamaConfig; `rope` is the published kind, "default" or "llama3"."""
    out = decoder.sizes(shapes, metadata, layout, theta=ROPE_THETA)
    is_stretched = stated(metadata, "rope_type", rope) == "llama3"
    if is_stretched:
        out["rope_parameters"] |= STRETCHED
    positions = STRETCHED_POSITIONS if is_stretched else MAX_POSITIONS
    return out | {"rms_norm_eps": NORM_EPS, "max_position_embeddings": positions}


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**configuration))


def _part(name: str, title: str, option: str, folder: str, inside: str, rope: str, tokenizer: Tokenizer) -> Part:
    return Part(
        name=name,
        title=title,
        option=option,
        layouts=decoder.LAYOUTS,
        recognise=recognise,
        config=partial(config, rope=rope),
        build=build,
        prefixes=decoder.names(inside),
        carried=decoder.CARRIED,
        diffusers_folder=folder,
        finish=finish,
        tokenizer=tokenizer,
        precision_options="llm",
    )


def llava(title: str = "a LLaVA-Llama-3 text encoder", option: str = "text_encoder") -> Part:
    """HunyuanVideo: the text half of llava-llama-3-8b, read at decoder.states(..., -3)."""
    tokenizer = Tokenizer("tokenizer", "hunyuanvideo-community/HunyuanVideo", subfolder="tokenizer")
    return _part("text_encoder", title, option, "text_encoder", "llama", "default", tokenizer)


def llama31(title: str = "a Llama 3.1 8B text encoder", option: str = "llama3") -> Part:
    """HiDream: all layers but the embeddings are read, decoder.states(..., range(1, layers + 1))."""
    hub = "meta-llama/Meta-Llama-3.1-8B-Instruct"
    tokenizer = Tokenizer("tokenizer_llama3", hub, beside=("tokenizer_4", "tokenizer_llama3"))
    return _part("llama3", title, option, "text_encoder_4", "llama", "llama3", tokenizer)
