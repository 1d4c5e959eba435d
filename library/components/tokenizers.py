"""Tokenizers of the text encoders: where each is looked for, and how it is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library import checkpoints
from library.errors import ConfigError
from library.families.family import Family, Part, Tokenizer
from library.headers import read_header

SPIECE = "spiece_model"  # in ComfyUI's UMT5 and Gemma files: the bytes of a sentencepiece model
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
HOME = ("config.json", "tokenizer_config.json")  # a model's own folder, in which its tokenizer lies beside its weights
TEKKEN = "tekken_model"  # in ComfyUI's Mistral files: the bytes of a tekken.json


def tokenizer_path(part: Part, options: Any, other: Tokenizer | None = None) -> tuple[str, str]:
    """(folder, file or hub id, subfolder of it): the option, else a folder beside the encoder, else the published
    folder that the encoder lies in, else its own file if it holds one, else the hub id. Of the encoder's own tokenizer,
    or of another one that goes with it."""
    where = other or part.tokenizer
    given = getattr(options, where.option)
    if given:
        return given, ""
    encoder = Path(checkpoints.path_of(part, options) or ".")
    for root in (encoder.parent, encoder, encoder.parent.parent):
        for name in where.beside:
            if (root / name / "tokenizer_config.json").is_file():
                return str(root / name), ""
    folder = encoder if encoder.is_dir() else encoder.parent
    if other in (None, part.tokenizer) and all((folder / name).is_file() for name in HOME):
        return str(folder), ""
    if where.inside and encoder.is_file() and _holds(encoder, where.inside):
        return str(encoder), ""
    return where.hub, where.subfolder


def _holds(file: Path, key: str) -> bool:
    return any(name == key or name.endswith(f".{key}") for name in read_header(file).tensors)


def tokenizer_paths(family: Family, options: Any) -> list[tuple[str, str]]:
    """In the family's order. No import of transformers, no network."""
    return [tokenizer_path(part, options, where) for where, part in family.tokenizers]


def load_tokenizers(family: Family, options: Any) -> list[Any]:
    """In the family's order. Raises ConfigError saying what to do."""
    return [
        (where.load or load_tokenizer)(*tokenizer_path(part, options, where), option=where.option)
        for where, part in family.tokenizers
    ]


def check_tokenizers(family: Family, options: Any) -> None:
    """A local tokenizer has to exist; only a hub id, owner/name, may be elsewhere. Raises ConfigError."""
    for where, part in family.tokenizers:
        value, _ = tokenizer_path(part, options, where)
        if not Path(value).exists() and (value.count("/") != 1 or value.startswith((".", "/", "~"))):
            raise ConfigError(f"--{where.option} {value}: no such folder (and not a hub id of the form owner/name)")


def not_here(family: Family, options: Any) -> list[str]:
    """The options of those tokenizers that are not on this disk and would have to come from a hub."""
    placed = ((where, tokenizer_path(part, options, where)[0]) for where, part in family.tokenizers)
    return [where.option for where, path in placed if not (Path(path).exists() or where.load is load_byt5)]


def load_tokenizer(path: str, subfolder: str = "", option: str = "tokenizer") -> Any:
    """A tokenizer from a folder, or from the hub if the path does not exist. Raises ConfigError saying what to do."""
    from transformers import AutoTokenizer

    folder = Path(path) / subfolder
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers builds an empty tokenizer from a configuration alone, and says nothing
        raise ConfigError(f"tokenizer {folder} holds no vocabulary ({', '.join(VOCABULARIES[:3])}...); load it anew")
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


