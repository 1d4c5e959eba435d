"""Convolutions in strips: less memory for the working buffers of a VAE, the same result to rounding.

Beside its input and output a convolution may need buffers of several times their size, depending on the device and the
algorithm that it chooses. In strips of rows, each with the rows that its kernel reaches over, they shrink in proportion
(`--vae_chunk_size` of sd-scripts).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@contextlib.contextmanager
def convolutions(model: torch.nn.Module, rows: int) -> Iterator[None]:
    """Within, every 2-d and 3-d convolution of `model` makes at most `rows` rows of its output at a time. 0 = all."""
    import torch

    kinds = (torch.nn.Conv2d, torch.nn.Conv3d)
    modules = [module for module in model.modules() if isinstance(module, kinds)] if rows > 0 else []
    for module in modules:
        # Subclasses pad in their own `forward` and then come here.
        module._conv_forward = partial(_in_strips, module, rows)
    try:
        yield
    finally:
        for module in modules:
            del module._conv_forward


def _in_strips(module: torch.nn.Module, rows: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the module's own `_conv_forward` gives, strip by strip along the height (the last dimension but one)."""
    import torch
    from torch.nn import functional

    kernel = module.dilation[-2] * (module.kernel_size[-2] - 1) + 1  # rows that it reaches over
    stride, padding = module.stride[-2], module.padding
    simple = module.padding_mode == "zeros" and not isinstance(padding, str)
    out_rows = (x.shape[-2] + 2 * padding[-2] - kernel) // stride + 1 if simple else 0
    if out_rows <= rows:
        return type(module)._conv_forward(module, x, weight, bias)
    convolve = functional.conv2d if x.ndim == 4 else functional.conv3d
    around = (*padding[:-2], 0, padding[-1])  # the height is padded by hand
    out = None
    for start in range(0, out_rows, rows):
        stop = min(start + rows, out_rows)
        first, last = start * stride - padding[-2], (stop - 1) * stride - padding[-2] + kernel
        strip = x[..., max(first, 0) : min(last, x.shape[-2]), :]
        if first < 0 or last > x.shape[-2]:
            strip = functional.pad(strip, (0, 0, max(-first, 0), max(last - x.shape[-2], 0)))
        made = convolve(strip, weight, bias, module.stride, around, module.dilation, module.groups)
        if out is None:
            out = torch.empty((*made.shape[:-2], out_rows, made.shape[-1]), dtype=made.dtype, device=made.device)
        out[..., start:stop, :] = made
    return out
