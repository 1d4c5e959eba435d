"""Models without weights: what a file's header says is enough to load one.

Inside of `FakeTensorMode` the loaded model has all its tensors, with shapes and number formats and no memory, and the
real code of loading, quantising, adapting and computing runs on them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
        self.made: dict[int, tuple[int, Any]] = {}  # storage -> its bytes, and when it was made
        self.now: Any = None  # what is being done, in the words of who asks
        self.freed: dict[Any, int] = {}  # when made -> bytes of that which are gone again; may be emptied at any time

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
        if key not in self.made:
            size = storage.nbytes()
            self.made[key] = size, self.now
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, then = self.made.pop(key, (0, None))
        self.live -= size
        self.freed[then] = self.freed.get(then, 0) + size

    def restart(self) -> None:
        """Forget the highest level so far."""
        self.peak = self.live


@dataclass(frozen=True)
class Segment:
    """A stretch of a step: bytes at its end and at its highest level, above its beginning."""

    label: Any
    net: int
    peak: int
    moved: int  # bytes that went to the host
    freed: dict[Any, int] = field(compare=False)  # label -> bytes made there that are freed here


class Recorder:
    """Cuts what a tracker counts into segments, the first of which is called "head"."""

    def __init__(self, tracker: Tracker, elsewhere: Elsewhere | None = None) -> None:
        self.tracker, self.elsewhere, self.segments = tracker, elsewhere, []
        self.level = tracker.live
        self._begin("head")

    def _begin(self, label: Any) -> None:
        self.tracker.restart()
        self.tracker.now, self.tracker.freed = label, {}
        self.start = self.tracker.live, self._moved()

    def _moved(self) -> int:
        return self.elsewhere.moved_bytes if self.elsewhere else 0

    def mark(self, label: Any) -> None:
        """Here the segment so far ends, and the one of that label begins."""
        tracker, (level, moved) = self.tracker, self.start
        sizes = tracker.live - level, tracker.peak - level, self._moved() - moved
        self.segments.append(Segment(tracker.now, *sizes, tracker.freed))
        self._begin(label)


def curve(segments: Iterable[Segment], level: int) -> tuple[int, int]:
    """(highest level, bytes that went to the host) of segments that begin at `level`."""
    peak, moved = level, 0
    for segment in segments:
        peak, level, moved = max(peak, level + segment.peak), level + segment.net, moved + segment.moved
    return peak, moved
