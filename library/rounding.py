"""--stochastic_rounding: updates of bf16 weights that are smaller than their last digit count on the average.

Rounding to the nearest bf16 number throws away an update below half a digit, every time. Here the optimizer updates a
float32 copy of one weight tensor after another, and the copy is rounded up or down, with probabilities that make the
mean exact. The optimizer's state is float32 (or 8 bits), as its copy is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.data.dataset import item_seed

STREAM = 4  # of random numbers, beside those of library.batches and library.runtime


def round_stochastically(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Put finite float32 `values` into the bf16 tensor `target`. What bf16 can hold exactly stays as it is.

    A bf16 number is the upper half of a float32 number: a random number below one digit is added to the lower half,
    which is then cut off. Signs are apart from magnitudes, so that this holds for negative numbers too.
    """
    bits = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits.add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    target.copy_(bits.view(torch.float32))


def rounding(cls: type[torch.optim.Optimizer], seed: int) -> type[torch.optim.Optimizer]:
    """The class of an optimizer that updates each weight by itself, with bf16 weights rounded stochastically.

    The random numbers depend on `seed`, on `self.number` (the optimizer step, set before it) and on the place of the
    weight in the groups: not on the process, nor on the order in which weights are updated.
    """

    class Rounding(cls):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            weights = [p for group in self.param_groups for p in group["params"]]
            self.number, self.places = 0, {id(p): k for k, p in enumerate(weights)}

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            groups = self.param_groups
            for group in groups:
                weights = group["params"]
                for p in weights:
                    if p.grad is not None:
                        self.param_groups = [group]
                        self._step_of(group, p, super().step)
                self.param_groups, group["params"] = groups, weights

        def _step_of(self, group: dict[str, Any], p: Tensor, step: Any) -> None:
            if p.dtype != torch.bfloat16:
                group["params"] = [p]
                step()
                return
            copy = torch.nn.Parameter(p.float())
            copy.grad, group["params"] = p.grad.float(), [copy]
            if p in self.state:
                self.state[copy] = {k: _in_float32(v) for k, v in self.state.pop(p).items()}
            step()
            self.state[p] = self.state.pop(copy, {})
            generator = torch.Generator(p.device).manual_seed(item_seed(seed, self.number, self.places[id(p)], STREAM))
            round_stochastically(p, copy.detach(), generator)

    Rounding.__name__ = Rounding.__qualname__ = cls.__name__
    return Rounding


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
