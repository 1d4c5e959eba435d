"""The pictures that an edit model is given: their size and their resampling as diffusers' pipelines have them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from library.data.buckets import Placement, cropped

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]


def of_area(size: Size, area: int, unit: int = 32) -> Size:
    """(width, height) of about `area` pixels in the proportions of `size`, each rounded to a multiple of `unit`."""
    width = math.sqrt(area * size[0] / size[1])
    return tuple(max(unit, round(side / unit) * unit) for side in (width, width * size[1] / size[0]))


def capped(size: Size, area: int, unit: int) -> Placement:
    """In the picture's own proportions, made smaller if it has more pixels than `area`; then its sides are cut in the
    middle to multiples of `unit`. Black Forest Labs' rule for Flux 2."""
    scale = min(1.0, math.sqrt(area / (size[0] * size[1])))
    resized = (int(size[0] * scale), int(size[1] * scale)) if scale < 1 else size
    return cropped(resized, unit)


def lanczos(picture: Tensor, size: Size) -> Tensor:
    """A picture [3,H,W] in -1..1 stretched to (width, height) `size`, in 256 steps as PIL computes them."""
    import torch
    from PIL import Image

    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    return (
        torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        .reshape(size[1], size[0], 3)
        .permute(2, 0, 1)
        .float()
        .div(127.5)
        .sub(1)
    )
