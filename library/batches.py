"""From the order of an epoch to tensors: optimizer steps, items, noise and sigma, prepared ahead of the step.

An optimizer step is a group of `gradient_accumulation_steps * processes` batches; process r takes every
world-th batch of it. So the groups, and with them every number below, do not depend on how many processes
share the work. Everything random about an item comes from a generator keyed by (seed, optimizer step, item,
repeat): nothing has to be stored for an exact resume, and the number of loader threads does not matter.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.data.captions import make_caption
from library.data.dataset import item_rng, item_seed

if TYPE_CHECKING:
    from library.data.dataset import BatchPlan, Dataset, Item
    from library.strategies import Loaded

CAPTION, PICTURE, NOISE = 0, 1, 2  # independent random streams of one item in one step


@dataclass
class Draws:
    """The random numbers of one batch, drawn on the CPU in float32 so that they are the same on every device."""

    noise: Tensor  # [B,C,h,w]
    uniform: Tensor  # [B]
    perturbation: Tensor | None  # [B,C,h,w] for --ip_noise_gamma
    gamma_scale: Tensor  # [B] uniform, for --ip_noise_gamma_random_strength
    choice: Tensor  # [B] uniform, for what a family decides anew in each step
    shapes: dict[str, Tensor] = field(default_factory=dict)  # what the objective shapes the noise with, [B,...]


@dataclass
class Batch:
    items: list[Item]
    captions: list[str]
    pictures: Tensor  # latents [B,C,h,w] float32 from the cache, or pixels [B,3,H,W] in [-1,1] where nothing is cached
    extras: list[Any]  # what else conditions each item: its Cond from the cache, or the ItemInput it is made of
    mask: Tensor | None  # [B,h,w] or [B,H,W] in [0,1]
    weights: Tensor  # [B] loss weight of each item (regularisation pictures)
    keys: list[tuple[int, int, int]]  # (optimizer step, item, repeat)
    share: float  # of this batch in its optimizer step: 1 / batches of the step over all processes


@dataclass
class Step:
    number: int  # optimizer steps before this one
    epoch: int
    batches: list[Batch]  # of this process; may be empty on the last step of an epoch


def draw(
    keys: list[tuple[int, int, int]],
    seed: int,
    shape: tuple[int, ...],
    perturb: bool,
    more: Callable[[torch.Generator, tuple[int, ...]], dict[str, Tensor]] = lambda generator, shape: {},
) -> Draws:
    """The random numbers of the items `keys` for latents of `shape` [C,h,w]; `more` draws the objective's."""
    noise, uniform, extra, gamma, shapes, choice = [], [], [], [], [], []
    for step, item, repeat in keys:
        generator = torch.Generator().manual_seed(item_seed(seed + NOISE, step, item, repeat))
        uniform.append(torch.rand((), generator=generator))
        gamma.append(torch.rand((), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
        if perturb:
            extra.append(torch.randn(shape, generator=generator))
        shapes.append(more(generator, shape))
        choice.append(torch.rand((), generator=generator))
    stack = torch.stack
    stacked = {name: stack([one[name] for one in shapes]) for name in shapes[0]}
    perturbation = stack(extra) if perturb else None
    return Draws(stack(noise), stack(uniform), perturbation, stack(gamma), stack(choice), stacked)


class Loader:
    """Yields the optimizer steps of a run, from any step on, with `workers` threads preparing `ahead` steps.

    `load_picture(item, rng)` returns a `strategies.Loaded` for one item.
    """

    def __init__(
        self,
        dataset: Dataset,
        load_picture: Callable[[Item, random.Random], Loaded],
        *,
        seed: int,
        accumulation: int,
        max_steps: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        ahead: int = 2,
    ) -> None:
        self.dataset, self.load_picture, self.seed = dataset, load_picture, seed
        self.size, self.max_steps, self.rank, self.world = accumulation * world, max_steps, rank, world
        self.workers, self.ahead = max(1, workers), ahead
        self.steps_per_epoch = -(-len(dataset.batches(0)) // self.size)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def __call__(self, start: int = 0) -> Iterator[Step]:
        """The steps from `start` to the end of the run, in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            pending: deque[tuple[int, int, list[Future]]] = deque()
            for number, epoch, plans, share in self._groups(start):
                pending.append((number, epoch, [pool.submit(self._load, p, number, epoch, share) for p in plans]))
                if len(pending) > self.ahead:
                    yield self._take(pending.popleft())
            while pending:
                yield self._take(pending.popleft())

    @staticmethod
    def _take(entry: tuple[int, int, list[Future]]) -> Step:
        number, epoch, futures = entry
        return Step(number, epoch, [future.result() for future in futures])

    def _groups(self, start: int) -> Iterator[tuple[int, int, list[BatchPlan], float]]:
        epoch, plans = -1, []
        for number in range(start, self.max_steps):
            if self.epoch_of(number) != epoch:
                epoch = self.epoch_of(number)
                plans = self.dataset.batches(epoch)
            first = (number - epoch * self.steps_per_epoch) * self.size
            group = plans[first : first + self.size]
            yield number, epoch, group[self.rank :: self.world], 1.0 / len(group)

    def _load(self, plan: BatchPlan, number: int, epoch: int, share: float) -> Batch:
        items, captions, loaded, keys = [], [], [], []
        for index, repeat in plan.entries:
            item, key = self.dataset.items[index], (number, index, repeat)
            caption_rng, picture_rng = (item_rng(self.seed + stream, *key) for stream in (CAPTION, PICTURE))
            captions.append(make_caption(item.caption, item.subset, caption_rng, number, epoch, self.max_steps))
            items.append(item), loaded.append(self.load_picture(item, picture_rng)), keys.append(key)
        weights = torch.tensor([item.weight for item in items], dtype=torch.float32)
        pictures, mask = torch.stack([one.tensor for one in loaded]), _stack_masks([one.mask for one in loaded])
        return Batch(items, captions, pictures, [one.extra for one in loaded], mask, weights, keys, share)


def _stack_masks(masks: list[Tensor | None]) -> Tensor | None:
    """Items without a mask in a masked batch get ones."""
    given = next((mask for mask in masks if mask is not None), None)
    if given is None:
        return None
    return torch.stack([torch.ones_like(given) if mask is None else mask for mask in masks])
