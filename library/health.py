"""Numbers that are no numbers: noticed in every step, kept away from the weights, named, and in a row the end of a run.

Loss and gradient norm stay on the device. What the host wants to know of a step it reads during the next one, when the
number has long arrived: `Late` waits for that copy alone and not for the work that was queued after it. Optimizers that
can skip a step on the device (torch's fused ones) need no more; for the others the host has to know before the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.dump import dump_batch
from library.errors import DiskError

if TYPE_CHECKING:
    from library.batches import Batch, Step
    from train_network import NetworkTrainer

IN_A_ROW = 3  # bad steps that end a run
OVERFLOWS = 20  # steps in a row that fp16's scaler may skip while it looks for a scale
DATA = ("the latents", "the conditioning")  # causes that lie in the data and not in the weights
MOST_DUMPS = 10  # bad batches that are kept


class Late:
    """A small tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.event = None
        if tensor.device.type == "cuda":
            self.value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.value.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.value = tensor.detach().clone()

    def numbers(self) -> list[float]:
        """Waits for this tensor only."""
        if self.event is not None:
            self.event.synchronize()
        return self.value.tolist()


class Guard:
    """Between gradient and optimizer: `step` takes the optimizer step unless loss or gradient norm are no numbers."""

    def __init__(self, trainer: NetworkTrainer, end: Callable[[str], None]) -> None:
        self.trainer, self.end = trainer, end  # `end(message)` saves what is good and raises
        self.on_device = skips_on_device(trainer.optimizer)
        self.waiting: tuple[Step, Late] | None = None
        self.in_a_row = self.overflows = self.dumps = 0

    @torch.no_grad()
    def step(self, step: Step, loss: Tensor, norm: Tensor) -> None:
        """One optimizer step, or none. `loss` and `norm` are scalars on the device, the same in all processes."""
        trainer = self.trainer
        bad = self.note(step, loss, norm)
        if trainer.scaler.is_enabled():
            trainer.scaler.step(trainer.optimizer)  # finds by itself whether a gradient overflowed
            trainer.scaler.update()
        elif self.on_device:
            trainer.optimizer.found_inf = bad.any().float()
            trainer.optimizer.step()
        elif not bad.any():
            trainer.optimizer.step()

    def note(self, step: Step, loss: Tensor, norm: Tensor) -> Tensor:
        """Look at a step's numbers; returns two flags on the device. What the host does about it comes later."""
        bad = torch.stack([~torch.isfinite(loss), ~torch.isfinite(norm)])
        self.settle()
        self.waiting = (step, Late(bad.float()))
        return bad

    def settle(self) -> None:
        """Read what became of the step before; a bad one is dumped, and the third in a row ends the run."""
        if self.waiting is None:
            return
        step, late = self.waiting
        self.waiting = None
        loss_bad, norm_bad = (bool(flag) for flag in late.numbers())
        self.overflows = self.overflows + 1 if norm_bad else 0
        if norm_bad and not loss_bad and self.trainer.scaler.is_enabled() and self.overflows <= OVERFLOWS:
            return  # a scale that is too large: the scaler halves it
        if not (loss_bad or norm_bad):
            self.in_a_row, self.trainer.position.suspect = 0, False
            return
        self.in_a_row += 1
        self.trainer.position.skipped += 1
        what = "the loss" if loss_bad else "the gradient norm"
        cause = self._dump(step)
        self.trainer.position.suspect = not any(word in cause for word in DATA)
        early = self.trainer.fused is not None and not loss_bad
        skipped = "is skipped from the first such gradient of its backward pass on" if early else "is skipped"
        self.trainer.outputs.say(f"warning: step {step.number + 1} {skipped}: {what} is no finite number; {cause}")
        if self.in_a_row >= IN_A_ROW:
            lower = "resume an earlier state with a lower --learning_rate, or use bf16 for fp16"
            self.end(
                f"{what} of {IN_A_ROW} steps in a row, up to step {step.number + 1}, is no finite number; {cause}; "
                + (lower if self.trainer.position.suspect else "look at these files")
            )

    def _dump(self, step: Step) -> str:
        """Compute the step again and write the batch that went wrong; returns a sentence about it."""
        trainer = self.trainer
        causes, files = [], []
        for index, batch in enumerate(step.batches):
            cause, tensors = first_bad(trainer, batch, step.number, index)
            if cause:
                causes.append(cause)
                files += [item.path.name for item in batch.items]
                self._write(step, batch, index, cause, tensors)
        if not causes:
            other = trainer.runtime.world > 1
            return f"computed again it {'is sound in this process' if other else 'is sound, so the cause is chance'}"
        return f"the first tensor that went wrong is {causes[0]}; files: {', '.join(files[:8])}"

    def _write(self, step: Step, batch: Batch, index: int, cause: str, tensors: tuple | None) -> None:
        self.dumps += 1
        if self.dumps > MOST_DUMPS:
            return
        outputs, rank = self.trainer.outputs, self.trainer.runtime.rank
        folder = outputs.folder / "bad_batch" / f"{outputs.name}-step{step.number + 1:08d}-{rank}-{index}"
        facts = {
            "step": step.number + 1,
            "files": [item.file for item in batch.items],
            "captions": batch.captions,
            "first_bad": cause,
            "dtypes": {name: str(p.dtype) for name, p in list(self.trainer.trained.items())[:3]},
            "latents": str(batch.pictures.dtype),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if tensors is not None:
                facts["sigma"] = [float(one) for one in tensors[2].detach().flatten()]
                facts["loss"] = [
                    float(one) if math.isfinite(one) else str(float(one)) for one in tensors[6].detach().flatten()
                ]
                dump_batch(folder / "batch.safetensors", self.trainer.family, batch, *tensors)
            text = json.dumps(facts, ensure_ascii=False, indent=1, default=str)
            (folder / "batch.json").write_text(text, encoding="utf-8")
        except (OSError, DiskError) as error:
            outputs.say(f"warning: the bad batch could not be written ({error})")


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer.found_inf` (a tensor, 1 = skip) leaves weights and states as they are: torch's fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


# ---------------------------------------------------------------- the first tensor that went wrong


def first_bad(trainer: NetworkTrainer, batch: Batch, number: int, index: int) -> tuple[str, tuple | None]:
    """Compute a micro-step again and name the first tensor with a value that is no finite number, "" if there is none.

    In the order of computation: latents, text, noise, the output of each module of the denoiser, the loss, gradients
    from the last layer to the first. Gradients in progress are not touched. Also returns what the step handed to the
    dump (see `library.dump`), None where it failed before that.
    """
    outputs = trainer.outputs
    outputs.captured = []
    try:
        trainer.runtime.seed(number, index)
        trainer.take_turn(number)
        plainly = trainer.runtime.memory.plainly()
        with torch.enable_grad(), plainly, watching(trainer.denoiser) as found, trainer.runtime.autocast():
            loss = trainer.step(batch).mean()
        tensors = outputs.captured[0] if outputs.captured else None
        cause = _bad_input(batch, tensors) or (found[0] if found else "")
        cause = cause or ("" if torch.isfinite(loss) else f"the loss ({float(loss)})")
        return cause or _bad_gradient(trainer, loss), tensors
    except torch.OutOfMemoryError:
        return "not known, since there is no memory to compute the step again", None
    finally:
        outputs.captured = None
        trainer.take_turn(trainer.position.step)


class watching:
    """A list that gets the name of the first module of `model` whose output is not finite."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.found, self.handles = model, [], []

    def __enter__(self) -> list[str]:
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_hook(self._hook(name or "the denoiser")))
        return self.found

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if not self.found:
                for tensor in tensors_in(output):
                    if bad := bad_values(tensor):
                        self.found.append(f"the output of {name} ({type(module).__name__}, {bad})")
                        return

        return hook


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def bad_values(tensor: Tensor) -> str:
    """`3 of 64 values` that are no finite numbers, "" if all are."""
    if not tensor.is_floating_point():
        return ""
    count = int((~torch.isfinite(tensor.float())).sum())
    return f"{count} of {tensor.numel()} values" if count else ""


def _bad_input(batch: Batch, tensors: tuple | None) -> str:
    if tensors is None:
        return ""
    x0, noise, sigma, noisy, _, _, _, conds = tensors
    for k, item in enumerate(batch.items):
        named: Iterable[tuple[str, Tensor]] = [
            ("the latents", x0[k]),
            *((f"the conditioning '{name}'", value) for name, value in conds[k].items()),
            ("the noise", noise[k]),
            ("sigma", sigma[k]),
            ("the noisy latents", noisy[k]),
        ]
        for what, tensor in named:
            if bad := bad_values(tensor):
                return f"{what} of {item.path.name} ({bad})"
    return ""


def _bad_gradient(trainer: NetworkTrainer, loss: Tensor) -> str:
    trained = {name: p for name, p in trainer.trained.items() if p.requires_grad}
    grads = torch.autograd.grad(trainer.scaler.scale(loss), list(trained.values()), allow_unused=True)
    for name, grad in reversed(list(zip(trained, grads, strict=True))):
        if grad is not None and (bad := bad_values(grad)):
            return f"the gradient of {name} ({bad})"
    return ""


def non_finite(tensors: dict[str, Tensor]) -> str:
    """The first name whose tensor has a value that is no finite number, "" if all are finite; one wait in all."""
    named = [(name, t) for name, t in tensors.items() if t.is_floating_point() and t.numel()]
    if not named:
        return ""
    good = torch.stack([torch.isfinite(t.detach()).all() for _, t in named]).tolist()
    return next((name for (name, _), fine in zip(named, good, strict=True) if not fine), "")


def bad_in_file(path: Path) -> str:
    """The first tensor of a weight file with a value that is no finite number, "" if all are finite."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) and non_finite({key: tensor}):
                return key
    return ""
