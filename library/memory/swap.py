"""Blocks that live on the host and pass through a ring of buffers on the device: --blocks_to_swap.

Each swapped block is one flat buffer on the host. Before its forward (and before the backward pass needs it again) it
is copied into a free buffer of the ring; meanwhile the block that followed it last time is fetched already, on a
stream of its own. A frozen block is only ever copied in, since the host keeps the master. Of a trained block the
gradients go to the host, where the optimizer updates the master; where the update happens in the backward pass
(--fused_backward_pass), what was changed on the device is written back when the block leaves.

The arithmetic is that of the resident model, on the same numbers: losses are equal to the bit. Without an accelerator
both ends are host memory, and everything works as on a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what CUDA's allocator and the widest vector loads want
RING = 2  # one block computes while the next one is copied


@dataclass
class Held:
    """One tensor of a block and its places: in the host's buffer, and in each buffer of the ring."""

    tensor: Tensor
    start: int
    size: int  # bytes
    host: Tensor

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.size].view(self.host.dtype).view(self.host.shape)


@dataclass
class Block:
    module: nn.Module
    number: int
    host: Tensor  # uint8, all tensors of the block
    held: list[Held]
    slot: Slot | None = None  # where it is on the device
    written: bool = False  # changed on the device since it was copied in
    # Id of a parameter -> its gradient so far, on the host, while the parameter itself is on the device.
    gradients: dict[int, Tensor] = field(default_factory=dict)
    fixed: Tensor | None = None  # a device buffer of its own, while it is not swapped


@dataclass
class Slot:
    buffer: Tensor  # uint8, on the device
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # block number -> its tensors in here
    block: Block | None = None
    copied: Any = None  # event: the block has arrived
    used: int = 0  # when it was entered last


