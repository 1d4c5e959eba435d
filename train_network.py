"""The one loop: LoRA and full fine-tuning of every family.

With --network_module it trains the network, without one the denoiser itself. It knows no family: what a model
is comes from a record in library/families. Runs by itself too; the family then comes from --model_type or from
the configuration file.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import options as option_machinery
from library.crash import Recorder
from library.errors import ConfigError, Interrupted, run
from library.stops import Stops
from library.trained import set_rates

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.batches import Batch, Step
    from library.options import Options
    from library.strategies import Encoders
    from library.turns import Turns


class NetworkTrainer:
    """One training run. `run()` is the whole of it; the seams are `setup`, `conditions`, `step`, `save`."""

    def __init__(self, options: Options) -> None:
        from library.preflight import check

        self.options = options
        self.started = time.perf_counter()
        self.plan = check(options)  # everything that can be known without a weight: files, dataset, prompts, disk
        self.family, self.dataset, self.resumed = self.plan.family, self.plan.dataset, self.plan.position

    def run(self) -> None:
        main = os.environ.get("RANK", "0") == "0"
        say, minutes = print if main else lambda text: None, self.options.save_every_n_minutes
        with Stops(self.plan.output_dir, looks=main, say=say, minutes=minutes) as self.stops:
            self.setup()
            try:
                self.train()
            except Interrupted:
                self.finish()
                raise
            finally:
                self.outputs.watch.close()
            self.finish()

    # ---------------------------------------------------------------- before the loop

    def setup(self) -> None:
        """Caches, models, network, optimizer, resume; each phase's seconds are kept for the report."""
        from library.memory import plan_of_run
        from library.runtime import Runtime

        self.runtime = Runtime(self.options, self.plan)
        self.device = self.runtime.device
        if self.runtime.is_main:
            with self.runtime.phase("memory plan"):
                self.plan.memory = plan_of_run.tell(self.options, self.plan, self.device, self.runtime.say)
        with self.runtime.phase("caching"):
            self._tell_captions(early=True)
            self._prepare_conditions()
        with self.runtime.phase("loading"):
            self.denoiser = self.runtime.load_denoiser()
            self.encoders = list(self.runtime.trained_encoders.values())
            self.network = self._create_network() if self.options.network_module else None
            self.turns, self.sigma_options = self._turns(), self.options
            whole = self.network is None
            self.runtime.prepare_denoiser(self.denoiser, trained=whole and self.plan.trained.denoiser)
            if whole and self.encoders:
                self.runtime.freeze_unread()
        self._create_optimizer()
        self.position = self.resumed
        if self.plan.resume:
            from library import optim
            from library.state import load_state

            asked = optim.settings(self.optimizer)
            load_state(self.plan.resume, self.trained, self.stateful)
            optim.take_settings(self.optimizer, self.scheduler, asked)
            self.runtime.wait("resuming")
        self._prepare_outputs()

    def _prepare_conditions(self) -> None:
        from library import prompts, strategies

        options, runtime = self.options, self.runtime
        longest = max(item.frames for item in self.dataset.items)
        self.prompts, notes = prompts.of_run(options.sample_prompts, self.family, longest)
        for note in notes if runtime.is_main else ():
            print(f"note: {note}", file=sys.stderr, flush=True)
        encoders = strategies.Encoders(runtime.load_vae, runtime.load_image_encoders)
        runtime.now = "caching latents"  # for the sentence about a failure
        self.latents = strategies.latent_source(
            self.dataset, self.family, encoders, options, runtime.rank, runtime.world
        )
        if self.latents.cached:
            runtime.release(keep_text=(), keep_vae=False)  # beside large text encoders there may be no room for it
        runtime.now, extra = "caching text", prompts.asked_of_text(self.prompts, self.family)
        self.text = strategies.text_source(
            self.dataset, self.family, runtime.load_text_encoders, options, extra, runtime.rank, runtime.world,
            is_trained=self.plan.trained.any_text, wait=lambda: runtime.wait("caching text"),
        )  # fmt: skip
        self._tell_captions(early=False)
        runtime.wait("caching")
        self.sample_conds = self._sample_conditions(encoders)  # a function: trained encoders give others every time
        runtime.release(keep_text=self.text.kept, keep_vae=not self.latents.cached)

    def _sample_conditions(self, encoders: Encoders) -> Callable[[], list[tuple]]:
        from library.sample import conditions_of

        side = max(self.dataset.items[0].placement.bucket)

        def now() -> list[tuple]:
            get = self.text.get
            return [conditions_of(prompt, self.family, get, encoders, side, self.device) for prompt in self.prompts]

        if self.plan.trained.any_text:
            return now
        made = [tuple({name: v.cpu() for name, v in cond.items()} for cond in pair) for pair in now()]
        return lambda: made

    def _tell_captions(self, early: bool) -> None:
        """Tokens of the captions and what is cut: before anything is encoded, or once a hub has given tokenizers."""
        from library.components.tokenizers import not_here
        from library.data import wording

        if self.runtime.is_main and early != bool(not_here(self.family, self.options)):
            text = wording.told(wording.measured(self.dataset, self.family, self.runtime.tokenizers))
            self.plan.text = f"{self.plan.text}\n{text}"
            self.runtime.say(text)

    def _create_network(self) -> torch.nn.Module:
        options = self.options
        module = importlib.import_module(options.network_module)
        arguments = dict(pair.split("=", 1) for pair in options.network_args or [])
        for path, multiplier in self.plan.base_weights:
            base, weights = module.create_network_from_weights(
                multiplier, path, None, [], self.denoiser, for_inference=True
            )
            self.runtime.add_base(base, path, weights, self.denoiser)
        pair = self.family.pair
        if pair and pair.apart:
            from networks.pair import PairNetwork

            network = PairNetwork(pair.names, lambda: self._new_network(module, arguments))
        else:
            network = self._new_network(module, arguments)
        set_rates(network, self.family, options)
        network.apply_to(self.encoders, self.denoiser, bool(self.encoders), self.plan.trained.denoiser)
        if options.network_weights:
            print(f"network weights: {network.load_weights(options.network_weights)}")
        self.runtime.prepare_network(network)
        return network

    def _new_network(self, module: Any, arguments: dict[str, Any]) -> torch.nn.Module:
        options = self.options
        if options.dim_from_weights:
            return module.create_network_from_weights(
                1.0, options.network_weights, None, self.encoders, self.denoiser, **arguments
            )[0]
        arguments.setdefault("dropout", options.network_dropout)
        if arguments["dropout"] is None:
            del arguments["dropout"]
        network = module.create_network(
            1.0,
            options.network_dim,
            options.network_alpha,
            None,
            self.encoders,
            self.denoiser,
            neuron_dropout=options.network_dropout,
            **arguments,
        )
        if network is None:
            raise ConfigError(f"--network_module {options.network_module} gave no network for these options")
        return network

    def _turns(self) -> Turns | None:
        from library.turns import Turns

        width, height = self.dataset.items[0].placement.bucket
        side = self.family.pixel_multiple
        return Turns(self.family, self.options, (width // side) * (height // side)) if self.family.pair else None

    def take_turn(self, number: int) -> None:
        """Of two experts, the one that the optimizer step `number` trains: its noise levels, and its own network."""
        if self.turns is not None:
            index = self.turns.of(number)
            self.sigma_options = self.turns.options[index]
            if self.family.pair.apart:
                self.network.take_turn(index)

    def _create_optimizer(self) -> None:
        import torch

        from library import optim
        from library.batches import Loader
        from library.ema import Average
        from library.memory.fused import FusedBackward

        options, runtime = self.options, self.runtime
        groups = runtime.parameter_groups(self.network, self.denoiser)
        self.parameters = [p for group in groups for p in group["params"]]
        self.trained = runtime.named_trained(self.network, self.denoiser)
        self.loader = Loader(
            self.dataset,
            self.latents.picture,
            seed=options.seed,
            accumulation=options.gradient_accumulation_steps,
            max_steps=self.plan.total_steps,
            rank=runtime.rank,
            world=runtime.world,
            workers=options.max_data_loader_n_workers,
        )
        self.optimizer = optim.create_optimizer(options, groups)
        self.scheduler = optim.create_scheduler(options, self.optimizer, self.plan.total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.mixed_precision == "fp16")
        self.fused = None
        if options.fused_backward_pass:
            self.fused = FusedBackward(self.optimizer, self.parameters, runtime.memory.swap)
        self.stateful = {"optimizer": optim.Stored(self.optimizer), "scheduler": self.scheduler, "scaler": self.scaler}
        self.average = Average(self.trained, options.ema_decay) if options.ema_decay else None
        if self.average is not None:
            self.stateful["average"] = self.average

    def _prepare_outputs(self) -> None:
        from library.health import Guard
        from library.outputs import Outputs
        from library.processes import Agreement

        self.agreement = Agreement(self.runtime.world)
        self.outputs = Outputs(self)
        self.guard = Guard(self, self.outputs.end_badly)

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Optimizer steps from the resumed position to the end."""
        from library import optim

        outputs, total = self.outputs, self.plan.total_steps
        outputs.before_training()
        self.stops.in_loop = True  # from here on a stop waits for the end of the step
        for step in self.loader(self.position.step):
            outputs.step_begins(step)
            self.take_turn(step.number)
            optim.begin_step(self.optimizer, step.number)
            if self.network is not None:
                self.network.on_epoch_start(
                    self.encoders, self.denoiser
                )  # train mode; cheap, and samples may have left it
            losses = [self._micro_step(batch, step.number, k) for k, batch in enumerate(step.batches)]
            outputs.after_backward()
            loss, norm = self._update(step, losses)
            self.position.step, self.position.epoch = step.number + 1, step.epoch
            outputs.after_step(loss, norm, self.agreement.granted, last=self.position.step == total)

    def _micro_step(self, batch: Batch, number: int, index: int) -> Tensor:
        """Forward and backward of one batch; returns its share of the step's loss, still on the device."""
        self.runtime.seed(number, index)
        self.runtime.now, self.at = "the forward and backward pass", batch  # for the sentence about a failure
        if self.network is not None and hasattr(self.network, "on_step_start"):  # optional in sd-scripts' interface
            self.network.on_step_start(self.encoders, self.denoiser)
        with self.runtime.autocast():
            loss = self.step(batch)
        loss = loss.mean() * batch.share
        if self.fused is not None:
            self.guard.settle()  # it may end the run, with the weights of the step before
            self.fused.begins(loss)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, batch: Batch) -> Tensor:
        """The loss of each item of a batch, [B] float32.

        For a flow model x_sigma = (1 - sigma) x0 + sigma noise; the denoiser predicts the velocity noise - x0.
        """
        from library import losses

        options, objective = self.options, self.family.objective
        x0, conds, draws = self.conditions(batch)
        sigma = self.runtime.sigma(draws.uniform, x0, self.sigma_options)
        noisy = objective.noisy(x0, self.runtime.perturbed(draws), sigma)
        predicted = self.family.predict(self.denoiser, noisy, sigma, conds)
        target = objective.target(x0, draws.noise, sigma, options)
        guess, goal = objective.compare(predicted, target, noisy, sigma, options)
        error = losses.elementwise(guess, goal, options.loss_type, self.runtime.huber_c(sigma))
        error = losses.masked(error, batch.mask) if batch.mask is not None else error
        error = losses.selected(error, [cond.get("loss_mask") for cond in conds])
        weight = objective.weight(sigma, options) * batch.weights.to(x0.device)
        loss = error.mean(dim=tuple(range(1, error.ndim))) * weight
        self.outputs.maybe_dump(batch, x0, draws.noise, sigma, noisy, predicted, target, loss, conds)
        return loss

    def conditions(self, batch: Batch) -> tuple[Tensor, list[dict[str, Tensor]], Any]:
        """Latents [B,C,h,w] float32, what conditions each item and the random draws, on the device."""
        from library.strategies import Request

        options, runtime = self.options, self.runtime
        x0, extras = self.latents.finish(batch.pictures.to(self.device), batch.extras)
        asked = [
            Request.of_item(self.family, caption, item)
            for caption, item in zip(batch.captions, batch.items, strict=True)
        ]
        conds = [runtime.to_device(self.text.get(one)) | extra for one, extra in zip(asked, extras, strict=True)]
        draws = runtime.draw(batch.keys, tuple(x0.shape[1:]))
        if self.family.vary is not None:
            chosen = zip(conds, x0, draws.choice.tolist(), strict=True)
            conds = [self.family.vary(cond, latents, choice, options) for cond, latents, choice in chosen]
        draws = runtime.draws_to_device(draws)
        draws.noise = self.family.objective.shape_noise(draws.noise, draws.shapes, x0, options)
        return x0, conds, draws

    def _update(self, step: Step, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All-reduce, optimizer, scheduler; returns loss and gradient norm, still on the device."""
        import torch

        options = self.options
        self.runtime.now = "the optimizer step after"
        self.runtime.reduce_gradients(self.parameters)
        loss = sum(losses) if losses else torch.zeros((), device=self.device)
        loss = self.agreement.sum(loss, self.stops.wishes())
        if self.fused is not None:
            norm = self.fused.norm()
            self.guard.note(step, loss, norm)
        else:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm or float("inf"))
            self.guard.step(step, loss, norm)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if options.scale_weight_norms and self.network is not None:
            self.network.apply_max_norm_regularization(options.scale_weight_norms, self.device)
        if self.average is not None:
            self.average.update()
        return loss, norm

    # ---------------------------------------------------------------- what is written

    @property
    def networks(self) -> dict[str, Any]:
        """What is saved, by what its file's name says besides: one thing "", or the networks of both experts."""
        pair = self.family.pair
        return dict(self.network.networks) if pair and pair.apart else {"": self.network}

    def save(self, path: Path, metadata: dict[str, str], which: str = "") -> str:
        """Write one of `networks` or the model under the family's names; returns the line about its keys."""
        from library import checkpoints
        from library.whole import save_whole

        dtype, network = self.runtime.save_dtype(), self.networks[which]
        if which:
            metadata |= self.turns.metadata(which)
        if network is not None:
            return network.save_weights(str(path), dtype, metadata)
        if self.family.container:
            return save_whole(self.family, self._trained_models(), self.options, path, metadata, dtype)
        checkpoints.save_part(self.denoiser, path, metadata, dtype)
        return f"{len(self.denoiser.binding.layout.entries)} tensors of the model"

    def _trained_models(self) -> dict[str, torch.nn.Module]:
        return {self.family.denoiser.name: self.denoiser} | self.runtime.trained_encoders

    def finish(self) -> None:
        self.outputs.finish()


def main(family_name: str | None = None, argv: list[str] | None = None) -> None:
    """Parse, check, train. The thin scripts call this with their family's name."""
    program = Path(sys.argv[0]).name
    with Recorder() as recorder:
        recorder.options = option_machinery.parse(family_name, argv, program)
        recorder.trainer = NetworkTrainer(recorder.options)
        recorder.trainer.run()


if __name__ == "__main__":
    run(main)
