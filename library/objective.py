"""What a family trains: how data and noise are mixed, what the denoiser says, how its error is weighed, how to sample.

A record of pure functions. `options` is the run's; sigma is in 0..1, 0 = data, float32 [B]. Imports no torch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    name: str
    reads: frozenset[str]  # options that only some objectives read: given to another family they are an error
    sigma: Callable[[Tensor, int, Any], Tensor]  # (uniform [B], image tokens, options) -> sigma [B]
    noisy: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x0, noise, sigma) -> x_sigma
    target: Callable[..., Tensor]  # (x0, noise, sigma, options) -> what a perfect `predict` returns
    compare: Callable[..., tuple[Tensor, Tensor]]  # (predicted, target, noisy, sigma, options) -> (guess, goal)
    weight: Callable[[Tensor, Any], Tensor]  # (sigma, options) -> loss weight [B]
    times: Callable[..., Tensor]  # (steps, shift, image tokens) -> [steps + 1] sigmas that a sampler visits
    step: Callable[..., Tensor]  # (x, predicted, sigma now, sigma then) -> x at `then`


def _sigma(uniform: Tensor, tokens: int, options: Any) -> Tensor:
    from library import flow

    return flow.sigma_from(uniform, tokens=tokens, **sigma_options(options))


def sigma_options(o: Any) -> dict[str, Any]:
    """The options that shape the distribution of sigma, as arguments of `flow.sigma_from`."""
    return {
        "sampling": o.timestep_sampling,
        "sigmoid_scale": o.sigmoid_scale,
        "shift": o.discrete_flow_shift,
        "weighting_scheme": o.weighting_scheme,
        "logit_mean": o.logit_mean,
        "logit_std": o.logit_std,
        "mode_scale": o.mode_scale,
        "min_sigma": (o.min_timestep or 0) / 1000,
        "max_sigma": (1000 if o.max_timestep is None else o.max_timestep) / 1000,
    }


def _noisy(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    from library import flow

    return flow.noisy(x0, noise, sigma)


def _compare(predicted: Tensor, target: Tensor, noisy: Tensor, sigma: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    from library import flow

    return flow.apply_prediction_type(predicted, target, noisy, sigma, options.model_prediction_type)


def _weight(sigma: Tensor, options: Any) -> Tensor:
    from library import flow

    return flow.loss_weight(sigma, options.weighting_scheme)


def _times(steps: int, shift: float, tokens: int) -> Tensor:
    from library import flow

    return flow.shifted_sigmas(steps, shift)


FLOW = Objective(
    name="flow",
    reads=frozenset(
        "timestep_sampling sigmoid_scale discrete_flow_shift weighting_scheme logit_mean logit_std mode_scale "
        "model_prediction_type".split()
    ),
    sigma=_sigma,
    noisy=_noisy,
    target=lambda x0, noise, sigma, options: noise - x0,
    compare=_compare,
    weight=_weight,
    times=_times,
    step=lambda x, velocity, now, then: x + (then - now) * velocity,  # Euler on dx/dsigma = velocity
)
