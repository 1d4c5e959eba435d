"""Original checkpoint names <-> our (diffusers, transformers) names: one table per model, used by everything.

A table is a list of rows. `row("attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v")` says that the original
module `attn.qkv` holds, stacked along dim 0 in this order, what our three modules hold; everything below the
names (`.weight`, `.bias`, deeper modules) follows. An `op` is an invertible operation between the two.

Tables are *expanded* against the parameters of the real model (built on the meta device): no regular
expression, no precedence, sizes from the model. Each of our keys is claimed exactly once or `Layout` raises.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from library.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """An invertible tensor operation. `to_ours` is given the shape that our parameter has."""

    name: str
    to_theirs: Callable[[Tensor], Tensor]
    to_ours: Callable[[Tensor, Shape], Tensor]
    shape: Callable[[Shape], Shape] = lambda shape: shape  # shape of theirs from the (stacked) shape of ours


def _swap(tensor: Tensor, shape: Shape = ()) -> Tensor:
    import torch

    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


swap_halves = Op("swap_halves", _swap, _swap)  # (shift, scale) against (scale, shift): its own inverse
conv1x1 = Op(  # an LDM attention projection is a 1x1 convolution, diffusers' is a Linear
    "conv1x1",
    lambda t: t[:, :, None, None] if t.ndim == 2 else t,
    lambda t, shape: t.reshape(shape),
    lambda shape: (*shape, 1, 1) if len(shape) == 2 else shape,
)


@dataclass(frozen=True)
class Row:
    theirs: str
    ours: tuple[str, ...]
    op: Op | None = None


def row(theirs: str, *ours: str, op: Op | None = None) -> Row:
    """One original module or parameter and ours; no name of ours means that it is the same."""
    return Row(theirs, ours or (theirs,), op)


def block(theirs: str, ours: str, *rows: Row) -> list[Row]:
    """Repeat `rows` below a numbered block; `{i}` runs over the blocks that the model has."""
    return [Row(f"{theirs}.{r.theirs}", tuple(f"{ours}.{o}" for o in r.ours), r.op) for r in rows]


def identity(ours: Mapping[str, Shape]) -> list[Row]:
    """The table of a file that already has our names."""
    return [Row(key, (key,)) for key in ours]


@dataclass(frozen=True)
class Entry:
    """One original tensor and the tensors of ours that it holds, in order along dim 0."""

    theirs: str
    ours: tuple[str, ...]
    sizes: tuple[int, ...]  # rows (dim 0) of each of ours
    shape: Shape  # of theirs
    op: Op | None = None

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Our tensors as the original one."""
        import torch

        whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return self.op.to_theirs(whole) if self.op else whole

    def split(self, whole: Tensor, our_shape: Shape) -> list[Tensor]:
        """The original tensor as ours; views of it unless the operation has to copy. `our_shape` is stacked."""
        if self.op:
            whole = self.op.to_ours(whole, our_shape)
        return list(whole.split(list(self.sizes))) if len(self.sizes) > 1 else [whole]


@dataclass(frozen=True)
class Layout:
    """A table bound to one model: `shapes` are our parameters' (and persistent buffers') shapes.

    Raises ConfigError where a key of ours is claimed by no row or by two.
    """

    name: str
    rows: Sequence[Row]
    shapes: Mapping[str, Shape]
    other: Layout | None = None  # the same model in the names of sd-scripts' LoRA files, where they are others
    also: tuple[Layout, ...] = ()  # in names that LoRA files may have as well, which are only read
    entries: tuple[Entry, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self._expand()))
        claims = Counter(ours for entry in self.entries for ours in entry.ours)
        wrong = sorted(key for key in self.shapes.keys() | claims.keys() if claims[key] != 1)
        doubled = [theirs for theirs, n in Counter(e.theirs for e in self.entries).items() if n > 1]
        if wrong or doubled:
            raise ConfigError(
                f"layout '{self.name}': {len(wrong)} parameters are not mapped exactly once, {len(doubled)} original "
                f"names are claimed twice: {', '.join((wrong + doubled)[:4])}"
            )

    def _expand(self) -> list[Entry]:
        below, entries = _below(self.shapes), []
        for r in self.rows:
            for i in itertools.count() if "{i}" in r.theirs else (0,):
                theirs, ours = r.theirs.replace("{i}", str(i)), [o.replace("{i}", str(i)) for o in r.ours]
                if ours[0] not in below:
                    break  # past the last block, or a part that this variant of the model lacks
                entries += [self._entry(theirs + leaf, [o + leaf for o in ours], r.op) for leaf in below[ours[0]]]
        return entries

    def _entry(self, theirs: str, ours: list[str], op: Op | None) -> Entry:
        shapes = [self.shapes.get(o, ()) for o in ours]  # a missing one is reported by the claim count
        sizes = tuple(shape[0] if shape else 1 for shape in shapes)
        stacked = (sum(sizes), *shapes[0][1:]) if len(ours) > 1 else shapes[0]
        return Entry(theirs, tuple(ours), sizes, op.shape(stacked) if op else stacked, op)

    @cached_property
    def by_theirs(self) -> dict[str, Entry]:
        return {entry.theirs: entry for entry in self.entries}

    @cached_property
    def their_shapes(self) -> dict[str, Shape]:
        """Original key -> shape that a complete file has."""
        return {entry.theirs: entry.shape for entry in self.entries}

    @cached_property
    def kohya_names(self) -> dict[str, str]:
        """Original module name -> the name that sd-scripts' files are made of, where it is another one."""
        names = {e.ours: name for name, e in self.other.their_modules.items()} if self.other else {}
        return {name: names[e.ours] for name, e in self.their_modules.items() if names.get(e.ours, name) != name}

    @cached_property
    def their_modules(self) -> dict[str, Entry]:
        """Original module name -> the entry of its `.weight`."""
        return {e.theirs.removesuffix(".weight"): e for e in self.entries if e.theirs.endswith(".weight")}

    def our_shape(self, entry: Entry) -> Shape:
        """Shape of our tensors of one entry, stacked."""
        first = self.shapes[entry.ours[0]]
        return (sum(entry.sizes), *first[1:]) if len(entry.ours) > 1 else tuple(first)

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the original names."""
        return {entry.theirs: entry.join([ours[o] for o in entry.ours]) for entry in self.entries}

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An original state dict under our names. Raises ConfigError naming keys that no row claims or that lack."""
        unknown, missing = theirs.keys() - self.by_theirs.keys(), self.by_theirs.keys() - theirs.keys()
        if unknown or missing:
            raise ConfigError(f"layout '{self.name}': no row for {sorted(unknown)[:4]}, missing {sorted(missing)[:4]}")
        out = {}
        for entry in self.entries:
            out.update(zip(entry.ours, entry.split(theirs[entry.theirs], self.our_shape(entry)), strict=True))
        return out


