"""--torch_compile: the denoiser's blocks compiled by torch, and as they are where that fails.

Blocks of one kind are the same code, so that a few graphs serve all of them; torch compiles anew for other sizes, soon
with sizes left open, and at most GRAPHS times for one kind of block: what comes after that runs as it is. Only training
is compiled. Sample pictures and validation have other sizes and no gradients, and would cost graphs of their own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from library.errors import ConfigError, nearest

GRAPHS = 64  # that are compiled for one kind of block; torch's own bound is 8, which a few buckets exceed
COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")


class BeginAgain(Exception):  # noqa: N818  (no error: it ends where it is expected)
    """The compiler failed in a block, which is to be called again."""


class CompiledBlocks:
    """Replaces the `forward` of `blocks`. After the first failure of the compiler nothing more is compiled.

    Gradient checkpointing calls a block again in the backward pass, where the same graph has to be chosen as in the
    forward pass: graphs are looked up in the order in which they were made, and those that there are at a failure are
    used further on. A call that failed midway begins again from outside of the checkpoint, which has counted what it
    kept. Backward passes are compiled with the forward passes, so that their failures show there.
    """

    def __init__(self, blocks: Sequence[nn.Module], backend: str) -> None:
        import torch._dynamo
        import torch._functorch.config

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        torch._functorch.config.force_non_lazy_backward_lowering = True
        torch._C._dynamo.eval_frame._set_lru_cache(False)
        self.backend, self.blocks = backend, blocks
        self.off = self.failed = self.can_begin_again = False
        for block in blocks:
            block.forward = self._wrapped(block.forward)

    def outermost(self) -> None:
        """To be called when the blocks have been wrapped by all others."""
        for block in self.blocks:
            block.forward = self._beginning_again(block.forward)

    def _beginning_again(self, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.can_begin_again = not self.failed
            try:
                return forward(*args, **kwargs)
            except BeginAgain:
                return forward(*args, **kwargs)
            finally:
                self.can_begin_again = False

        return run

    def _wrapped(self, forward: Callable) -> Callable:
        compiled = torch.compile(forward, backend=self.backend)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.off or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if not self.failed:
                try:
                    return compiled(*args, **kwargs)
                except Exception as error:
                    if not of_the_compiler(error):
                        raise
                    self._fail(error)
                    if self.can_begin_again:
                        raise BeginAgain from error
            with torch.compiler.set_stance("eager_on_recompile"):
                return compiled(*args, **kwargs)

        return run

    def _fail(self, error: Exception) -> None:
        self.failed = True
        said = f"warning: --torch_compile: {reason(error)}; the blocks run as they are"
        print(said, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the blocks run as they are: hooks that are set for a moment would be compiled in."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before


def of_the_compiler(error: BaseException) -> bool:
    """Whether torch's compiler failed, and not the computation or the memory."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, torch.OutOfMemoryError | MemoryError):
        return False
    return type(error).__module__.startswith(COMPILERS)


def reason(error: BaseException) -> str:
    error = getattr(error, "inner_exception", None) or error  # what a backend raised
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__} ({lines[0][:160] if lines else 'no message'})"


def check(options: Any) -> None:
    """Raise ConfigError for a --dynamo_backend that torch does not know here."""
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=None)
    if options.dynamo_backend not in known:
        raise ConfigError(f"--dynamo_backend {options.dynamo_backend} is not known to torch"
                          f"{nearest(options.dynamo_backend, known)} (known: {', '.join(known)})")  # fmt: skip
