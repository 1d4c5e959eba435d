"""Learning-rate schedules as closed forms: optimizer step -> factor of the learning rate.

The formulas and argument names are transformers' (`get_scheduler`) and, for piecewise_constant, diffusers'; the
tests hold them against both. `warmup`, `decay` and `total` are optimizer steps; warm-up is linear from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from library.errors import ConfigError

Factor = Callable[[int], float]


def _ramp(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _progress(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def _wave(progress: float, cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress))


def constant() -> Factor:
    return lambda step: 1.0


def constant_with_warmup(*, warmup: int) -> Factor:
    return lambda step: min(1.0, _ramp(step, warmup)) if warmup else 1.0


def linear(*, warmup: int, total: int) -> Factor:
    return lambda step: (
        _ramp(step, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))
    )  # fmt: skip


def cosine(*, warmup: int, total: int, num_cycles: float = 0.5) -> Factor:
    return lambda step: (
        _ramp(step, warmup) if step < warmup else max(0.0, _wave(_progress(step, warmup, total), num_cycles))
    )


def cosine_with_restarts(*, warmup: int, total: int, num_cycles: int = 1) -> Factor:
    def factor(step: int) -> float:
        if step < warmup:
            return _ramp(step, warmup)
        progress = _progress(step, warmup, total)
        return 0.0 if progress >= 1.0 else _wave(num_cycles * progress % 1.0, 0.5)

    return factor


def polynomial(*, warmup: int, total: int, rate: float, power: float = 1.0, lr_end: float = 1e-7) -> Factor:
    """Down to the absolute rate `lr_end`; `rate` is the largest learning rate of the run's groups."""
    if rate <= lr_end:
        raise ConfigError(f"--lr_scheduler polynomial: the learning rate {rate:g} has to be above lr_end {lr_end:g}")
    end = lr_end / rate

    def factor(step: int) -> float:
        if step < warmup:
            return _ramp(step, warmup)
        return (1.0 - end) * max(0.0, 1.0 - _progress(step, warmup, total)) ** power + end

    return factor


def inverse_sqrt(*, warmup: int, timescale: int | None = None) -> Factor:
    scale = timescale or warmup or 10_000
    return lambda step: _ramp(step, warmup) if step < warmup else 1.0 / math.sqrt((step + scale - warmup) / scale)


def _floor(rate: float, min_lr: float | None, min_lr_rate: float | None, name: str) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ConfigError(f"--lr_scheduler {name} needs the lowest rate: --lr_scheduler_min_lr_ratio (or min_lr in "
                          "--lr_scheduler_args), one of them")  # fmt: skip
    return min_lr / rate if min_lr_rate is None else min_lr_rate


def cosine_with_min_lr(
    *, warmup: int, total: int, rate: float, num_cycles: float = 0.5, min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Factor:  # fmt: skip
    low = _floor(rate, min_lr, min_lr_rate, "cosine_with_min_lr")

    def factor(step: int) -> float:
        if step < warmup:
            return _ramp(step, warmup)
        return max(0.0, _wave(_progress(step, warmup, total), num_cycles) * (1.0 - low) + low)

    return factor


def cosine_warmup_with_min_lr(
    *, warmup: int, total: int, rate: float, num_cycles: float = 0.5, min_lr: float | None = None,
    min_lr_rate: float | None = None, warmup_lr_rate: float | None = None,
) -> Factor:  # fmt: skip
    """As cosine_with_min_lr, with a warm-up that begins above 0 and progress that counts the current step."""
    low = _floor(rate, min_lr, min_lr_rate, "cosine_warmup_with_min_lr")

    def factor(step: int) -> float:
        if step < warmup and warmup_lr_rate is None:
            return (step + 1.0) / max(1, warmup)
        if step < warmup:
            return warmup_lr_rate + (1.0 - warmup_lr_rate) * step / max(1, warmup - 1)
        return max(0.0, _wave((step - warmup + 1.0) / max(1, total - warmup), num_cycles) * (1.0 - low) + low)

    return factor


_UP = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1.0 - math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(1.0 - x),
}


def warmup_stable_decay(
    *, warmup: int, decay: int, total: int, num_stable_steps: int | None = None, warmup_type: str = "linear",
    decay_type: str = "cosine", min_lr_ratio: float = 0.0, num_cycles: float = 0.5,
) -> Factor:  # fmt: skip
    for value in (warmup_type, decay_type):
        if value not in _UP:
            raise ConfigError(f"--lr_scheduler warmup_stable_decay: type '{value}' is none of {', '.join(_UP)}")
    stable = total - warmup - decay if num_stable_steps is None else num_stable_steps
    if stable < 0:
        raise ConfigError(f"--lr_scheduler warmup_stable_decay: {warmup} steps of warm-up and {decay} of decay are "
                          f"more than the run's {total}")  # fmt: skip

    def shape(step: int) -> float:
        if step < warmup:
            return _UP[warmup_type](_ramp(step, warmup))
        if step < warmup + stable:
            return 1.0
        progress = (step - warmup - stable) / max(1, decay)
        if progress >= 1.0:
            return 0.0
        down = {"linear": 1.0 - progress, "cosine": _wave(progress, num_cycles), "1-sqrt": 1.0 - math.sqrt(progress)}
        return down[decay_type]

    return lambda step: max(0.0, shape(step) * (1.0 - min_lr_ratio) + min_lr_ratio)


def piecewise_constant(*, step_rules: str) -> Factor:
    """`"1:10,0.1:20,0.01"`: factor 1 before step 10, 0.1 before step 20, then 0.01."""
    try:
        *rules, last = str(step_rules).split(",")
        pairs = sorted((int(until), float(value)) for value, until in (rule.split(":") for rule in rules))
        end = float(last)
    except ValueError:
        raise ConfigError(f"--lr_scheduler piecewise_constant: step_rules '{step_rules}' is not of the form "
                          "1:10,0.1:20,0.01") from None  # fmt: skip
    return lambda step: next((value for until, value in pairs if step < until), end)


SCHEDULES: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt,
        cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, piecewise_constant,
    )
}  # fmt: skip
OURS = frozenset({"warmup", "decay", "total", "rate"})  # arguments that the run gives, never --lr_scheduler_args
