"""`split_qkv`: adapters of their own for q, k, v and what else one original module holds of ours.

The original module is adapted by n adapters of rank r instead of one: n times the down matrix, the same up rows. A file
in the original names holds them side by side, which is one adapter of rank n * r whose up matrix is zero outside of
its n blocks; a file in diffusers' names holds n files' worth of rank r. Both are the same update, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import ConfigError
from networks.adapter import Dropout, Target, Weight, seeded_generator
from networks.lora import LoRA


class SplitLoRA(LoRA):
    """`lora_down` is [n * rank, in], one block for each module of ours; `lora_up` [out, rank] as of a LoRA."""

    def __init__(self, target: Target, rank: int, alpha: float, dropout: Dropout) -> None:
        super().__init__(target, rank, alpha, dropout)
        self.lora_down = Weight(rank * len(self.bases), *target.our_shape[1:])
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=seeded_generator(target.name))

    def part(self, hidden: Tensor, index: int) -> Tensor:
        return hidden[..., index * self.rank : (index + 1) * self.rank]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(down [rank, in], up [out_i, rank]) of each module of ours."""
        downs = self.lora_down.weight.split(self.rank)
        return list(zip(downs, self.rows(), strict=True))

    def _stacked(self) -> Tensor:
        """One up matrix [out, n * rank] in the order of the original rows, zero outside of its blocks."""
        ups, count = self.rows(), len(self.bases)
        padded = [F.pad(up, (i * self.rank, (count - 1 - i) * self.rank)) for i, up in enumerate(ups)]
        stacked = torch.cat(padded)
        return self.entry.op.to_theirs(stacked) if self.entry.op else stacked

    def delta(self) -> Tensor:
        return self.scale * (self._stacked().float() @ self.lora_down.weight.float())

    def norm(self) -> Tensor:
        pairs = [(down.double(), up.double()) for down, up in self._pairs()]
        squares = [((down @ down.T) * (up.T @ up)).sum() for down, up in pairs]
        return abs(self.scale) * torch.stack(squares).sum().clamp(min=0).sqrt()

    def content(self) -> dict[str, Any]:
        down, rank = self.lora_down.weight.detach(), self.rank * len(self.bases)
        return {"down": down, "up": self._stacked().detach(), "alpha": self.scale * rank, "blocks": len(self.bases)}

    @torch.no_grad()
    def load(self, content: Mapping[str, Any], source: str) -> None:
        """From split files, or from a fused one, whose down matrix every block then has.

        A column that a block does not use keeps its first down row, so that it can still be trained.
        """
        rows = split_rows(self.entry, content["up"])
        for index, up in enumerate(rows):
            used = up.abs().amax(0) > 0
            if used.sum() > self.rank:
                raise ConfigError(
                    f"{source}: {self.name} has rank {int(used.sum())} in one of its {len(rows)} parts, the network's "
                    f"is {self.rank}; set --network_dim to it or use --dim_from_weights"
                )
            own, start = int(used.sum()), index * self.rank
            self.lora_down.weight[start : start + own] = content["down"][used].to(self.lora_down.weight)
            self.rows()[index].copy_(F.pad(up[:, used], (0, self.rank - own)))
        self.scale = content["alpha"] / content["down"].shape[0]
        self.alpha.fill_(self.scale * self.rank)


def split_rows(entry: Any, up: Tensor) -> Sequence[Tensor]:
    """The up rows [out_i, rank] of each of our modules, from those of the original one."""
    ours = entry.op.to_ours(up, tuple(up.shape)) if entry.op else up
    return ours.split(list(entry.sizes))


def is_split(target: Target) -> bool:
    """Whether an original module holds several of ours."""
    return len(target.modules) > 1


def rank_of(target: Target, content: Mapping[str, Any]) -> int:
    """The rank that each block needs for a file's content."""
    used = max(int((up.abs().amax(0) > 0).sum()) for up in split_rows(target.entry, content["up"]))
    return used or max(1, content["down"].shape[0] // len(target.modules))
