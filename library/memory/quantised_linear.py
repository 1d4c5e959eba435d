"""A frozen Linear whose weight is held in 8 or 4 bits and made anew, in the compute dtype, in every forward.

To everything around it it is an `nn.Linear`: adapters attach to it, `weight` reads as the dequantised weight. The
backward pass dequantises again instead of keeping the result, so no full-precision weight outlives its layer.

    fp8_scaled   w ~ codes * scale, one scale for BLOCK values of a row: max|w| / largest code value
    fp8_base     w ~ codes, a plain cast
    nf4          4-bit normal floats of QLoRA (Dettmers et al., 2023) in blocks of 64, their scales in 8 bits
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from library.errors import ConfigError

BLOCK = 64  # values that share a scale: sd-scripts' and musubi-tuner's size for fp8_scaled, QLoRA's for nf4
LEAST_BLOCK = 16  # where a row has no divisor from here to BLOCK, the whole row shares one scale
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class QuantisedLinear(nn.Linear):
    """`forward(x)` computes in autocast's dtype, else in that of `x`. Its weight cannot be trained or written."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """[out, in], dequantised where it is computed with; its size, dtype and device cost nothing to read."""
        return _Weight(self)

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold the weight; never written to the state dict."""
        return tuple(self._buffers[name] for name in self.parts)

    parts: tuple[str, ...]

    def hold(self, **tensors: Tensor) -> None:
        for name in self.parts:
            self.register_buffer(name, tensors[name], persistent=False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.dequantise(self.stored(), dtype)

    def dequantise(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, bias, self.dequantise, *self.stored())
        return F.linear(x, self.dequantised(dtype), bias)

    def move(self, device: torch.device) -> None:
        """The stored tensors to a device; the bias goes with the state dict."""
        for name in self.parts:
            self._buffers[name] = self._buffers[name].to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Moves follow, conversions do not: the codes are no numbers that could be rounded."""
        self.move(fn(torch.empty(0, device=self._buffers[self.parts[0]].device)).device)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=False)
        return self


class _Weight(Tensor):
    """Stands for a dequantised weight: transformers' T5 asks for its dtype in every forward. It cannot be written."""

    @staticmethod
    def __new__(cls, module: QuantisedLinear) -> Tensor:
        size, device = (module.out_features, module.in_features), module.stored()[0].device
        return Tensor._make_wrapper_subclass(cls, size, dtype=module.dtype, device=device)

    def __init__(self, module: QuantisedLinear) -> None:
        self.module = module

    def whole(self) -> Tensor:
        return self.module.dequantised(self.module.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError("a quantised weight cannot be written; load the base unquantised")
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Frozen(torch.autograd.Function):
    """y = x W^T + b with a gradient for x alone; W is made from `stored` here and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dequantise: Any, *stored: Tensor) -> Tensor:
        ctx.dequantise = dequantise
        ctx.save_for_backward(*stored)
        return F.linear(x, dequantise(stored, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        stored = ctx.saved_tensors
        gradient = grad.flatten(0, -2) @ ctx.dequantise(stored, grad.dtype)
        return gradient.view(*grad.shape[:-1], gradient.shape[-1]), None, None, *[None] * len(stored)


class Fp8Linear(QuantisedLinear):
    """Codes [out, in] float8; `scale` broadcasts over [out, groups, in / groups], or has no values for a plain cast."""

    parts = ("codes", "scale")

    def dequantise(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        codes, scale = stored
        weight = codes.to(dtype)  # exact: every fp8 value is one of bfloat16 and of float16
        if scale.numel():
            # One rounding: where `scale` has the wider dtype, torch multiplies in it and rounds the product.
            weight.view(weight.shape[0], scale.shape[1], -1).mul_(scale)
        return weight

    def quantise(self, weight: Tensor, scheme: str, fp8_format: str) -> None:
        """Take over a weight [out, in] of any float dtype."""
        dtype = FP8[fp8_format]
        top = torch.finfo(dtype).max
        if scheme == "fp8_base":
            return self.hold(codes=weight.float().clamp(-top, top).to(dtype), scale=_no_scale(weight))
        groups = weight.float().unflatten(1, (-1, block_size(weight.shape[1])))
        scale = (groups.abs().amax(-1, keepdim=True) / top).to(torch.bfloat16)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = (groups / scale.float()).clamp(-top, top).to(dtype)
        return self.hold(codes=codes.flatten(1), scale=scale)

    def take(self, codes: Tensor, scale: Tensor | None) -> None:
        """Take over codes as a file holds them; `scale` is one number, one a row, or None."""
        if scale is None:
            return self.hold(codes=codes, scale=_no_scale(codes))
        return self.hold(codes=codes, scale=scale.float().reshape(-1, 1, 1))


class Nf4Linear(QuantisedLinear):
    """Two codes a byte; the block scales are codes too, of blocks of 256, around their mean `offset`."""

    parts = ("codes", "scale", "scale_of_scale", "offset")

    def dequantise(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional as bnb

        codes, scale, scale_of_scale, offset = stored
        nested = bnb.QuantState(scale_of_scale, code=_dynamic_map(codes.device), blocksize=256, dtype=torch.float32)
        state = bnb.QuantState(
            scale, (self.out_features, self.in_features), None, BLOCK, "nf4", dtype, offset=offset, state2=nested
        )
        return bnb.dequantize_4bit(codes, state)

    def quantise(self, weight: Tensor, scheme: str, fp8_format: str) -> None:
        """Take over a weight [out, in] of any float dtype."""
        from bitsandbytes import functional as bnb

        codes, state = bnb.quantize_4bit(
            weight.float().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
        self.hold(codes=codes, scale=state.absmax, scale_of_scale=state.state2.absmax, offset=state.offset)


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    from bitsandbytes import functional as bnb

    return bnb.create_dynamic_map().to(device)


def make_nf4_tables() -> None:
    """The tables of code values on the CPU, which bitsandbytes otherwise makes when it first quantises: in a memory
    plan they would be tensors without values then."""
    from bitsandbytes import functional as bnb

    bnb.name2qmap.setdefault("dynamic", _dynamic_map(torch.device("cpu")))


def _no_scale(like: Tensor) -> Tensor:
    return torch.empty(0, device=like.device)


def block_size(width: int) -> int:
    """Values of a row that share a scale: the largest divisor of the row up to BLOCK, or all where that is small."""
    best = next(n for n in range(BLOCK, 0, -1) if width % n == 0)
    return best if best >= min(LEAST_BLOCK, width) else width


def quantised_like(linear: nn.Linear, scheme: str, dtype: torch.dtype) -> QuantisedLinear:
    """An empty quantised Linear with the sizes, and the bias, of `linear`; `dtype` is what its weight reads as."""
    if scheme == "nf4":
        _need_bitsandbytes()
    kind = Nf4Linear if scheme == "nf4" else Fp8Linear
    made = kind(linear.in_features, linear.out_features, dtype)
    made.bias = linear.bias
    return made


def _need_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError("--nf4 needs the package bitsandbytes: pip install bitsandbytes") from None


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, QuantisedLinear)
