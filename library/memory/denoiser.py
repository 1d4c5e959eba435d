"""Everything of the memory options that concerns the denoiser, in the order in which it has to happen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpointing import blocks_of, checkpoint_blocks
from library.memory import swap_plan
from library.memory.activations import HostActivations
from library.memory.attention import Attention
from library.memory.compiled import CompiledBlocks
from library.memory.loading import Loading
from library.memory.precision import denoiser_recipe
from library.memory.swap import BlockSwap

if TYPE_CHECKING:
    from library.families.family import Family


AT_ONCE = 1 << 28  # bytes of gradients that are reduced over the processes at a time


class DenoiserMemory:
    """One denoiser: how it is loaded, and what its blocks do in forward and backward."""

    def __init__(self, options: Any, family: Family, device: Any) -> None:
        self.options, self.family, self.device = options, family, torch.device(device)
        self.swap: BlockSwap | None = None
        self.swapped = getattr(options, "blocks_to_swap", None) or 0
        self.compiled: CompiledBlocks | None = None

    def loading(self, dtype: torch.dtype) -> Loading:
        return Loading(denoiser_recipe(self.options, self.family), self.device, dtype, self._names_on_host)

    def _names_on_host(self, model: torch.nn.Module) -> set[str]:
        """Parameters of the blocks that are swapped, which never are on the device all at once; of two experts all."""
        if self.family.pair:
            return set(dict(model.named_parameters()))  # until `Experts.place`
        blocks = swap_plan.block_names(model, self.family, self.swapped)
        return {f"{block}.{name}" for block in blocks for name, _ in model.get_submodule(block).named_parameters()}

    def prepare(self, model: torch.nn.Module, *, trained: bool = False, checkpointed: bool = False) -> None:
        """Wrap the blocks: compiled, then swapped, then checkpointed; a recomputation fetches its block again."""
        self.model = model
        if getattr(self.options, "torch_compile", False):
            self.compiled = CompiledBlocks(blocks_of(model, self.family.blocks), self.options.dynamo_backend)
        self._choose_attention(model)
        if self.swapped:
            self.swap = BlockSwap(
                [model.get_submodule(name) for name in swap_plan.block_names(model, self.family, self.swapped)],
                self.device,
                ring=getattr(self.options, "block_swap_ring_size", 2),
                pinned=getattr(self.options, "use_pinned_memory_for_block_swap", False),
                collects=trained and not getattr(self.options, "fused_backward_pass", False),
                checkpointed=checkpointed,
            )
        if self.family.pair:
            model.experts.place(self.device, self.swap)
        if checkpointed:
            offload = getattr(self.options, "cpu_offload_checkpointing", False)
            self.activations = HostActivations(self.device) if offload else None
            around = {"around": self.activations.around} if offload else {}
            checkpoint_blocks(model, self.family.blocks, **around)
        if self.compiled is not None:
            self.compiled.outermost()

    def _choose_attention(self, model: torch.nn.Module) -> None:
        mode, split = getattr(self.options, "attn_mode", None) or "torch", getattr(self.options, "split_attn", False)
        if mode in ("torch", "sdpa") and not split:
            return
        attention = Attention(mode, split, compiled=self.compiled is not None)
        model.forward = attention.wrapped(model.forward)
        for block in (block for name in self.family.blocks for block in model.get_submodule(name)):
            block.forward = attention.wrapped(block.forward)  # again in the backward pass, outside of the model's

    def plainly(self) -> contextlib.AbstractContextManager:
        """Inside, nothing is compiled."""
        return self.compiled.paused() if self.compiled is not None else contextlib.nullcontext()

    def before_update(self) -> None:
        """The optimizer, saves and states find every weight, and its gradient, where they are to stay."""
        if self.swap is not None:
            self.swap.park()

    def forget(self) -> None:
        """Drop the denoiser, which nothing else holds."""
        self.model = self.swap = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def together(self, gradients: list[Tensor]) -> list[list[Tensor]]:
        """Gradients in parts that are reduced at once, in their order, wherever they are.

        A reduction over more than two processes adds in an order that depends on the place in its part, so that the
        parts are the same with and without block swap.
        """
        size, parts = 0, []
        for gradient in gradients:
            if not parts or size + gradient.nbytes > AT_ONCE:
                size, parts = 0, [*parts, []]
            parts[-1].append(gradient)
            size += gradient.nbytes
        return parts

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Inside, the denoiser is on the host."""
        tensors = [] if self.device.type == "cpu" else [*self.model.parameters(), *self.model.buffers()]
        self.before_update()
        moved = [tensor for tensor in tensors if tensor.device.type == self.device.type]
        for tensor in moved:
            tensor.data = tensor.data.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            for tensor in moved:
                tensor.data = tensor.data.to(self.device)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, --sample_blocks_to_swap instead of --blocks_to_swap."""
        fewer = getattr(self.options, "sample_blocks_to_swap", None)
        if self.swap is None or fewer is None:
            yield
            return
        names = swap_plan.block_names(self.model, self.family, self.swapped, fewer)
        with self.swap.only([self.model.get_submodule(name) for name in names]):
            yield
