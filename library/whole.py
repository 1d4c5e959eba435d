"""A whole checkpoint: all parts of a model in one file under original names, trained ones new, the rest kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import checkpoints, quantised
from library.layout import shapes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Family, Part

STALE = ("model_ema.",)  # averages of the weights before training; they would be taken for those of the new ones


def save_whole(
    family: Family,
    models: Mapping[str, torch.nn.Module],
    options: Any,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> str:
    """Write the parts that `family.container` names; `models` are the trained ones by part name. Returns a line.

    Keys of the base file that belong to no part are kept, and the family's markers added. Floating-point tensors are
    written in `dtype`, None = as trained or as stored.
    """
    tensors: dict[str, Tensor] = {}
    for part in [part for part in family.parts if part.name in family.container]:
        prefix, layout = family.container[part.name]
        source = checkpoints.path_of(part, options)
        found = _trained(models[part.name], layout) if part.name in models else _stored(part, source, layout)
        tensors |= {prefix + key: value for key, value in found.items()}
    base = Path(checkpoints.path_of(family.denoiser, options))
    rest, own = _others(base, tensors, [prefix for prefix, _ in family.container.values()])
    tensors |= rest | {key: value for key, value in family.markers(family).items() if key not in rest}
    if dtype is not None:
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    checkpoints.save(tensors, path, {**own, **metadata})
    return f"{len(tensors)} tensors of {len(family.container)} parts"


def _trained(model: torch.nn.Module, layout: str) -> dict[str, Tensor]:
    """A live model under the names of a layout, with what its file held besides if that had these names too."""
    binding = model.binding
    wanted = checkpoints.layout_of(binding.part, layout, binding.layout.shapes)
    extras = binding.extras if binding.layout.name == layout else {}
    return wanted.to_theirs(model.state_dict()) | extras


def _stored(part: Part, path: str, layout: str) -> dict[str, Tensor]:
    """A part's tensors from its file, renamed if the file has other names."""
    import torch

    checkpoint, name = checkpoints.find_part(part, path)
    shapes = checkpoint.shapes
    with checkpoint.reader() as reader:
        theirs = {key: reader.tensor(key) for key in shapes}
    if name == layout:
        return theirs
    config = checkpoints.configuration(part, path, shapes, checkpoint.metadata, name)
    with torch.device("meta"):
        ours = shapes_of(part.build(config))
    has = checkpoints.layout_of(part, name, ours)
    state = has.to_ours({key: theirs[key] for key in has.their_shapes})
    return checkpoints.layout_of(part, layout, ours).to_theirs(state)


def _others(base: Path, tensors: Mapping[str, Tensor], prefixes: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a base checkpoint holds beside its parts, and its header's metadata."""
    if not base.is_file():
        return {}, {}
    checkpoint = checkpoints.Checkpoint.open(base)
    own = {key: value for key, value in checkpoint.metadata.items() if key != quantised.METADATA}
    if not any(key.startswith(tuple(prefixes)) for key in checkpoint.files):  # the file of the denoiser alone
        return {}, own
    keys = [k for k in checkpoint.files if k not in tensors and not k.startswith((*prefixes, *STALE))]
    with checkpoint.reader() as reader:
        return {key: reader.raw(key) for key in keys}, own
