"""Hostile inputs: mutations of good files, and a child process with a limited memory in which a reader takes them."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from library.errors import UserError

SECONDS = 10  # within which a reader has to be done with one input
MEMORY = 2 * 1024**3  # bytes that a reader may take besides what the process has
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**64 - 1)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Up to four of: bits flipped, bytes set, a part cut out, doubled, filled or moved, a number put in, the end lost."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.6 else rng.randrange(min(len(out), 96) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 16, 64, len(out) // 4 + 1))
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + size] = bytes([rng.choice((0, 0x20, 0xFF, 0x5B, 0x7B))]) * size
        elif kind == 5:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
            out[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 6:
            del out[at:]
        else:
            part = out[at : at + size]
            del out[at : at + size]
            to = rng.randrange(len(out) + 1)
            out[to:to] = part
    return bytes(out)


def survives(reader: Callable[[random.Random], str], count: int, seed: int = 0, memory: int = MEMORY) -> dict[str, Any]:
    """Call `reader(rng)` `count` times in a child; it makes an input, reads it, and returns what became of it.

    A UserError is an answer; any other exception, a hang, and more memory than is allowed are faults. All different
    ones are raised at once, with the number of their first input (the rng of an input is that of "seed number").
    Returns counts.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _in_child(reader, count, seed, memory, write)
    os.close(write)
    with open(read, "rb") as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the child died with {status}: {told[-3000:].decode()}"
    facts = json.loads(told)
    assert not facts["faults"], "\n".join(facts["faults"].values())
    assert facts["grown"] < memory, facts
    return facts


def _in_child(reader: Callable[[random.Random], str], count: int, seed: int, memory: int, write: int) -> None:
    facts: dict[str, Any] = {"inputs": 0, "faults": {}, "longest": 0.0, "grown": 0}
    answers: Counter[str] = Counter()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders complain
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (pages + memory,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _too_long)
    for number in range(count):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            answers[_answer(reader, random.Random(f"{seed} {number}"))] += 1
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"input {number}: {traceback.format_exc()[-2500:]}"
            facts["faults"].setdefault(f"{type(error).__name__} {last.filename} {last.lineno}", text)
        took = SECONDS - signal.setitimer(signal.ITIMER_REAL, 0)[0]
        facts["longest"] = max(facts["longest"], round(took, 3))
        facts["inputs"] += 1
    facts["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    with open(write, "w") as file:
        json.dump({**facts, "answers": answers}, file)
    os._exit(0)


def _answer(reader: Callable[[random.Random], str], rng: random.Random) -> str:
    try:
        return reader(rng)
    except UserError as error:
        assert str(error).isprintable(), f"not one line: {error!r}"
        return type(error).__name__


def _too_long(*_: object) -> None:
    raise TimeoutError(f"the reader took more than {SECONDS} s")
