"""What a run writes and when: file names as sd-scripts has them, intervals in optimizer steps, retention."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library import checkpoints, state
from library.errors import DiskError, Interrupted, NonFiniteError, UserError
from library.health import bad_in_file, non_finite
from library.state import of_part
from library.stops import again, resume_command

if TYPE_CHECKING:
    from library.options import Options
    from train_network import NetworkTrainer

PAUSE = 5.0  # seconds between two attempts on a full disk
REMIND = 600.0  # seconds after which a pause is told again


def file_name(name: str, *, step: int | None = None, epoch: int | None = None) -> str:
    """`<name>-step00000010.safetensors`, `<name>-000002.safetensors`, or the final `<name>.safetensors`."""
    if step is not None:
        return f"{name}-step{step:08d}.safetensors"
    return f"{name}-{epoch:06d}.safetensors" if epoch is not None else f"{name}.safetensors"


class Schedule:
    """Answers 'now?' after each optimizer step, for saves, samples and validation."""

    def __init__(self, options: Options, steps_per_epoch: int, total_steps: int) -> None:
        self.options, self.per_epoch, self.total = options, steps_per_epoch, total_steps
        self.save_epochs = options.save_every_n_epochs
        if options.save_n_epoch_ratio:
            epochs = -(-total_steps // steps_per_epoch)
            self.save_epochs = max(1, epochs // options.save_n_epoch_ratio)

    def _epoch_done(self, step: int, every: int | None) -> bool:
        return bool(every) and step % self.per_epoch == 0 and (step // self.per_epoch) % every == 0

    def save_name(self, step: int) -> str | None:
        """Name of the intermediate file due after `step` steps; the last step gives only the final file."""
        name, every = self.options.output_name, self.options.save_every_n_steps
        if step >= self.total:
            return None
        if self._epoch_done(step, self.save_epochs):
            return file_name(name, epoch=step // self.per_epoch)
        return file_name(name, step=step) if every and step % every == 0 else None

    def sample(self, step: int) -> bool:
        every = self.options.sample_every_n_steps
        return self._epoch_done(step, self.options.sample_every_n_epochs) or bool(every and step % every == 0)

    def validate(self, step: int) -> bool:
        every, epochs = self.options.validate_every_n_steps, self.options.validate_every_n_epochs
        if not every and not epochs:
            epochs = 1  # sd-scripts: every epoch when there is a validation set
        return self._epoch_done(step, epochs) or bool(every and step % every == 0) or step == self.total


def doomed(
    options: Options, folder: Path, steps_per_epoch: int, step: int, *, coming: int = 0, parts: Iterable[str] = ("",)
) -> list[Path]:
    """What --save_last_n_* lets go at `step`: files and states of this name, never the newest one that is there.

    `coming` = 1 asks the same as if the save that is about to be written were there already.
    """
    out = []
    for which, suffix in ((which, suffix) for which in parts for suffix in ("", "-ema")):
        name = of_part(options.output_name, options.output_name, which)
        by_epoch = _numbered(folder, name, rf"-(\d{{6}}){suffix}\.safetensors")
        by_step = _numbered(folder, name, rf"-step(\d{{8}}){suffix}\.safetensors")
        if options.save_last_n_epochs:
            out += [path for _, path in by_epoch[: -max(1, options.save_last_n_epochs - coming)]]
        if options.save_last_n_steps:
            out += [path for number, path in by_step[:-1] if number < step - options.save_last_n_steps]
    keep_steps = options.save_last_n_steps_state or options.save_last_n_steps
    keep_epochs = options.save_last_n_epochs_state or options.save_last_n_epochs
    window = keep_steps or (keep_epochs and keep_epochs * steps_per_epoch)
    if window:
        states = _numbered(folder, options.output_name, r"-step(\d{8})-state")
        out += [path for number, path in states[:-1] if number <= step - window]
    return out


def _numbered(folder: Path, name: str, ending: str) -> list[tuple[int, Path]]:
    pattern = re.compile(re.escape(name) + ending)
    found = ((pattern.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted((int(match[1]), path) for match, path in found if match)


def remove(path: Path) -> None:
    """A state first loses its name, so that a half-removed one is never taken for a whole one."""
    if path.is_dir():
        gone = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Saves:
    """Weights and states of one run, in its main process. What the disk refuses pauses the run, it never ends it.

    Each save is written whole and verified, then the ones that it replaces are removed. On a full disk first those
    go that were to go anyway as long as one older save stays; then --fallback_output_dir is tried; then the run waits.
    """

    def __init__(self, trainer: NetworkTrainer, say: Callable[[str], None]) -> None:
        self.trainer, self.options, self.say = trainer, trainer.options, say
        self.folder, self.name = trainer.plan.output_dir, trainer.options.output_name
        self.fallback = Path(self.options.fallback_output_dir) if self.options.fallback_output_dir else None
        self.written: list[Path] = []
        self.key_line = ""
        self.last_state: Path | None = None
        self.state_bytes = 0

    def weights(self, name: str, metadata: Mapping[str, str], *, must: bool) -> Path | None:
        """Write the network or model as `name`; the average of --ema_decay too. Raises NonFiniteError.

        A failure that is no matter of the disk is told and lets the training go on, unless this save is a `must`.
        """
        trainer = self.trainer
        if bad := non_finite(trainer.trained):
            raise NonFiniteError(f"{bad} holds values that are no finite numbers; {name} was not saved")
        try:
            path = self._all_parts(name, metadata)
            if trainer.average is not None:
                with trainer.average.in_place():
                    self._all_parts(f"{name.removesuffix('.safetensors')}-ema.safetensors", metadata)
            return path
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            if must:
                raise
            self.say(f"warning: saving {name} failed ({type(error).__name__}: {error}); the training goes on")
            return None

    def _all_parts(self, name: str, metadata: Mapping[str, str]) -> Path:
        for which in self.trainer.networks:
            file = of_part(name, self.name, which)
            path = self._patiently(file, lambda folder, f=file, w=which: self._weights(folder / f, metadata, w))
        return path

    def _weights(self, path: Path, metadata: Mapping[str, str], which: str) -> Path:
        with checkpoints.publishing(path) as partial:
            self.key_line = self.trainer.save(partial, dict(metadata), which)
            if bad := bad_in_file(partial):
                raise NonFiniteError(
                    f"{bad} holds values that are no finite numbers in {path.name}, which was not saved; "
                    "--save_precision bf16 or float holds larger ones than fp16"
                )
        self.written.append(path)
        self.say(f"saved {path.name}: {self.key_line}")
        return path

    def state(self) -> Path:
        """Write a training state; returns where it is."""
        trainer = self.trainer
        tensors = {k: v.detach().cpu().contiguous() for k, v in trainer.trained.items()}
        name = state.state_path(Path(), self.name, trainer.position.step).name

        def write(folder: Path) -> Path:
            state.save_state(folder / name, tensors, trainer.stateful, trainer.position, trainer.plan.origin)
            return folder / name

        path = self.last_state = self._patiently(name, write)
        self.state_bytes = sum(p.stat().st_size for p in path.iterdir())
        self.say(f"state {path.name}: continue with --resume {path}")
        return path

    def prune(self) -> None:
        """Remove what the save that was just verified replaces."""
        for path in self._doomed(0):
            remove(path)
            self.say(f"deleted {path.name} (--save_last_n_...)")

    def _doomed(self, coming: int) -> list[Path]:
        trainer = self.trainer
        per_epoch, step = trainer.plan.steps_per_epoch, trainer.position.step
        return doomed(self.options, self.folder, per_epoch, step, coming=coming, parts=trainer.networks)

    def _patiently(self, name: str, write: Callable[[Path], Path]) -> Path:
        told = None
        while True:
            try:
                path = write(self.folder)
                if told is not None:
                    self.say(f"{name} is written, the run goes on")
                return path
            except DiskError as error:
                reason = str(error)
            if early := self._doomed(1):
                remove(early[0])
                self.say(f"deleted {early[0].name} before the new save, because the disk is full (--save_last_n_...)")
                continue
            if self.fallback is not None:
                try:
                    path = write(self.fallback)
                    self.say(f"warning: {reason}; {name} is in {self.fallback} instead")
                    return path
                except DiskError as error:
                    reason = f"{reason}; and {error}"
            if told is None or time.monotonic() - told > REMIND:
                told = time.monotonic()
                step = self.trainer.position.step
                self.say(f"PAUSED at step {step}: {reason}; the run goes on by itself when there is room")
            if self.trainer.stops.sleep(PAUSE):
                raise Interrupted(f"stopped while the disk was full, {name} is not written; {self._way_out()}")

    def _way_out(self) -> str:
        return f"continue with:\n  {resume_command(self.last_state)}" if self.last_state else again()

    def forecast(self) -> str:
        """How much this run will write, and whether it fits; the size of a state is exact after the first one."""
        options, trainer = self.options, self.trainer
        size = {"fp16": 2, "bf16": 2, "float": 4, None: 0}[options.save_precision]
        file = sum(p.numel() * (size or p.element_size()) for p in trainer.trained.values())
        schedule = Schedule(options, trainer.plan.steps_per_epoch, trainer.plan.total_steps)
        steps = range(trainer.position.step + 1, trainer.plan.total_steps + 1)
        saves = sum(1 for step in steps if schedule.save_name(step)) + 1
        files = min(saves, 1 + (options.save_last_n_epochs or saves))
        states = min(saves, (options.save_last_n_epochs_state or options.save_last_n_epochs or saves))
        states = states if options.save_state else int(bool(options.save_state_on_train_end))
        copies = 1 if trainer.average is None else 2
        held = sum(p.numel() * p.element_size() for p in trainer.trained.values()) * (2 + copies)
        total, free = copies * files * file + states * held, shutil.disk_usage(self.folder).free
        text = f"disk: {files} files of {file / 1e6:,.1f} MB and {states} states of about {held / 1e6:,.1f} MB, "
        text += f"{total / 1e6:,.0f} MB in all; {free / 1e6:,.0f} MB are free"
        return text if total < free else f"warning: {text}; the run will pause when there is no room"
