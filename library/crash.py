"""What a failed run leaves: one sentence, and a folder `crash/` with all that a report needs.

The folder holds the effective configuration, the plan, the last lines of the terminal and of the log, the traceback,
versions, and the state of memory. Mistakes in options or data, found before anything ran, need none.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import provenance
from library.errors import Interrupted, OutOfMemoryError, UserError

if TYPE_CHECKING:
    from library.options import Options
    from train_network import NetworkTrainer

LINES = 200  # of the terminal and of the step log
KEPT = 5  # bundles in one output folder
PLANNING = 90.0  # seconds that the planner gets to say what would fit


class _Tee(io.TextIOBase):
    """Passes text on and keeps the last lines."""

    def __init__(self, stream: Any, lines: deque[str]) -> None:
        self.stream, self.lines, self.rest = stream, lines, ""

    def write(self, text: str) -> int:
        *whole, self.rest = (self.rest + text).split("\n")
        self.lines.extend(whole)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


class Recorder:
    """`with Recorder() as recorder:` around a program. An exception that leaves it has `bundle`, the folder or None."""

    def __init__(self) -> None:
        self.options: Options | None = None
        self.trainer: NetworkTrainer | None = None
        self.lines: deque[str] = deque(maxlen=LINES)

    def __enter__(self) -> Recorder:
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Tee(sys.stdout, self.lines), _Tee(sys.stderr, self.lines)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        sys.stdout, sys.stderr = self.streams
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt | Interrupted) or self.trainer is None:
            return
        if is_out_of_memory(error):
            better = OutOfMemoryError(out_of_memory(self.trainer, error))
            better.bundle = self.bundle(error)
            raise better from error
        error.bundle = self.bundle(error)  # type: ignore[attr-defined]

    def bundle(self, error: BaseException) -> Path | None:
        """Write the folder; None where that is not possible or another process of the run does it."""
        trainer, options = self.trainer, self.options
        if trainer is None or options is None:
            return None
        rank = getattr(getattr(trainer, "runtime", None), "rank", 0)
        parent = trainer.plan.output_dir / "crash"
        folder = parent / f"{options.output_name}-{time.strftime('%Y%m%d-%H%M%S')}{f'-process{rank}' if rank else ''}"
        contents = {
            "error.txt": lambda: "".join(traceback.format_exception(error)),
            "config.toml": options.to_toml,
            "options.txt": options.report,
            "plan.txt": lambda: trainer.plan.text,
            "terminal.txt": lambda: "\n".join(self.lines),
            "steps.jsonl": lambda: _tail(trainer.plan.output_dir / f"{options.output_name}.jsonl"),
            "versions.json": lambda: json.dumps(provenance.versions(), indent=1),
            "memory.json": lambda: json.dumps(memory(), indent=1),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        for name, content in contents.items():
            with contextlib.suppress(Exception):  # whatever can be had
                (folder / name).write_text(content(), encoding="utf-8")
        for old in sorted(parent.iterdir())[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return folder


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8").splitlines()[-LINES:]) if path.is_file() else ""


def memory() -> dict[str, Any]:
    """Bytes: host (total, available, of this process), each GPU (free, total, reserved and allocated by us)."""
    import psutil

    host = psutil.virtual_memory()
    found: dict[str, Any] = {
        "host": {"total": host.total, "available": host.available, "process": psutil.Process().memory_info().rss}
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            ours = {"reserved": torch.cuda.memory_reserved(index), "allocated": torch.cuda.memory_allocated(index)}
            found[f"cuda:{index}"] = {"name": torch.cuda.get_device_name(index), "free": free, "total": total, **ours}
    return found


# ---------------------------------------------------------------- out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """torch's error of a device, its error of the host's allocator, or Python's own."""
    if type(error).__name__ == "OutOfMemoryError" and not isinstance(error, UserError):
        return True
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def out_of_memory(trainer: NetworkTrainer, error: BaseException) -> str:
    """One sentence: in which phase, for which bucket and files, how much there is, and the cheapest change.

    On an accelerator the planner (library.memory.advice) says what fits; where it cannot, it is a list by cost.
    """
    runtime = getattr(trainer, "runtime", None)
    where = getattr(runtime, "now", "") or "the start"
    items = getattr(error, "items", None)  # of a batch that was being cached
    if items is None and (batch := getattr(trainer, "at", None)) is not None:
        items = batch.items
    if items:
        size = "x".join(map(str, items[0].bucket))
        names = ", ".join(item.path.name for item in items[:3])
        where += f" of a batch of {len(items)} in bucket {size} ({names})"
    known = remedies(trainer)
    planned = by_plan(trainer, where)
    advice = f"{planned}; else try {known[-1]}" if planned else f"try {' or '.join(known[:2])}"
    return f"out of memory in {where}{_held(runtime)}; {advice}"


