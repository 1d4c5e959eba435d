"""Block inputs that checkpointing keeps, on the host until the backward pass: --cpu_offload_checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.memory.swap import Streams

LEAST = 1 << 16  # values: what is smaller is not worth a copy


class HostActivations:
    """Hooks around a checkpointed block: its large inputs that need a gradient go to the host and come back.

    Inputs without a gradient (masks, rotary tables) are the same for all blocks and stay.
    """

    def __init__(self, device: Any, least: int | None = None) -> None:
        self.device, self.least = torch.device(device), LEAST if least is None else least
        self.streams = Streams(self.device)
        self.moved = self.moved_bytes = 0  # tensors taken to the host so far

    def around(self, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                return call(*args, **kwargs)

        return run

    def _pack(self, tensor: Tensor) -> Any:
        if not tensor.requires_grad or tensor.numel() < self.least:
            return tensor
        self.moved += 1
        self.moved_bytes += tensor.nbytes
        return self.put(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else self.get(packed)

    def put(self, tensor: Tensor) -> Any:
        """Copy to the host; what `get` needs to bring it back."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.streams.side is not None)
        with self.streams.copying():
            host.copy_(tensor, non_blocking=True)
            if self.streams.side is not None:
                tensor.record_stream(self.streams.side)  # its memory is free again once the copy is made
        return host, self.streams.mark()

    def get(self, packed: Any) -> Tensor:
        host, event = packed
        self.streams.wait(event)
        return host.to(self.device, non_blocking=True)
