"""Configuration files of other programs: each is one table of their keys, read as our options.

A key does what it says, or is refused by name with the reason; one that changes nothing here is a note. sd-scripts' and
musubi-tuner's files have our own names and need no table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError, nearest

if TYPE_CHECKING:
    from library.families.family import Family


# What arithmetic on a value of another kind raises; no rule has to look at the kind of every value by itself
OF_ANOTHER_KIND = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@contextlib.contextmanager
def taken(where: str) -> Iterator[None]:
    """Values of a kind that their key does not take are a ConfigError with what Python says of them."""
    try:
        yield
    except OF_ANOTHER_KIND as error:
        raise ConfigError(f"{where}: a value is not of the kind that is taken there ({str(error)[:120]})") from error


@dataclass(frozen=True)
class Refused:
    """A key that is not offered, and what to do instead."""

    reason: str


@dataclass(frozen=True)
class Idle:
    """A key that is taken and changes nothing here."""

    reason: str


@dataclass(frozen=True)
class Kind:
    """A model as another program names it."""

    family: str
    implied: Mapping[str, Any] = field(default_factory=dict)  # options
    usual: Mapping[str, Any] = field(default_factory=dict)  # options that hold where no key says otherwise
    trains_text: bool = False  # its text encoders are trained, and so not cached
    # part of the denoiser's name -> --model_version, the first that fits, where the file itself does not tell
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Translation:
    """Our options, and which key of the file each of them comes from."""

    source: str
    config: Mapping[str, Any] = field(default_factory=dict)  # the whole file
    family: Family | None = None
    kind: Kind | None = None
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # option -> ", [model] dtype", to follow the file's name
    implied: set[str] = field(default_factory=set)  # options that no key has set
    notes: list[str] = field(default_factory=list)

    def set(self, option: str, value: Any, where: str) -> None:
        """Raises ConfigError if another key has set it to something else."""
        if option in self.values and option not in self.implied and self.values[option] != value:
            self.refuse(where, f"it contradicts {self.places[option].removeprefix(', ')}; remove one of them")
        if option not in self.values or option in self.implied:
            self.places[option] = f", {where}"
        self.implied.discard(option)
        self.values[option] = value

    def imply(self, option: str, value: Any, where: str) -> None:
        """What the other program does where its file says nothing."""
        if option not in self.values:
            self.values[option], self.places[option] = value, f", {where}"
            self.implied.add(option)

    def refuse(self, where: str, reason: str) -> None:
        raise ConfigError(f"{self.source}: {where}: {reason}")

    def note(self, where: str, reason: str) -> None:
        self.notes.append(f"{self.source}: {where} is not read: {reason}")

    def read(self, table: Mapping[str, Any], rules: Mapping[str, Any], name: str) -> None:
        """Every key of a table by its rule: an option's name, a function (self, value, where), Refused, Idle.

        Raises ConfigError for a key without a rule, naming the nearest one, and for one that is refused.
        """
        for key, value in table.items():
            where = f"{name} {key}" if name else key
            rule = rules.get(key)
            if rule is None:
                self.refuse(where, f"there is no such key{nearest(key, rules)}")
            elif isinstance(rule, str):
                self.set(rule, value, where)
            elif isinstance(rule, Refused):
                if value not in (False, 0, "", [], None):
                    self.refuse(where, rule.reason)
            elif isinstance(rule, Idle):
                self.note(where, rule.reason)
            else:
                with taken(f"{self.source}: {where}"):
                    rule(self, value, where)


def translated(config: Mapping[str, Any], path: Path) -> Translation | None:
    """The options of another program's file; None for one of ours. Raises ConfigError naming a key."""
    if isinstance(config.get("model"), Mapping) and "type" in config["model"]:
        from library.dialects.diffusion_pipe import translate

        with taken(str(path)):
            return translate(config, path)
    return None


def translated_dataset(table: Mapping[str, Any], source: str, folder: Path, options: Any) -> Mapping[str, Any]:
    """Another program's description of a dataset as ours, which is returned as it is."""
    if "directory" in table and "datasets" not in table:
        from library.dialects.diffusion_pipe_data import translate

        with taken(source):
            return translate(table, source, folder, options)
    return table
