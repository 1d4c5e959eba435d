"""The optimizer step inside the backward pass: --fused_backward_pass.

A weight is updated as soon as its gradient is complete, and the gradient is gone before the next one is computed: a
full fine-tune never holds all gradients. It is the one optimizer of the run, given one weight at a time, so states,
schedules and resuming are those of any run. What has to know all gradients before the step cannot be had: clipping,
accumulation, fp16's scale, sums over processes, and optimizers that find one number for all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.health import skips_on_device

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.memory.swap import BlockSwap


class FusedBackward:
    """Hooks on `parameters`. Call `begins(loss)` before each backward pass and `norm()` after it.

    If the loss is no finite number nothing is updated. If only a gradient is none, the weights whose gradients came
    before it are updated and no other: nothing that is not finite reaches a weight or the optimizer's state.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], swap: BlockSwap | None = None) -> None:
        self.optimizer, self.parameters, self.swap = optimizer, parameters, swap
        self.on_device = skips_on_device(optimizer)
        self.group = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.norms: dict[int, Tensor] = {}  # id of a parameter -> norm of its gradient, a scalar on the device
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient_is_there)

    def begins(self, loss: Tensor) -> None:
        self.norms.clear()
        self.bad = ~torch.isfinite(loss.detach())

    def reached(self, parameter: Tensor) -> bool:
        """Whether the last backward pass gave it a gradient."""
        return id(parameter) in self.norms

    def norm(self) -> Tensor:
        """Of all gradients of the last backward pass, a scalar on the device."""
        norms = [self.norms[id(p)] for p in self.parameters if id(p) in self.norms]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(self.bad, dtype=torch.float)

    @torch.no_grad()
    def _gradient_is_there(self, parameter: Tensor) -> None:
        norm = self.norms[id(parameter)] = torch.linalg.vector_norm(parameter.grad)
        self.bad = self.bad | ~torch.isfinite(norm)
        if self.on_device:
            self.optimizer.found_inf = self.bad.float()
            self._step(parameter)
        elif not self.bad:  # waits for the device
            self._step(parameter)
        parameter.grad = None

    def _step(self, parameter: Tensor) -> None:
        """Of a block that is swapped, the optimizer's state stays on the host but for this moment."""
        index = self.group[id(parameter)]
        swapped = self.swap is not None and id(parameter) in self.swap.owner
        if swapped:
            move_state(self.optimizer, index, parameter, parameter.device)
        step_alone(self.optimizer, index, parameter)
        if swapped:
            self.swap.mark_written(parameter)
            move_state(self.optimizer, index, parameter, torch.device("cpu"))


def separate(model: torch.nn.Module) -> None:
    """Give trained weights memory of their own where several are slices of one tensor of the file.

    Autograd counts changes by the tensor that was sliced, and would take the update of one slice for one of the others.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p.untyped_storage().nbytes() > p.nbytes:
                made.setdefault(id(p), torch.nn.Parameter(p.detach().clone()))
                module.register_parameter(name, made[id(p)])


def step_alone(optimizer: Optimizer, group: int, parameter: Tensor) -> None:
    """`optimizer.step()` for one parameter of the group with this index."""
    groups, only = optimizer.param_groups, optimizer.param_groups[group]
    together = only["params"]
    try:
        optimizer.param_groups, only["params"] = [only], [parameter]
        optimizer.step()
    finally:
        optimizer.param_groups, only["params"] = groups, together


def move_state(optimizer: Optimizer, group: int, parameter: Tensor, device: torch.device) -> None:
    """A parameter's state to a device. Step counters are there where torch wants them: beside it only for its fused
    and capturable implementations."""
    state, options = optimizer.state.get(parameter, {}), optimizer.param_groups[group]
    counts = bool(options.get("fused") or options.get("capturable"))
    for name, value in state.items():
        if isinstance(value, Tensor) and (value.ndim or counts):
            state[name] = value.to(device)
