"""What a run writes and when: file names as sd-scripts has them, intervals in optimizer steps, retention."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.options import Options


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


def prune(options: Options, output_dir: Path, steps_per_epoch: int, step: int) -> list[Path]:
    """Delete what --save_last_n_* says, once a newer save was verified: files of this name, never the newest."""
    removed = []
    name = options.output_name
    by_epoch = sorted(output_dir.glob(f"{glob.escape(name)}-[0-9]*.safetensors"))
    if options.save_last_n_epochs:
        removed += by_epoch[: -options.save_last_n_epochs]
    by_step = sorted(output_dir.glob(f"{glob.escape(name)}-step*.safetensors"))
    if options.save_last_n_steps:
        removed += [path for path in by_step[:-1] if _step_of(path, name) < step - options.save_last_n_steps]
    states = sorted(path for path in output_dir.glob(f"{glob.escape(name)}-step*-state") if path.is_dir())
    keep_steps = options.save_last_n_steps_state or options.save_last_n_steps
    keep_epochs = options.save_last_n_epochs_state or options.save_last_n_epochs
    window = keep_steps or (keep_epochs and keep_epochs * steps_per_epoch)
    if window:
        removed += [path for path in states[:-1] if _step_of(path, name) <= step - window]
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return removed


def _step_of(path: Path, name: str) -> int:
    digits = path.name.removeprefix(f"{name}-step").removesuffix("-state").removesuffix(".safetensors")
    return int(digits) if digits.isdigit() else 2**63  # not one of ours: never old enough to delete
