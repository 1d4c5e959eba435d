"""The table of docs/memory.md: what a LoRA of every model needs. python tools/memory_table.py [models ...]

Without names all rows are made anew (some half an hour on two cores); with names only theirs, and the others stay.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: its inspect.py hides the standard one

from library import options as option_machinery
from library.errors import ConfigError, run
from library.families import FAMILIES
from library.memory.released import completed, index

PAGE = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- table: python tools/memory_table.py -->\n", "<!-- end of the table -->\n"
HEAD = (
    "| model | largest batch | text | latents | bf16 | fp8 | fp8, all swapped | 24 GB | 12 GB | 8 GB |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)
CARDS = (24, 12, 8)  # GB
SETTINGS = (
    "--mixed_precision bf16 --network_module networks.lora --network_dim 16 --gradient_checkpointing --cache_latents "
    "--cache_text_encoder_outputs --optimizer_type AdamW8bit --output_dir ."
)
SMALLER = {"hunyuan_image, 1024": ("hunyuan_image", (1024, 1024))}  # a second size of a model


def names() -> list[str]:
    """Of all rows: every family, beside it its other released models and sizes."""
    variants = index()["variants"]
    out = []
    for family in sorted(FAMILIES):
        out += [family, *(name for name, row in variants.items() if row["family"] == family)]
        out += [name for name, (one, _) in SMALLER.items() if one == family]
    return out


def row(name: str) -> str:
    """One line. Peaks in GB (10^9 bytes): of encoding captions, of encoding pictures, of training in three ways."""
    from library.memory import advice
    from library.memory.planner import Work

    family, size = SMALLER.get(name, (index()["variants"].get(name, {}).get("family", name), None))
    variant = name if name in index()["variants"] else None
    with completed(option_machinery.parse(family, SETTINGS.split(), "memory_table.py"), variant) as (
        options,
        record,
        _,
    ):
        width, height = size or (record.resolution, record.resolution)
        frames = record.sampling.get("frame_count", 1) if record.frames else 1
        work = Work(width, height, 1, frames, controls=((width, height),) * record.least_controls)
        trials = advice.Trials(options, record, work)
        latents, plain = trials.latents(work)[0], trials.training(options, work)[1]
        ways = list(advice.swaps(trials, options.replace(fp8_scaled=True), work, offload=False))
        cards = [_cheapest(trials, options, int(card * 1e9)) for card in CARDS]
    peaks = [trials.captions.peak, latents.peak, plain.peak, ways[0]["peak_bytes"]]
    swapped = f"{_gb(ways[-1]['peak_bytes'])} ({len(ways) - 1})" if ways[1:] else "-"
    shown = f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")
    return f"| {name} | {shown} | {' | '.join([*map(_gb, peaks), swapped, *cards])} |\n"


def _cheapest(trials: Any, options: Any, limit: int) -> str:
    """The advice in a few words; where nothing fits, the smaller item that does."""
    from library.memory import advice

    found = advice.cheapest(trials, options, limit)
    if found["peak_bytes"] > limit:
        items = advice.smaller_items(trials, found, limit)
        smaller = next(items, None)
        if smaller and smaller["now"] == 1:  # a picture teaches no motion: rather a smaller clip
            smaller = next(items, smaller)
        if smaller is None:
            return "no"
        unit = "" if smaller["kind"] == "resolution" else " frame" if smaller["now"] == 1 else " frames"
        return f"{smaller['now']}{unit}"
    settings = found["settings"]
    count = settings.get("blocks_to_swap")
    host = [f"swap {count}"] * bool(count) + ["offload"] * bool(settings.get("cpu_offload_checkpointing"))
    return ", ".join(["fp8" if settings.get("fp8_scaled") else "bf16", *([" + ".join(host)] if host else [])])


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"


def rows_of(page: str) -> dict[str, str]:
    """Name -> line of the table in a page."""
    lines = page.partition(BEGIN)[2].partition(END)[0].removeprefix(HEAD).splitlines(keepends=True)
    return {line.split("|")[1].strip(): line for line in lines}


def main() -> None:
    asked = sys.argv[1:]
    if asked[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if unknown := [name for name in asked if name not in names()]:
        raise ConfigError(f"{unknown[0]} is no row of the table (rows: {'; '.join(names())})")
    for name in asked or names():
        line = row(name)
        print(line, end="", flush=True)
        page = PAGE.read_text(encoding="utf-8")
        rows = rows_of(page) | {name: line}
        before, _, rest = page.partition(BEGIN)
        table = "".join(rows[one] for one in names() if one in rows)
        PAGE.write_text(before + BEGIN + HEAD + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    run(main)
