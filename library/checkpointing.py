"""Gradient checkpointing around blocks, and times that reach their embedding exactly.

Both mend diffusers 0.42: its own checkpointing drops attention masks in some families and crashes in others, and
under bf16 some of its models round `timestep * 1000` to the model's number format before they embed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, names: Iterable[str]) -> int:
    """Recompute each block of the model's module lists `names` in the backward pass; returns how many blocks."""
    blocks = [block for name in names for block in model.get_submodule(name)]
    for block in blocks:
        block.forward = _checkpointed(block.forward)
    return len(blocks)


def _checkpointed(forward: Callable) -> Callable:
    def wrapped(*args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped


@contextlib.contextmanager
def exact_times(modules: Sequence[nn.Module], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the k-th of diffusers' `Timesteps` modules embeds `values[k]` (float32) whatever it is called with.

    For families whose forward rounds: pass the modules and the exact time (and guidance), scaled as the embedding
    wants them.
    """

    def restore(value: Tensor) -> Callable:
        return lambda module, args: (value.to(args[0].device, torch.float32), *args[1:])

    handles = [module.register_forward_pre_hook(restore(v)) for module, v in zip(modules, values, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
