"""A step of a denoiser with many equal blocks, run on a few of them and extended where that is exact.

Of every run of equal blocks one at its beginning is run, two at its end and two between them. The others are left out:
they are called like all blocks and hand on what they are given. The step is run so, and again with one block between
the ends, another one. Where the two steps differ by what one block does and nothing else, in the forward pass and in
the backward pass, to the byte, each block that was left out counts as one more of those between. Where they differ in
any other way `Unequal` is raised, and the whole step has to be run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from library.layout import modules_like
from library.memory.alike import alike, traits_of
from library.memory.sketch import Recorder, Segment, curve

# Blocks that are run at the ends of a run. In the backward pass a gradient that all blocks add to is there after the
# last one, and its sum after the one before it; from then on every block does the same.
FRONT, BACK = 1, 2
MIDDLE = 2
KEPT = FRONT + MIDDLE + BACK
# Labels of segments are words, or ("forward", "backward" or "left out", number of the run, place in it).
LAST = FRONT + MIDDLE - 1  # place of the second block between the ends
GAIN = 0.75  # of the model's blocks: if two shortened steps run more, one whole step is about as fast


class Unequal(Exception):
    """One block more does not add the same each time."""


@dataclass(frozen=True)
class Run:
    """Equal blocks that follow each other in a module list."""

    blocks: nn.ModuleList
    first: int
    length: int

    def kept(self, middle: int) -> dict[int, int]:
        """Index of each block that is run -> its place; where one is in the `middle` it is none of the two."""
        end = self.first + self.length
        between = self.first + (FRONT if middle == MIDDLE else self.length // 2)
        ends = {self.first + place: place for place in range(FRONT)} | {end - k: -k for k in range(1, BACK + 1)}
        return ends | {between + k: FRONT + k for k in range(middle)}


class Passing:
    """The blocks of one run during a step: those that are run mark where they begin, the others hand on their input."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self.recorder, self.number = recorder, number
        self.call: Any = None  # what the last block that was run was called with
        self.out: tuple[list[Any], Any] = [], None  # its tensors, and how they lie in what it returned

    def watched(self, forward: Callable, place: int) -> Callable:
        """The forward of a block that is run."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.recorder.mark(("forward", self.number, place))
            leaves, structure = tree_flatten((args, kwargs))
            self.call = structure, [_kind(leaf) for leaf in leaves]
            out = forward(*args, **kwargs)
            leaves, structure = tree_flatten(out)
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise Unequal("a block does not return tensors alone")
            self.out = [weakref.ref(leaf) for leaf in leaves], structure
            left = [("backward", self.number, place)]

            def back(gradient: Tensor) -> None:
                if left:  # of several outputs the first one that has its gradient
                    self.recorder.mark(left.pop())

            for leaf in leaves:
                if leaf.requires_grad:
                    leaf.register_hook(back)
            return out

        return run

    def through(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block that is left out: what the one before it gave. Raises Unequal for any other call."""
        self.recorder.mark(("left out", self.number, 0))
        before, (leaves, structure) = [reference() for reference in self.out[0]], tree_flatten((args, kwargs))
        given, own = {id(leaf) for leaf in leaves}, {id(leaf) for leaf in before}
        if any(leaf is None or id(leaf) not in given for leaf in before):
            raise Unequal("a block is not given what the one before it returned")
        if structure != self.call[0] or any(
            id(leaf) not in own and _kind(leaf) != kind for leaf, kind in zip(leaves, self.call[1], strict=True)
        ):
            raise Unequal("a block is called in another way than the one before it")
        return tree_unflatten(before, self.out[1])


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else traits_of(value, {})


def runs_of(model: nn.Module, names: Iterable[str]) -> list[Run]:
    """The runs in the module lists `names` that are long enough; none if two shortened steps are no gain."""
    lists = [model.get_submodule(name) for name in modules_like(model, names)]
    found = [Run(blocks, first, length) for blocks in lists for first, length in alike(blocks) if length >= 2 * KEPT]
    count = sum(map(len, lists))
    both = 2 * (count - sum(run.length for run in found)) + (2 * KEPT - 1) * len(found)
    return found if both <= GAIN * count else []


