"""One owner of all options: typed, checked wherever they come from, each value with its origin.

Order: default < family's default < configuration file < command line. Nothing in here imports torch, so that
`--help` is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from library.errors import ConfigError, nearest
from library.option_checks import check_read, is_lr_free
from library.option_kinds import KINDS, LISTS, Option
from library.option_table import OPTIONS
from library.options_not_offered import NOT_OFFERED

if TYPE_CHECKING:
    from library.families.family import Family

__all__ = ["Option", "Options", "check_read", "parse", "read_toml"]

COMMAND_LINE, DEFAULT = "command line", "default"
RIVALS = (("max_train_steps", "max_train_epochs"),)  # given in two places, the later place decides


class Options:
    """The effective options of a run, read-only: `options.learning_rate`, and where each value came from."""

    def __init__(
        self, table: Mapping[str, Option], values: Mapping[str, Any], origins: Mapping[str, str], family: Family | None
    ) -> None:
        self.__dict__.update(_table=dict(table), _values=dict(values), _origins=dict(origins), family=family)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"there is no option '{name}'{nearest(name, values)}")
        return values[name]

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"options are read-only ('{name}'); use replace()")

    def origin(self, name: str) -> str:
        """`default`, `family z_image`, `config examples/q.toml`, `command line` or `implied by --x`."""
        return self._origins[name]

    def given(self, name: str) -> bool:
        """Whether the user set it, in the configuration file or on the command line."""
        return self._origins[name] == COMMAND_LINE or self._origins[name].startswith("config ")

    def off(self, name: str) -> bool:
        """Whether the value leaves off what is off by default (false, 0, none), so that it can do no harm."""
        value = self._values[name]
        return not value and value == self._table[name].default

    def as_dict(self) -> dict[str, Any]:
        return dict(self._values)

    def replace(self, **changes: Any) -> Options:
        """The same options with some values set as if on the command line."""
        unknown = [name for name in changes if name not in self._table]
        if unknown:
            raise ConfigError(f"--{unknown[0]} is not an option{nearest(unknown[0], self._table)}")
        values = {name: None if v is None else self._table[name].read(v, COMMAND_LINE) for name, v in changes.items()}
        origins = {**self._origins, **dict.fromkeys(changes, COMMAND_LINE)}
        return Options(self._table, {**self._values, **values}, origins, self.family)

    def grouped(self) -> dict[str, list[str]]:
        """Group title -> names, in the order of the table."""
        out: dict[str, list[str]] = {}
        for option in self._table.values():
            out.setdefault(option.group, []).append(option.name)
        return out

    def report(self) -> str:
        """Name, value and origin of everything, by group: what --print_config prints."""
        lines = []
        for title, names in self.grouped().items():
            lines.append(f"# {title}")
            lines += [f"{name:36} {_toml(self._values[name]):40} {self._origins[name]}" for name in sorted(names)]
        return "\n".join(lines)

    def to_toml(self) -> str:
        """A configuration file that gives this run again; values that nobody set are comments."""
        lines = []
        for title, names in self.grouped().items():
            lines.append(f"\n# {title}")
            for name in names:
                if name in ("config_file", "print_config"):
                    continue
                live = self.given(name) and self._values[name] is not None
                note = "" if live else f"  # {self._origins[name]}"
                lines.append(f"{'' if live else '# '}{name} = {_toml(self._values[name])}{note}")
        return "\n".join(lines).lstrip() + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(_toml(one) for one in value) + "]" if isinstance(value, list | tuple) else repr(value)


def parse(family_name: str | None, argv: list[str] | None = None, prog: str = "") -> Options:
    """Read the command line and the configuration file that it names.

    Without `family_name` the family comes from --model_type or the configuration file. `--help` and
    `--print_config` print and exit with 0. Raises ConfigError for anything that is not understood.
    """
    words = _split(sys.argv[1:] if argv is None else argv)
    if "help" in words:
        _print_help(family_name or (words.get("model_type") or [None])[-1], prog)
        sys.exit(0)
    path = _config_path(words)
    config, places = configured(path) if path else ({}, {})
    family = _family(family_name, words, config, path)
    table = {option.name: option for option in (*OPTIONS, *options_of(family))}
    values = {name: option.default for name, option in table.items()}
    origins = dict.fromkeys(table, DEFAULT)
    for name, value in family.defaults.items():
        values[name], origins[name] = table[name].read(value, f"family {family.name}"), f"family {family.name}"
    values["model_type"], origins["model_type"] = family.name, f"family {family.name}"
    _apply_config(table, values, origins, config, path, places)
    _apply_words(table, values, origins, words)
    _settle(table, values, origins, family)
    options = Options(table, values, origins, family)
    if options.print_config:
        print(options.report(), flush=True)
        check_read(options)
        sys.exit(0)
    return options


def parse_data(argv: list[str]) -> Options:
    """The options of a dataset where no model is known: those that every family has, from the command line.

    Raises ConfigError for anything that is not understood.
    """
    words = _split(argv)
    if "config_file" in words:
        raise ConfigError("--config_file describes a run, which needs --model_type, too")
    table = {option.name: option for option in OPTIONS}
    values = {name: option.default for name, option in table.items()}
    origins = dict.fromkeys(table, DEFAULT)
    _apply_words(table, values, origins, words)
    return Options(table, values, origins, None)


def options_of(family: Family) -> list[Option]:
    """What a family adds to the table: the files of its parts, their tokenizers, and its own options."""
    group, known = OPTIONS[0].group, {option.name for option in OPTIONS}
    out = {}
    for part in family.parts:
        if part.option not in known:
            out[part.option] = Option(part.option, "path", None, f"{part.title}: a file or a folder", group)
    for where, _ in family.tokenizers:
        text = f"tokenizer ({where.hub}): a folder or a hub id"
        out[where.option] = Option(where.option, "path", None, text, group)
    return [*(out | {option.name: option for option in family.options}).values()]


def _split(argv: list[str]) -> dict[str, list[str]]:
    """`--name word ...` and `--name=word` -> {name: words}; the last one of a name holds."""
    out: dict[str, list[str]] = {}
    current: list[str] | None = None
    for token in argv:
        if token in ("-h", "--help"):
            return {**out, "help": []}
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            current = out[name] = [value] if equals else []
        elif current is None:
            raise ConfigError(f"'{token}' on the command line belongs to no option; options begin with --")
        else:
            current.append(token)
    return out


def _family(name: str | None, words: Mapping[str, list[str]], config: Mapping[str, Any], path: Path | None) -> Family:
    from library.families import get_family, script_of

    wanted = words["model_type"][-1] if words.get("model_type") else config.get("model_type")
    if name and wanted and wanted != name:
        raise ConfigError(
            f"--model_type {wanted} does not fit this script, which trains {name}; "
            f"run {script_of(str(wanted))}_train_network.py or train_network.py"
        )
    if not name and not wanted:
        wanted = _family_of_base(words, config, path)
    return get_family(name or str(wanted))


def _family_of_base(words: Mapping[str, list[str]], config: Mapping[str, Any], path: Path | None) -> str:
    """The family that the denoiser's file is of, where nobody says it. Raises ConfigError unless it is one."""
    from library.families import FAMILIES, families_of

    names = ("pretrained_model_name_or_path", "dit")  # musubi-tuner's is the second
    given = next((words[name][-1] for name in names if words.get(name)), None)
    base = given or _beside(path or Path("."), next((config[name] for name in names if name in config), None))
    if not base or not Path(base).exists():
        raise ConfigError(f"--model_type is missing; give one of {', '.join(FAMILIES)}")
    found = families_of(base)
    if len(found) != 1:
        may = f"it can be each of {', '.join(found)}" if found else f"it is none of {', '.join(FAMILIES)}"
        raise ConfigError(f"--model_type is missing, and {base} does not tell: {may}")
    return found[0]


