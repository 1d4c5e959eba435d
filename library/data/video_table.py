"""What becomes of every video, as text: its frames, those at the model's rate, its clips, what is unused and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.data.items import Account, Item

HEAD = ("video", "fps x frames", "as trained", "clips", "unused", "bucket", "remarks")


def video_table(accounts: Sequence[Account], trained: Sequence[Item], held_out: Sequence[Item]) -> list[str]:
    """One line a video, in columns."""
    places = {item.row: item.placement for item in (*trained, *held_out) if item.clip is not None}
    held = {item.row for item in held_out}
    used = {item.row for item in trained} | held
    rows = [HEAD]
    for account in accounts:
        cut, video, remarks = account.cut, account.video, list(account.cut.remarks)
        if account.row in held:
            remarks.append("held out")
        elif cut.windows and account.row not in used:
            remarks.append("dropped")
        lengths = Counter(frames for _, frames in cut.windows)
        size = places[account.row].bucket if account.row in places else None
        rows.append((
            Path(video.file).name, f"{_rate(video.fps)} x {video.frames}", f"{_rate(cut.fps)} x {len(cut.order)}",
            " + ".join(f"{count} of {frames}" for frames, count in sorted(lengths.items())) or "none",
            str(cut.unused), f"{size[0]}x{size[1]}" if size else "-", "; ".join(remarks),
        ))  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _rate(fps: object) -> str:
    return "?" if fps is None else f"{float(fps):.2f}".rstrip("0").rstrip(".")