@contextlib.contextmanager
def shortened(runs: Sequence[Run], middle: int, recorder: Recorder) -> Iterator[None]:
    """Inside, of every run the blocks of its ends and `middle` ones between them are run, and the others left out."""
    changed = []
    try:
        for number, run in enumerate(runs):
            passing, kept = Passing(recorder, number), run.kept(middle)
            for index in range(run.first, run.first + run.length):
                block = run.blocks[index]
                changed.append((block, vars(block).get("forward")))
                block.forward = passing.watched(block.forward, kept[index]) if index in kept else passing.through
        yield
    finally:
        for block, forward in changed:
            del block.forward
            if forward is not None:
                block.forward = forward


def whole(recorder: Callable[[], Recorder], step: Callable[[], None], *unread: Any) -> tuple[int, int]:
    """(highest level, bytes that went to the host) of a step, forward and backward, that is run as it is."""
    found = recorder()
    step()
    found.mark("end")
    return curve(found.segments, found.level)


def extended(
    recorder: Callable[[], Recorder],
    step: Callable[[], None],
    model: nn.Module,
    names: Iterable[str],
    parameters: Sequence[Tensor],
) -> tuple[int, int]:
    """The same from a few blocks of each run in the module lists `names`. `parameters` are those that get gradients.

    Raises Unequal; the model is then to be loaded anew, as it has kept what it makes in a first step.
    """
    runs = runs_of(model, names)
    if not runs:
        return whole(recorder, step)
    steps, left = [], []
    for middle in (MIDDLE, MIDDLE - 1):
        steps.append(found := recorder())
        with shortened(runs, middle, found):
            step()
        found.mark("end")
        for parameter in parameters:
            parameter.grad = None
        left.append(found.tracker.live - found.level)
    long, short = (_own(found.segments) for found in steps)
    more = [run.length - KEPT for run in runs]
    return curve(_lengthened(long, short, more, *left), steps[0].level)


def _lengthened(
    long: list[Segment], short: list[Segment], more: Sequence[int], left: int, left_again: int
) -> list[Segment]:
    """`long` with the last block in each run's middle `more` times more often, if it is `short` with that block.

    `left`: bytes that each leaves behind, in its head: tables that a model makes once. Raises Unequal.
    """
    for before, segment, after in zip(long, long[1:], long[2:], strict=False):
        if _is_last(segment.label):
            twin = before if segment.label[0] == "forward" else after
            if twin != replace(segment, label=_twin(segment.label)):
                raise Unequal(f"{segment} is not {twin}")
    short[0] = replace(short[0], net=short[0].net + left - left_again, peak=long[0].peak if left else short[0].peak)
    out, fewer = [], []
    for segment in long:
        if _is_last(segment.label):
            out += [segment] * (1 + more[segment.label[1]])
            continue
        shares = _shares(segment, len(more))
        fewer.append(replace(segment, net=segment.net + sum(shares)))
        gone = sum(share * count for share, count in zip(shares, more, strict=True))
        out.append(replace(segment, net=segment.net - gone))
    if fewer != short:
        raise Unequal("one block more changes what others do")
    return out


def _is_last(label: Any) -> bool:
    return isinstance(label, tuple) and label[2] == LAST


def _twin(label: tuple) -> tuple:
    """The label of the block before."""
    return (*label[:2], label[2] - 1)


def _shares(segment: Segment, count: int) -> list[int]:
    """For each run: bytes that each of its blocks has made, and that are freed in this segment whatever their number.

    A peak that is the same with one block less was before that, so that it is the same with more.
    """
    shares = [0] * count
    for label, size in segment.freed.items():
        if _is_last(label) and segment.freed.get(_twin(label)) == size:
            shares[label[1]] += size
    return shares


def _own(segments: list[Segment]) -> list[Segment]:
    """Without those of blocks that are left out: what is made between the blocks of a run has to be the same each time,
    and nothing of it may stay. Raises Unequal."""
    out = [segment for segment in segments if segment.label[0] != "left out"]
    others = {(one.label, one.net, one.peak, one.moved) for one in segments if one.label[0] == "left out"}
    if any(net or moved for _, net, _, moved in others) or len({label for label, *_ in others}) < len(others):
        raise Unequal("what is made between the blocks is not the same each time")
    if len({segment.label for segment in out}) < len(out):
        raise Unequal("a block is called twice")
    return out
