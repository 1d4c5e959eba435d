"""Several processes that train one model: waiting with a name and an end, wishes that all grant after the same step.

Nothing here starts anything for one process. A barrier of the collective library says "timeout" after half an hour;
ours counts arrivals in the rendezvous store, so that a process may wait for another's caching or saving as long as that
one lives, and says who is missing and where it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from library.errors import ProcessError
from library.stops import Wishes

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = 10  # minutes, of collectives and of a sign of life; --ddp_timeout
BEAT = 2.0  # seconds between two signs of life
POLL = 0.02  # seconds between two looks at the store
TELL = 60.0  # seconds after which a wait is told


class Processes:
    """`wait(name)` for all processes of a run; in a run of one it returns at once."""

    def __init__(self, rank: int, world: int, minutes: float | None, say: Callable[[str], None] = print) -> None:
        self.rank, self.world, self.limit, self.say = rank, world, 60 * (minutes or TIMEOUT), say
        self.count = 0
        self.store = None
        if world > 1:
            from torch.distributed import distributed_c10d

            self.store = distributed_c10d._get_default_store().clone()  # a connection of its own, for two threads
            self.store.set_timeout(timedelta(seconds=30))
            self._place("start")
            threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def _key(self, *words: object) -> str:
        return "lorasmith/" + "/".join(map(str, words))

    def _place(self, name: str) -> None:
        self.store.set(self._key("place", self.rank), name)

    def _beat(self) -> None:
        try:
            while True:
                self.store.add(self._key("alive", self.rank), 1)
                time.sleep(BEAT)
        except Exception:  # the store is gone, and with it the run
            return

    def wait(self, name: str) -> None:
        """Until every process is here. Raises ProcessError naming those that show no sign of life."""
        if self.world == 1:
            return
        self.count += 1
        try:
            self._place(f"{name} ({self.count})")
            self.store.add(self._key("at", self.count), 1)
            self._until("at", self.world, name)
            self._place("training")
            if self.rank:
                self.store.add(self._key("left", self.count), 1)
            else:  # it may hold the store, and so leaves last
                self._until("left", self.world - 1, name)
        except RuntimeError as error:  # the store's connection
            raise ProcessError(f"the process that keeps the others together has ended ({_first_line(error)})") from None

    def _until(self, what: str, wanted: int, name: str) -> None:
        began = told = time.monotonic()
        seen: dict[int, tuple[int, float]] = {}
        while self.store.add(self._key(what, self.count), 0) < wanted:
            now = time.monotonic()
            self._check_alive(name, seen, now)
            if now - told > TELL:
                told = now
                self.say(f"process {self.rank} waits at '{name}' for {now - began:.0f} s: {self._places()}")
            time.sleep(POLL)

    def _check_alive(self, name: str, seen: dict[int, tuple[int, float]], now: float) -> None:
        for rank in range(self.world):
            beats = self.store.add(self._key("alive", rank), 0)
            if rank not in seen or seen[rank][0] != beats:
                seen[rank] = (beats, now)
            elif now - seen[rank][1] > self.limit:
                raise ProcessError(
                    f"process {rank} has shown no sign of life for {self.limit:.0f} s while process {self.rank} waited "
                    f"at '{name}'; look at its last message (--ddp_timeout {self.limit / 60:g} minutes)"
                )

    def _places(self) -> str:
        return ", ".join(
            f"process {r} is at {self.store.get(self._key('place', r)).decode()}" for r in range(self.world)
        )


class Agreement:
    """The loss of all processes and what any of them was asked for, in one small sum per step.

    One process grants a wish at once. Several read the sum during the next step, so that none waits for a device, and
    grant it after that one, all of them.
    """

    def __init__(self, world: int) -> None:
        self.world, self.granted = world, Wishes()
        self.late: Any = None

    def sum(self, loss: Tensor, wishes: Wishes) -> Tensor:
        """The sum of `loss`, a scalar, over the processes; sets `granted`."""
        if self.world == 1:
            self.granted = wishes
            return loss
        import torch

        from library.health import Late

        numbers = torch.tensor([float(wishes.stop), float(wishes.save), float(wishes.sample)], device=loss.device)
        numbers = torch.cat([loss.detach().float().reshape(1), numbers])
        all_reduce(numbers)
        before = self.late.numbers() if self.late else [0.0] * 3
        self.granted = Wishes(*(one > 0 for one in before))
        self.late = Late(numbers[1:])
        return numbers[0]


def all_reduce(tensor: Tensor) -> None:
    """Sum in place over the processes. Raises ProcessError if one of them is gone or does not come in time."""
    import torch

    try:
        torch.distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise ProcessError(
            f"another process of this run has ended or does not answer ({_first_line(error)}); "
            "look at its last message, then resume"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
