"""Which of two experts an optimizer step trains, where a model has two for its noise levels.

The expert is that of one sigma, drawn as any item's; then all items of the step draw theirs from the distribution cut
to that expert's part. So over a run the noise levels are distributed as if one denoiser had them all, and within a step
the weights change at most once. The draw is keyed by the step: the same in all processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from library.data.dataset import item_seed

if TYPE_CHECKING:
    from library.families.family import Family
    from library.options import Options

EXPERT = 4  # random stream of a step, beside those of library.batches and library.runtime
BELOW = 1e-3  # of 1000 * sigma: the low-noise expert's part ends below the boundary


class Turns:
    """`of(step)` gives 0 or 1 for an optimizer step; `options[k]` are the run's with that expert's minimum and maximum.

    `tokens` of a usual item, for shifts that depend on them.
    """

    def __init__(self, family: Family, options: Options, tokens: int) -> None:
        self.family, self.run, self.tokens, self.every = family, options, tokens, family.pair.every
        edge, values = family.pair.boundary * 1000, options.as_dict()
        low, high = ends(options)
        parts = ({"max_timestep": min(high, edge - BELOW)}, {"min_timestep": max(low, edge)})
        self.options: tuple[Any, Any] = tuple(SimpleNamespace(**values | part) for part in parts)

    def of(self, step: int) -> int:
        generator = torch.Generator().manual_seed(item_seed(self.run.seed + EXPERT, step // self.every, 0, 0))
        return self._expert(torch.rand(1, generator=generator))

    def _expert(self, uniform: torch.Tensor) -> int:
        sigma = self.family.objective.sigma(uniform, self.tokens, self.run)
        return int(float(sigma) >= self.family.pair.boundary)

    def grouped(self, quantiles: Sequence[float]) -> list[list[float]]:
        """Quantiles of the run's distribution, those of one expert together."""
        experts = {q: self._expert(torch.tensor([q], dtype=torch.float64)) for q in quantiles}
        parts = [[q for q in quantiles if experts[q] == index] for index in (0, 1)]
        return [part for part in parts if part]

    def metadata(self, name: str) -> dict[str, str]:
        """Of a file that holds the adapter of one expert."""
        low, high = ends(self.options[self.family.pair.names.index(name)])
        return {"modelspec.timestep_range": f"{round(low)},{round(high)}"}


def ends(options: Any) -> tuple[float, float]:
    """--min_timestep and --max_timestep with their defaults."""
    return options.min_timestep or 0, 1000 if options.max_timestep is None else options.max_timestep
