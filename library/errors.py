"""What can go wrong for a user: one sentence (what, which value, what to do) and an exit code of its own.

Exit codes: 2 configuration, 3 dataset, 4 out of memory, 5 non-finite loss, 6 disk, 7 another process, 130 interrupted.
A `UserError` ends a program without a traceback; any other exception is ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable


class UserError(Exception):
    exit_code = 2

    def __str__(self) -> str:
        """One line, whatever is quoted in it: a file's name may hold line ends and codes that a terminal obeys."""
        return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in super().__str__())


class ConfigError(UserError):
    """An option, a configuration file or a model file is not what it has to be."""


class DatasetError(UserError):
    exit_code = 3


class OutOfMemoryError(UserError):
    exit_code = 4


class NonFiniteError(UserError):
    exit_code = 5


class DiskError(UserError):
    exit_code = 6


class ProcessError(UserError):
    """Another process of this run has ended or does not answer."""

    exit_code = 7


class Interrupted(UserError):
    """The run was asked to stop; it is no fault."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` with the nearest of `known`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _is_output_closed() -> bool:
    """Whether nobody reads the standard output any more, as behind `| head`. If so, the rest goes nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails, too
    return True


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`: whatever ends it, the last line is one sentence, with an exit code of its own.

    A fault of the program (exit code 1) keeps its traceback above that line. `error.bundle`, where a run recorded
    one (library.crash), is the folder with what a report needs.
    """
    try:
        main()
        sys.stdout.flush()
    except Interrupted as stop:
        _last_line(str(stop), stop)
        sys.exit(stop.exit_code)
    except UserError as error:
        _last_line(f"error: {error}", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        _last_line("interrupted; files that were saved before are whole, start again with the same command", error)
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, since torch may not be imported here
            text = str(error).split(". ")[0]
            _last_line(
                f"error: out of memory ({text}); try --gradient_checkpointing, or a smaller batch or size", error
            )
            sys.exit(OutOfMemoryError.exit_code)
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            sys.exit(141)  # as a shell says of a program that SIGPIPE ended
        traceback.print_exc()
        what = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no text'}"
        )
        _last_line(f"error: a fault of the program, not of its options ({what}); please report it", error)
        sys.exit(1)


def _last_line(text: str, error: BaseException) -> None:
    bundle = getattr(error, "bundle", None)
    more = f"; what a report needs is in {bundle}" if bundle else ""
    print(text + more, file=sys.stderr, flush=True)
