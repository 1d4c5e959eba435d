"""What a run leaves behind, and when: log lines, saves, states, samples, validation, dumps, the report.

Auxiliary work may not kill training: samples, trackers and the report run guarded, after the save.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library import optim, report, state, stops, trackers
from library.data.items import names
from library.dump import dump_batch
from library.errors import DiskError, Interrupted, NonFiniteError
from library.health import Late
from library.memory import plan_of_run
from library.memory.peaks import Peaks
from library.metadata import save_metadata, training_metadata
from library.saving import Saves, Schedule, file_name
from library.updates import Updates
from library.validation import Best, Validation
from library.watch import Watch
from library.workflows import Lora

if TYPE_CHECKING:
    from torch import Tensor

    from library.batches import Step
    from train_network import NetworkTrainer


class Outputs:
    """Bound to one trainer; called before the loop, after each optimizer step and at the end."""

    def __init__(self, trainer: NetworkTrainer) -> None:
        self.trainer, self.options, self.runtime = trainer, trainer.options, trainer.runtime
        self.folder: Path = trainer.plan.output_dir
        self.name = self.options.output_name
        self.schedule = Schedule(self.options, trainer.plan.steps_per_epoch, trainer.plan.total_steps)
        self.log = (
            report.JsonLog(self.folder / f"{self.name}.jsonl", resume_step=trainer.position.step)
            if self._main
            else None
        )
        self.validation = Validation(trainer) if trainer.dataset.validation else None
        self.best = Best(report.read_lines(self.log.path) if self.log and self.validation else [])
        self.samples = self._sample_run() if self._main and trainer.prompts else None
        self.base_metadata = self._metadata() if self._main else {}
        self.pending: tuple | None = None  # the step whose numbers are still on the device
        self.last_loss, self.last_norm = math.nan, math.nan
        self.dumped = False
        self.saved: dict[int, str] = {}  # step -> name of the latest file of weights
        self.captured: list[tuple] | None = None  # what a step hands to the dump, while one is computed again
        self.first_number = trainer.position.step
        self.updates, self.peaks = Updates(trainer), Peaks(self.runtime.device)
        beats = self.folder / f"{self.name}-heartbeat.json" if self._main else None
        self.watch = Watch(beats, functools.partial(print, flush=True))
        if self._main:
            state.recover(self.folder, self.name)
            self.saves = Saves(trainer, self.say)
        if self._main and self.options.log_with:
            self.runtime.accelerator.init_trackers(
                config=self._tracker_config(), **trackers.init_arguments(self.options)
            )

    @property
    def _main(self) -> bool:
        return self.runtime.is_main

    def _tracker_config(self) -> dict[str, Any]:
        return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in self.options.as_dict().items()}

    def _metadata(self) -> dict[str, str]:
        plan, options = self.trainer.plan, self.options
        run = {"total_steps": plan.total_steps, "epochs": plan.epochs, "steps_per_epoch": plan.steps_per_epoch}
        return training_metadata(options, self.trainer.family, plan.dataset.metadata(), {}, run)

    # ---------------------------------------------------------------- in the loop

    def before_training(self) -> None:
        trainer, plan = self.trainer, self.trainer.plan
        count = sum(p.numel() for p in trainer.parameters)
        self.say(f"training {count:,} parameters in {len(trainer.parameters)} tensors on {self.runtime.device}")
        if hasattr(trainer.network, "summary"):
            self.say(f"  network: {trainer.network.summary()}")
        rates = optim.learning_rates(trainer.optimizer, trainer.optimizer.param_groups)
        rates = names([f"{name} {rate:.3g}" for name, rate in rates.items()], 8)
        where = plan.where() if plan.resume else "the start"
        self.say(f"  {where}; learning rates: {rates}")
        self.first_step = self.step_started = time.perf_counter()
        self.runtime.seconds["start to first step"] = self.first_step - trainer.started
        if self.samples and (trainer.network is not None or trainer.position.step == 0):
            self._guarded(lambda: self.samples.base(trainer.denoiser, trainer.network), "the base pictures")
            if self.options.sample_at_first and trainer.position.step == 0:
                self._sample(0)
        self.step_started = time.perf_counter()
        self.remaining = plan.total_steps - trainer.position.step
        if self._main:
            self.say(self.saves.forecast())
            self.log.write(
                step=trainer.position.step, event="first step begins", time=time.time(), seconds=self.runtime.seconds
            )

    def step_begins(self, step: Step) -> None:
        """The loader has handed over the step's data."""
        self.data_ready, self.batches = time.perf_counter(), step.batches
        self.peaks.begin()

    def after_backward(self) -> None:
        """Before the gradients of the processes are added up, which fills in what is missing."""
        if self.trainer.position.step == self.first_number:
            fused = self.trainer.fused
            if text := self.updates.without_gradient(fused.reached) if fused else self.updates.without_gradient():
                self.say(text)

    def after_step(self, loss: Tensor, norm: Tensor, wishes: stops.Wishes, *, last: bool) -> None:
        """Numbers of the step before this one are written now: reading this step's would wait for the device."""
        trainer, position = self.trainer, self.trainer.position
        self._write_pending()
        now = time.perf_counter()
        self.pending = (
            position.step,
            position.epoch,
            Late(torch.stack([loss.detach().float(), norm.detach().float()])),
            {"data": self.data_ready - self.step_started, "step": now - self.data_ready},
            optim.learning_rates(trainer.optimizer, trainer.optimizer.param_groups),
            self.peaks.end(self.batches),
        )
        self.step_started = now
        self.watch.step(position.step)
        name = self.schedule.save_name(position.step)
        if name is None and (wishes.save or wishes.stop) and not last:
            name = file_name(self.name, step=position.step)
        sample = self.schedule.sample(position.step) or wishes.sample or last
        validate = self.validation is not None and self.schedule.validate(position.step)
        if last or name or sample or validate:
            self._write_pending()
            trainer.guard.settle()
            state = self.options.save_state or wishes.save or wishes.stop
            with self.watch.doing("saving, validation and samples"):
                self._boundary(name, state, sample=sample and not wishes.stop, validate=validate, last=last)
            self.step_started = time.perf_counter()
        if wishes.stop and not last:
            self._stopped()
        if text := self.updates.idle(position.step, self.first_number, self.last_norm):
            self.say(text)

    def _stopped(self) -> None:
        step, total = self.trainer.position.step, self.trainer.plan.total_steps
        way = f"\n  {stops.resume_command(self.saves.last_state)}" if self._main else ""
        raise Interrupted(f"stopped after step {step} of {total}, nothing is lost; continue with:{way}")

    def end_badly(self, message: str) -> None:
        """Three steps in a row gave no numbers: the weights are those before them; keep these and end the run."""
        if self._main:
            self.saves.state()
            path = self.folder / file_name(self.name, step=self.trainer.position.step)
            optim.eval_mode(self.trainer.optimizer)
            self._save(path.name, must=False)
        self.runtime.wait("saving")
        where = f"; the last good state is {self.saves.last_state}" if self._main else ""
        raise NonFiniteError(message + where)

    def _write_pending(self) -> None:
        if self.pending is None:
            return
        step, epoch, late, seconds, rates, memory = self.pending
        self.pending = None
        position = self.trainer.position
        loss, norm = late.numbers()
        if math.isfinite(loss):
            position.losses = [*position.losses, loss][-self.trainer.plan.steps_per_epoch :]
            position.loss_average = sum(position.losses) / len(position.losses)
        position.seconds += sum(seconds.values())
        self.last_loss, self.last_norm = loss, norm
        done = step - (self.trainer.plan.total_steps - self.remaining)
        rate = (time.perf_counter() - self.first_step) / max(done, 1)
        eta = rate * (self.trainer.plan.total_steps - step)
        if self._main:
            self.log.write(
                step=step,
                epoch=epoch + 1,
                loss=loss,
                loss_average=position.loss_average,
                grad_norm=norm,
                lr=rates,
                seconds=seconds,
                eta=eta,
                **memory,
            )
            self._track(
                {
                    "loss/current": loss,
                    "loss/average": position.loss_average,
                    "norm/grad": norm,
                    **{f"lr/{name}": value for name, value in rates.items()},
                },
                step,
            )
            if step % self.options.log_every_n_steps == 0 or step == self.trainer.plan.total_steps:
                self.say(
                    f"step {step}/{self.trainer.plan.total_steps}  loss {loss:.4f}  average {position.loss_average:.4f}"
                    f"  {sum(seconds.values()):.2f} s  left {eta / 60:.1f} min"
                )

    def _boundary(self, name: str | None, keep: bool, *, sample: bool, validate: bool, last: bool) -> None:
        """The state and the weights first, verified; then what they replace is removed; then all that may fail."""
        trainer, before = self.trainer, len(self.saves.written) if self._main else 0
        if self._main:
            if (name and keep) or (last and (keep or self.options.save_state_on_train_end)):
                self.saves.state()
            optim.eval_mode(trainer.optimizer)
            if (name or last) and self._save(file_name(self.name) if last else name, must=last):
                self.saves.prune()
        optim.eval_mode(trainer.optimizer)
        if validate:
            self._validate(before)
        if sample and self.samples:
            self._sample(trainer.position.step)
        optim.train_mode(trainer.optimizer)
        self.runtime.wait("saving and sampling")

    def _save(self, name: str, *, must: bool) -> Path | None:
        position = self.trainer.position
        metadata = save_metadata(self.base_metadata, step=position.step, epoch=position.epoch + 1)
        path = self.saves.weights(name, metadata, must=must)
        if path is not None:
            self.saved = {position.step: path.name}
            self._guarded(self._tell_update, "measuring the update")
        return path

    def _tell_update(self) -> None:
        line, numbers = self.updates.line()
        self.log.write(step=self.trainer.position.step, update=numbers)
        self.say(line)

    def _validate(self, before: int) -> None:
        """`before`: how many files had been written before this step's."""
        values = self._guarded(self.validation.run, "validation", "validation")
        if values is None:
            return
        step = self.trainer.position.step
        if self._main:
            self.log.write(step=step, validation=values)
            self._track({f"loss/validation/{name}": value for name, value in values.items()}, step)
            written = self.saves.written[before:]
            take = functools.partial(self.best.take, values["average"], step, written)
            said = self._guarded(take, "keeping the best weights") or f"loss {values['average']:.4f}"
            self.say(f"validation at step {step}: {said}")

    def _sample_run(self) -> Any:
        from library.sample import Samples

        t = self.trainer
        first = t.dataset.items[0].placement.bucket
        return Samples(
            t.prompts,
            self.trainer.family,
            self.options,
            t.sample_conds,
            self.folder,
            self.name,
            self.runtime.decoder,
            self.runtime.device,
            self.runtime.drawing,
            self.runtime.latent_channels(t.denoiser),
            max(first),
        )

    def _name_weights(self, file: str) -> None:
        """What the samples' workflows name: the file that holds, or would hold, this step's weights."""
        plan, samples = self.trainer.plan, self.samples
        if self.trainer.network is None:
            samples.model = file
            return
        merged = [Lora(path, multiplier) for path, multiplier in plan.base_weights]
        samples.loras = (*merged, Lora(file, with_text=plan.trained.any_text))

    def _sample(self, step: int) -> None:
        trainer, per_epoch = self.trainer, self.trainer.plan.steps_per_epoch
        self._name_weights(self.saved.get(step) or file_name(self.name, step=step))
        epoch = step // per_epoch if self.options.sample_every_n_epochs and step and step % per_epoch == 0 else None
        self._guarded(
            lambda: self.samples.render(trainer.denoiser, trainer.network, step=step, epoch=epoch), "sampling"
        )

    def _guarded(self, work: Any, what: str, phase: str = "sampling") -> Any:
        try:
            with self.runtime.phase(phase):
                return work()
        except Exception as error:  # auxiliary work may not kill training
            self.say(f"warning: {what} failed and was skipped ({type(error).__name__}: {error})")
            return None

    def _track(self, values: dict[str, float], step: int) -> None:
        if self.options.log_with:
            self._guarded(lambda: self.runtime.accelerator.log(values, step=step), "logging to the tracker")

    def say(self, text: str) -> None:
        if self._main:
            print(text, flush=True)

    def maybe_dump(self, batch: Any, *tensors: Any) -> None:
        """--dump_batch_at_step N: the first batch of optimizer step N (counted from 1), once."""
        if self.captured is not None:
            self.captured.append(tensors)
        elif self.options.dump_batch_at_step == self.trainer.position.step + 1 and not self.dumped and self._main:
            self.dumped = True
            path = self.folder / f"{self.name}-batch-step{self.options.dump_batch_at_step}.safetensors"
            try:
                dump_batch(path, self.trainer.family, batch, *tensors)
                self.say(f"dumped the batch of step {self.options.dump_batch_at_step} to {path.name}")
            except DiskError as error:
                self.say(f"warning: the batch was not dumped: {error}")

    # ---------------------------------------------------------------- at the end

    def finish(self) -> None:
        self.watch.close(done=True)
        if self.options.log_with:
            self._guarded(self.runtime.accelerator.end_training, "closing the tracker")
        if self._main:
            self.runtime.seconds["training"] = self.trainer.position.seconds
            self._guarded(self._report, "the report")
        if self.runtime.world > 1:
            import torch

            torch.distributed.destroy_process_group()

    def _report(self) -> None:
        trainer, plan = self.trainer, self.trainer.plan
        facts = {
            "trained": f"{sum(p.numel() for p in trainer.parameters):,} parameters",
            "optimizer steps": str(trainer.position.step),
            "loss, average of the last pass over the data": f"{trainer.position.loss_average:.4f}",
            "keys": self.saves.key_line,
            **({"validation, lowest": f"{self.best.loss:.4f} at step {self.best.step}"} if self.best.step else {}),
            **self._memory(),
            **{f"seconds: {name}": f"{value:.1f}" for name, value in self.runtime.seconds.items()},
            **self._style(),
        }
        path = report.write(
            self.folder,
            self.name,
            title=f"{self.name}: {self.trainer.family.title}",
            facts=facts,
            plan=plan.text,
            options=self.options.report(),
            log=self.log.path,
            files=self.saves.written,
            grid=self.samples.grid_path if self.samples else None,
        )
        self.say(f"report: {path}")

    def _memory(self) -> dict[str, str]:
        """The device's highest use beside the planned one, and that of each bucket."""
        text = plan_of_run.measured(self.trainer.plan.memory, self.peaks.highest())
        if not text:
            return {}
        self.say(f"memory, most at one time on {self.runtime.device}: {text}")
        return {"memory, most at one time": text, **self.peaks.facts()}

    def _style(self) -> dict[str, str]:
        """How far the sample pictures are from the training pictures, before and after."""
        from library.sample import style_distance

        trainer = self.trainer
        if not (self.samples and trainer.latents.cached and len(self.samples.latents) > 1):
            return {}
        training = [trainer.latents.get(item.index) for item in trainer.dataset.items]
        labels = list(self.samples.latents)
        before, after = (style_distance(self.samples.latents[label], training) for label in (labels[0], labels[-1]))
        return {f"style distance to the training pictures, {labels[0]} -> {labels[-1]}": f"{before:.2f} -> {after:.2f}"}
