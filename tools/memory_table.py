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
    from library.memory.planner import Planner, Work

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
        planner = Planner(options, record, work)
        text, cond = planner.text()
        latents, shape, extra = planner.latents()
        plain = planner.training(shape, cond | extra)[0]
        planner = Planner(options.replace(fp8_scaled=True), record, work)
        fp8, _, facts = planner.training(shape, cond | extra)
    peaks = _swapped(planner, fp8, facts)
    ways = [("bf16", plain.peak), ("fp8", fp8.peak), *((f"fp8, swap {n + 1}", peak) for n, peak in enumerate(peaks))]
    shown = f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")
    last = f"{_gb(peaks[-1])} ({len(peaks)})" if peaks else "-"
    fits = [next((way for way, peak in ways if peak <= card * 1e9), "no") for card in CARDS]
    numbers = [_gb(account.peak) for account in (text, latents, plain, fp8)]
    return f"| {name} | {shown} | {' | '.join([*numbers, last, *fits])} |\n"


def _swapped(planner: Any, fp8: Any, facts: dict[str, Any]) -> list[int]:
    """Peaks with 1, 2, ... blocks swapped, up to the largest number."""
    from library.memory.planner import Account

    out = []
    for count in range(1, facts["most_blocks_to_swap"] + 1):
        smaller = Account(fp8.peak, dict(fp8.parts))
        planner.swap(smaller, Account(), facts["blocks"], count)
        out.append(smaller.peak)
    return out


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
