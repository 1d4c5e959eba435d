"""Texts of different lengths as one batch, without a mask where none is needed and without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pad(items: Sequence[Tensor], length: int = 0) -> Tensor:
    """[T_i, ...] each -> [B, T, ...], zeros after the end; T is the longest, at least `length`."""
    import torch

    longest = max(length, *(len(item) for item in items))
    if all(len(item) == longest for item in items):
        return torch.stack(list(items))
    return torch.stack([torch.cat([item, item.new_zeros(longest - len(item), *item.shape[1:])]) for item in items])


def mask(items: Sequence[Tensor], length: int = 0) -> Tensor | None:
    """bool [B, T], true where `pad` has an item's own values; None if that is everywhere."""
    import torch

    longest = max(length, *(len(item) for item in items))
    if all(len(item) == longest for item in items):
        return None
    # Made on the device from lengths that the host knows, so that nothing is copied to it.
    place = torch.arange(longest, device=items[0].device)
    return torch.stack([place < len(item) for item in items])


def scalars(conds: Sequence[Mapping[str, Tensor]], key: str, default: float, like: Tensor) -> Tensor:
    """[B] float32 on the device of `like`: a number that items may have, else the default."""
    import torch

    fallback = torch.full((), default, dtype=torch.float32, device=like.device)  # a fill, not a copy
    return torch.stack([cond[key].float() if key in cond else fallback for cond in conds])
