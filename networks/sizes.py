"""The names that LoRA files of a family have, for a model of a given size: from its files, else as released."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError
from networks.names import PREFIXES, Space, denoiser_space, is_text, text_space

if TYPE_CHECKING:
    from library.families.family import Family, Part
    from library.layout import Layout


def spaces(family: Family, keys: Iterable[str], files: Sequence[Path]) -> Iterator[tuple[str, tuple[Space, ...]]]:
    """(what it is the size of, names of the denoiser and of the text encoders that the keys name), most likely first.

    `files` are the model's, of which only headers are read; without them the released sizes are tried.
    """
    part, texts = family.denoiser, text_spaces(family, files) if any(map(is_text, keys)) else ()
    if files:
        checkpoint, layout = _find(part, files)
        sizes = [(str(checkpoint.path), _configuration(part, checkpoint, layout))]
    else:
        sizes = list(_released(family)) or [("the released model", {})]
    for title, configuration in sizes:
        space = denoiser_space(_layout(part, configuration), part.diffusers_folder, part.apart)
        yield title, (space, *texts)


def text_spaces(family: Family, files: Sequence[Path]) -> tuple[Space, ...]:
    """Of the text encoders that the family can train. One that no file holds has the released size."""
    from library.memory import released

    found, names = [], released.index()["families"].get(family.name, {})
    for part, prefix in zip(family.text_encoders, family.text_prefixes, strict=False):
        try:
            configuration = _configuration(part, *_find(part, files))
        except ConfigError:
            configuration = _of_list(part, names[part.name]) if part.name in names else None
        if configuration is None:
            continue
        own = _layout(part, configuration)
        found.append(text_space(own, prefix.removeprefix("lora_"), part.name, part.diffusers_folder))
    return tuple(found)


def likely(names: Sequence[str], keys: Iterable[str]) -> list[str]:
    """The families in the order in which a file's names speak for them."""
    from library.families import get_family

    stems = {_plain(key) for key in keys}

    def votes(name: str) -> int:
        starts = tuple(_starts(get_family(name)))
        return sum(stem.startswith(starts) for stem in stems)

    return sorted(names, key=votes, reverse=True)


def _starts(family: Family) -> set[str]:
    """Beginnings of module names, with underscores, that every size of the model has."""
    rows = [row for table in family.denoiser.layouts.values() if not callable(table) for row in table]
    names = [name for row in rows for name in (row.theirs, *row.ours) if "{i}" in name]
    return {name.replace("{i}", "0").replace(".", "_") for name in names} | {
        name.replace("*.", "0.").replace(".", "_") for name in family.adapted
    }


def _plain(key: str) -> str:
    for prefix in PREFIXES:
        if prefix and key.startswith(prefix):
            key = key.removeprefix(prefix)
            break
    return key.replace(".", "_")


def _find(part: Part, files: Sequence[Path]) -> tuple[Any, str]:
    """The part in the first file that holds it. Raises ConfigError if none does."""
    from library import checkpoints

    error = ConfigError(f"no file is given for {part.title}")
    for file in files:
        try:
            return checkpoints.find_part(part, file)
        except ConfigError as found:
            error = found
    raise error


def _configuration(part: Part, checkpoint: Any, layout: str) -> Mapping[str, Any]:
    from library import checkpoints

    return part.config(checkpoint.shapes, checkpoints.facts(part, checkpoint), layout)


def _released(family: Family) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sizes that the family's released models have, each once, the usual one first."""
    from library.memory import released

    index = released.index()
    usual = index["families"].get(family.name, {}).get("denoiser", family.name)
    others = [index["variants"][name].get("denoiser", name) for name in released.variants_of(family.name)]
    seen: list[Mapping[str, Any]] = []
    for name in dict.fromkeys((usual, *others)):
        configuration = _of_list(family.denoiser, name)
        if configuration is not None and configuration not in seen:
            seen.append(configuration)
            yield name, configuration


def _of_list(part: Part, name: str) -> Mapping[str, Any] | None:
    """A part's configuration from a released file's list of names and shapes; None if there is none of the part."""
    from library.memory import released

    path = released.FOLDER / f"{name}.json.gz"
    listed = json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else {}
    for prefix in part.prefixes:
        shapes = {key[len(prefix) :]: tuple(shape) for key, shape in listed.items() if key.startswith(prefix)}
        if layout := part.recognise(shapes):
            return part.config(shapes, {}, layout)
    return None


def _layout(part: Part, configuration: Mapping[str, Any]) -> Layout:
    import torch

    from library import checkpoints
    from library.layout import shapes_of

    with torch.device("meta"):
        shapes = shapes_of(part.build(dict(configuration)))
    return checkpoints.layout_of(part, next(iter(part.layouts)), shapes)
