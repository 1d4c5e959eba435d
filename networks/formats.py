"""LoRA files: one table of formats, one canonical form, reading, writing, checking, hashing.

Canonical form: `{original module name: {"down": [rank, *in], "up": [out, rank], "alpha": float}}` (a text encoder's
name is qualified, see `networks.names`), rows of `up` in the original order; the update of the original weight is
`alpha / rank * up @ down`. `read` adds `"blocks": n` where it had to put n separate adapters (a file with q, k, v
apart) side by side on one fused module.

What ComfyUI takes (names, suffixes, and that a missing `.alpha` means a factor of 1) is held against its own key
lists in tests/data/lora_keys.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError, nearest
from library.layout import Entry, Layout
from networks import kinds
from networks.kinds import OTHER_KINDS, ROLES
from networks.names import Finder, Names, Place, Space, is_text, modules_of, places_of, spaces_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Modules = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Format:
    name: str
    prefixes: tuple[str, ...]  # by which a file of this format is known; `networks.names` has those of each model
    separator: str  # between the parts of a module's name
    down: str
    up: str
    alpha: str  # "tensor": a key of its own; "folded": alpha / rank multiplied into `up`
    layout: str  # whose module names: "original" or "ours" (diffusers)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            "comfy", ("diffusion_model.", "text_encoders."), ".", "lora_A.weight", "lora_B.weight", "tensor", "original"
        ),
        Format("kohya", ("lora_unet_", "lora_te"), "_", "lora_down.weight", "lora_up.weight", "tensor", "original"),
        Format("original", ("transformer.",), ".", "lora_A.weight", "lora_B.weight", "folded", "original"),
        Format(
            "diffusers",
            ("transformer.", "unet.", "text_encoder.", "text_encoder_"),
            ".",
            "lora_A.weight",
            "lora_B.weight",
            "folded",
            "ours",
        ),
    )
}


def split_key(key: str) -> tuple[str, str] | None:
    """(module with its prefix, "down" | "up" | "alpha") of a LoRA key, or None if it is no such key."""
    for suffix, role in ROLES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return None


def is_lora(keys: Iterable[str]) -> bool:
    """Whether these are the keys of an adapter file of any kind, as far as names tell."""
    endings = [*(s for s in ROLES if s != ".alpha"), *OTHER_KINDS]
    return any(key.endswith(ending) for key in keys for ending in endings)


def detect_format(keys: Iterable[str], names: Names | None = None) -> str:
    """Name of the format in FORMATS whose prefix most modules have, else `"other"`.

    Adapters of other kinds count by their prefix; plain LoRA have to have the format's words as well. Two formats
    differ only in the modules' names: which of them a file is in, the models' `names` say, else it is diffusers'.
    """
    votes: dict[str, int] = defaultdict(int)
    keys = list(keys)
    for key in keys:
        for f in FORMATS.values():
            if key.startswith(f.prefixes) and (key.endswith(f".{f.down}") or split_key(key) is None):
                votes[f.name] += 1
    if not votes:
        return "other"
    found = [name for name in votes if votes[name] == max(votes.values())]
    if len(found) > 1 and names is not None:
        stems = {(split_key(key) or (key,))[0] for key in keys}
        found.sort(key=lambda name: -len(stems & _format_places(name, names).keys()))
        return found[0]
    return "diffusers" if "diffusers" in found else found[0]


def _sort_keys(keys: Iterable[str], finder: Finder) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module as spelled: {role: key}} of the keys that the models know, and the other keys."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for key in sorted(keys):
        split = split_key(key)
        if split and finder.find(split[0]):
            modules[split[0]].setdefault(split[1], key)
        else:
            strange.append(key)
    return modules, strange


def unknown_keys(keys: Iterable[str], names: Names) -> list[str]:
    """The LoRA keys, in any format, that name no module of the models."""
    return _sort_keys(keys, Finder(names))[1]


def _refuse(strange: list[str], total: int, names: Names, source: str) -> None:
    for key in strange:
        for suffix, kind in OTHER_KINDS.items():
            if key.endswith(suffix):
                raise ConfigError(f"{source}: {key} belongs to a {kind} adapter; only plain LoRA files can be read")
    spaces = spaces_of(names)
    known = [
        f"{space.prefixes['comfy']}{name}.lora_A.weight" for space in spaces for name in space.layout.their_modules
    ]
    raise ConfigError(
        f"{source}: {len(strange)} of {total} keys name no module of this model ({spaces[0].layout.name}), "
        f"for instance {strange[0]}{nearest(strange[0], known)}"
    )


def of_models(tensors: Mapping[str, Tensor], names: Names) -> Mapping[str, Tensor]:
    """A LoRA's tensors without those of text encoders, if no text encoder is among these models."""
    if any(space.key for space in spaces_of(names)):
        return tensors
    return {key: value for key, value in tensors.items() if not is_text(key)} or tensors