def by_plan(trainer: NetworkTrainer, where: str, seconds: float = PLANNING) -> str:
    """The planner's cheapest settings for the memory that this run can have; "" where it has no answer in time."""
    device = getattr(getattr(trainer, "runtime", None), "device", None)
    if device is None or device.type != "cuda":
        return ""
    facts = memory()[f"cuda:{device.index or 0}"]
    room = min(facts["total"], facts["free"] + facts["reserved"])  # what other programs hold is not to be had
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # the failure is to be told in any case
            found.append(_settings(trainer, where, room))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else ""


def _settings(trainer: NetworkTrainer, where: str, room: int) -> str:
    from library.memory import advice, plan_table

    options, family, work = trainer.options, trainer.family, plan_table.largest(trainer.dataset)
    if where.startswith("caching latents"):
        settings = advice.latents(options, family, work, room)
        settings = {name: value for name, value in settings.items() if getattr(options, name) != value}
        return f"the cheapest change is {advice.words(settings)}, with which caching takes longer" if settings else ""
    if where.startswith("caching text"):
        settings, cost = advice.text(advice.Trials(options, family, work), room)
        return f"the cheapest change is {advice.words(settings)} ({cost})" if not options.text_encoder_cpu else ""
    if where.startswith("caching"):
        return ""
    found = advice.smaller(options, family, work, room)
    if not found["settings"]:
        return ""
    verdict = "the cheapest settings that fit are" if found["fits"] else "it does not fit; closest is"
    cost = f" ({'; '.join(found['costs'])})" if found["costs"] else ""
    return f"{verdict} {advice.words(found['settings'])}, by plan {found['peak_bytes'] / 1e9:.2f} GB{cost}"


def _held(runtime: Any) -> str:
    device = getattr(runtime, "device", None)
    facts = memory()
    if device is not None and device.type == "cuda":
        card = facts[f"cuda:{device.index or 0}"]
        others = card["total"] - card["free"] - card["reserved"]
        return (
            f": {card['name']} has {card['total'] / 2**30:.1f} GiB, this run holds {card['reserved'] / 2**30:.1f}, "
            f"other programs {max(0, others) / 2**30:.1f}"
        )
    host = facts["host"]
    return f": the machine has {host['total'] / 2**30:.1f} GiB, this process holds {host['process'] / 2**30:.1f}"


def _could_fuse(trainer: NetworkTrainer) -> bool:
    """Whether gradients could be freed one by one; those of a network are small anyway."""
    from library.option_checks import is_lr_free, is_schedule_free

    options, kind = trainer.options, trainer.options.optimizer_type
    whole = options.network_module or options.fused_backward_pass or is_lr_free(kind) or is_schedule_free(kind)
    several = options.gradient_accumulation_steps > 1 or getattr(getattr(trainer, "runtime", None), "world", 1) > 1
    return not (whole or several or options.mixed_precision == "fp16")


def remedies(trainer: NetworkTrainer) -> list[str]:
    """What would need less memory and is not done yet, cheapest in time first."""
    options, out = trainer.options, []
    have = options.as_dict()
    now = getattr(getattr(trainer, "runtime", None), "now", "")
    caching = now.startswith("caching")
    if now == "caching text" and not have.get("text_encoder_cpu", True):
        out.append("--text_encoder_cpu")
    elif caching and options.vae_batch_size > 1:
        out.append("--vae_batch_size 1")
    if not caching and not options.gradient_checkpointing:
        out.append("--gradient_checkpointing")
    if options.network_module:
        for name, value in (("fp8_scaled", ""), ("fp8_base", ""), ("blocks_to_swap", " 10")):
            if name in have and not have[name] and not (name == "fp8_base" and have.get("fp8_scaled")):
                out.append(f"--{name}{value}")
    elif not options.full_bf16 and "bf16" in (options.mixed_precision, None):
        out.append("--full_bf16")
    if _could_fuse(trainer):
        out.append("--fused_backward_pass --max_grad_norm 0")
    largest = max((spec.batch_size for spec in trainer.dataset.specs), default=1)
    if largest > 1:
        out.append(f"a batch_size below {largest} with --gradient_accumulation_steps")
    if "8bit" not in options.optimizer_type.lower():
        out.append("--optimizer_type AdamW8bit")
    return [*out, "a smaller resolution"]
