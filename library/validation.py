"""Validation loss on held-out pictures: fixed noise and fixed sigmas, so that two values differ only by training."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        """Mean error of what is predicted over the held-out items at each sigma quantile, and their average."""
        trainer, runtime, objective = self.trainer, self.trainer.runtime, self.trainer.family.objective
        network, totals = trainer.network, {q: 0.0 for q in QUANTILES}
        (network if network is not None else trainer.denoiser).eval()
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
                totals[q] += float((predicted.float() - target).square().mean())
        (network if network is not None else trainer.denoiser).train()
        values = {f"sigma_q{int(q * 100)}": total / len(self.items) for q, total in totals.items()}
        return values | {"average": sum(values.values()) / len(values)}
