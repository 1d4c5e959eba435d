"""Stopping, saving and sampling on demand: signals, and the files STOP, SAVE and SAMPLE in the output folder.

The first Ctrl-C or SIGTERM is a wish that the loop grants after its step; before the loop it ends the program at once.
The second ends the process whatever it is doing. SIGUSR1 is SAVE.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.errors import Interrupted

STOP, SAVE, SAMPLE = "STOP", "SAVE", "SAMPLE"
SAME = 1.0  # seconds: a launcher passes on what the terminal sent to us as well; that is one Ctrl-C
LOOK = 0.2  # seconds between two looks at the folder
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))
SAVING = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


@dataclass
class Wishes:
    stop: bool = False
    save: bool = False
    sample: bool = False

    def __bool__(self) -> bool:
        return self.stop or self.save or self.sample


class Stops:
    """`with Stops(folder) as stops:` around a run. `wishes()` says what was asked for since the last call."""

    def __init__(
        self,
        folder: Path,
        *,
        looks: bool = True,
        say: Callable[[str], None] = print,
        minutes: float | None = None,  # between two saves
    ) -> None:
        self.folder, self.looks, self.say, self.minutes = folder, looks, say, minutes
        self._saved = time.monotonic()
        self.in_loop = False  # whether somebody asks for wishes
        self.asked = Wishes()
        self._first = 0.0  # time of the first ending signal
        self._looked = 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> Stops:
        self._remove_leftovers()
        if threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._old:
            return
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
        self._write.close()  # ends the listener

    def _install(self) -> None:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        for number in (*ENDING, *SAVING):
            self._old[number] = signal.signal(number, self._in_main_thread)
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def _in_main_thread(self, number: int, frame: object) -> None:
        """Between two bytecodes of the main thread: outside of the loop there is nothing to finish."""
        if number in ENDING and not self.in_loop:
            raise Interrupted(f"stopped before the first step; {again()}")

    def _listen(self) -> None:
        """In a thread, so that the second signal works while the main thread waits in a library."""
        while data := self._read.recv(1):
            number = data[0]
            if number in SAVING:
                self.asked.save = True
            elif number in ENDING and not self._first:
                self._first = time.monotonic()
                self.asked.stop = True
                if self.in_loop:
                    self.say(
                        "stopping after this step, state and weights are saved first; a second signal ends at once"
                    )
            elif number in ENDING and time.monotonic() - self._first > SAME:
                os.write(2, b"error: ended at once by a second signal; files that were saved before are whole\n")
                os._exit(Interrupted.exit_code)
        self._read.close()

    def _remove_leftovers(self) -> None:
        """A wish of before this run was meant for another one."""
        for name in (STOP, SAVE, SAMPLE) if self.looks else ():
            if (self.folder / name).is_file():
                (self.folder / name).unlink(missing_ok=True)
                self.say(f"removed the file {name} that was left in {self.folder} from before")

    def wishes(self) -> Wishes:
        """What was asked for since the last call; a file is removed when it is seen. A stop stays asked for."""
        now = time.monotonic()
        if self.looks and now - self._looked >= LOOK:
            self._looked = now
            for name in (STOP, SAVE, SAMPLE):
                if (self.folder / name).is_file():
                    (self.folder / name).unlink(missing_ok=True)
                    setattr(self.asked, name.lower(), True)
        if self.looks and self.minutes and now - self._saved >= 60 * self.minutes:
            self.asked.save = True
        if self.asked.save:
            self._saved = now
        found = Wishes(self.asked.stop, self.asked.save, self.asked.sample)
        self.asked.save = self.asked.sample = False
        return found

    def sleep(self, seconds: float) -> bool:
        """Wait; returns whether a stop was asked for meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.asked.stop or (self.looks and (self.folder / STOP).is_file()):
                return True
            time.sleep(min(0.1, seconds))
        return False


def again() -> str:
    return f"start again with:\n  {shlex.join(command_line())}"


def command_line() -> list[str]:
    """The words that started this run, its launcher included."""
    words = list(sys.orig_argv)
    if not ({"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()):
        return words
    try:
        import psutil

        parent = psutil.Process(os.getppid()).cmdline()
    except Exception:  # no such library, no such right: the plain words start it too
        return words
    return parent if parent and sys.argv[0] in parent else words


def resume_command(state: Path) -> str:
    """The command that started this run, going on from `state`."""
    words, kept, skip = command_line(), [], False
    for word in words:
        if word == "--resume":
            skip = True
        elif word.startswith("--resume="):
            continue
        elif skip and not word.startswith("--"):
            skip = False
        else:
            skip = False
            kept.append(word)
    return shlex.join([*kept, "--resume", str(state)])
