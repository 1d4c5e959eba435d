"""The cheapest settings with which a run fits into a given memory, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.memory.planner import Account, Planner

if TYPE_CHECKING:
    from library.families.family import Family
    from library.memory.planner import Work

GB = 1e9
# Training settings from cheap to dear: option -> (value, what it costs). Each step keeps those before it.
CHECKPOINTING = ("gradient_checkpointing", True, "blocks are computed twice: about a third more time a step")
FP8 = ("fp8_scaled", True, "the frozen weights err by about 6 % of the output (docs/memory.md)")
FUSED = ("fused_backward_pass", True, "no accumulation and no clipping by the global norm")
TEXT = {"vl": "fp8_vl", "t5": "fp8_t5", "llm": "fp8_llm"}


def words(settings: Mapping[str, Any]) -> str:
    """Settings as a command line has them."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in settings.items())


def fitting(options: Any, family: Family, work: Work, plan: dict[str, Any], vram: float) -> dict[str, Any]:
    """{"fits", "settings": {option: value}, "costs": [...], "peak_bytes"} for a device of `vram` GB (10^9 bytes)."""
    limit = int(vram * GB)
    found = _training(options, family, work, limit)
    settings, costs, peak = found["settings"], found["costs"], found["peak_bytes"]
    phases = plan["device"]["phases"]
    if phases["text"]["peak_bytes"] > limit:
        settings["text_encoder_cpu"] = True
        costs.append("captions are encoded on the CPU, once: seconds to minutes each; cache them on disk")
    if phases["latents"]["peak_bytes"] > limit:
        settings |= latents(options, family, work, limit)
        costs.append("caching latents takes longer")
    return {
        "vram_bytes": limit,
        "fits": peak <= limit,
        "settings": settings,
        "costs": costs,
        "training_peak_bytes": peak,
    }


def smaller(options: Any, family: Family, work: Work, room: int) -> dict[str, Any]:
    """{"settings", "costs", "peak_bytes", "fits"} for a training that has run out of `room` bytes.

    The settings are never those that it has: where the plan says that these fit, what it cannot see (fragments,
    libraries) has taken the rest, and what needs a tenth less is looked for.
    """
    found = _training(options, family, work, room)
    if not found["settings"]:
        found = _training(options, family, work, int(0.9 * min(room, found["peak_bytes"])))
    return found | {"fits": found["peak_bytes"] <= room}


def _training(options: Any, family: Family, work: Work, limit: int) -> dict[str, Any]:
    """Try the steps in their order; in the last one as few blocks are swapped as fit."""
    steps = [CHECKPOINTING, FP8 if options.network_module else FUSED]
    taken: dict[str, Any] = {}
    costs: list[str] = []
    for step in (None, *steps):
        if step is not None:
            name, value, cost = step
            if getattr(options, name, None):
                continue
            try:
                changed = options.replace(**{name: value})
            except Exception:  # an option that this program does not have is no advice
                continue
            options, taken, costs = changed, taken | {name: value}, [*costs, cost]
        planner = Planner(options.replace(blocks_to_swap=None), family, work)
        _, cond = planner.text()
        _, shape, extra = planner.latents()
        device, _, facts = planner.training(shape, cond | extra)
        if device.peak <= limit:
            return {"settings": taken, "costs": costs, "peak_bytes": device.peak}
    if not facts["most_blocks_to_swap"]:
        return {"settings": taken, "costs": costs, "peak_bytes": device.peak}
    for count in range(1, facts["most_blocks_to_swap"] + 1):
        smaller, host = Account(device.peak, dict(device.parts)), Account()
        planner.swap(smaller, host, facts["blocks"], count)
        if smaller.peak <= limit:
            break
    gigabytes = host.parts.get("weights", 0) / GB
    costs = [*costs, f"{gigabytes:.1f} GB of weights cross the bus in every pass, forward and backward"]
    return {"settings": taken | {"blocks_to_swap": count}, "costs": costs, "peak_bytes": smaller.peak}


def latents(options: Any, family: Family, work: Work, limit: int) -> dict[str, Any]:
    """Settings for encoding latents within `limit` bytes: one picture at a time, in strips where the family can."""
    single = Planner(options.replace(vae_batch_size=1), family, work).latents()[0]
    settings: dict[str, Any] = {"vae_batch_size": 1}
    if single.peak > limit and any(option.name == "vae_chunk_size" for option in family.options):
        settings["vae_chunk_size"] = 16
    return settings
