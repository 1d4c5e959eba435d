"""Which blocks of a model are equal in all that decides the memory that they take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def alike(blocks: nn.ModuleList) -> Iterator[tuple[int, int]]:
    """(index of its first block, number of its blocks) of every run of equal blocks, one after another."""
    numbers = _numbers(blocks)
    own = [{name: value for name, value in vars(block).items() if name not in numbers} for block in blocks]
    traits = [(type(block), traits_of(values, {})) for block, values in zip(blocks, own, strict=True)]
    first = 0
    for index in range(1, len(traits) + 1):
        if index == len(traits) or traits[index] != traits[first]:
            yield first, index - first
            first = index


def _numbers(blocks: nn.ModuleList) -> set[str]:
    """Attributes that count the blocks of a list and say nothing else of them."""
    rows = {name: [vars(block).get(name) for block in blocks] for name in (vars(blocks[0]) if len(blocks) else ())}
    counted = {name: row for name, row in rows.items() if all(type(value) is int for value in row)}
    return {name for name, row in counted.items() if len(row) > 1 and row == list(range(row[0], row[0] + len(row)))}


def traits_of(value: Any, seen: dict[int, int]) -> Any:
    """What of a module, and of what is put in its forward's place, decides the memory that it takes.

    `seen` numbers the objects that were met on the way; what leads back to one ends there.
    """
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, str):
        return re.sub(r"\d+", "#", value)  # an adapter's name has its block's number
    if value is None or isinstance(value, bool | int | float | torch.dtype | type | ModuleType):
        return value
    if isinstance(value, list | tuple):
        return tuple(traits_of(one, seen) for one in value)
    if isinstance(value, dict):
        pairs = ((key if isinstance(key, str) else "", one) for key, one in value.items())
        return tuple((traits_of(key, seen), traits_of(one, seen)) for key, one in pairs)
    if isinstance(value, MethodType):  # an adapter's
        return value.__func__, traits_of(value.__self__, seen)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = len(seen)
    return type(value), traits_of(getattr(value, "__dict__", {}), seen)
