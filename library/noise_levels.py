"""Which noise levels the training steps will see: the run's own distribution of sigma in ten bins, before it starts.

Nothing is drawn: the quantile function that every step puts its random number into is given evenly spaced ones, so that
no random number of the run moves and the shares are exact to about 1 / POINTS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.option_checks import is_read

if TYPE_CHECKING:
    from library.families.family import Family
    from library.options import Options

POINTS, LEAST = 4000, 400  # numbers in all, and at least for each size of picture
BINS, WIDTH = 10, 40  # bins of sigma; characters of a whole bar
SHAPING = (  # options that shape the distribution
    "timestep_sampling discrete_flow_shift sigmoid_scale weighting_scheme logit_mean logit_std mode_scale "
    "min_timestep max_timestep"
).split()


@dataclass(frozen=True)
class Levels:
    shares: tuple[float, ...]  # of the steps, in each tenth of sigma
    weights: tuple[float, ...] | None  # of the loss, where it is weighed by the noise level
    boundary: float | None = None  # of two experts
    above: float = 0.0  # share of the steps at or above it
    names: tuple[str, str] = ("", "")  # of the experts, the one below first

    def as_dict(self) -> dict[str, Any]:
        pair = {"boundary": self.boundary, "share_at_or_above": self.above} if self.boundary is not None else {}
        return {"shares": list(self.shares), "loss_weights": self.weights and list(self.weights)} | pair


def tokens_of(dataset: Any, family: Family) -> Counter[int]:
    """How many items of an epoch have how many image tokens, which some shifts depend on."""
    side, found = family.pixel_multiple, Counter()
    for (_, bucket, _), entries in dataset.groups.items():
        found[(bucket[0] // side) * (bucket[1] // side)] += len(entries)
    return found


def levels(family: Family, options: Options, tokens: Mapping[int, int]) -> Levels:
    """The distribution over items with these numbers of tokens (tokens -> items)."""
    import torch

    points = max(POINTS // len(tokens), LEAST)
    even = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    sigmas = [family.objective.sigma(even, count, options) for count in tokens]
    sigma = torch.cat(sigmas)
    items = torch.tensor(list(tokens.values()), dtype=torch.float64).repeat_interleave(points)
    place = ((sigma.double() * BINS - 1e-5).ceil() - 1).clamp(0, BINS - 1).long()  # an edge belongs to the bin below it
    weight = family.objective.weight(sigma, options).double()
    shares = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, items / items.sum())
    weighed = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, items * weight / (items * weight).sum())
    pair = family.pair
    return Levels(
        tuple(shares.tolist()),
        tuple(weighed.tolist()) if float(weight.max() - weight.min()) > 1e-6 else None,
        pair and pair.boundary,
        float((items * (sigma >= pair.boundary)).sum() / items.sum()) if pair else 0.0,
        pair.names if pair else ("", ""),
    )


def text(found: Levels, options: Options) -> str:
    """For people: where the distribution comes from, a bar for each tenth, the share of each of two experts."""
    lines = [f"noise levels of the training steps (sigma, 0 = data): {_origin(options)}"]
    longest = max(found.shares)
    for k, share in enumerate(found.shares):
        weight = f"  of the loss {_percent(found.weights[k])}" if found.weights else ""
        bar = "#" * round(WIDTH * share / longest)
        lines.append(f"  {k / BINS:.1f} - {(k + 1) / BINS:.1f} {_percent(share)}{weight}  {bar}".rstrip())
    if found.boundary is not None:
        low, high = found.names
        lines.append(
            f"  share of steps with sigma >= {found.boundary:g}: {_percent(found.above).strip()} ({high}), "
            f"below: {_percent(1 - found.above).strip()} ({low})"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:5.1f} %"


def _origin(options: Options) -> str:
    """Every option that shapes the distribution, and where its value comes from."""
    read = [name for name in SHAPING if getattr(options, name) is not None and is_read(options, name)]
    told = ", ".join(f"{name} {getattr(options, name)} ({options.origin(name)})" for name in read)
    return told or "every timestep alike, as the model was trained"
