"""Which blocks --blocks_to_swap N keeps on the host. No torch in here.

N counts units. A unit is one block of the largest kind; of a kind that is about half as large (the single-stream
blocks of FLUX.1 or HunyuanImage) two blocks make a unit, as sd-scripts counts, and so on. Two blocks of every list
always stay on the device, so the largest N is the sum over the lists of (blocks - 2) / blocks per unit, rounded down:
HunyuanImage-2.1 has 20 + 40 blocks, so 18 + 19 = 37.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError
from library.layout import modules_like

if TYPE_CHECKING:
    from torch import nn

    from library.families.family import Family

STAY = 2  # blocks of a list that are never swapped


def most_units(counts: Mapping[str, int], units: Mapping[str, int]) -> dict[str, int]:
    """List -> units of it that can be swapped."""
    return {name: max(0, n - STAY) // units.get(name, 1) for name, n in counts.items()}


def largest(counts: Mapping[str, int], units: Mapping[str, int]) -> int:
    """The largest --blocks_to_swap for lists of these lengths."""
    return sum(most_units(counts, units).values())


def swapped(counts: Mapping[str, int], units: Mapping[str, int], value: int) -> dict[str, tuple[int, ...]]:
    """List -> the blocks of it that live on the host, spread evenly, so that a copy has as long as it can have.

    The units are shared between the lists in proportion to what each can give. Raises ConfigError beyond the largest.
    """
    most = most_units(counts, units)
    total = sum(most.values())
    if value > total:
        lists = " + ".join(str(n) for n in counts.values())
        raise ConfigError(f"--blocks_to_swap {value}: this model has {lists} blocks, of which at most {total} can be "
                          "swapped; take fewer")  # fmt: skip
    exact = {name: value * n / total if total else 0.0 for name, n in most.items()}
    shares = {name: int(part) for name, part in exact.items()}
    by_rest = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_rest[: value - sum(shares.values())]:
        shares[name] += 1
    return {name: spread(counts[name], shares[name] * units.get(name, 1)) for name in counts}


def spread(count: int, picked: int) -> tuple[int, ...]:
    """`picked` of `count` indices at even distances; the first one only where all are picked."""
    return tuple(i for i in range(count) if (i + 1) * picked // count > i * picked // count)


def counts_of(model: nn.Module, family: Family) -> dict[str, int]:
    return {name: len(model.get_submodule(name)) for name in modules_like(model, family.blocks)}


def units_of(model: nn.Module, family: Family) -> dict[str, int]:
    """List -> how many of its blocks make a unit, from their numbers of weights."""
    lists = modules_like(model, family.blocks)
    sizes = {name: max(map(weights_of, model.get_submodule(name)), default=1) for name in lists}
    return {name: max(1, round(max(sizes.values()) / size)) for name, size in sizes.items()}


def weights_of(block: nn.Module) -> int:
    """Values of a block's weights, however they are held."""
    count = 0
    for module in block.modules():
        shape = (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        count += max(own, shape[0] * shape[1])
    return count


def block_names(model: nn.Module, family: Family, value: int, fewer: int | None = None) -> list[str]:
    """Names of the blocks of a model that `value` swaps; of these, those that `fewer` would leave swapped.

    Raises ConfigError beyond the largest value.
    """
    counts, units = counts_of(model, family), units_of(model, family)
    chosen = swapped(counts, units, value)
    if fewer is not None:
        less = swapped(counts, units, min(fewer, value))
        for name, indices in chosen.items():
            left = spread(len(indices), min(len(indices), len(less[name])))
            chosen[name] = tuple(indices[i] for i in left)
    return [f"{name}.{index}" for name, indices in chosen.items() for index in indices]


def check(family: Family, options: Any) -> None:
    """From the file's header: can this model swap that many blocks? Raises ConfigError before anything is loaded."""
    if not getattr(options, "blocks_to_swap", None):
        return
    import torch

    from library import checkpoints

    part, path = family.denoiser, checkpoints.path_of(family.denoiser, options)
    checkpoint, layout = checkpoints.find_part(part, path)
    config = checkpoints.configuration(part, path, checkpoint.shapes, checkpoint.metadata, layout)
    with torch.device("meta"):
        block_names(part.build(config), family, options.blocks_to_swap)
