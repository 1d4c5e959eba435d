"""How a prediction with the prompt and one without are joined while sampling. Pure functions and one small state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

Guide = Callable[[Tensor, Tensor, float, int], Tensor]  # (with prompt, without, scale, step) -> joined


def guided(cond: Tensor, uncond: Tensor, scale: float, step: int) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): uncond + scale (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """`guided` moved by `phi` towards the deviation of `cond`, per item (Lin et al. 2023, section 3.4)."""
    if not phi:
        return guided
    axes = tuple(range(1, cond.ndim))
    same = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    return phi * same + (1 - phi) * guided


def norm_kept(patch: int) -> Guide:
    """Classifier-free guidance that keeps the norm of `cond` in every token, which is `patch` x `patch` latents.

    As Qwen-Image's published pipeline joins them.
    """

    def guide(cond: Tensor, uncond: Tensor, scale: float, step: int) -> Tensor:
        joined = guided(cond, uncond, scale, step)
        sizes = [avg_pool2d(x.square().sum(1, keepdim=True), patch).sqrt() for x in (cond, joined)]
        return joined * (sizes[0] / sizes[1]).repeat_interleave(patch, -1).repeat_interleave(patch, -2)

    return guide


def norm_of_rows_kept(cond: Tensor, uncond: Tensor, scale: float, step: int) -> Tensor:
    """The same for every row of latents, the last axis, as diffusers' Lumina2Pipeline joins them."""
    joined = guided(cond, uncond, scale, step)
    return joined * (cond.norm(dim=-1, keepdim=True) / joined.norm(dim=-1, keepdim=True))


def until(steps: int, guide: Guide) -> Guide:
    """`guide` in the first `steps` steps, no guidance in the others."""
    return lambda cond, uncond, scale, step: guide(cond, uncond, scale, step) if step < steps else cond


def projected(cond: Tensor, difference: Tensor, threshold: float) -> Tensor:
    """The part of `difference`, cut to the norm `threshold`, that is orthogonal to `cond` (Sadat et al. 2024, APG)."""
    axes = tuple(range(1, cond.ndim))
    size = torch.linalg.vector_norm(difference, dim=axes, keepdim=True)
    difference = (difference * (threshold / size).clamp(max=1)).double()
    along = torch.nn.functional.normalize(cond.double(), dim=axes)
    return (difference - (difference * along).sum(axes, keepdim=True) * along).to(cond.dtype)


def adaptive_projected(
    *, start: int, scale: float, threshold: float, momentum: float, rescale: float, rescale_apg: float
) -> Guide:
    """Classifier-free guidance up to step `start`, adaptive projected guidance with `scale` after it.

    The difference of the predictions is averaged over the steps with `momentum`, also before `start`. Made anew for
    every picture, because it holds that average.
    """
    average: Tensor | float = 0.0

    def guide(cond: Tensor, uncond: Tensor, cfg_scale: float, step: int) -> Tensor:
        nonlocal average
        average = (cond - uncond) + momentum * average
        if step <= start:
            return rescaled(guided(cond, uncond, cfg_scale, step), cond, rescale)
        return rescaled(uncond + scale * projected(cond, average, threshold), cond, rescale_apg)

    return guide
