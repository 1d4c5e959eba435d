"""Tokenizers of the text encoders: where each is looked for, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library import checkpoints
from library.errors import ConfigError
from library.families.family import Family, Part


def tokenizer_path(part: Part, options: Any) -> tuple[str, str]:
    """(folder, file or hub id, subfolder of it): the option, else a folder beside the encoder, else the hub id."""
    where = part.tokenizer
    given = getattr(options, where.option)
    if given:
        return given, ""
    encoder = Path(checkpoints.path_of(part, options) or ".")
    for root in (encoder.parent, encoder, encoder.parent.parent):
        for name in where.beside:
            if (root / name / "tokenizer_config.json").is_file():
                return str(root / name), ""
    return where.hub, where.subfolder


def tokenizer_paths(family: Family, options: Any) -> list[tuple[str, str]]:
    """Of every text encoder that has one. No import of transformers, no network."""
    return [tokenizer_path(part, options) for part in family.text_encoders if part.tokenizer]


def load_tokenizers(family: Family, options: Any) -> list[Any]:
    """In the order of the text encoders. Raises ConfigError saying what to do."""
    parts = [part for part in family.text_encoders if part.tokenizer]
    return [
        (part.tokenizer.load or load_tokenizer)(*tokenizer_path(part, options), option=part.tokenizer.option)
        for part in parts
    ]


def check_tokenizers(family: Family, options: Any) -> None:
    """A local tokenizer has to exist; only a hub id, owner/name, may be elsewhere. Raises ConfigError."""
    for part in family.text_encoders:
        if part.tokenizer:
            value, _ = tokenizer_path(part, options)
            if not Path(value).exists() and (value.count("/") != 1 or value.startswith((".", "/", "~"))):
                raise ConfigError(
                    f"--{part.tokenizer.option} {value}: no such folder (and not a hub id of the form owner/name)"
                )


def load_tokenizer(path: str, subfolder: str = "", option: str = "tokenizer") -> Any:
    """A tokenizer from a folder, or from the hub if the path does not exist. Raises ConfigError saying what to do."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, subfolder=subfolder, local_files_only=Path(path).exists(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ConfigError(
            f"tokenizer {path} cannot be loaded ({reason}); "
            f"give --{option} a folder with tokenizer.json and tokenizer_config.json"
        ) from None