def read(tensors: Mapping[str, Tensor], names: Names, source: str = "the LoRA") -> Modules:
    """The canonical form of a LoRA in any known format.

    Adapters on separate q, k, v become one adapter of the fused module: of the same rank if they share their down
    matrix, else with the ranks added up and `up` block by block, which is exact but larger (`blocks` says how many).
    Raises ConfigError naming keys that match nothing, incomplete modules, other kinds of adapters.
    """
    finder, known = Finder(names), modules_of(names)
    spelled, strange = _sort_keys(tensors, finder)
    if strange or not spelled:
        _refuse(strange or ["no key"], len(tensors), names, source)
    whole: Modules = {}
    slices: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for module, keys in spelled.items():
        if lacking := {"down", "up"} - keys.keys():
            raise ConfigError(f"{source}: {module} has no {' and no '.join(sorted(lacking))} matrix")
        place = finder.find(module)
        content = _content(tensors, keys, place, source)
        taken = (
            place.name in whole or place.name in slices and (place.index is None or place.index in slices[place.name])
        )
        if taken:
            raise ConfigError(f"{source}: {place.name} is adapted twice, the second time as {module}")
        if place.index is None:
            whole[place.name] = content
        else:
            slices[place.name][place.index] = content
    fused = {name: _fuse(known[name][2], parts) for name, parts in slices.items()}
    return {name: (whole | fused)[name] for name in known if name in whole or name in fused}


def _content(tensors: Mapping[str, Tensor], keys: Mapping[str, str], place: Place, source: str) -> dict[str, Any]:
    down, up = tensors[keys["down"]].float(), tensors[keys["up"]].float()
    inner = place.layout.our_shape(place.entry)[1:]
    expected = math.prod(inner)
    rank = down.shape[0] if down.ndim > 1 else 0
    if not rank or up.ndim < 2 or math.prod(down.shape[1:]) != expected or up.flatten(1).shape != (place.rows, rank):
        raise ConfigError(
            f"{source}: {keys['down']} {tuple(down.shape)} and {keys['up']} {tuple(up.shape)} do not fit {place.name}, "
            f"which takes {expected} inputs and gives {place.rows}; the LoRA is for a model of another size"
        )
    up = up.flatten(1)
    if "alpha" in keys and not (tensors[keys["alpha"]].numel() == 1 and math.isfinite(tensors[keys["alpha"]])):
        raise ConfigError(f"{source}: {keys['alpha']} is no number; the file is damaged")
    alpha = float(tensors[keys["alpha"]]) if "alpha" in keys else float(rank)
    return {"down": down.reshape(rank, *inner), "up": up, "alpha": alpha or float(rank)}


