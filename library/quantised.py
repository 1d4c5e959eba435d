"""Quantised weights as ComfyUI's files hold them, dequantised when they are read.

Four conventions (fp8 and nvfp4 files of Comfy-Org, Kijai and others); the companions of `x.weight` are

    plain fp8      none                                             w
    scaled_fp8     x.scale_weight (and a marker `scaled_fp8`)       w * scale_weight
    comfy_quant    x.weight_scale (and x.comfy_quant, a JSON text)  w * weight_scale
    nvfp4          x.weight_scale (fp8, swizzled), x.weight_scale_2  e2m1 * block scale * tensor scale
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names and shapes are asked for before torch is needed
    import torch
    from torch import Tensor

COMPANIONS = (".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale", ".comfy_quant")
MARKERS = ("scaled_fp8",)
METADATA = "_quantization_metadata"  # in the header: names the quantised layers, so it is untrue of dequantised weights
FP8 = ("F8_E4M3", "F8_E5M2")
# Values of a 4-bit float with two exponent bits and one mantissa bit (OCP Microscaling Formats 1.0, E2M1).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK = 16  # values that share a block scale in nvfp4


def is_companion(key: str) -> bool:
    return key.endswith(COMPANIONS) or key.rsplit(".", 1)[-1] in MARKERS


def stored_shape(key: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that a tensor has once dequantised: nvfp4 holds two values in a byte."""
    shape = tuple(shapes[key])
    if key.removesuffix(".weight") + ".weight_scale_2" in shapes and len(shape) == 2:
        return (shape[0], shape[1] * 2)
    return shape


def dequantise(key: str, weight: Tensor, read: Callable[[str], Tensor | None], dtype: torch.dtype) -> Tensor:
    """`weight` as stored -> real values in `dtype`. `read(name)` gives a companion tensor or None."""
    import torch

    stem = key.removesuffix(".weight")
    second = read(f"{stem}.weight_scale_2")
    if second is not None and weight.dtype == torch.uint8:
        return nvfp4(weight, read(f"{stem}.weight_scale"), second).to(dtype)
    scale = scale_of(key, read)
    if scale is None:
        return weight.to(dtype)
    scale = scale.float()
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif scale.ndim < weight.ndim:  # one scale a row
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return (weight.float() * scale).to(dtype)


def scale_of(key: str, read: Callable[[str], Tensor | None]) -> Tensor | None:
    """The scale of an fp8 weight, one number or one a row, or None for a plain cast."""
    stem = key.removesuffix(".weight")
    scale = read(f"{stem}.scale_weight")
    return read(f"{stem}.weight_scale") if scale is None else scale


def nvfp4(packed: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """Packed bytes [out, in/2], the high half first; block scales e4m3 in cuBLAS's 128x4 tiles; float32 [out, in]."""
    import torch

    table = torch.tensor(E2M1, dtype=torch.float32)
    values = torch.stack([table[(packed >> 4).long()], table[(packed & 15).long()]], dim=-1).flatten(-2)
    rows, columns = values.shape
    scales = unswizzle(block_scale.view(torch.float8_e4m3fn).float())[:rows, : columns // BLOCK]
    return values * scales.repeat_interleave(BLOCK, dim=1) * tensor_scale.float()


def unswizzle(tiled: Tensor) -> Tensor:
    """Block scales from cuBLAS's layout (tiles of 128 rows x 4 columns, stored as 32 x 16) to rows and columns."""
    rows, columns = -(-tiled.shape[0] // 128), -(-tiled.shape[1] // 4)
    tiles = tiled.reshape(rows, columns, 32, 4, 4).transpose(
        2, 3
    )  # row tile, column tile, 4 groups, 32 rows, 4 columns
    return tiles.permute(0, 2, 3, 1, 4).reshape(rows * 128, columns * 4)