class Streams:
    """A side stream for copies where the device has streams; where it has none, copies happen at once."""

    def __init__(self, device: torch.device) -> None:
        self.api = torch.get_device_module(device) if device.type not in ("cpu", "mps") else None
        self.side = self.api.Stream(device) if self.api else None

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Copies inside wait for what is enqueued now, and nothing waits for them yet."""
        if self.api is None:
            yield
            return
        self.side.wait_stream(self.api.current_stream())
        with self.api.stream(self.side):
            yield

    def mark(self) -> Any:
        return self.side.record_event() if self.side else None

    def wait(self, event: Any) -> None:
        """What is enqueued from now on waits for the event."""
        if event is not None:
            self.api.current_stream().wait_event(event)

    def finish(self) -> None:
        if self.side is not None:
            self.side.synchronize()


class BlockSwap:
    """Swaps `modules`, in any order of execution.

    `checkpointed`: their backward pass runs them again. `collects`: their gradients are summed on the host.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: Any,
        *,
        ring: int = RING,
        pinned: bool = False,
        collects: bool = False,
        checkpointed: bool = False,
    ) -> None:
        self.device, self.checkpointed = torch.device(device), checkpointed
        self.blocks = [pack(module, number, pinned) for number, module in enumerate(modules)]
        size = max(block.host.numel() for block in self.blocks)
        count = min(ring, len(self.blocks))  # more would only stand empty
        self.slots = [Slot(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(count)]
        self.streams = Streams(self.device)
        self.follows: dict[tuple, Block] = {}  # the two blocks entered last -> the one that came next, last time
        self.last: tuple[Block | None, Block | None] = (None, None)
        self.entered = self.waits = 0  # blocks entered; of these, how many were not fetched before
        self.owner = {id(held.tensor): block for block in self.blocks for held in block.held}
        for block in self.blocks:
            block.module.forward = self._wrapped(block, block.module.forward)
        if collects:
            self._collect_gradients()

    # ---------------------------------------------------------------- where blocks are

    def enter(self, block: Block) -> None:
        """The block's tensors are on the device, for what is enqueued from now on; the next one is on its way."""
        if block.fixed is not None:
            return
        if block is not self.last[1]:
            self.entered += 1
            self.follows[self._key()] = block
            if block.slot is None:
                self.waits += 1
                self._fetch(block)
            self.last = (self.last[1], block)
            self.streams.wait(block.slot.copied)
            expected = self.follows.get(self._key())
            if expected is not None and expected.slot is None and expected.fixed is None:
                self._fetch(expected)
        elif block.slot is None:  # parked since
            self._fetch(block)
            self.streams.wait(block.slot.copied)
        block.slot.used = self.entered

    def _key(self) -> tuple:
        return tuple(block.number if block else None for block in self.last)

    def _fetch(self, block: Block) -> None:
        """Copy a block in, over the one that was entered longest ago. The block in use is never that one."""
        free = [slot for slot in self.slots if slot.block is None or slot.block is not self.last[1]]
        slot = min(free, key=lambda one: (one.block is not None, one.used))
        with self.streams.copying():
            if slot.block is not None:
                self._leave(slot.block)
            slot.buffer[: block.host.numel()].copy_(block.host, non_blocking=True)
            slot.copied = self.streams.mark()
        if block.number not in slot.views:
            slot.views[block.number] = [held.view(slot.buffer) for held in block.held]
        for held, view in zip(block.held, slot.views[block.number], strict=True):
            if held.tensor.grad is not None:  # a sum of gradients, on the host
                block.gradients[id(held.tensor)], held.tensor.grad = held.tensor.grad, None
            held.tensor.data = view
        slot.block, block.slot = block, slot

    def _leave(self, block: Block) -> None:
        if block.written:
            block.host.copy_(block.slot.buffer[: block.host.numel()], non_blocking=True)
            block.written = False
        for held in block.held:
            held.tensor.data = held.host
            if id(held.tensor) in block.gradients:
                held.tensor.grad = block.gradients.pop(id(held.tensor))
        block.slot.block = block.slot = None

    def park(self) -> None:
        """Everything that is swapped is on the host, what was changed included: for the optimizer, saves, states."""
        with self.streams.copying():
            for block in self.blocks:
                if block.slot is not None:
                    self._leave(block)
        self.streams.finish()

    def packed(self, values: dict[int, Tensor]) -> list[Tensor]:
        """Host buffers as the blocks have them, of other values: id of a tensor -> what it is to be."""
        buffers = []
        for block in self.blocks:
            buffers.append(torch.empty_like(block.host, pin_memory=block.host.is_pinned()))
            for held in block.held:
                held.view(buffers[-1]).copy_(values[id(held.tensor)])
        return buffers

    def exchange(self, buffers: Sequence[Tensor]) -> None:
        """Other weights for the blocks: host buffers from `packed`, or those that were theirs before."""
        self.park()
        for block, buffer in zip(self.blocks, buffers, strict=True):
            block.host = buffer
            for held in block.held:
                held.host = held.view(buffer)
                if block.fixed is None:
                    held.tensor.data = held.host
            if block.fixed is not None:
                block.fixed.copy_(buffer)

    def resident(self) -> list[Block]:
        """The swapped blocks that take room on the device now."""
        return [block for block in self.blocks if block.slot is not None or block.fixed is not None]

    # ---------------------------------------------------------------- forward and backward

    def _wrapped(self, block: Block, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(block)
            if self.checkpointed or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                return forward(*args, **kwargs)

        return run

    def _pack(self, tensor: Tensor) -> Any:
        """A tensor in the ring is remembered by its place in its block, since the room is used again."""
        storage = tensor.untyped_storage().data_ptr()
        slot = next((slot for slot in self.slots if slot.buffer.untyped_storage().data_ptr() == storage), None)
        if slot is None:
            return tensor
        return slot.block, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        block, dtype, *place = packed
        self.enter(block)
        return block.slot.buffer.view(dtype).as_strided(*place)

    # ---------------------------------------------------------------- training the blocks themselves

    def _collect_gradients(self) -> None:
        for block in self.blocks:
            for held in block.held:
                if held.tensor.requires_grad:
                    held.tensor.register_post_accumulate_grad_hook(self._gradient_is_there)

    def _gradient_is_there(self, parameter: Tensor) -> None:
        """Add a gradient to the sum on the host, and free it on the device."""
        gradients = self.owner[id(parameter)].gradients
        moved = parameter.grad.to("cpu", copy=False)
        kept = gradients.get(id(parameter))
        gradients[id(parameter)] = moved if kept is None else kept.add_(moved)
        parameter.grad = None

    def mark_written(self, parameter: Tensor) -> None:
        """A parameter was changed while its block was on the device."""
        block = self.owner.get(id(parameter))
        if block is not None and block.slot is not None:
            block.written = True

    # ---------------------------------------------------------------- another number for a while

    @contextlib.contextmanager
    def only(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, only these of the swapped blocks are swapped; the others are on the device. Nothing is trained."""
        staying = [block for block in self.blocks if not any(block.module is module for module in modules)]
        self.park()
        for block in staying:
            block.fixed = block.host.to(self.device, copy=True)
            for held in block.held:
                held.tensor.data = held.view(block.fixed)
        try:
            yield
        finally:
            for block in staying:
                block.fixed = None
                for held in block.held:
                    held.tensor.data = held.host


def pack(module: nn.Module, number: int, pinned: bool) -> Block:
    """Move a block's parameters and buffers into one flat buffer on the host; they keep their identity."""
    tensors = [t for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values() if t.numel()]
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    host = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
    held = []
    for tensor, start in zip(tensors, starts, strict=True):
        size = tensor.numel() * tensor.element_size()
        view = host[start : start + size].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor.data)
        tensor.data = view
        held.append(Held(tensor, start, size, view))
    return Block(module, number, host, held)
