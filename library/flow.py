"""Flow matching: sigma, shift, noising, target, weights. Pure functions, tensors in and out.

x_sigma = (1 - sigma) x0 + sigma noise, sigma in [0, 1], 0 = data; velocity v = noise - x0.
Formulas: SD3 (Esser et al. 2024, arXiv:2403.03206) sections 3.1 and 5.3.2; sampling options as in sd-scripts.
B = batch, u uniform in (0, 1), n standard normal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

EDGE = 1e-5  # keeps u away from 0 and 1, where the normal's quantile is infinite


def expand(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B,1,1,...] to multiply `like`."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def noisy(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """noise - x0, the derivative of x_sigma."""
    return noise - x0


def ip_noise(noise: Tensor, perturbation: Tensor, gamma: Tensor) -> Tensor:
    """Input perturbation (Ning et al. 2023): what is mixed in is noise + gamma * perturbation, the target stays."""
    return noise + expand(gamma, noise) * perturbation


def shifted(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """s sigma / (1 + (s - 1) sigma): SD3's resolution-dependent shift, more noise for s > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flux_shift(tokens: int) -> float:
    """Flux's shift e^mu, mu linear in the image tokens from 0.5 at 256 to 1.15 at 4096 (BFL's flux repository)."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def qwen_shift(tokens: int) -> float:
    """Qwen-Image's: mu is 0.5 at 256 tokens and 0.9 at 8192 (its published scheduler configuration)."""
    return math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))


BY_TOKENS = {"flux_shift": flux_shift, "qwen_shift": qwen_shift}


def density(u: Tensor, scheme: str, logit_mean: float, logit_std: float, mode_scale: float) -> Tensor:
    """SD3's densities over [0, 1] as the quantile of `u`: logit-normal, mode with heavy tails, else uniform.

    `mode` is monotone, and so a quantile function, for mode_scale in [-1, 2 / (pi - 2)] (SD3, section 3.1).
    """
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    if scheme == "mode":
        return 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return u


def quantile(
    u: Tensor,
    *,
    sampling: str,
    sigmoid_scale: float,
    shift: float,
    weighting_scheme: str,
    logit_mean: float,
    logit_std: float,
    mode_scale: float,
    tokens: int,
) -> Tensor:
    """Sigma at `u`, the quantile function of each `--timestep_sampling`, before min and max; float32.

    `sigma` follows sd-scripts' Flux and HunyuanImage code: the scheme's density indexes a *descending* table, so its
    u = 0 is pure noise: sigma = shifted(1 - density(u)), here continuous instead of in 1000 steps.
    """
    u = u.double().clamp(EDGE, 1 - EDGE)
    if sampling == "uniform":
        out = u
    elif sampling == "nextdit_shift":  # sd-scripts' Lumina code: uniform, on Flux's line through the tokens
        out = shifted(u, flux_shift(tokens))
    elif sampling == "sigma":
        out = shifted(1 - density(u, weighting_scheme, logit_mean, logit_std, mode_scale), shift)
    else:
        out = torch.sigmoid(sigmoid_scale * torch.special.ndtri(u))
        if sampling != "sigmoid":
            out = shifted(out, BY_TOKENS[sampling](tokens) if sampling in BY_TOKENS else shift)
    return out.float()


def sigma_from(uniform: Tensor, *, min_sigma: float = 0.0, max_sigma: float = 1.0, **distribution: object) -> Tensor:
    """[B] float32 sigma from pre-drawn uniforms [B]; `distribution` are the arguments of `quantile`.

    Minimum and maximum cut the distribution: u is mapped into the part of (0, 1) whose quantiles lie between them, so
    that inside the range the density keeps its shape. sd-scripts ignores both for flow models.
    """
    u = (uniform.cpu() if uniform.device.type == "mps" else uniform).double()  # Metal has no float64
    if min_sigma > 0 or max_sigma < 1:
        low, high = _bounds(min_sigma, max_sigma, tuple(sorted(distribution.items())))
        u = low + (high - low) * u
    return quantile(u, **distribution).clamp(min_sigma, max_sigma).to(uniform.device)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _bounds(low: float, high: float, distribution: tuple[tuple[str, object], ...]) -> tuple[float, float]:
    """The interval of u whose quantiles are in [low, high]; found on a grid: `mode` has no closed inverse.

    The grid costs 7 ms, a noticeable part of a short step; only `tokens` changes within a run.
    """
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    values = quantile(grid, **dict(distribution))  # type: ignore[arg-type]
    inside = grid[(values >= low) & (values <= high)]
    if len(inside):
        return float(inside[0]), float(inside[-1])
    nearest = float(grid[(values - (low + high) / 2).abs().argmin()])
    return nearest, nearest


