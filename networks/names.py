"""Which names an adapter file may give the modules of which model: the denoiser, and text encoders beside it.

A module is named as in the model's original layout; those of a text encoder carry its key before a colon
(`te1:text_model.encoder.layers.0.mlp.fc1`), because two encoders have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import ConfigError
from library.layout import Entry, Layout

PREFIXES = (  # of the denoiser in files in the wild; tried in this order, longest first where one begins another
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_transformer_",
    "transformer.",
    "lora_unet_",
    "lycoris_",
    "unet.",
    "",
)
TEXT_PREFIXES = ("lora_te", "text_encoder")  # what every text encoder's names begin with, in every format


@dataclass(frozen=True)
class Space:
    """The names of one model: its layout, and what stands before a module's name in each format."""

    layout: Layout
    prefixes: Mapping[str, str]  # format -> prefix
    key: str = ""  # "" for the denoiser, "te1" for what kohya's files call lora_te1
    apart: Sequence[tuple[str, str]] = ()  # modules of ours that diffusers' files have under another prefix: both ends

    def qualified(self, name: str) -> str:
        return f"{self.key}:{name}" if self.key else name

    def stem(self, format_name: str, module: str, separator: str = ".") -> str:
        """A module as files of a format name it, its prefix included."""
        for ours, theirs in self.apart if format_name == "diffusers" else ():
            if module.startswith(ours):
                return theirs + module.removeprefix(ours)
        return self.prefixes[format_name] + module.replace(".", separator)


Names = Layout | Sequence[Space]  # a layout alone means a denoiser's


def denoiser_space(layout: Layout, folder: str = "transformer", apart: Sequence[tuple[str, str]] = ()) -> Space:
    """`folder` is the denoiser's in a diffusers repository, which is its prefix in diffusers' files; `apart` says which
    modules of ours have another."""
    prefixes = {"comfy": "diffusion_model.", "kohya": "lora_unet_", "diffusers": f"{folder or 'transformer'}."}
    prefixes["original"] = "transformer."
    return Space(layout, prefixes, apart=[(f"{ours}.", f"{theirs}.") for ours, theirs in apart])


def text_space(layout: Layout, key: str, name: str, folder: str) -> Space:
    """A text encoder's: `name` is ComfyUI's ("clip_l"), `folder` diffusers' ("text_encoder")."""
    comfy = f"text_encoders.{name}.transformer."
    prefixes = {"comfy": comfy, "kohya": f"lora_{key}_", "diffusers": f"{folder}.", "original": f"{folder}."}
    return Space(layout, prefixes, key)


def spaces_of(names: Names) -> tuple[Space, ...]:
    return (denoiser_space(names),) if isinstance(names, Layout) else tuple(names)


def adapter_layout(binding: Any) -> Layout:
    """The layout that a model's adapters are in, its part's first, also where the file has other names."""
    part = getattr(binding, "part", None)
    name = next(iter(part.layouts)) if part else binding.layout.name
    if name == binding.layout.name:
        return binding.layout
    from library.checkpoints import layout_of

    return layout_of(part, name, binding.layout.shapes)


def space_of(model: Any) -> Space:
    """Of a loaded model. Raises ConfigError for one that was not loaded from a file."""
    binding = getattr(model, "binding", None)
    if binding is None:
        raise ConfigError("a model has no layout: load it with library.checkpoints.load_part")
    layout, part, key = adapter_layout(binding), getattr(binding, "part", None), getattr(binding, "lora_key", "")
    if key:
        return text_space(layout, key, part.name, part.diffusers_folder)
    return denoiser_space(layout, part.diffusers_folder, part.apart) if part else denoiser_space(layout, "")


def is_text(key: str) -> bool:
    """Whether a key of an adapter file belongs to a text encoder."""
    return key.startswith(TEXT_PREFIXES)


@dataclass(frozen=True)
class Place:
    """Where a name in a file points: an original module (`index` None), or a module of ours that is not just that."""

    name: str  # qualified
    entry: Entry
    layout: Layout
    index: int | None = None

    @property
    def rows(self) -> int:
        return self.entry.shape[0] if self.index is None else self.entry.sizes[self.index]


def places_of(space: Space) -> dict[str, Place]:
    """Every spelling of every module (original and ours, with dots and with underscores) -> its place.

    Original names win where the two spellings collide.
    """
    layout = space.layout
    matrices = [(name, e) for name, e in layout.their_modules.items() if len(e.shape) >= 2]
    found: dict[str, Place] = {}
    for name, entry in matrices:
        place, kohya = Place(space.qualified(name), entry, layout), layout.kohya_names.get(name, name)
        found |= {name: place, name.replace(".", "_"): place, kohya: place, kohya.replace(".", "_"): place}
    for name, entry in matrices:
        for i, ours in enumerate(entry.ours):
            module = ours.removesuffix(".weight")
            place = Place(space.qualified(name), entry, layout, i if len(entry.ours) > 1 or entry.op else None)
            others = [theirs + module.removeprefix(start) for start, theirs in space.apart if module.startswith(start)]
            # diffusers before 0.20 had these below "processor", which ComfyUI still reads
            older = module.replace(".to_", ".processor.to_").removesuffix(".0") if ".to_" in module else module
            for spelling in (module, module.replace(".", "_"), older, *others):
                found.setdefault(spelling, place)
    return _also(layout, {entry.ours: name for name, entry in matrices}, found) | found


def _also(layout: Layout, names: Mapping[tuple[str, ...], str], found: Mapping[str, Place]) -> dict[str, Place]:
    """The places under the names that are only read: a module of them is a whole original one or one of ours."""
    more = {}
    for name, entry in (pair for other in layout.also for pair in other.their_modules.items()):
        same = names.get(entry.ours, entry.ours[0].removesuffix(".weight"))
        if same in found:  # a norm is not
            more |= {name: found[same], name.replace(".", "_"): found[same]}
    return more


class Finder:
    """Finds the module that a file's name means, whatever the format."""

    def __init__(self, names: Names) -> None:
        tables = [(space.prefixes.values() if space.key else PREFIXES, places_of(space)) for space in spaces_of(names)]
        self.tables = sorted(tables, key=lambda table: table[0] is PREFIXES)  # "" of the denoiser fits everything

    def find(self, module: str) -> Place | None:
        for prefixes, places in self.tables:
            for prefix in prefixes:
                if module.startswith(prefix) and (place := places.get(module.removeprefix(prefix))):
                    return place
        return None

    def spellings(self) -> Iterable[tuple[str, Place]]:
        """Every name with every prefix."""
        for prefixes, places in self.tables:
            yield from ((prefix + name, place) for prefix in prefixes for name, place in places.items())


def modules_of(names: Names) -> dict[str, tuple[Space, str, Entry]]:
    """Qualified original module name -> its model, its plain name, the entry of its weight; in file order."""
    return {
        space.qualified(name): (space, name, entry)
        for space in spaces_of(names)
        for name, entry in space.layout.their_modules.items()
    }
