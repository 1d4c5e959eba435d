"""What a run says of its caches while they are made: what is valid, what is not and why, their size, the time left."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from library.data import cache_report as report
from library.data.cache import file_name

if TYPE_CHECKING:
    from library.data.cache import Store

MOST = 20_000  # entries whose headers are read for the reasons; more would delay the start by more than seconds
FIRST, EVERY = 5.0, 60.0  # seconds of work after which a forecast is told, and told again


def told(kind: str, store: Store, wanted: Mapping[str, str], lacking: Collection[str]) -> str:
    """What is to be made and why, and what is not read; "" if there is nothing but what the run needs.

    `wanted`: identity of every entry of the run -> its file, "" for a prompt; `lacking`: those that were not found.
    """
    there = store.listed()
    others = len(there.keys() - {file_name(identity) for identity in wanted})
    by_reason: dict[str, list[str]] = defaultdict(list)
    if there and len(there) <= MOST:
        explain = _reasons(kind, store, there.values()) if lacking else None
        for identity in lacking:
            reason = "damaged" if identity in store.damaged else explain(report.Need(kind, identity, wanted[identity]))
            by_reason[reason].append(wanted[identity])
    parts = [f"{len(files)} to make: {reason} ({report.named(files)})" for reason, files in by_reason.items()]
    return "; ".join(["", *parts, *([f"{others} that this run does not read"] if others else [])])


def _reasons(kind: str, store: Store, there: Iterable[str]) -> Callable[[report.Need], str]:
    with ThreadPoolExecutor() as pool:
        entries = pool.map(lambda path: report.look(Path(path), kind), there)
    return report.reasons(kind, [one for one in entries if not one.problem], report.Files(store.folder.parent))


class Progress:
    """Forecast of one cache: `add` after each part; says size and time once they are known, then every minute.

    `amount` is in whatever unit work and bytes are proportional to: pixels of latents, captions. The first part sets
    the clock only, since models load in it.
    """

    def __init__(
        self, what: str, count: int, amount: float, folder: Path | None, say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.what, self.count, self.amount, self.folder, self.say, self.clock = what, count, amount, folder, say, clock
        self.done, self.made, self.bytes = 0, 0.0, 0
        self.start: tuple[float, int, float] | None = None  # (time, done, made) after the first part
        self.next, self.warned = FIRST, False

    def add(self, count: int, amount: float, size: int) -> None:
        """`size`: bytes of what was made."""
        self.done, self.made, self.bytes = self.done + count, self.made + amount, self.bytes + size
        self._check_room()
        if self.start is None:
            self.start = self.clock(), self.done, self.made
        began, done, made = self.start
        seconds = self.clock() - began
        if seconds >= self.next and self.made > made:
            self.next = seconds + EVERY
            left = seconds * (self.amount - self.made) / (self.made - made)
            rate = (self.done - done) / seconds
            self.say(f"{self.what}: {self.done} of {self.count} made, {rate:.1f} a second, {spoken(left)} left; "
                     f"{self.total / 1e9:.2f} GB in all{self._free()}")  # fmt: skip

    @property
    def total(self) -> float:
        """Bytes of the whole, if the rest is like what was made."""
        return self.bytes / self.made * self.amount

    def _free(self) -> str:
        return f", {shutil.disk_usage(self.folder).free / 1e9:.2f} GB are free" if self.folder else ""

    def _check_room(self) -> None:
        if self.folder is None or self.warned:
            return
        needed, free = self.total - self.bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            self.warned = True
            self.say(f"warning: {self.what}: about {needed / 1e9:.2f} GB more will be written, {free / 1e9:.2f} GB are "
                     "free; make room, or stop and give another --cache_dir: what is cached stays")  # fmt: skip


def spoken(seconds: float) -> str:
    """`40 s`, `12 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
