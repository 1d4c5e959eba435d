"""Qwen3 as a text encoder: ComfyUI's single files and transformers folders, sizes from the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError
from library.families.family import Part
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


def part(title: str, option: str = "text_encoder") -> Part:
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
    )


def tokenizer_path(options: Any, default: str) -> str:
    """--tokenizer, else a folder `tokenizer` beside the text encoder, else the published model's hub id."""
    if options.tokenizer:
        return options.tokenizer
    beside = Path(options.text_encoder or ".")
    for folder in (beside.parent / "tokenizer", beside / "tokenizer", beside.parent.parent / "tokenizer"):
        if (folder / "tokenizer_config.json").is_file():
            return str(folder)
    return default


def load_tokenizer(path: str) -> Any:
    """A tokenizer from a folder, or from the hub if the path does not exist. Raises ConfigError saying what to do."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=Path(path).exists(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ConfigError(
            f"tokenizer {path} cannot be loaded ({reason}); "
            "give --tokenizer a folder with tokenizer.json and tokenizer_config.json"
        ) from None
