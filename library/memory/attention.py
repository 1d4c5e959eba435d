"""Which attention the denoiser computes with: --attn_mode and --split_attn, for every family.

Every denoiser here ends at `torch.nn.functional.scaled_dot_product_attention`, diffusers' dispatch included. While the
denoiser (or one of its blocks, in the backward pass) computes, that name stands for an `Attention`. A library is
imported only when its mode is asked for.

Masks: the libraries take none, and --split_attn wants none. A mask that only hides keys, which is what padded texts
need, is not needed either when each item is computed for itself, with the keys that it has. A mask of any other kind
goes to torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from library.errors import ConfigError

torch_attention = F.scaled_dot_product_attention
HIDDEN = -1e4  # an additive mask hides what it lowers at least by this; real biases are small numbers
Kernel = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]  # q, k, v [B,H,T,D], scale -> [B,H,T,D]


def _xformers() -> Kernel:
    from xformers.ops import memory_efficient_attention

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2)

    return run


def _flash() -> Kernel:
    from flash_attn import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, softmax_scale=scale).transpose(1, 2)

    return run


def _sage() -> Kernel:
    from sageattention import sageattn

    return lambda q, k, v, scale: sageattn(q, k, v, tensor_layout="HND", sm_scale=scale)


def _torch() -> Kernel:
    return lambda q, k, v, scale: torch_attention(q, k, v, scale=scale)


# --attn_mode -> how its function is had, and the package for pip; "sdpa" is sd-scripts' other word for torch's own
MODES: dict[str, tuple[Callable[[], Kernel], str]] = {
    "torch": (_torch, "torch"),
    "sdpa": (_torch, "torch"),
    "xformers": (_xformers, "xformers"),
    "flash": (_flash, "flash-attn"),
    "sageattn": (_sage, "sageattention"),
}


def kernel(mode: str) -> Kernel:
    """The function of an --attn_mode. Raises ConfigError where its package is not there or does not load."""
    load, package = MODES[mode]
    try:
        return load()
    except ModuleNotFoundError:
        raise ConfigError(f"--attn_mode {mode} needs the package {package}: pip install {package}") from None
    except Exception as error:  # a build for another torch or CUDA fails in its own ways
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ConfigError(f"--attn_mode {mode}: the package {package} does not load here ({reason})") from None


class Attention:
    """In place of torch's function, with its signature. `split`: items of a batch one after another.

    `compiled`: the blocks are, and a compiler has to leave this function alone, since it looks at masks' values.
    """

    def __init__(self, mode: str = "torch", split: bool = False, compiled: bool = False) -> None:
        self.kernel, self.split, self.own = kernel(mode), split, mode in ("torch", "sdpa")
        self.function = torch.compiler.disable(self.__call__) if compiled else self
        self.seen: list[tuple[tuple, Tensor, list]] = []  # the masks looked at last, and what they let each item see

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, torch's function is this one."""
        before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self.function
        try:
            yield
        finally:
            F.scaled_dot_product_attention = before

    def wrapped(self, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.active():
                return forward(*args, **kwargs)

        return run

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """[B,H,T,D] each -> [B,H,T,D]."""
        if dropout_p or is_causal:
            return torch_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        query, key, value = self._cast(query, key, value)
        if enable_gqa and key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        if attn_mask is None and not self.split:
            return self.kernel(query, key, value, scale)
        shown = [None] * len(query) if attn_mask is None else self._shown(attn_mask, len(query), key.shape[2])
        if not self.split and all(keys is None for keys in shown):
            return self.kernel(query, key, value, scale)
        items = [
            self._item(*(x[i : i + 1] for x in (query, key, value)), keys, attn_mask, i, scale)
            for i, keys in enumerate(shown)
        ]
        return torch.cat(items) if len(items) > 1 else items[0]

    def _item(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Any, mask: Tensor | None, number: int, scale: float | None
    ) -> Tensor:
        if keys is False:
            mask = mask[number : number + 1] if mask.ndim == 4 and len(mask) > 1 else mask
            return torch_attention(q, k, v, mask, scale=scale)
        if keys is not None:
            k, v = (x.narrow(2, 0, keys) if isinstance(keys, int) else x.index_select(2, keys) for x in (k, v))
        return self.kernel(q, k, v, scale)

    def _cast(self, *tensors: Tensor) -> list[Tensor]:
        """As autocast does for torch's function, which the libraries know nothing of."""
        device = tensors[0].device.type
        if self.own or not torch.is_autocast_enabled(device):
            return list(tensors)
        return [x.to(torch.get_autocast_dtype(device)) for x in tensors]

    def _shown(self, mask: Tensor, count: int, length: int) -> list:
        """What each item may attend to: None = all keys, a number = the first ones, indices, or False = no key mask.

        All blocks of a model get the same mask, or views of it; looking at it waits for the device, so this happens
        once for each. The mask is kept, so that no other one can take its place in memory meanwhile.
        """
        same = (mask.data_ptr(), mask._version, mask.shape, mask.stride(), mask.dtype, count, length)
        for key, _, found in self.seen:
            if key == same:
                return found
        found = (
            [_keys(one, length) for one in mask.expand(count, *mask.shape[1:])] if mask.ndim == 4 else [False] * count
        )
        self.seen = [*self.seen[-1:], (same, mask, found)]
        return found


def _keys(mask: Tensor, length: int) -> Any:
    """One item's mask [H,Tq,Tk]; see `Attention._shown`."""
    visible = mask if mask.dtype == torch.bool else mask > HIDDEN
    biases = mask.dtype != torch.bool and bool(((mask != 0) & visible).any())
    if biases or mask.shape[-1] != length:
        return False
    rows = visible.flatten(0, -2)
    union = rows.any(0)
    if bool((rows.any(1) & (rows != union).any(1)).any()):  # rows that see nothing are padding, which nothing reads
        return False
    indices = union.nonzero().flatten()
    if len(indices) == length:
        return None
    if not len(indices):
        return False
    return len(indices) if int(indices[-1]) == len(indices) - 1 else indices
