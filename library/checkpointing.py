"""Gradient checkpointing around blocks, and times that reach their embedding exactly.

Both mend diffusers 0.42: its own checkpointing drops attention masks in some families and crashes in others, and
under bf16 some of its models round `timestep * 1000` to the model's number format before they embed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from library.layout import modules_like


def checkpoint_blocks(model: nn.Module, names: Iterable[str], around: Callable = lambda call: call) -> int:
    """Recompute each block of the model's module lists `names` in the backward pass; returns how many blocks.

    `around` wraps each checkpointed call; hooks that it sets see the inputs that are kept for the recomputation.
    """
    blocks = blocks_of(model, names)
    for block in blocks:
        block.forward = around(_checkpointed(block.forward))
    return len(blocks)


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The blocks in the module lists `names`; the star of `down_blocks.*.resnets` is every block with such a list."""
    return [block for name in modules_like(model, names) for block in model.get_submodule(name)]


def largest_list(model: nn.Module) -> list[str]:
    """Name of the module list with most parameters, the blocks of a text encoder."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return sorted(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))[-1:]


def _checkpointed(forward: Callable) -> Callable:
    def wrapped(*args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))  # torch looks for tensors among positional arguments alone

        def run(*values: object) -> object:
            given, named = tree_unflatten(values, structure)
            return forward(*given, **named)

        return checkpoint(run, *leaves, use_reentrant=False)

    return wrapped


@contextlib.contextmanager
def exact_times(module: nn.Module, values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the k-th call of diffusers' `Timesteps` module embeds `values[k]`, float32, whatever it is called with.

    For families whose forward rounds: give the time and, where one module embeds it too, the guidance, scaled as the
    embedding wants them.
    """
    left = iter(values)

    def restore(called: nn.Module, args: tuple) -> tuple:
        return (next(left).to(args[0].device, torch.float32), *args[1:])

    handle = module.register_forward_pre_hook(restore)
    try:
        yield
    finally:
        handle.remove()
