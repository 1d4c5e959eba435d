"""Sample prompt files in sd-scripts' syntax: .txt, .toml, .json. No torch.

A line is a text and options: `a red fox --w 1024 --h 768 --d 7 --s 20 --l 4.5 --n blurry`. Negative numbers work
(`--d -1` is a new seed each time); an option that is not known or not readable is an error that names the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from library.errors import ConfigError, nearest


@dataclass(frozen=True)
class Prompt:
    prompt: str
    negative_prompt: str = ""
    width: int | None = None  # None: the family's usual size
    height: int | None = None
    seed: int | None = None  # None: the run's seed plus the prompt's place; below 0: a new one each time
    sample_steps: int = 20
    scale: float = 1.0  # classifier-free guidance; 1 = off
    guidance_scale: float | None = None  # embedded guidance, for families that have it
    flow_shift: float | None = None  # None: --discrete_flow_shift


FLAGS = {
    "w": "width", "h": "height", "d": "seed", "s": "sample_steps", "l": "scale", "g": "guidance_scale",
    "n": "negative_prompt", "fs": "flow_shift",
}  # fmt: skip
ELSEWHERE = {
    "ss": "samplers other than Euler on flow sigmas are not offered",
    "cn": "control images belong to edit models", "ctr": "it belongs to Lumina", "rcfg": "it belongs to Lumina",
}  # fmt: skip
WHOLE = {"width", "height", "seed", "sample_steps"}


def parse_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises ConfigError naming file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--sample_prompts {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--sample_prompts {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if path.suffix == ".toml":
        from library.options import read_toml

        table = read_toml(path).get("prompt", {})
        entries = [{**{k: v for k, v in table.items() if k != "subset"}, **one} for one in table.get("subset", [])]
    elif path.suffix == ".json":
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--sample_prompts {path} is not valid JSON: {error}") from None
    else:
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
        return _some([parse_line(line, f"{path}:{n}") for n, line in lines if line and not line.startswith("#")], path)
    where = [f"{path}, prompt {n}" for n in range(1, len(entries) + 1)]
    return _some([_entry(e, w) for e, w in zip(entries, where, strict=True)], path)


def _some(prompts: list[Prompt], path: Path) -> list[Prompt]:
    if not prompts:
        raise ConfigError(f"--sample_prompts {path}: there is no prompt in it")
    return prompts


def parse_line(line: str, where: str) -> Prompt:
    """One line of a .txt file."""
    pieces = re.split(r"(?:^|\s)--(?=[a-zA-Z]+\b)", line)
    values: dict[str, Any] = {"prompt": pieces[0].strip()}
    for piece in pieces[1:]:
        flag, _, value = piece.partition(" ")
        if flag in ELSEWHERE:
            raise ConfigError(f"{where}: --{flag} is not read here: {ELSEWHERE[flag]}")
        if flag not in FLAGS:
            raise ConfigError(
                f"{where}: --{flag} is not an option of a prompt (known: {', '.join('--' + f for f in FLAGS)})"
            )
        values[FLAGS[flag]] = value.strip()
    return _entry(values, where)


def _entry(entry: Any, where: str) -> Prompt:
    if isinstance(entry, str):
        return parse_line(entry, where)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: neither a text nor a table")
    names = {f.name for f in fields(Prompt)}
    values = {}
    for name, value in entry.items():
        if name == "enum":
            continue
        if name not in names:
            raise ConfigError(f"{where}: '{name}' is not known{nearest(name, names)}")
        values[name] = value if name in ("prompt", "negative_prompt") else _number(name, value, where)
    if "prompt" not in values:
        raise ConfigError(f"{where}: there is no prompt in it")
    prompt = Prompt(**values)
    for name in ("width", "height"):
        if getattr(prompt, name) is not None and getattr(prompt, name) < 1:
            raise ConfigError(f"{where}: {name} {getattr(prompt, name)} is not a size")
    if not 1 <= prompt.sample_steps <= 1000:
        raise ConfigError(f"{where}: {prompt.sample_steps} steps; 1 to 1000 are possible")
    return prompt


def _number(name: str, value: Any, where: str) -> int | float:
    try:
        return int(str(value)) if name in WHOLE else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {name} {value!r} is not a {'whole ' if name in WHOLE else ''}number") from None
