"""Does the training do anything? The size of the update in every save, and tensors that nothing happens to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train_network import NetworkTrainer

AFTER = 50  # steps after which an adapter that does nothing is a warning
SAMPLED = 64  # tensors of a fully trained model that are compared with what they were at the start
SAMPLED_BYTES = 512 * 1024**2


class Updates:
    """Relative sizes of what was learned: ||dW|| / ||W||, Frobenius norms, by original module name."""

    def __init__(self, trainer: NetworkTrainer) -> None:
        self.trainer = trainer
        self.base: dict[str, float] = {}  # ||W||, which does not change under an adapter
        self.start = {} if self._adapters else self._sample(trainer.trained)
        self.looked = False

    @property
    def _adapters(self) -> Mapping[str, Any]:
        return getattr(self.trainer.network, "adapters", None) or {}

    @staticmethod
    def _sample(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of evenly spaced tensors, on the CPU, within a bound."""
        names, kept, size = list(trained), {}, 0
        for name in names[:: max(1, len(names) // SAMPLED)]:
            size += trained[name].numel() * trained[name].element_size()
            if size > SAMPLED_BYTES and kept:
                break
            kept[name] = trained[name].detach().to("cpu", copy=True)
        return kept

    @torch.no_grad()
    def sizes(self) -> dict[str, float]:
        """Name -> ||dW|| / ||W||; where ||W|| cannot be read (a quantised base), ||dW||."""
        if not self._adapters:
            now = {name: self.trainer.trained[name].detach().to("cpu") for name in self.start}
            return {name: _ratio(_distance(now[name], old), old.float().norm()) for name, old in self.start.items()}
        names, scale = list(self._adapters), abs(float(getattr(self.trainer.network, "multiplier", 1.0)))
        norms = torch.stack([self._adapters[name].norm().float() for name in names]).tolist()  # one wait
        return {name: _ratio(scale * norm, self._base_norm(name)) for name, norm in zip(names, norms, strict=True)}

    def _base_norm(self, name: str) -> float:
        if name not in self.base:
            weights = self._adapters[name].base_weights()
            readable = all(w.is_floating_point() and w.element_size() >= 2 and not w.is_meta for w in weights)
            self.base[name] = math.sqrt(sum(float(w.float().square().sum()) for w in weights)) if readable else 1.0
        return self.base[name]

    def line(self) -> tuple[str, dict[str, float]]:
        """For people and for the log."""
        sizes = self.sizes()
        if not sizes:
            return "update: nothing to compare", {}
        mean, still = sum(sizes.values()) / len(sizes), sum(1 for value in sizes.values() if value == 0)
        what = "modules" if self._adapters else "sampled tensors"
        numbers = {"mean": mean, "largest": max(sizes.values()), "unchanged": still, "of": len(sizes)}
        return f"update: mean ||dW||/||W|| {100 * mean:.3g} %, {still} of {len(sizes)} {what} unchanged", numbers

    def without_gradient(self, reached: Callable[[Tensor], bool] = lambda p: p.grad is not None) -> str:
        """A warning about trained tensors that the first backward pass did not reach, "" if it reached all."""
        names = [name for name, p in self.trainer.trained.items() if p.requires_grad and not reached(p)]
        if not names:
            return ""
        return (
            f"warning: {len(names)} of {len(self.trainer.trained)} trained tensors got no gradient in the first step "
            f"({', '.join(names[:3])}): nothing computes with them, so they stay as they are; leave them out of the "
            "network (exclude_patterns, network_reg_dims)"
        )

    def idle(self, step: int, first: int, norm: float) -> str:
        """Once, AFTER steps after the start: a warning if not all has changed, with the likely reason."""
        if self.looked or step - first < AFTER:
            return ""
        self.looked = True
        sizes = self.sizes()
        still = [name for name, value in sizes.items() if value < 1e-9]
        if not still:
            return ""
        what = f"{len(still)} of {len(sizes)} modules are unchanged after {AFTER} steps ({', '.join(still[:3])})"
        return f"warning: {what}: {self._reason(len(still) == len(sizes), norm)}"

    def _reason(self, all_of_them: bool, norm: float) -> str:
        options, groups = self.trainer.options, self.trainer.optimizer.param_groups
        rates = [float(group["lr"]) for group in groups if group.get("lr") is not None]
        if all_of_them and rates and max(rates) == 0:
            return "the learning rate is 0 (--learning_rate, --unet_lr, or a warm-up that has not begun)"
        if all_of_them and norm == 0:
            return "the gradient is 0: the network is not part of what the loss is computed from"
        if options.full_bf16 or options.full_fp16:
            better = "leave out --full_bf16 / --full_fp16"
            if options.full_bf16 and not options.stochastic_rounding:
                better = "add --stochastic_rounding, take --optimizer_type AdamW8bitKahan, or leave out --full_bf16"
            return f"the steps are smaller than what half precision can hold; {better}"
        if all_of_them:
            return f"the steps are too small (learning rate {max(rates, default=0):g}, gradient norm {norm:.3g})"
        return "no gradient reaches them, or their own learning rate is 0 (network_reg_lrs)"


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).norm()


def _ratio(a: float | Tensor, b: float | Tensor) -> float:
    return float(a) / float(b) if float(b) else float(a)
