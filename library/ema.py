"""An exponential moving average of the trained weights: `--ema_decay`.

average <- decay * average + (1 - decay) * weights after every optimizer step, float32, beginning with the weights at
the start. It is saved beside the weights as `<file>-ema.safetensors`, kept in the training state and never trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Average:
    """`update()` after each step; inside `in_place()` the trained tensors hold the average."""

    def __init__(self, trained: Mapping[str, Tensor], decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.values = {name: p.detach().float().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        now = [p.detach().float() for p in self.trained.values()]
        torch._foreach_lerp_(list(self.values.values()), now, 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average where the weights are, and afterwards the very same weights back."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            self._copy(self.values)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(source[name])

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self.values.items():
            value.copy_(state["values"][name])
