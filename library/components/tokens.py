"""Latents as rows of tokens with positions, as Flux and its kin take them, and reference pictures after the noisy one.

A reference picture of an item is its condition "control.0", "control.1", ..: normalised latents [C,h,w].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Cond


def pack(latents: Tensor, patch: int = 2) -> Tensor:
    """[B,C,h,w] -> [B, h/patch * w/patch, C * patch * patch], the channel before the place within a patch."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpack(tokens: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """The first height/patch * width/patch tokens as [B,C,height,width]: what `pack` made of them."""
    rows, columns = height // patch, width // patch
    patches = tokens[:, : rows * columns].reshape(len(tokens), rows, columns, -1, patch, patch)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def grid(
    rows: int, columns: int, device: torch.device, *, index: int = 0, row: int = 0, column: int = 0, axes: int = 3
) -> Tensor:
    """Positions [rows * columns, axes] float32: (index, row, column, 0, ..), counted from `row` and `column`."""
    import torch

    place = torch.zeros(rows, columns, axes, device=device)
    place[..., 0] = index
    place[..., 1] = torch.arange(row, row + rows, device=device)[:, None]
    place[..., 2] = torch.arange(column, column + columns, device=device)
    return place.flatten(0, 1)


def key_mask(text_mask: Tensor | None, after: Tensor) -> Tensor | None:
    """bool [B,1,1,T+N]: the mask [B,T] of a text, and all N tokens [B,N,..] that follow it. None if there is none."""
    from torch.nn import functional as F

    return None if text_mask is None else F.pad(text_mask, (0, after.shape[1]), value=True)[:, None, None]


def rope_axes(head: int) -> list[int]:
    """How index, row and column share the rotary width of a head: 16, 56, 56 of 128."""
    side = 2 * (head * 7 // 32)
    return [head - 2 * side, side, side]


def references(conds: Sequence[Cond]) -> list[Tensor]:
    """The k-th reference of all items, [B,C,h,w] each, in order. Items have to have equally many of equal sizes."""
    import torch

    count = sum(key.startswith("control.") for key in conds[0])
    return [torch.stack([cond[f"control.{k}"] for cond in conds]) for k in range(count)]


def reference_shapes(cond: Cond) -> Hashable:
    return tuple(sorted((key, tuple(value.shape)) for key, value in cond.items() if key.startswith("control.")))


def in_groups(
    run: Callable[..., Tensor],
    noisy: Tensor,
    sigma: Tensor,
    conds: list[Cond],
    alike: Callable[[Cond], Hashable] = reference_shapes,
) -> Tensor:
    """`run(noisy, sigma, conds)` once for all items that are `alike`; [B,..] in the order of the items.

    For what a model cannot take in one batch. As a rule there is one group, and this is a plain call.
    """
    import torch

    groups: dict[Any, list[int]] = {}
    for i, cond in enumerate(conds):
        groups.setdefault(alike(cond), []).append(i)
    if len(groups) == 1:
        return run(noisy, sigma, conds)
    out: dict[int, Tensor] = {}
    for items in groups.values():
        some = run(
            torch.stack([noisy[i] for i in items]), torch.stack([sigma[i] for i in items]), [conds[i] for i in items]
        )
        out.update(zip(items, some, strict=True))
    return torch.stack([out[i] for i in range(len(conds))])
