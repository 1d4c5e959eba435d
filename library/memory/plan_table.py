"""What a plan is made for, and how it is shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from library.memory.planner import Work


def largest(dataset: Any) -> Work:
    """The batch of a dataset that needs most memory: pixels of an item times items."""
    batches = {}
    for (number, bucket, controls), entries in dataset.groups.items():
        size = min(dataset.specs[number].batch_size, len(entries))
        frames = bucket[2] if len(bucket) > 2 else 1
        sides = tuple(tuple(control[:2]) for control in controls)
        pixels = bucket[0] * bucket[1] * frames + sum(w * h for w, h in sides)
        batches[size * pixels] = Work(bucket[0], bucket[1], size, frames, controls=sides)
    items = len(dataset.items) + len(dataset.validation)
    longest = max((item.caption for item in dataset.items), key=len, default="")
    return replace(batches[max(batches)], items=items, captions=items, caption=longest)


def table(plan: dict[str, Any]) -> str:
    """The plan for people, in GB (10^9 bytes)."""
    batch, device, host = plan["largest_batch"], plan["device"], plan["host"]
    size = f"{batch['width']}x{batch['height']}" + (f"x{batch['frames']}" if batch["frames"] > 1 else "")
    lines = [
        f"memory with the largest batch, {batch['batch']} x {size}: at most {_gb(device['peak_bytes'])} GB on the "
        f"device ({device['peak_phase']}), {_gb(host['peak_bytes'])} GB on the host"
    ]
    lines += [f"  {name:9}{_gb(phase['peak_bytes']):>8}  {_parts(phase)}" for name, phase in device["phases"].items()]
    lines.append(f"  {'host':9}{_gb(host['peak_bytes']):>8}  {_parts(host)}".rstrip())
    if plan["disk"]["cache_bytes"]:
        lines.append(f"  caches on disk {_gb(plan['disk']['cache_bytes'])}")
    return "\n".join([*lines, *_advice(plan.get("advice")), *(f"note: {note}" for note in plan["notes"])])


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _parts(values: dict[str, int]) -> str:
    names = {key: key.removesuffix("_bytes").replace("_", " ") for key in values if key != "peak_bytes"}
    return ", ".join(f"{name} {_gb(values[key])}" for key, name in names.items())


def _advice(advice: dict[str, Any] | None) -> list[str]:
    if not advice:
        return []
    from library.memory.advice import words

    settings = words(advice["settings"])
    verdict = "it fits with" if advice["fits"] else "it does not fit; closest is"
    peak = _gb(advice["training_peak_bytes"])
    lines = [f"in {advice['vram_bytes'] / 1e9:g} GB {verdict} {settings or 'these settings'}: training takes {peak} GB"]
    lines += [f"  cost: {cost}" for cost in advice["costs"]]
    for one in advice["smaller"]:
        unit = " frames" if one["kind"] == "frames" else ""
        settings = words(one["settings"]) or "these settings"
        lines.append(f"  last resort: {one['now']}{unit} instead of {one['was']}, with {settings}: "
                     f"training takes {_gb(one['training_peak_bytes'])} GB")  # fmt: skip
        lines += [f"    cost: {cost}" for cost in one["costs"]]
    return lines