def _below(keys: Iterable[str]) -> Mapping[str, list[str]]:
    """Module name -> the tensors below it, as suffixes."""
    below = defaultdict(list)
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            below[".".join(parts[:n])].append("".join(f".{part}" for part in parts[n:]))
    return below


def our_view(rows: Iterable[Row], theirs: Mapping[str, Shape]) -> dict[str, Shape]:
    """An original file's shapes under our names, before there is a model: what its size is read from.

    A fused tensor stands whole under the first of our names; operations are not applied.
    """
    below, found = _below(theirs), {}
    for r in rows:
        for i in itertools.count() if "{i}" in r.theirs else (0,):
            name, ours = r.theirs.replace("{i}", str(i)), r.ours[0].replace("{i}", str(i))
            if name not in below:
                break
            found.update((ours + leaf, tuple(theirs[name + leaf])) for leaf in below[name])
    return found


def our_shapes(rows: Iterable[Row], theirs: Mapping[str, Shape]) -> dict[str, Shape]:
    """An original file's shapes under our names, fused tensors apart, without a model that says how they divide.

    Of what a fused weight holds the first, q, has as many rows as the weight has columns; so have k and v where a
    fourth, the MLP, takes the rest, else they share the rest. tests/test_check.py holds this against every model.
    """
    below, found = _below(theirs), {}
    for r in rows:
        for i in itertools.count() if "{i}" in r.theirs else (0,):
            name = r.theirs.replace("{i}", str(i))
            if name not in below:
                break
            ours = [o.replace("{i}", str(i)) for o in r.ours]
            width = tuple(theirs.get(f"{name}.weight", (0, 0)))[1:2]
            for leaf in below[name]:
                shape = tuple(theirs[name + leaf])
                shape = r.op.shape(shape) if r.op else shape  # every operation on a denoiser's shape is its own inverse
                found.update(zip((o + leaf for o in ours), _divided(shape, len(ours), *width), strict=True))
    return found


def _divided(shape: Shape, parts: int, width: int = 0) -> list[Shape]:
    if parts == 1:
        return [shape]
    same = 1 if parts == 3 else parts - 1  # leading parts of `width` rows; the others share what remains
    rest = (shape[0] - same * width) // (parts - same)
    return [(n, *shape[1:]) for n in (width,) * same + (rest,) * (parts - same)]


def count(keys: Iterable[str], name: str) -> int:
    """How many numbered blocks `name.0`, `name.1`, ... these keys have: one more than the highest number."""
    start = name + "."
    return 1 + max((int(key[len(start) :].split(".")[0]) for key in keys if key.startswith(start)), default=-1)


def is_below(name: str, pattern: str) -> bool:
    """Whether a dotted name lies below another, in which `*` stands for one part: `blocks.*.attn`."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) > len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False))


def modules_like(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the modules that the patterns mean, in their order; a name without `*` stands for itself."""
    known, out = [name for name, _ in model.named_modules()], []
    for pattern in patterns:
        depth = pattern.count(".")
        like = [name for name in known if name.count(".") == depth and is_below(f"{name}.", pattern)]
        out += like if "*" in pattern else [pattern]
    return out


def shapes_of(model) -> dict[str, Shape]:
    """Names and shapes of a model's parameters and persistent buffers (works on the meta device)."""
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
