"""What quantised storage and block swap change while a part is read: one tensor at a time, straight to its place.

`checkpoints.load_part` calls `prepare` with the empty model, then `take` for each tensor of the file. So neither the
device nor the host ever holds the model in full precision: what is there is one tensor of it and what was quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library import quantised
from library.layout import is_below
from library.memory.precision import Recipe
from library.memory.quantised_linear import FP8, Fp8Linear, QuantisedLinear, quantised_like

if TYPE_CHECKING:
    from library.checkpoints import Reader
    from library.layout import Entry, Layout


class Loading:
    """One part's loading. `elsewhere(model)` gives our parameter names that belong on the host instead of `device`."""

    def __init__(
        self,
        recipe: Recipe | None,
        device: Any,
        dtype: torch.dtype,
        elsewhere: Callable[[nn.Module], set[str]] = lambda model: set(),
    ) -> None:
        self.recipe, self.device, self.dtype, self.elsewhere = recipe, torch.device(device), dtype, elsewhere
        self.as_stored = 0  # weights whose codes were taken from the file as they are

    def prepare(self, model: nn.Module, layout: Layout) -> None:
        """Put empty quantised modules where the recipe wants them. The model is still on the meta device."""
        self.on_host = self.elsewhere(model)
        self.modules: dict[str, QuantisedLinear] = {}  # our parameter name -> module
        for name in self._chosen(model, layout) if self.recipe else ():
            module = quantised_like(model.get_submodule(name), self.recipe.scheme, self.dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
            self.modules[f"{name}.weight"] = module

    def _chosen(self, model: nn.Module, layout: Layout) -> list[str]:
        theirs = {ours: entry.theirs for entry in layout.entries for ours in entry.ours}
        within = self.recipe.within
        return [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear
            and (not within or any(is_below(name, pattern) for pattern in within))
            and not any(word in theirs[f"{name}.weight"] for word in self.recipe.kept)
        ]

    def place(self, name: str) -> torch.device:
        return torch.device("cpu") if name in self.on_host else self.device

    def take(self, entry: Entry, reader: Reader, our_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Read one original tensor; returns the pieces that belong into the state dict, each where it is to live."""
        if not any(name in self.modules for name in entry.ours):
            pieces = entry.split(reader.tensor(entry.theirs, self.dtype), our_shape)
            return {name: piece.to(self.place(name)) for name, piece in zip(entry.ours, pieces, strict=True)}
        if not self._take_codes(entry, reader, our_shape):
            pieces = entry.split(reader.tensor(entry.theirs, None), our_shape)
            for name, piece in zip(entry.ours, pieces, strict=True):
                self._quantise(name, piece)
        return {}

    def _quantise(self, name: str, weight: Tensor) -> None:
        module = self.modules[name]
        module.quantise(weight.to(self.device), self.recipe.scheme, self.recipe.fp8_format)
        module.move(self.place(name))

    def _take_codes(self, entry: Entry, reader: Reader, our_shape: tuple[int, ...]) -> bool:
        """Codes that the file holds in fp8 stay as they are: quantising anew what was rounded once adds an error."""
        codes = reader.raw(entry.theirs)
        if codes.dtype not in FP8.values() or entry.op or self.recipe.scheme == "nf4":
            return False
        scale = quantised.scale_of(entry.theirs, reader.raw)
        scales: list[Tensor | None] = [scale] * len(entry.ours)
        if scale is not None and scale.numel() > 1:
            scales = list(scale.reshape(-1).split(list(entry.sizes)))
        for name, piece, one in zip(entry.ours, entry.split(codes, our_shape), scales, strict=True):
            module = self.modules[name]
            assert isinstance(module, Fp8Linear)
            module.take(piece, one)
            module.move(self.place(name))
            self.as_stored += 1
        return True

    def summary(self) -> str:
        """One line about what was done, for the log."""
        count = sum(m.in_features * m.out_features for m in self.modules.values())
        held = sum(t.numel() * t.element_size() for m in self.modules.values() for t in m.stored())
        kept = f", {self.as_stored} of them as the file holds them" if self.as_stored else ""
        return (
            f"{len(self.modules)} weights in {self.recipe}{kept}: {count / 1e6:,.1f} M values in {held / 1e6:,.1f} MB"
        )