def load_byt5(path: str, subfolder: str = "", option: str = "tokenizer") -> Any:
    """ByT5's tokens are the bytes, so that nothing has to be fetched where no folder is given."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer.from_pretrained(path, local_files_only=True) if Path(path).exists() else ByT5Tokenizer()


class SentencePiece:
    """A sentencepiece model with those methods of transformers' tokenizers that families use.

    transformers 5 rebuilds T5's tokenizer without the byte fallback that UMT5's vocabulary has: what is not in it
    becomes one <unk> instead of its bytes.
    """

    def __init__(self, model: bytes, begin: bool, end: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = SentencePieceProcessor(model_proto=model)
        self.pad_token_id, self.eos_token_id = self.model.pad_id(), self.model.eos_id()
        self.begin, self.end = [self.model.bos_id()] * begin, [self.model.eos_id()] * end

    def __len__(self) -> int:
        return self.model.vocab_size()

    def __call__(
        self, text: str, add_special_tokens: bool = True, truncation: bool = False, max_length: int | None = None
    ) -> dict[str, list[int]]:
        begin, end = (self.begin, self.end) if add_special_tokens else ([], [])
        room = max_length - len(begin) - len(end) if truncation and max_length else None
        return {"input_ids": [*begin, *self.model.encode(text)[:room], *end]}

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))


def load_umt5(path: str, subfolder: str = "", option: str = "tokenizer") -> Any:
    """UMT5's tokenizer: a sentencepiece model, a weight file that holds one, a folder or hub id with spiece.model."""
    from transformers.utils import cached_file

    if Path(path).is_file():
        return SentencePiece(held(path, SPIECE), begin=False, end=True)
    try:
        file = cached_file(path, "spiece.model", subfolder=subfolder, local_files_only=Path(path).exists())
    except OSError as error:
        reason = str(error).splitlines()[0][:160]
        raise ConfigError(
            f"tokenizer {path} cannot be loaded ({reason}); give --{option} a folder with spiece.model"
        ) from None
    return SentencePiece(Path(file).read_bytes(), begin=False, end=True)


def load_gemma(path: str, subfolder: str = "", option: str = "tokenizer") -> Any:
    """Gemma's tokenizer, which begins every text with <bos>: a folder or hub id, or a file as `load_umt5` takes it."""
    if Path(path).is_file():
        return SentencePiece(held(path, SPIECE), begin=True, end=False)
    return load_tokenizer(path, subfolder, option)


def load_mistral(path: str, subfolder: str = "", option: str = "tokenizer") -> Any:
    """Mistral's tokenizer: a folder or hub id, a tekken.json, or a weight file that holds one."""
    if not Path(path).is_file():
        return load_tokenizer(path, subfolder, option)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tekken.json").write_bytes(held(path, TEKKEN))
        return load_tokenizer(folder, option=option)


def held(path: str, key: str) -> bytes:
    """The bytes of a tokenizer: of the tensor `key` of a weight file, else of the file itself."""
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        return Path(path).read_bytes()
    names = [name for name in read_header(path).tensors if name == key or name.endswith(f".{key}")]
    if not names:
        raise ConfigError(f"{path} holds no tokenizer ({key}); give the folder of one")
    with safe_open(path, framework="np") as file:
        return file.get_tensor(names[0]).tobytes()


def wrapped(tokenizer: Any, caption: str, length: int, template: tuple[str, str]) -> tuple[list[int], str]:
    """(ids of the caption between the two halves of a template, at most `length`; the end of it that did not fit).

    The template is never cut; the tokenizer's own first and last tokens are not added.
    """
    before, ids, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (template[0], caption, template[1])
    )
    room = length - len(before) - len(after)
    return [*before, *ids[:room], *after], tokenizer.decode(ids[room:]) if len(ids) > room else ""


def ended(tokenizer: Any, caption: str, length: int) -> tuple[list[int], str]:
    """(ids of the caption with the tokenizer's own first and last tokens, at most `length`; what did not fit)."""
    whole, bare = (tokenizer(caption, add_special_tokens=special)["input_ids"] for special in (True, False))
    room = length - (len(whole) - len(bare))
    if len(bare) <= room:
        return whole, ""
    first = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return [*whole[:first], *bare[:room], *whole[first + len(bare) :]], tokenizer.decode(bare[room:])


def padded(ids: Sequence[int], length: int, token: int, left: bool = False) -> tuple[list[int], list[int]]:
    """(ids, mask) at `length`, filled up with `token` on the right (or the left); the mask is 1 for what was there."""
    fill, ones = [token] * (length - len(ids)), [1] * len(ids)
    zeros = [0] * len(fill)
    return ([*fill, *ids], [*zeros, *ones]) if left else ([*ids, *fill], [*ones, *zeros])