def _fuse(entry: Entry, parts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    import torch

    first = next(iter(parts.values()))
    same = len(parts) == len(entry.sizes) and all(
        p["alpha"] == first["alpha"] and torch.equal(p["down"], first["down"]) for p in parts.values()
    )
    if same:
        up = torch.cat([parts[i]["up"] for i in range(len(entry.sizes))])
        fused = {"down": first["down"], "alpha": first["alpha"]}
    else:
        rank = sum(p["down"].shape[0] for p in parts.values())
        scales = {i: p["alpha"] / p["down"].shape[0] for i, p in parts.items()}
        common = scales[min(scales)] if len(set(scales.values())) == 1 else 1.0  # stays in alpha: nothing is rounded
        up, start, column = torch.zeros(sum(entry.sizes), rank), 0, 0
        for i, size in enumerate(entry.sizes):
            if i in parts:
                r = parts[i]["down"].shape[0]
                up[start : start + size, column : column + r] = parts[i]["up"] * (scales[i] / common)
                column += r
            start += size
        down = torch.cat([parts[i]["down"] for i in sorted(parts)])
        fused = {"down": down, "alpha": common * rank, "blocks": len(parts)}
    fused["up"] = entry.op.to_theirs(up).flatten(1) if entry.op else up
    return fused


def write(modules: Modules, format_name: str, names: Names, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a file in that format, on the CPU. alpha stays float32; it is folded in before the cast."""
    import torch

    if format_name not in FORMATS:
        raise ConfigError(
            f"save_format '{format_name}' is not known{nearest(format_name, FORMATS)} (known: {', '.join(FORMATS)})"
        )
    form, known, tensors = FORMATS[format_name], modules_of(names), {}
    for qualified, content in modules.items():
        space, name, entry = known[qualified]
        for module, down, up in _pieces(form, spelled(form, name, space.layout), entry, content):
            stem = space.stem(form.name, module, form.separator)
            if form.alpha == "folded":
                up = up * (content["alpha"] / content["up"].shape[1])
            for word, value in ((form.down, down), (form.up, up)):
                tensors[f"{stem}.{word}"] = value.to("cpu", dtype or value.dtype, copy=True).contiguous()
            if form.alpha == "tensor":
                tensors[f"{stem}.alpha"] = torch.tensor(content["alpha"])
    return tensors


def spelled(form: Format, name: str, layout: Layout) -> str:
    """An original module's name as files of this format have it."""
    return layout.kohya_names.get(name, name) if form.name in ("kohya", "original") else name


def _pieces(form: Format, name: str, entry: Entry, content: Mapping[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
    """(module name, down, up) of everything that the format writes for one original module."""
    down, up = content["down"].detach().float(), content["up"].detach().float()
    out, rank = up.shape
    if form.layout == "original":
        ones = [1] * (len(entry.shape) - 2)
        return [(name, down.reshape(rank, *entry.shape[1:]), up.reshape(out, rank, *ones))]
    rows = entry.op.to_ours(up, (out, rank)) if entry.op else up
    parts = rows.split(list(entry.sizes))
    ones, used = [1] * (down.ndim - 2), [part.abs().amax(0) > 0 for part in parts]
    apart = len(parts) > 1 and sum(u.int() for u in used).max() == 1  # blocks side by side: each has ranks of its own
    pieces = []
    for ours, part, own in zip(entry.ours, parts, used, strict=True):
        first = down
        if apart and own.any():
            first, part = down[own], part[:, own]
        pieces.append((ours.removesuffix(".weight"), first, part.reshape(*part.shape, *ones)))
    return pieces


def load_file(path: Any) -> dict[str, Tensor]:
    """All tensors of a .safetensors file on the CPU. Raises ConfigError if it is missing, damaged or something else."""
    from safetensors.torch import load_file as load

    from library.headers import read_header

    read_header(path)
    return load(str(path))


def header_of(path: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(key -> shape, metadata) from a file's header."""
    from library.headers import read_header

    header = read_header(path)
    return header.shapes, dict(header.metadata)


def check_file(path: Any, names: Names, family: Any = None) -> tuple[int, int, list[str]]:
    """Hold a written LoRA, name and shape of every key, against the family's names: (matched, total, the unmatched)."""
    return check_keys(header_of(path)[0], names)


def check_keys(shapes: Mapping[str, tuple[int, ...]], names: Names) -> tuple[int, int, list[str]]:
    """`check_file` for keys and shapes. A file whose prefix is a known format's has to have that format's names."""
    places = _format_places(detect_format(shapes, names), names)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    wrong = []
    for key in shapes:
        stem, role = kinds.split(key)
        if (stem or _known_stem(key, places)) not in places:
            wrong.append(key)
        elif role:
            modules[stem][role] = key
    for stem, keys in modules.items():
        place = places[stem]
        bias = place.layout.by_theirs.get(place.entry.theirs.removesuffix("weight") + "bias")
        weight = (place.rows, *place.entry.shape[1:])
        if kinds.fault({role: shapes[key] for role, key in keys.items()}, weight, bias and (place.rows,)):
            wrong += keys.values()
    return len(shapes) - len(wrong), len(shapes), sorted(wrong)


def _format_places(format_name: str, names: Names) -> Mapping[str, Place]:
    """Every module name, prefix included, that a file of this format may have."""
    form = FORMATS.get(format_name)
    if form is None:
        return dict(Finder(names).spellings())
    found = {}
    for space in spaces_of(names):
        places = places_of(space)
        found |= {
            space.stem(form.name, name, form.separator): places[name]
            for name in _spelled(space, form)
            if name in places
        }
    return found


def _spelled(space: Space, form: Format) -> Iterable[str]:
    """The modules' names as a format has them."""
    if form.layout == "original":
        return [spelled(form, name, space.layout) for name in space.layout.their_modules]
    return (ours.removesuffix(".weight") for entry in space.layout.their_modules.values() for ours in entry.ours)


def _known_stem(key: str, places: Mapping[str, Place]) -> str:
    """The longest beginning of a key, at a dot, that is a module's name."""
    stem = key.rpartition(".")[0]
    while stem and stem not in places:
        stem = stem.rpartition(".")[0]
    return stem


def save_file(
    modules: Modules, path: Any, format_name: str, names: Names, dtype: Any, metadata: Mapping[str, str] | None
) -> str:
    """Write a LoRA with its hashes, re-open it, check it key by key, and return `N/N keys match`."""
    from library.checkpoints import save

    tensors, metadata = write(modules, format_name, names, dtype), dict(metadata or {})
    save(tensors, Path(path), metadata | model_hashes(tensors, metadata))
    matched, total, wrong = check_file(path, names)
    return f"{matched}/{total} keys match" + (f"; not matched: {', '.join(wrong[:4])}" if wrong else "")


def difference(one: Modules, other: Modules) -> dict[str, float]:
    """Module -> how far its update in `other` is from that in `one`, relative, to about 1e-8; 1 for one that lacks."""
    import torch

    found = {}
    for name, content in one.items():
        if name not in other:
            found[name] = 1.0
            continue
        pair = (content, other[name])
        scales = [c["alpha"] / c["up"].shape[1] for c in pair]
        first, second = [s * c["up"].double() for s, c in zip(scales, pair, strict=True)]
        downs = [c["down"].flatten(1).double() for c in pair]
        left, right = torch.cat([first, -second], 1), torch.cat(downs)
        squares = [((u.T @ u) * (d @ d.T)).sum().clamp(min=0) for u, d in ((left, right), (first, downs[0]))]
        found[name] = float((squares[0] / squares[1]).sqrt()) if squares[1] > 0 else float(squares[0].sqrt())
    return found


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """sd-scripts' `sshs_model_hash` and `sshs_legacy_hash`, without a second copy of the tensors.

    They are taken of the file that safetensors would write with only the `ss_` metadata: the first is the SHA-256 of
    all bytes after its header, the second the first 8 hex digits of the SHA-256 of the 64 KiB at offset 1 MiB.
    """
    kept = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    order, header = _file_order(tensors), {"__metadata__": kept} if kept else {}
    end = 0
    for name, code in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head = len(text).to_bytes(8, "little") + text + b" " * (-len(text) % 8)
    head = (len(head) - 8).to_bytes(8, "little") + head[8:]
    model, window, position = hashlib.sha256(), bytearray(head[0x100000:0x110000]), len(head)
    for name, _ in order:
        data = _bytes(tensors[name])
        model.update(data)
        start, stop = max(0x100000 - position, 0), min(0x110000 - position, len(data))
        window += data[start:stop] if start < stop else b""
        position += len(data)
    return {"sshs_model_hash": model.hexdigest(), "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8]}


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """(name, dtype code) in the order in which safetensors lays tensors out, asked of it with one value per tensor."""
    import torch
    from safetensors.torch import save

    small = save({name: torch.zeros(1, dtype=value.dtype) for name, value in tensors.items()})
    header = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])
    return [(n, h["dtype"]) for n, h in sorted(header.items(), key=lambda item: item[1]["data_offsets"])]
