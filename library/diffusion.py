"""DDPM as Stable Diffusion 1, 2 and XL use it: noise schedule, predictions, loss weights, shaped noise, sampler steps.

Symbols (Ho et al. 2020, arXiv:2006.11239): x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps, ab = alpha_bar = prod(1 - beta),
t = 0..999; v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho 2022, arXiv:2202.00512); SNR = ab / (1 - ab).
The trainer's sigma is (t + 1) / 1000: 0 = data, and 1 after all of the noising steps. Pure functions, B = batch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from library.flow import expand

STEPS = 1000  # T
BETA_START, BETA_END = 0.00085, 0.012  # Stable Diffusion's `linear_start` and `linear_end`
SNR_LIMIT = 1000.0  # of the weights that divide by the SNR or by what is near 0 with it, as in sd-scripts


@functools.lru_cache(maxsize=4)
def alpha_bar(zero_terminal_snr: bool = False) -> Tensor:
    """ab_t [1000] float64 of the "scaled linear" schedule, whose sqrt(beta) is linear in t.

    With `zero_terminal_snr` sqrt(ab) is shifted and scaled so that ab_999 = 0 and ab_0 stays (Lin et al. 2023,
    arXiv:2305.08891, algorithm 1).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, STEPS, dtype=torch.float64).square()
    ab = (1 - betas).cumprod(0)
    if zero_terminal_snr:
        root = ab.sqrt()
        ab = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return ab


def timestep(sigma: Tensor) -> Tensor:
    """t of sigma = (t + 1) / 1000, int64; -1 for the data."""
    return (sigma * STEPS).round().long() - 1


def sigma_of(t: Tensor) -> Tensor:
    """(t + 1) / 1000, float32."""
    return ((t.double() + 1) / STEPS).float()


def alpha_bar_at(sigma: Tensor, zero_terminal_snr: bool = False) -> Tensor:
    """ab of each sigma, float32 on its device; 1 for sigma 0, which is the data."""
    table = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar(zero_terminal_snr)]).float()
    return table.to(sigma.device)[timestep(sigma) + 1]


def timesteps_from(uniform: Tensor, low: int = 0, high: int = STEPS) -> Tensor:
    """t [B] int64, uniform over low..high-1 (low alone where high is no more), from pre-drawn uniforms [B]."""
    t = low + (uniform * max(high - low, 1)).floor().long()
    return t.clamp(min(low, STEPS - 1), max(min(high, STEPS) - 1, min(low, STEPS - 1)))


# ---------------------------------------------------------------- predictions


def noisy(x0: Tensor, eps: Tensor, ab: Tensor) -> Tensor:
    """x_t."""
    return expand(ab.sqrt(), x0) * x0 + expand((1 - ab).sqrt(), x0) * eps


def velocity(x0: Tensor, eps: Tensor, ab: Tensor) -> Tensor:
    """v."""
    return expand(ab.sqrt(), x0) * eps - expand((1 - ab).sqrt(), x0) * x0


