"""A thread that looks at a run from outside: a heartbeat file, the stacks of a hanging step, memory that runs out."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEAT = 10.0  # seconds between two heartbeats
SLOW, LEAST = 10, 60.0  # a step is called hanging after this many medians, and never before these seconds
ELSEWHERE = 1800.0  # seconds after which saving, sampling or validation is called hanging
FULL = 0.9  # part of the memory that is a warning
TRAINING = "training"


class Watch:
    """`step(n)` after each step, `doing(name)` for anything between steps, `close()` at the end."""

    def __init__(
        self, path: Path | None, say: Callable[[str], None], *, beat: float = BEAT, least: float = LEAST
    ) -> None:
        self.path, self.say, self.beat, self.least = path, say, beat, least
        self.number, self.now, self.since = 0, TRAINING, time.monotonic()
        self.seconds: deque[float] = deque(maxlen=50)
        self.told_hang = self.told_memory = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def step(self, number: int) -> None:
        """A step has been taken."""
        now = time.monotonic()
        self.seconds.append(now - self.since)
        self.number, self.since, self.told_hang = number, now, False

    @contextlib.contextmanager
    def doing(self, name: str) -> Any:
        self.now, self.since = name, time.monotonic()
        try:
            yield
        finally:
            self.now, self.since, self.told_hang = TRAINING, time.monotonic(), False

    def close(self, *, done: bool = False) -> None:
        """End the thread. The heartbeat of a run that is not `done` stays: its age says when the run died."""
        self._end.set()
        self._thread.join(timeout=5)
        if done and self.path is not None:
            self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # it may not harm what it watches
                self._look(time.monotonic())
            if self._end.wait(min(1.0, self.beat)):
                return

    def _look(self, now: float) -> None:
        if now - getattr(self, "_beaten", -self.beat) >= self.beat:
            self._beaten = now
            self._write()
            used = memory_used()
            if used is not None and used > FULL and not self.told_memory:
                self.told_memory = True
                self.say(
                    f"warning: {100 * used:.0f} % of this machine's memory is in use; the system may kill the run; "
                    "use fewer --max_data_loader_n_workers, or keep caches on disk (--cache_latents_to_disk)"
                )
        if now - self.since > self.limit() and not self.told_hang:
            self.told_hang = True
            self._tell_hang(now - self.since)

    def limit(self) -> float:
        """Seconds after which the present step is called hanging."""
        if self.now != TRAINING:
            return max(self.least, ELSEWHERE)
        return max(self.least, SLOW * statistics.median(self.seconds)) if self.seconds else ELSEWHERE

    def _tell_hang(self, seconds: float) -> None:
        rank = os.environ.get("RANK", "0")
        where = f"at step {self.number + 1} ({self.now}) for {seconds:.0f} s"
        sys.stderr.write(f"warning: process {rank} has been {where}; what it is doing:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)

    def _write(self) -> None:
        if self.path is None:
            return
        content = {"time": time.time(), "step": self.number, "doing": self.now, "pid": os.getpid()}
        partial = self.path.with_name(f".{uuid.uuid4().hex[:8]}.{self.path.name}")
        try:
            partial.write_text(json.dumps(content), encoding="utf-8")
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def memory_used() -> float | None:
    """Part of the memory in use that the system cannot take back, of the container if that is limited."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        most = int((group / "memory.max").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(facts["inactive_file"]) + int(facts["active_file"])
        return (int((group / "memory.current").read_text()) - cached) / most
    with contextlib.suppress(ImportError):
        import psutil

        return psutil.virtual_memory().percent / 100
    return None
