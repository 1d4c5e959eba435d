"""Validation loss on held-out pictures: fixed noise and fixed sigmas, so that two values differ only by training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library import flow
from library.data.dataset import item_rng, item_seed
from library.strategies import plain_caption

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
        """Mean velocity error over the held-out items at each sigma quantile, and their average."""
        trainer, runtime = self.trainer, self.trainer.runtime
        network, totals = trainer.network, {q: 0.0 for q in QUANTILES}
        (network if network is not None else trainer.denoiser).eval()
        for item in self.items:
            picture, _ = trainer.latents.picture(item, item_rng(self.seed, 0, item.index, 0))
            x0 = trainer.latents.finish(picture[None].to(runtime.device))
            generator = torch.Generator().manual_seed(item_seed(self.seed, 0, item.index, 0))
            noise = torch.randn(x0.shape, generator=generator).to(runtime.device)
            conds = [runtime.to_device(trainer.text.get(plain_caption(item)))]
            for q in QUANTILES:
                sigma = flow.sigma_quantiles([q], tokens=runtime.tokens(x0), **runtime.sigma_options()).to(
                    runtime.device
                )
                with runtime.autocast():
                    predicted = trainer.family.predict(trainer.denoiser, flow.noisy(x0, noise, sigma), sigma, conds)
                totals[q] += float((predicted.float() - flow.velocity(x0, noise)).square().mean())
        (network if network is not None else trainer.denoiser).train()
        values = {f"sigma_q{int(q * 100)}": total / len(self.items) for q, total in totals.items()}
        return values | {"average": sum(values.values()) / len(values)}
