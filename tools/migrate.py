"""Rewrite another program's configuration as ours: python tools/migrate.py SRC.toml DST.toml

Reads diffusion-pipe's files ([model] type = ..., and the dataset file that they name) and writes the same run in our
own options, each with the key that it comes from, and beside it the dataset as DST_dataset.toml.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its inspect.py hides the standard one

from library.errors import ConfigError, run

if TYPE_CHECKING:
    from library.dialects import Translation


def migrate(source: Path, target: Path) -> list[str]:
    """Write the native files; returns lines for people. Raises ConfigError for a key that is refused."""
    from library import options
    from library.dialects import translated, translated_dataset

    data = target.with_name(f"{target.stem}_dataset.toml")
    for path in (target, data):
        if path.exists():
            raise ConfigError(f"{path} exists already; name another file")
    foreign = translated(options.read_toml(source), source)
    if foreign is None:
        raise ConfigError(f"{source} is no file of another program: it has no [model] with a type; use it as it is")
    settings, lines = options.parse(None, ["--config_file", str(source)]), []
    if settings.dataset_config:
        path = Path(settings.dataset_config)
        table = translated_dataset(options.read_toml(path), str(path), path.parent, settings)
        _write(data, f"the dataset of {path.name}", datasets(table, path.parent))
        foreign.values["dataset_config"] = str(data)
        lines.append(f"{path} -> {data}")
    paths = {name: getattr(settings, name) for name in foreign.values if name != "dataset_config"}
    _write(target, f"the run of {source.name}", native(foreign, paths))
    return [*(f"note: {note}" for note in foreign.notes), *lines, f"{source} -> {target}"]


def native(foreign: Translation, values: Mapping[str, Any]) -> list[str]:
    """A line an option, with the key of the other file."""
    out = []
    for name, value in foreign.values.items():
        text = f"{name} = {toml(values.get(name, value))}"
        out.append(f"{text:60}  # {foreign.places[name].removeprefix(', ')}")
    return out


def datasets(table: Mapping[str, Any], folder: Path) -> list[str]:
    """[[datasets]] tables; relative paths as they are found from the other file's folder."""
    out = []
    for dataset in table["datasets"]:
        out += ["", "[[datasets]]", *(f"{k} = {toml(v)}" for k, v in dataset.items() if k != "subsets")]
        for subset in dataset["subsets"]:
            out += ["  [[datasets.subsets]]", *(f"  {key} = {toml(_found(v, folder))}" for key, v in subset.items())]
    return out


def _found(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_found(one, folder) for one in value]
    there = folder / value if isinstance(value, str) and value else None
    return str(there) if there and there.exists() else value


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _write(path: Path, title: str, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"# {title}, in lorasmith's own options", *lines]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="the other program's main file (.toml)")
    parser.add_argument("target", type=Path, metavar="DST", help="the file to write (.toml)")
    arguments = parser.parse_args()
    print("\n".join(migrate(arguments.source, arguments.target)))


if __name__ == "__main__":
    run(main)
