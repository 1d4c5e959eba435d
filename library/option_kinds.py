"""What one option is, and how a value of it is read from the command line or from TOML. No torch in here."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import ConfigError, nearest

LONGEST_NAME = 255  # bytes, on every file system that is in use

KINDS = {  # kind -> what a value looks like, for --help and messages
    "str": "text",
    "int": "whole number",
    "float": "number",
    "flag": "true or false",
    "path": "path",
    "output": "path",  # a path that is written to: always relative to the current directory
    "strs": "texts",
    "paths": "paths",
    "ints": "whole numbers",
    "floats": "numbers",
    "args": "name=value pairs",
    "size": "side or width,height",
    "range": "min,max",
    "int_or_ratio": "steps, a ratio below 1 or a percentage",
}
LISTS = {"strs": "str", "paths": "path", "ints": "int", "floats": "float"}  # kind -> kind of one element


@dataclass(frozen=True)
class Option:
    """One option of the command line and of the configuration file.

    `low` and `high` are inclusive bounds of a number (of each number of a list). `default` None means "not set".
    """

    name: str
    kind: str
    default: Any
    help: str
    group: str = "Other"
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def many(self) -> bool:
        """Several words follow on the command line."""
        return self.kind in LISTS or self.kind == "args"

    def read(self, value: Any, origin: str) -> Any:
        """`value` as it came (words of the command line or TOML) -> typed value. Raises ConfigError."""
        if value == "none" and self.default is None and self.kind not in ("str", "strs"):
            return None
        try:
            typed = _READERS[self.kind](value)
        except (TypeError, ValueError) as error:
            reason = str(error) or f"expected {KINDS[self.kind]}"
            raise ConfigError(f"--{self.name} {_shown(value)} ({origin}): {reason}") from None
        self._check(typed, origin)
        return typed

    def _check(self, value: Any, origin: str) -> None:
        for one in value if isinstance(value, list | tuple) else (value,):
            if self.choices and one not in self.choices:
                hint = nearest(str(one), self.choices)
                raise ConfigError(f"--{self.name} '{one}' ({origin}) is none of {', '.join(self.choices)}{hint}")
            if isinstance(one, str | bool):
                continue
            if (self.low is not None and one < self.low) or (self.high is not None and one > self.high):
                bounds = f"at least {self.low:g}" if self.high is None else f"in {self.low or 0:g}..{self.high:g}"
                raise ConfigError(f"--{self.name} {one} ({origin}) has to be {bounds}")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    return value


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise TypeError("expected true or false")


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError("expected a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("expected a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("expected a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("expected a finite number")
    return number


def is_path(text: str) -> bool:
    """Whether a file could have this name; what could not is an error of the system wherever it is used."""
    try:
        return "\0" not in text and all(len(os.fsencode(part)) <= LONGEST_NAME for part in Path(text).parts)
    except UnicodeEncodeError:
        return False


def _path(value: Any) -> str:
    if not _text(value).strip():
        raise ValueError("the path is empty; remove the option or give a path")
    if not is_path(value):
        raise ValueError("no file can have this name")
    return str(Path(value).expanduser()) if value.startswith("~") else value


def _list(kind: str):
    def read(value: Any) -> list:
        return [_READERS[kind](one) for one in (value if isinstance(value, list | tuple) else [value])]

    return read


def _arguments(value: Any) -> list[str]:
    """`["k=v", ...]` from words, a TOML list of such or a TOML table."""
    if isinstance(value, Mapping):
        return [f"{key}={_argument(one)}" for key, one in value.items()]
    pairs = _list("str")(value)
    for pair in pairs:
        if not pair.partition("=")[0].strip() or "=" not in pair:
            raise ValueError(f"'{pair}' is not of the form name=value")
    return pairs


def _argument(value: Any) -> str:
    if isinstance(value, Mapping):
        raise TypeError("a table inside the table; give name = value")
    return value if isinstance(value, str) else repr(value)


def _numbers(value: Any, counts: tuple[int, ...], one: str, wanted: str) -> list:
    words = value.replace("x", ",").split(",") if isinstance(value, str) else value
    words = words if isinstance(words, list | tuple) else [words]
    if len(words) not in counts:
        raise ValueError(f"expected {wanted}")
    return [_READERS[one](word.strip() if isinstance(word, str) else word) for word in words]


def _size(value: Any) -> tuple[int, int]:
    numbers = _numbers(value, (1, 2), "int", "a side or width,height")
    if min(numbers) < 1:
        raise ValueError("sides have to be positive")
    return (numbers[0], numbers[-1])


def _range(value: Any) -> tuple[float, float]:
    low, high = _numbers(value, (2,), "float", "min,max")
    if low > high:
        raise ValueError("min is above max")
    return (low, high)


def _int_or_ratio(value: Any) -> int | float:
    if isinstance(value, str) and value.strip().endswith("%"):
        ratio = _float(value.strip()[:-1]) / 100
        if not 0 <= ratio <= 1:
            raise ValueError("expected 0% to 100%")
        return ratio
    number = _float(value)
    if number < 0 or (number >= 1 and number != int(number)):
        raise ValueError("expected a number of steps, a ratio below 1 or a percentage")
    return int(number) if number >= 1 or number == 0 else number


_READERS = {
    "str": _text,
    "int": _int,
    "float": _float,
    "flag": _flag,
    "path": _path,
    "output": _path,
    "args": _arguments,
    "size": _size,
    "range": _range,
    "int_or_ratio": _int_or_ratio,
    **{kind: _list(one) for kind, one in LISTS.items()},
}


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`["k=v", ...]` -> {k: value}; a value that is a Python literal becomes one, anything else stays text.

    Only the first `=` separates, so a value may contain some. Raises ConfigError for a name given twice.
    """
    out: dict[str, Any] = {}
    for pair in pairs or []:
        name, _, text = pair.partition("=")
        name = name.strip()
        if name in out:
            raise ConfigError(f"--{option}: '{name}' is given twice")
        out[name] = literal(text)
    return out


def literal(text: str) -> Any:
    """A Python literal (number, tuple, True, None, quoted text), `true`/`false`, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the latter two: nested too deeply
        return text
