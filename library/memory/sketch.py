"""Models without weights: what a file's header says is enough to load one.

Inside of `FakeTensorMode` the loaded model has all its tensors, with shapes and number formats and no memory, and the
real code of loading, quantising, adapting and computing runs on them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from library.checkpoints import TORCH_DTYPES, Checkpoint, Reader, find_part
from library.memory.activations import HostActivations

if TYPE_CHECKING:
    from library.families.family import Part


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


class Elsewhere(HostActivations):
    """Block inputs that wait on the host, where they take nothing: what is left counts on the device."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def put(self, tensor: Tensor) -> Any:
        return tensor.shape, tensor.dtype

    def get(self, packed: Any) -> Tensor:
        shape, dtype = packed
        return torch.empty(shape, dtype=dtype)


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
        if isinstance(out, Tensor):
            self.see(out)
        elif isinstance(out, list | tuple):  # most other answers are sizes and devices, asked for at every step
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
