"""Does a LoRA fit a model, in ComfyUI? Every key of the file against the model's own header; no weight is read.

Which names ComfyUI takes for which model is read off comfy/lora.py (`model_lora_keys_unet`, `model_lora_keys_clip`) as
of February 2026, and held against the lists of names in tests/data/lora_keys. Whether the shapes fit ComfyUI only finds
out when it computes the weights; here they are compared first.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import Checkpoint, find_part, layout_of, rows_of
from library.comfy_names import TAKEN
from library.errors import ConfigError
from library.families import FAMILIES, get_family
from library.fingerprints import identify
from library.layout import Shape, our_shapes
from networks import formats, kinds
from networks.names import Space, is_text, text_space

if TYPE_CHECKING:
    from library.families.family import Family, Part

Weights = dict[str, tuple[Shape, "Shape | None"]]  # name in an adapter's file, prefix included -> weight and bias

MISSED = {  # modules of ours, by the beginning of their names, that ComfyUI has no diffusers name for
    "chroma": ("distilled_guidance_layer.",),
    "flux2": ("double_stream_modulation_", "single_stream_modulation.", "time_guidance_embed."),
}
LISTED, REASONS = 6, 8  # keys shown of a reason, and reasons
TENCENT_WORDS = (  # of ComfyUI's names -> the release's
    ("_mod.lin.", "_mod.linear."), ("_attn.qkv.", "_attn_qkv."), ("_attn.proj.", "_attn_proj."),
    ("mlp.0.", "mlp.fc1."), ("mlp.2.", "mlp.fc2."), (".modulation.lin.", ".modulation.linear."),
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    lora: str
    base: str  # what the model's file is
    family: str
    format: str
    total: int
    unmatched: Mapping[str, str] = field(default_factory=dict)  # key -> why
    notes: tuple[str, ...] = ()

    @property
    def matched(self) -> int:
        return self.total - len(self.unmatched)

    @property
    def line(self) -> str:
        return f"ComfyUI: {self.matched}/{self.total} keys match"

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "family": self.family,
            "format": self.format,
            "matched": self.matched,
            "total": self.total,
            "unmatched": dict(self.unmatched),
            "notes": list(self.notes),
        }


def check(lora: Path | str, base: Sequence[Path | str]) -> Checked:
    """Hold a LoRA against a model: the denoiser's file first, then, where the LoRA has text encoders, theirs.

    An encoder that no file holds is taken to be as released. Raises ConfigError if `lora` is no LoRA or no file of
    `base` is a denoiser of a family that is trained here.
    """
    shapes = formats.header_of(lora)[0]
    if not formats.is_lora(shapes):
        raise ConfigError(f"{lora} is not a LoRA: it is {identify(Checkpoint.open(lora)).sentence}")
    family, checkpoint, layout, sentence = _denoiser(base)
    ours = shapes_of_header(family.denoiser, checkpoint, layout)
    names = weights_of(family, ours)
    if any(map(is_text, shapes)):
        names |= text_weights(family, [Path(one) for one in base])
    unmatched, form = compare(shapes, names), formats.detect_format(shapes)
    notes = _notes(lora, shapes, unmatched)
    return Checked(str(lora), sentence, family.name, form, len(shapes), unmatched, notes)


def _denoiser(base: Sequence[Path | str]) -> tuple[Family, Checkpoint, str, str]:
    """The family, its denoiser in the first file that holds one, the layout, and what the file is."""
    found = None
    for path in base:
        found = identify(Checkpoint.open(path))
        if found.kind == "checkpoint" and found.family in FAMILIES:
            family = get_family(found.family)
            checkpoint, layout = find_part(family.denoiser, path)
            variant = f" {found.variant}" if found.variant else ""
            return family, checkpoint, layout, f"{path}, {found.title}{variant}"
    raise ConfigError(f"{base[0]} is no denoiser: it is {found.sentence}; give --base the model that the LoRA is for")


def shapes_of_header(part: Part, checkpoint: Checkpoint, layout: str) -> dict[str, Shape]:
    """A part's shapes under our names, from its file's header. Raises ConfigError for a damaged one."""
    try:
        return our_shapes(rows_of(part, layout, part.view(checkpoint.shapes, layout)), checkpoint.shapes)
    except (LookupError, ValueError, ArithmeticError, TypeError):
        raise ConfigError(
            f"{checkpoint.path} does not fit {part.title}: its tensors do not have the shapes of one"
        ) from None


def weights_of(family: Family, ours: Mapping[str, Shape]) -> Weights:
    """Every name that ComfyUI takes for this family's denoiser."""
    part, found = family.denoiser, {}
    own = layout_of(part, next(iter(part.layouts)), ours).their_shapes
    missed = MISSED.get(family.name, ())
    tables: dict[str, Mapping[str, Shape]] = defaultdict(
        lambda: {k: s for k, s in ours.items() if not k.startswith(missed)}
    )
    tables |= {"comfy": own, "tencent": own, "qkv": _linear1(own)}
    for prefix, whose in (*TAKEN.get(family.name, ()), ("lora_unet_", "comfy"), ("diffusion_model.", "comfy")):
        table = tables[whose]
        for key, shape in table.items():
            name = _renamed(key, whose)
            if name.endswith(".weight"):
                module = name.removesuffix(".weight")
                stem = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
                found[stem] = (shape, table.get(key.removesuffix("weight") + "bias"))
            elif (prefix, whose) == ("diffusion_model.", "comfy"):
                found[prefix + name] = (shape, None)  # a weight of another name is named whole
    return found


