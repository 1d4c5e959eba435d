"""A family's toy as its inference script loads it, for comparisons with diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomllib
import torch

from library.families import get_family
from library.inference import Studio, parser_of, settle
from library.preflight import check_parts
from library.prompts import defaults_of, parse_line


def make_toy(name: str, folder: Path) -> Path:
    """All files of a family's toy; returns its toy.toml."""
    from tools.make_toy_model import make

    return make(name, folder)


def words_of(toml: Path, **changes: str) -> list[str]:
    """The options of the inference script that name a toy's files; `changes` name others."""
    known = {word.removeprefix("--") for action in _parser(toml)._actions for word in action.option_strings}
    values = {name: value for name, value in tomllib.loads(toml.read_text()).items() if name in known}
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    given = {name: str(path) if (path := toml.parent / value).exists() else value for name, value in texts.items()}
    return [word for name, value in (given | changes).items() if value for word in (f"--{name}", str(value))]


def _parser(toml: Path) -> Any:
    return parser_of(get_family(toml.parent.name))


def studio_of(toml: Path, **changes: str) -> Studio:
    """As the script has it. The toy's folder has the name of its family."""
    words = [*words_of(toml, **changes), "--save_path", "x.png", "--prompt", "x", "--device", "cpu"]
    arguments = _parser(toml).parse_args(words)
    family, _ = check_parts(get_family(toml.parent.name), arguments)
    settle(arguments, family)
    return Studio(family, arguments)


def pair_of(studio: Studio, line: str) -> tuple[dict, dict]:
    """What conditions the picture of a prompt line, with it and with its negative prompt."""
    return studio.conditions(parse_line(line, "test", defaults_of(studio.family)))


def start_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The noise that a seed begins with, [1,C,h,w]."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def batched_and_one_by_one(studio: Studio, conds: list[dict], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Predictions of items in one batch, and of each alone."""
    noisy, sigma = torch.randn(len(conds), *shape), torch.linspace(0.2, 0.9, len(conds))
    family, model = studio.family, studio.denoiser
    with torch.no_grad():
        both = family.predict(model, noisy, sigma, conds)
        each = [family.predict(model, noisy[k : k + 1], sigma[k : k + 1], [cond]) for k, cond in enumerate(conds)]
    return both, torch.cat(each)
