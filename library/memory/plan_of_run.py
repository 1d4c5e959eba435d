"""The memory plan at the start of a run, made by a process of its own: --memory_plan.

In a process of its own, because planning runs the run's own code on tensors without values, and nothing of that may
stay behind: no cached tensor, no drawn random number, no fault that ends a training run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.options import Options
    from library.preflight import Plan

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from library.memory import plan_of_run; plan_of_run.child()"
LARGE = 10**9  # bytes of a denoiser's file, from which on a plan is worth its seconds on a CPU, too
PATIENCE = 180  # seconds
GB = 1e9


def is_wanted(options: Options, plan: Plan, device: Any) -> bool:
    """`auto`: on an accelerator, and on a CPU for models that are no toys."""
    if options.memory_plan != "auto":
        return options.memory_plan == "always"
    from library.checkpoints import Checkpoint, path_of

    part = plan.family.denoiser
    if device.type != "cpu":
        return True
    return Checkpoint.open(path_of(part, options), part.diffusers_folder).stored_bytes > LARGE


def tell(options: Options, plan: Plan, device: Any, say: Any = print) -> dict[str, Any] | None:
    """Say how much memory the run will need, or why that is not known; returns the plan as JSON has it."""
    try:
        if not is_wanted(options, plan, device):
            return None
        free = free_bytes(device)
        found = _ask(options, plan, device.type != "cpu", free)
    except Exception as error:  # a forecast may not end a run
        say(f"note: the memory of this run could not be planned ({type(error).__name__}: {str(error)[:200]})")
        return None
    text = found.pop("text")
    if free is not None:
        text = f"{text}\n{compared(found['device']['peak_bytes'], free)}"
    plan.text = f"{plan.text}\n{text}"
    say(text)
    return found


def compared(peak: int, free: int) -> str:
    room = f"the device has {free / GB:.2f} GB free"
    if peak <= free:
        return room
    return f"warning: {room}, {(peak - free) / GB:.2f} GB less than this run needs"


def measured(plan: dict[str, Any] | None, peak: int | None) -> str:
    """After a run: the device's real peak in bytes beside the planned one; "" where a device does not count."""
    if peak is None:
        return ""
    planned = f", {plan['device']['peak_bytes'] / GB:.2f} GB planned" if plan else ""
    return f"{peak / GB:.2f} GB{planned}"


def free_bytes(device: Any) -> int | None:
    """Of an accelerator; None where it does not say."""
    if device.type == "cpu":
        return None
    import torch

    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return ask()[0] if ask else None


def _ask(options: Options, plan: Plan, accelerator: bool, free: int | None) -> dict[str, Any]:
    from library.memory.plan_table import largest

    values = {k: v for k, v in options.as_dict().items() if options.given(k) or not options.off(k)}
    return elsewhere({
        "model_type": plan.family.name,
        "values": values,
        "work": dataclasses.asdict(largest(plan.dataset)),
        "accelerator": accelerator,
        "free": free,
    })  # fmt: skip


def elsewhere(question: dict[str, Any]) -> dict[str, Any]:
    """The answer of another process. Raises RuntimeError with its last words."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(question), capture_output=True, text=True,
        encoding="utf-8", env=environment, timeout=PATIENCE,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """Read a question from the standard input, write the answer as one line of JSON."""
    print(json.dumps(answer(json.loads(sys.stdin.read()))), flush=True)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The plan, with its table as "text"."""
    from library.families import get_family
    from library.memory import advice, plan_table, planner
    from library.options import OPTIONS, Options, options_of

    family = get_family(question["model_type"])
    table = {option.name: option for option in (*OPTIONS, *options_of(family))}
    values = {option.name: option.default for option in table.values()} | question["values"]
    options = Options(table, values, dict.fromkeys(table, "default"), family)
    given = question["work"]
    work = planner.Work(**{**given, "controls": tuple(map(tuple, given["controls"]))})
    family = family.resolved(options)
    plan = planner.make(options, family, work, question["accelerator"])
    if question["free"] and plan["device"]["peak_bytes"] > question["free"]:
        plan["advice"] = advice.fitting(options, family, work, plan, question["free"] / GB)
    return {**plan, "text": plan_table.table(plan)}
