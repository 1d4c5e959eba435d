"""Mistral Small 3 24B as Flux 2's text encoder: whole, or ComfyUI's pruned file with its first 30 layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import decoder, tokenizers
from library.components.sizes import finish
from library.families.family import Part, Tokenizer
from library.layout import Shape

if TYPE_CHECKING:
    import torch

# Mistral Small 3's published configuration.
ROPE_THETA, NORM_EPS, MAX_POSITIONS = 1_000_000_000.0, 1e-5, 131_072
LLAMA_VOCABULARIES = (128256, 128320)


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    return decoder.plain(shapes, LLAMA_VOCABULARIES)


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """MistralConfig, and `final_norm`: a pruned file has no norm after its last layer."""
    return decoder.sizes(shapes, metadata, layout, theta=ROPE_THETA) | {
        "rms_norm_eps": NORM_EPS,
        "max_position_embeddings": MAX_POSITIONS,
        "sliding_window": None,
        "final_norm": f"{decoder.PREFIX[layout]}norm.weight" in shapes,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    import torch
    from transformers import MistralConfig, MistralModel

    rest = {key: value for key, value in configuration.items() if key != "final_norm"}
    model = MistralModel(MistralConfig(**rest))
    if not configuration["final_norm"]:
        model.norm = torch.nn.Identity()  # so that its last state is the bare one, as in the whole model
    return model


def part(title: str = "a Mistral Small text encoder", option: str = "text_encoder") -> Part:
    """Flux 2 dev: layers 10, 20 and 30 are read, decoder.states(..., (10, 20, 30))."""
    return Part(
        name="text_encoder",
        title=title,
        option=option,
        layouts=decoder.LAYOUTS,
        recognise=recognise,
        config=config,
        build=build,
        prefixes=decoder.names("mistral3_24b"),
        carried=(*decoder.CARRIED, tokenizers.TEKKEN),
        diffusers_folder="text_encoder",
        finish=finish,
        tokenizer=Tokenizer(
            "tokenizer",
            "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
            inside=tokenizers.TEKKEN,
            load=tokenizers.load_mistral,
        ),
        precision_options="llm",
    )
