"""The cheapest settings with which a run fits into a given memory, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from library.memory.planner import Account, Planner

if TYPE_CHECKING:
    from library.families.family import Family
    from library.memory.planner import Work

GB = 1e9
# Training settings from cheap to dear: option -> (value, what it costs). Each step keeps those before it.
CHECKPOINTING = ("gradient_checkpointing", True, "blocks are computed twice: about a third more time a step")
FP8 = ("fp8_scaled", True, "the frozen weights err by about 6 % of the output (docs/memory.md)")
BOTH = "weights and block inputs share one bus, so that each waits for the other"
TEXT_ON_CPU = "captions are encoded on the CPU, once: seconds to minutes each; cache them on disk"
FP8_TEXT = "captions are encoded with weights of 8 bits, which err as those of --fp8_scaled (docs/memory.md)"
FUSED = ("fused_backward_pass", True, "no accumulation and no clipping by the global norm")
BY_HOST = ("blocks_to_swap", "cpu_offload_checkpointing")
COSTS = {
    "frames": "shorter clips: the model learns less of motion, and long clips are cut",
    "resolution": "smaller pictures: fine detail is not learnt, and samples at the full size gain less",
}
TRIES = 3  # plans between the smallest item and the whole one


def words(settings: Mapping[str, Any]) -> str:
    """Settings as a command line has them; what is to be taken away last, as "without --name"."""
    given = [f"--{name}" if v is True else f"--{name} {v}" for name, v in settings.items() if v is not False]
    return " ".join([*given, *(f"without --{name}" for name, v in settings.items() if v is False)])


class Trials:
    """Plans of training with other options and other items. Each is made once, and text and latents once an item."""

    def __init__(self, options: Any, family: Family, work: Work) -> None:
        self.family, self.work = family, work
        self.text = Planner(options, family, work)
        self.captions, self.cond = self.text.text()
        self.items: dict[Work, Any] = {}
        self.made: dict[tuple[str, Work], Any] = {}

    def latents(self, work: Work) -> tuple[Account, Any, Any]:
        """What `Planner.latents` says of other items."""
        if work not in self.items:
            planner = Planner(self.text.options, self.family, work)
            self.items[work] = planner.latents()
            self.text.resident |= planner.resident
        return self.items[work]

    def training(self, options: Any, work: Work) -> tuple[Planner, Account, dict[str, Any]]:
        """(planner, the device's account, facts) of an optimizer step without block swap."""
        options = options.replace(blocks_to_swap=None)
        key = repr(options.as_dict()), work
        if key not in self.made:
            planner = Planner(options, self.family, work)
            _, shape, extra = self.latents(work)
            planner.resident = self.text.resident
            device, _, facts = planner.training(shape, self.cond | extra)
            self.made[key] = planner, device, facts
        return self.made[key]


def fitting(
    options: Any, family: Family, work: Work, plan: dict[str, Any], vram: float, last_resort: bool = False
) -> dict[str, Any]:
    """What fits into a device of `vram` GB (10^9 bytes): "fits", "settings": {option: value}, "costs", and more.

    `last_resort`: where no settings fit, "smaller" says which smaller items would. That takes up to ten more plans.
    """
    limit = int(vram * GB)
    trials = Trials(options, family, work)
    found = cheapest(trials, options, limit)
    settings, costs, peak = found["settings"], found["costs"], found["peak_bytes"]
    phases = plan["device"]["phases"]
    if phases["text"]["peak_bytes"] > limit:
        for_text, cost = text(trials, limit)
        settings |= for_text
        costs.append(cost)
    if phases["latents"]["peak_bytes"] > limit:
        settings |= latents(options, family, work, limit)
        costs.append("caching latents takes longer")
    return {
        "vram_bytes": limit,
        "fits": peak <= limit,
        "smaller": list(smaller_items(trials, found, limit)) if last_resort and peak > limit else [],
        "settings": settings,
        "costs": costs,
        "training_peak_bytes": peak,
    }


def smaller(options: Any, family: Family, work: Work, room: int) -> dict[str, Any]:
    """{"settings", "costs", "peak_bytes", "fits"} for a training that has run out of `room` bytes.

    The settings are never those that it has: where the plan says that these fit, what it cannot see (fragments,
    libraries) has taken the rest, and what needs a tenth less is looked for.
    """
    trials = Trials(options, family, work)
    found = cheapest(trials, options, room)
    if not found["settings"]:
        found = cheapest(trials, options, int(0.9 * min(room, found["peak_bytes"])))
    return found | {"fits": found["peak_bytes"] <= room}


def cheapest(trials: Trials, options: Any, limit: int) -> dict[str, Any]:
    """The first of the steps, in their order and then what the host can hold, with which training fits.

    {"settings", "costs", "peak_bytes", "options"}; where nothing fits, what needs least. "options" are those that
    the steps have made, without what the host holds.
    """
    taken: dict[str, Any] = {}
    costs: list[str] = []
    for step in (None, CHECKPOINTING, FP8 if options.network_module else FUSED):
        if step is not None:
            name, value, cost = step
            if getattr(options, name, None):
                continue
            try:
                changed = options.replace(**{name: value})
            except Exception:  # an option that this program does not have is no advice
                continue
            options, taken, costs = changed, taken | {name: value}, [*costs, cost]
        peak = trials.training(options, trials.work)[1].peak
        if peak <= limit:
            return {"settings": taken, "costs": costs, "peak_bytes": peak, "options": options}
    found = _on_host(trials, options, limit)
    return found | {"settings": taken | found["settings"], "costs": [*costs, *found["costs"]], "options": options}


def _on_host(trials: Trials, options: Any, limit: int) -> dict[str, Any]:
    """As few swapped blocks as fit; else block inputs on the host; else both.

    Block inputs that are on the host already stay there.
    """
    offloads = [options.cpu_offload_checkpointing]
    if options.gradient_checkpointing and not options.cpu_offload_checkpointing:
        offloads.append(True)
    return _first((way for offload in offloads for way in swaps(trials, options, trials.work, offload)), limit)


def _first(ways: Iterator[dict[str, Any]], limit: int) -> dict[str, Any]:
    """The first way that fits; where none does, the one that needs least."""
    least: dict[str, Any] = {}
    for way in ways:
        if way["peak_bytes"] <= limit:
            return way
        if not least or way["peak_bytes"] < least["peak_bytes"]:
            least = way
    return least


def swaps(trials: Trials, options: Any, work: Work, offload: bool) -> Iterator[dict[str, Any]]:
    """No block swapped, then 1, 2, ... up to the largest number; `offload`: with block inputs on the host."""
    planner, device, facts = trials.training(options.replace(cpu_offload_checkpointing=offload), work)
    before, costs = {}, []
    if facts["offloaded_bytes"] and not options.cpu_offload_checkpointing:
        before["cpu_offload_checkpointing"] = True
        costs.append(f"{facts['offloaded_bytes'] / GB:.1f} GB of block inputs cross the bus twice a step and wait on "
                     "the host")  # fmt: skip
    back = {"blocks_to_swap": 0} if offload and options.blocks_to_swap else {}
    yield {"settings": before | back, "costs": costs, "peak_bytes": device.peak}
    both = (
        ["weights and block inputs share one bus, so that each waits for the other"] if facts["offloaded_bytes"] else []
    )
    for count in range(1, facts["most_blocks_to_swap"] + 1):
        left, host = Account(device.peak, dict(device.parts)), Account()
        planner.swap(left, host, facts["blocks"], count)
        gigabytes = host.parts.get("weights", 0) / GB
        cost = f"{gigabytes:.1f} GB of weights cross the bus in every pass, forward and backward"
        yield {"settings": {"blocks_to_swap": count} | before, "costs": [cost, *costs, *both], "peak_bytes": left.peak}


# ---------------------------------------------------------------- before training


def text(trials: Trials, limit: int) -> tuple[dict[str, Any], str]:
    """(settings, their cost) for encoding captions within `limit` bytes.

    Encoders in 8 bits, the largest first and as few as fit; where that does not do, on the CPU.
    """
    options, family, settings = trials.text.options, trials.family, {}
    sizes: dict[str, int] = {}
    for part in family.text_encoders:
        kind = part.precision_options
        if kind and not (getattr(options, f"fp8_{kind}") or getattr(options, f"nf4_{kind}")):
            sizes[f"fp8_{kind}"] = sizes.get(f"fp8_{kind}", 0) + trials.text.sketch(part)[0].stored_bytes
    for name in sorted(sizes, key=sizes.get, reverse=True):
        settings[name] = True
        if Planner(options.replace(**settings), family, trials.work).text()[0].peak <= limit:
            return settings, FP8_TEXT
    return {
        "text_encoder_cpu": True
    }, "captions are encoded on the CPU, once: seconds to minutes each; cache them on disk"


def latents(options: Any, family: Family, work: Work, limit: int) -> dict[str, Any]:
    """Settings for encoding latents within `limit` bytes: one picture at a time, in strips where the family can."""
    single = Planner(options.replace(vae_batch_size=1), family, work).latents()[0]
    settings: dict[str, Any] = {"vae_batch_size": 1}
    if single.peak > limit and any(option.name == "vae_chunk_size" for option in family.options):
        settings["vae_chunk_size"] = 16
    return settings


# ---------------------------------------------------------------- the last resort: smaller items


def smaller_items(trials: Trials, found: dict[str, Any], limit: int) -> Iterator[dict[str, Any]]:
    """Fewer frames, then a smaller resolution: of each the largest that was found to fit, with what it takes."""
    for kind, works in {"frames": fewer_frames(trials), "resolution": smaller_resolutions(trials)}.items():
        fits = _largest(trials, found["options"], works, found["peak_bytes"], limit)
        if fits is None:
            continue
        work, way = fits
        kept = {name: value for name, value in found["settings"].items() if name not in BY_HOST}
        was, now = (_size(trials.work), _size(work)) if kind == "resolution" else (trials.work.frames, work.frames)
        yield {
            "kind": kind, "was": was, "now": now, "settings": kept | way["settings"],
            "costs": [COSTS[kind], *way["costs"]], "training_peak_bytes": way["peak_bytes"],
        }  # fmt: skip


def _largest(trials: Trials, options: Any, works: list[Work], peak: int, limit: int) -> tuple[Work, Any] | None:
    """The work that fits, and how. A plan takes seconds, so that only a few are made: the least first, then by line."""
    if not works:
        return None
    low = works[-1]
    best, low_peak = _with_both(trials, options, low, limit)
    if low_peak > limit:
        return None
    high, high_peak = trials.work, peak
    for _ in range(TRIES):
        slope = (high_peak - low_peak) / (_pixels(high) - _pixels(low))
        most = _pixels(low) + (limit - low_peak) / slope if slope > 0 else _pixels(high)
        guess = next((one for one in works if _pixels(low) < _pixels(one) < min(most, _pixels(high))), None)
        if guess is None:
            break
        way, least = _with_both(trials, options, guess, limit)
        if least <= limit:
            return guess, way
        high, high_peak = guess, least
    return low, best


def _with_both(trials: Trials, options: Any, work: Work, limit: int) -> tuple[dict[str, Any], int]:
    """(the fewest swapped blocks that fit beside block inputs on the host, the peak with as many as help most)."""
    ways = list(swaps(trials, options, work, options.gradient_checkpointing))
    return _first(iter(ways), limit), min(way["peak_bytes"] for way in ways)


def fewer_frames(trials: Trials) -> list[Work]:
    """From the most to the fewest frames that the family takes, below those that are asked for."""
    rule, out = trials.family.frames, []
    frames = rule.fit(trials.work.frames - 1) if rule else 0
    while frames >= max(1, rule.least if rule else 1):
        out.append(replace(trials.work, frames=frames))
        frames = rule.fit(frames - 1)
    return out


def smaller_resolutions(trials: Trials) -> list[Work]:
    """15/16 to 4/16 of both sides, pictures that are controls with them, in steps of what the family takes."""
    step, work = trials.family.pixel_multiple, trials.work

    def scaled(sides: tuple[int, int], part: int) -> tuple[int, int]:
        width, height = (max(step, side * part // 16 // step * step) for side in sides)
        return width, height

    sizes = {scaled((work.width, work.height), part): part for part in range(15, 3, -1)}
    sizes.pop((work.width, work.height), None)
    return [
        replace(work, width=size[0], height=size[1], controls=tuple(scaled(one, part) for one in work.controls))
        for size, part in sizes.items()
    ]


def _pixels(work: Work) -> int:
    return work.width * work.height * work.frames


def _size(work: Work) -> str:
    return f"{work.width}x{work.height}"
