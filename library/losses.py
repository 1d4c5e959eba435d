"""Elementwise losses and masks. Pure functions in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from library.flow import expand


def elementwise(predicted: Tensor, target: Tensor, kind: str, c: Tensor | None = None) -> Tensor:
    """The loss of every element, in the shape of `predicted`; `c` [B] for huber and smooth_l1.

    huber 2c (sqrt(d^2 + c^2) - c) and smooth_l1 2 (sqrt(d^2 + c^2) - c), the pseudo-Huber forms of sd-scripts.
    """
    difference = predicted.float() - target.float()
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    c = expand(c, difference)
    root = (difference.square() + c.square()).sqrt() - c
    return 2 * c * root if kind == "huber" else 2 * root


def huber_c(sigma: Tensor, schedule: str, c: float, scale: float, signal: Tensor | None = None) -> Tensor:
    """[B]: constant c s; exponential exp(ln(c) sigma) s; snr (1 - c) / (1 + q)^2 + c with q the noise per data.

    `signal` is 1 / (1 + q), the objective's; for a flow, and by default, q = sigma / (1 - sigma), so it is 1 - sigma.
    sd-scripts has the snr schedule for DDPM only: q = sqrt((1 - alpha_bar) / alpha_bar).
    """
    if schedule == "constant":
        return torch.full_like(sigma, c * scale)
    if schedule == "exponential":
        return torch.exp(math.log(c) * sigma) * scale
    return (1 - c) * (1 - sigma if signal is None else signal).square() + c


def masked(error: Tensor, mask: Tensor) -> Tensor:
    """Error [B,C,h,w] or [B,C,F,h,w] times the mask [B,H,W] in 0..1, area-resized to the latents (not renormalised)."""
    mask = mask[:, None].to(error.device, error.dtype)
    if mask.shape[-2:] != error.shape[-2:]:
        mask = F.interpolate(mask, size=error.shape[-2:], mode="area")
    return error * mask.unflatten(1, (1,) * (error.ndim - 3))


def selected(error: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Error [B,C,...] times the mask of each item (None = all of it), weighed so that its mean is that of the rest.

    A mask is what `encode_item` or `vary` of a family calls "loss_mask": 0 where the model was given the answer.
    """
    if all(mask is None for mask in masks):
        return error
    whole = [one if mask is None else one * (mask / mask.mean()) for one, mask in zip(error, masks, strict=True)]
    return torch.stack(whole)
