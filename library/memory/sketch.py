"""Models without weights: what a file's header, or a released model's list of names, says is enough to load one.

Inside of `FakeTensorMode` the loaded model has all its tensors, with shapes and number formats and no memory, and the
real code of loading, quantising, adapting and computing runs on them.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from library.checkpoints import TORCH_DTYPES, Checkpoint, Reader, find_part
from library.errors import ConfigError
from library.headers import BITS, Header, TensorInfo

if TYPE_CHECKING:
    from library.families.family import Part

RELEASED = Path(__file__).resolve().parent.parent / "released"


class Sketch(Checkpoint):
    """A checkpoint whose tensors have no values."""

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        yield SketchReader(self)


class SketchReader(Reader):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def raw(self, key: str) -> Tensor | None:
        if key not in self.checkpoint.files:
            return None
        info = self.checkpoint.info(key)
        return torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))


def of_file(part: Part, path: str) -> tuple[Sketch, str]:
    """(the sketch of a part's file, its layout's name); only headers are read."""
    found, layout = find_part(part, path)
    return Sketch(found.path, found.headers, found.prefix, found.folder), layout


def released(part: Part, name: str, dtype: str = "BF16") -> tuple[Sketch, str]:
    """The sketch of a released model from its list of names and shapes, `library/released/<name>.json.gz`.

    Raises ConfigError if there is none or the part does not know it.
    """
    path = RELEASED / f"{name}.json.gz"
    if not path.is_file():
        known = ", ".join(sorted(p.name.removesuffix(".json.gz") for p in RELEASED.glob("*.json.gz")))
        raise ConfigError(f"there is no list of the released model {name} (known: {known}); give its file instead")
    shapes = json.loads(gzip.decompress(path.read_bytes()))
    checkpoint = of_shapes({key: tuple(shape) for key, shape in shapes.items()}, path, dtype)
    for prefix in part.prefixes:
        chosen = Sketch(path, checkpoint.headers, prefix)
        if layout := part.layout_in(chosen.shapes):
            return chosen, layout
    raise ConfigError(f"{path.name} is not {part.title}")


def released_names(family: str) -> dict[str, str]:
    """Part name -> the list of the released model's part; nothing for a family without lists."""
    return json.loads((RELEASED / "index.json").read_text(encoding="utf-8")).get(family, {})


def of_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path, dtype: str) -> Sketch:
    tensors = {key: TensorInfo(dtype, shape, 0, math.prod(shape) * BITS[dtype] // 8) for key, shape in shapes.items()}
    return Sketch(path, (Header(path, tensors, {}, 0),))


class Tracker(TorchDispatchMode):
    """Counts the bytes of every tensor storage that is made inside, and how many are alive at once.

    The same for real and for fake tensors, so that a plan and a run are measured alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self.see, out)
        return out

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def restart(self) -> None:
        """Forget the highest level so far."""
        self.peak = self.live