def data_and_noise(x: Tensor, predicted: Tensor, ab: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(x0, eps) that a prediction ("epsilon" or "v") means at x_t; at ab = 0 only v has an x0."""
    a, s = expand(ab.sqrt(), x), expand((1 - ab).sqrt(), x)
    if prediction == "v":
        return a * x - s * predicted, s * x + a * predicted
    return (x - s * predicted) / a, predicted


# ---------------------------------------------------------------- loss weights


def snr(ab: Tensor) -> Tensor:
    return ab / (1 - ab)


def min_snr(ratio: Tensor, gamma: float, prediction: str) -> Tensor:
    """min(SNR, gamma) / SNR, for v / (SNR + 1) (Hang et al. 2023, arXiv:2303.09556)."""
    return ratio.clamp(max=gamma) / (ratio + 1 if prediction == "v" else ratio)


def like_noise_prediction(ratio: Tensor) -> Tensor:
    """SNR / (SNR + 1), which makes the loss of v that of epsilon: |v error|^2 (1 - 1 / (SNR + 1)) = |eps error|^2."""
    ratio = ratio.clamp(max=SNR_LIMIT)
    return ratio / (ratio + 1)


def debiased(ratio: Tensor, prediction: str) -> Tensor:
    """1 / sqrt(SNR), for v 1 / (SNR + 1) (Yu et al. 2023, arXiv:2310.08442)."""
    ratio = ratio.clamp(max=SNR_LIMIT)
    return 1 / (ratio + 1) if prediction == "v" else ratio.rsqrt()


# ---------------------------------------------------------------- shaped noise


def offset(noise: Tensor, unit: Tensor, strength: Tensor | float) -> Tensor:
    """Noise [B,C,h,w] whose channels are shifted as wholes by strength * unit, unit [B,C] standard normal."""
    return noise + (strength * unit)[..., None, None]


def adaptive_strength(strength: Tensor | float, x0: Tensor, scale: float) -> Tensor:
    """[B,C]: strength + scale * |mean of each channel of x0|, not below 0."""
    return (strength + scale * x0.mean(dim=(-2, -1)).abs()).clamp(min=0)


def octaves(shape: tuple[int, ...], generator: torch.Generator, iterations: int, discount: float) -> Tensor:
    """What multi-resolution noise adds to the noise of one item, [C,h,w].

    The sum over i = 0, 1, ... of noise of size (h / r^i, w / r^i), enlarged bilinearly, times discount^i, with r
    uniform in 2..4 anew each time, until a side is 1.
    """
    (channels, height, width), out = shape, torch.zeros(shape)
    for i in range(iterations):
        r = 2 + 2 * float(torch.rand((), generator=generator))
        size = max(1, int(height / r**i)), max(1, int(width / r**i))
        coarse = torch.randn((1, channels, *size), generator=generator)
        out = out + discount**i * F.interpolate(coarse, (height, width), mode="bilinear")[0]
        if 1 in size:
            break
    return out


def multires(noise: Tensor, summed: Tensor) -> Tensor:
    """Noise plus its octaves, every item of [B,C,h,w] of unit standard deviation."""
    out = noise + summed
    return out / out.std(dim=(-3, -2, -1), keepdim=True)


# ---------------------------------------------------------------- sampling


def sampler_timesteps(steps: int, spacing: str) -> Tensor:
    """[steps] int64, falling: "leading" are multiples of 1000 // steps, plus 1 (Stable Diffusion's `steps_offset`).

    "trailing" begins at 999, which a model with zero terminal SNR needs (Lin et al. 2023, section 3.3).
    """
    if spacing == "trailing":
        return torch.arange(steps, 0, -1, dtype=torch.float64).mul(STEPS / steps).round().long() - 1
    return (torch.arange(steps).flip(0) * (STEPS // steps) + 1).clamp(max=STEPS - 1)


def deterministic_step(x: Tensor, predicted: Tensor, ab: Tensor, then: Tensor, prediction: str) -> Tensor:
    """DDIM (Song et al. 2020, arXiv:2010.02502) with eta 0, which is Euler's step in x / sqrt(ab)."""
    return noisy(*data_and_noise(x, predicted, ab, prediction), then)


def ancestral_step(x: Tensor, predicted: Tensor, ab: Tensor, then: Tensor, prediction: str, fresh: Tensor) -> Tensor:
    """Euler's step to below the noise of `then`, made up for with fresh noise (Karras et al. 2022, k-diffusion).

    r is the ratio of the two noise variances in x / sqrt(ab); of the new noise a part 1 - r is fresh.
    """
    x0, eps = data_and_noise(x, predicted, ab, prediction)
    r = expand((1 - then) * ab / (then * (1 - ab)), x)
    return noisy(x0, r.sqrt() * eps + (1 - r).clamp(min=0).sqrt() * fresh, then)