def sigma_quantiles(points: Sequence[float], **distribution: object) -> Tensor:
    """Sigma at fixed quantiles of the training distribution, for validation: [len(points)] float32."""
    return sigma_from(torch.tensor(points, dtype=torch.float64), **distribution)  # type: ignore[arg-type]


def apply_prediction_type(
    predicted: Tensor, target: Tensor, noisy_x: Tensor, sigma: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """What the loss compares: raw velocity; `additive` v + x_sigma; `sigma_scaled` x_sigma - sigma v = x0.

    sd-scripts transforms only the prediction, so that its loss has no minimum at the true velocity; here the target
    is transformed too, and every kind is the same model with another weight of the error.
    """
    if kind == "raw":
        return predicted, target
    if kind == "additive":
        return predicted + noisy_x, target + noisy_x
    s = expand(sigma, noisy_x)
    return noisy_x - s * predicted, noisy_x - s * target


def loss_weight(sigma: Tensor, scheme: str) -> Tensor:
    """[B]: `sigma_sqrt` sigma^-2, `cosmap` 2 / (pi (1 - 2 sigma + 2 sigma^2)), else 1 (SD3, section 3.1).

    sigma^-2 stops at 10^6, its value at the least timestep, 1 of 1000.
    """
    if scheme == "sigma_sqrt":
        return sigma.clamp(min=1e-3) ** -2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def shifted_sigmas(steps: int, shift: float, terminal: float = 0.0) -> Tensor:
    """[steps + 1] float32 from 1 to 0: the sigmas that a sampler visits, evenly spaced before the shift.

    With `terminal` > 0 all but the 0 are stretched so that the last of them is `terminal` (LTX-Video's published
    scheduler, diffusers' `shift_terminal`).
    """
    sigmas = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    if terminal and steps > 1:
        data = 1 - sigmas[:-1]
        sigmas[:-1] = 1 - data * (1 - terminal) / data[-1]
    return sigmas.float()


def karras_sigmas(steps: int, low: float, high: float, shift: float = 1.0, rho: float = 7.0) -> Tensor:
    """[steps + 1] float32: `steps` noise levels s of x0 + s noise from `high` to `low`, evenly spaced in s^(1 / rho)
    (Karras et al. 2022, arXiv:2206.00364, equation 5), as sigma = s / (1 + s); then 0. A `shift` multiplies s."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho * shift
    return torch.cat([levels / (1 + levels), torch.zeros(1, dtype=torch.float64)]).float()


def linear_quadratic_sigmas(steps: int, shift: float = 1.0, threshold: float = 0.025) -> Tensor:
    """[steps + 1] float32 from 1 to 0: half of the steps even from 1 to 1 - `threshold`, then a parabola that goes on
    at the same slope to 0, before the shift (LTX-Video 0.9.5 and later; Polyak et al. 2024, arXiv:2410.13720)."""
    linear = max(1, steps // 2)
    slope = threshold / linear
    at = torch.arange(steps + 1, dtype=torch.float64)
    bend = (1 - slope * steps) / (steps - linear) ** 2 if steps > 1 else 0.0
    data = slope * at + bend * (at - linear).clamp(min=0) ** 2 if steps > 1 else at
    return shifted(1 - data, shift).clamp(0, 1).float()