def _linear1(own: Mapping[str, Shape]) -> dict[str, Shape]:
    fused = {key: shape for key, shape in own.items() if key.endswith(".linear1.weight")}
    return {key.replace(".linear1.", ".linear1_qkv."): (3 * shape[1], *shape[1:]) for key, shape in fused.items()}


def _renamed(key: str, whose: str) -> str:
    if whose == "tencent":
        for own, theirs in TENCENT_WORDS:
            key = key.replace(own, theirs)
    if whose == "processor":
        key = key.replace(".to_", ".processor.to_").replace(".to_out.0.", ".to_out.")
    return key


def text_weights(family: Family, files: Sequence[Path]) -> Weights:
    """Of the text encoders that the family can train, in every format."""
    from library.memory import released

    known, found = released.index()["families"].get(family.name, {}), {}
    for part, prefix in zip(family.text_encoders, family.text_prefixes, strict=False):
        ours = _text_shapes(part, files, known.get(part.name, ""))
        if ours is None:
            continue
        layout = layout_of(part, next(iter(part.layouts)), ours)
        space = text_space(layout, prefix.removeprefix("lora_"), part.name, part.diffusers_folder)
        found |= _spelled(space)
    return found


def _text_shapes(part: Part, files: Sequence[Path], listed: str) -> dict[str, Shape] | None:
    """From the first file that holds the encoder, else from the released one's list; None if there is neither."""
    from library.memory import released

    for file in files:
        try:
            return shapes_of_header(part, *find_part(part, file))
        except ConfigError:
            continue
    path = released.FOLDER / f"{listed}.json.gz"
    if not path.is_file():
        return None
    shapes = {key: tuple(shape) for key, shape in json.loads(gzip.decompress(path.read_bytes())).items()}
    layout = part.layout_in(shapes)
    return our_shapes(rows_of(part, layout, shapes), shapes) if layout else None


def _spelled(space: Space) -> Weights:
    found, shapes = {}, space.layout.their_shapes
    for name, entry in space.layout.their_modules.items():
        for form, separator in (("comfy", "."), ("kohya", "_"), ("diffusers", ".")):
            found[space.stem(form, name, separator)] = (entry.shape, shapes.get(f"{name}.bias"))
    return found


def compare(shapes: Mapping[str, Shape], weights: Weights) -> dict[str, str]:
    """The keys that change nothing, each with the reason."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    wrong = {}
    for key in shapes:
        stem, role = kinds.split(key)
        if not stem:
            wrong[key] = "it is no key of an adapter"
        elif stem not in weights and is_text(key) and not any(map(is_text, weights)):
            wrong[key] = (
                "it is a text encoder's, and which of these names ComfyUI takes for this model is not known here"
            )
        elif stem not in weights:
            wrong[key] = "the model has no such module under a name that ComfyUI takes"
        else:
            modules[stem][role] = key
    for stem, keys in modules.items():
        if reason := kinds.fault({role: shapes[key] for role, key in keys.items()}, *weights[stem]):
            wrong |= dict.fromkeys(keys.values(), reason)
    return wrong


def _notes(lora: Path | str, shapes: Mapping[str, Shape], unmatched: Mapping[str, str]) -> tuple[str, ...]:
    notes = []
    roles = {kinds.split(key)[1] for key in shapes}
    if "down" in roles and "alpha" not in roles:
        notes.append("the file has no alpha: ComfyUI takes each update as it is, a factor of 1")
    if len(unmatched) > len(shapes) / 2:
        notes.append(f"by its names the file is {identify(Checkpoint.open(lora)).title}")
    return tuple(notes)


def text(found: Checked) -> str:
    """For people: the count, then what does not match, by reason, and the notes."""
    lines, reasons = [f"{found.line} {found.base}"], defaultdict(list)
    for key, reason in found.unmatched.items():
        reasons[reason].append(key)
    for reason, keys in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = f" ... ({len(keys)} in all)" if len(keys) > LISTED else ""
        lines.append(f"  not matched: {', '.join(sorted(keys)[:LISTED])}{more}: {reason}")
    if len(lines) - 1 > REASONS:
        lines[1 + REASONS :] = [
            f"  and {len(lines) - 1 - REASONS} more modules whose shapes do not fit (--json has all)"
        ]
    return "\n".join([*lines, *(f"  note: {note}" for note in found.notes)])