def _config_path(words: Mapping[str, list[str]]) -> Path | None:
    if "config_file" not in words:
        return None
    if len(words["config_file"]) != 1:
        raise ConfigError("--config_file needs one path")
    path = Path(words["config_file"][0]).expanduser()
    with_suffix = path.with_name(path.name + ".toml")  # sd-scripts lets its users leave the extension out
    return path if path.is_file() or not with_suffix.is_file() else with_suffix


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises ConfigError for a missing file, a wrong encoding and a syntax error with its line."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        hint = "; a Windows path needs '/' or single quotes" if "escape" in str(error).lower() else ""
        raise ConfigError(f"{path} is not valid TOML: {error}{hint}") from None
    except (RecursionError, ValueError):  # the latter for a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: it is nested too deeply, or has too long a number") from None


def configured(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(options of a --config_file, what to add to its name where one has another key there). Raises ConfigError."""
    from library.dialects import translated

    table = read_toml(path)
    if foreign := translated(table, path):
        for note in foreign.notes if os.environ.get("LOCAL_RANK", "0") == "0" else ():
            print(f"note: {note}", file=sys.stderr, flush=True)
        return foreign.values, foreign.places
    return flattened(table, path), {}


def flattened(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The tables of a --config_file as one. Raises ConfigError for a name that appears twice."""
    argument_names = {option.name for option in OPTIONS if option.kind == "args"}
    out: dict[str, Any] = {}

    def add(name: str, value: Any, where: str) -> None:
        if name in out:
            raise ConfigError(f"{path}: '{name}' is set twice, the second time in {where}")
        out[name] = value

    for name, value in table.items():
        if not isinstance(value, Mapping) or name in argument_names:
            add(name, value, "the top level")
            continue
        for inner, one in value.items():
            if isinstance(one, Mapping) and inner not in argument_names:
                raise ConfigError(f"{path}: [{name}.{inner}] is a table inside a table; only one level is read")
            add(inner, one, f"[{name}]")
    return out


def _known(table: Mapping[str, Option], name: str, where: str) -> Option:
    aliases = {alias: option for option in table.values() for alias in option.aliases}
    if name in table or name in aliases:
        return table.get(name) or aliases[name]
    if name in NOT_OFFERED:
        raise ConfigError(f"--{name} ({where}) is an option of sd-scripts that is not offered: {NOT_OFFERED[name]}")
    raise ConfigError(f"--{name} ({where}) is not an option{nearest(name.replace('-', '_'), table)}")


def _apply_config(
    table: Mapping[str, Option],
    values: dict[str, Any],
    origins: dict[str, str],
    config: Mapping[str, Any],
    path: Path | None,
    places: Mapping[str, str],
) -> None:
    file = f"config {path.as_posix()}" if path else ""
    for name, value in config.items():
        origin = file + places.get(name, "")
        option = _known(table, name, origin)
        if option.name in ("config_file", "print_config"):
            raise ConfigError(f"--{option.name} ({origin}) belongs on the command line")
        if origins[option.name] == origin:
            raise ConfigError(f"--{option.name} ({origin}) is set twice, once by its old name")
        typed = option.read(value, origin)
        if option.kind == "path":
            typed = _beside(path, typed)
        elif option.kind == "paths":
            typed = [_beside(path, one) for one in typed]
        values[option.name], origins[option.name] = typed, origin


def _beside(config: Path, value: str | None) -> str | None:
    """A relative path of a configuration file: beside the file if it exists there, else as it is."""
    if value is None or Path(value).is_absolute():
        return value
    there = config.parent / value
    return str(there) if there.exists() else value


def _apply_words(
    table: Mapping[str, Option], values: dict[str, Any], origins: dict[str, str], words: Mapping[str, list[str]]
) -> None:
    for name, given in words.items():
        option = _known(table, name, COMMAND_LINE)
        if option.many:
            value = None if given == ["none"] else given
            values[option.name] = None if value is None else option.read(value, COMMAND_LINE)
        elif option.kind == "flag" and not given:
            values[option.name] = True
        elif len(given) == 1:
            values[option.name] = option.read(given[0], COMMAND_LINE)
        else:
            got = f"{len(given)} words ({' '.join(given[:4])}); quote a text with blanks" if given else "nothing"
            raise ConfigError(f"--{option.name} needs one value ({KINDS[option.kind]}), it got {got}")
        origins[option.name] = COMMAND_LINE


def _settle(table: Mapping[str, Option], values: dict[str, Any], origins: dict[str, str], family: Family) -> None:
    """Values that follow from other values."""
    for pair in RIVALS:
        places = [origins[name] for name in pair]
        if COMMAND_LINE in places and any(place.startswith("config ") for place in places):
            loser, winner = pair if places[1] == COMMAND_LINE else reversed(pair)
            values[loser], origins[loser] = table[loser].default, f"set aside by --{winner} on the command line"

    record = f"family {family.name}"

    def imply(name: str, value: Any, why: str) -> None:
        if origins[name] in (DEFAULT, record):
            values[name], origins[name] = value, why

    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if values[f"{name}_to_disk"]:
            values[name], origins[name] = True, f"implied by --{name}_to_disk"
    if values["logging_dir"] and not values["log_with"]:
        imply("log_with", "tensorboard", "implied by --logging_dir")
    if values["log_with"] in ("tensorboard", "all") and not values["logging_dir"] and values["output_dir"]:
        imply("logging_dir", (Path(values["output_dir"]) / "logs").as_posix(), "implied by --log_with")
    if values["save_format"] is None and values["network_module"]:
        values["save_format"], origins["save_format"] = family.save_formats[0], record
    if is_lr_free(values["optimizer_type"]):
        imply("learning_rate", 1.0, f"implied by --optimizer_type {values['optimizer_type']}")


def _print_help(family_name: str | None, prog: str) -> None:
    """Help of the base options and, where the family is known, of its own."""
    from library.families import FAMILIES, get_family

    family = get_family(family_name) if family_name else None
    title = f"Train a LoRA of {family.title}, or the model itself." if family else "Train a LoRA, or a model."
    parser = argparse.ArgumentParser(
        prog=prog or None,
        description=title,
        usage="%(prog)s [--config_file FILE] [--option value ...]",
        epilog=f"Families: {', '.join(FAMILIES)}. docs/options.md has the same list.",
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for option in {o.name: o for o in (*OPTIONS, *(options_of(family) if family else ()))}.values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        default = family.defaults.get(option.name, option.default) if family else option.default
        shown = "" if default is None or option.kind == "flag" else f" (default {default})"
        extra: dict[str, Any] = {"action": "store_true"}
        if option.kind != "flag":
            metavar = "{" + ",".join(option.choices) + "}" if option.choices else _METAVARS[option.kind]
            extra = {"metavar": metavar, "nargs": "*" if option.many else None}
        groups[option.group].add_argument(f"--{option.name}", help=(option.help + shown).replace("%", "%%"), **extra)
    parser.print_help()


_METAVARS = {
    **dict.fromkeys(KINDS, "VALUE"),
    **dict.fromkeys(("path", "output"), "PATH"),
    **dict.fromkeys(LISTS, "VALUE"),
    "str": "TEXT",
    "int": "N",
    "float": "X",
    "args": "NAME=VALUE",
    "size": "W,H",
    "range": "MIN,MAX",
    "int_or_ratio": "N",
}
