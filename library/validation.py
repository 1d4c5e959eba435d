"""Validation loss on held-out pictures: fixed noise and fixed sigmas, so that two values differ only by training."""

from __future__ import annotations

import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.data.dataset import item_rng, item_seed
from library.strategies import Request, plain_caption

if TYPE_CHECKING:
    from train_network import NetworkTrainer

QUANTILES = (0.2, 0.4, 0.6, 0.8)  # of the run's own sigma distribution; sd-scripts takes four even timesteps


class Validation:
    def __init__(self, trainer: NetworkTrainer) -> None:
        self.trainer = trainer
        options = trainer.options
        self.seed = options.validation_seed if options.validation_seed is not None else options.seed
        self.items = trainer.dataset.validation[: options.max_validation_steps or None]

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Mean error of what is predicted over the held-out items at each sigma quantile, and their average.

        Of several datasets also the average of each: `dataset_1`, ... in the order of the description.
        """
        model = self.trainer.network if self.trainer.network is not None else self.trainer.denoiser
        model.eval()
        try:
            errors = list(self._errors())
        finally:
            model.train()
        values = {f"sigma_q{int(q * 100)}": _mean(e for _, at, e in errors if at == q) for q in QUANTILES}
        values["average"] = sum(values.values()) / len(values)
        datasets = sorted({number for number, _, _ in errors})
        if len(datasets) > 1:
            values |= {f"dataset_{n + 1}": _mean(e for number, _, e in errors if number == n) for n in datasets}
        return values

    def _errors(self) -> Iterator[tuple[int, float, float]]:
        """(dataset, quantile, mean squared error) of every item at every noise level."""
        trainer, runtime, objective = self.trainer, self.trainer.runtime, self.trainer.family.objective
        # Of two experts one after the other, because it takes time to change between them.
        passes = trainer.turns.grouped(QUANTILES) if trainer.turns else [QUANTILES]
        for quantiles, item in ((quantiles, item) for quantiles in passes for item in self.items):
            loaded = trainer.latents.picture(item, item_rng(self.seed, 0, item.index, 0))
            x0, extras = trainer.latents.finish(loaded.tensor[None].to(runtime.device), [loaded.extra])
            generator = torch.Generator().manual_seed(item_seed(self.seed, 0, item.index, 0))
            noise = torch.randn(x0.shape, generator=generator).to(runtime.device)
            request = Request.of_item(trainer.family, plain_caption(item), item)
            conds = [runtime.to_device(trainer.text.get(request)) | extras[0]]
            for q in quantiles:
                sigma = runtime.sigma(torch.tensor([q], dtype=torch.float64), x0).to(runtime.device)
                with runtime.autocast():
                    noisy = objective.noisy(x0, noise, sigma)
                    predicted = trainer.family.predict(trainer.denoiser, noisy, sigma, conds)
                target = objective.target(x0, noise, sigma, trainer.options)
                yield item.dataset, q, float((predicted.float() - target).square().mean())


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


class Best:
    """The lowest validation loss of a run, and its weights as `<name>-best.safetensors`."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """`lines` of the run's log, which a resumed run goes on with."""
        values = [(line["validation"]["average"], line["step"]) for line in lines if "validation" in line]
        self.loss, self.step = min((v for v in values if v[0] is not None), default=(math.inf, 0))

    def take(self, loss: float, step: int, written: Iterable[Path]) -> str:
        """One more value, and the files that were saved at this step. Returns what is to be said. Raises OSError."""
        if not loss < self.loss:
            return f"loss {loss:.4f} (lowest: {self.loss:.4f} at step {self.step})"
        self.loss, self.step = loss, step
        kept = [_tag(path).name for path in written]
        return f"loss {loss:.4f}, the lowest so far{kept and ', kept as ' or ''}{', '.join(kept)}"


def _tag(path: Path) -> Path:
    """A second name for a saved file, which stays when that is deleted: a link, or a copy where there are none."""
    best = path.with_name(re.sub(r"(-step\d{8}|-\d{6})?(-ema)?\.safetensors$", r"-best\2.safetensors", path.name))
    partial = best.with_name(f".{best.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        try:
            os.link(path, partial)
        except OSError:  # a file system without links
            shutil.copyfile(path, partial)
        os.replace(partial, best)
    finally:
        partial.unlink(missing_ok=True)
    return best
