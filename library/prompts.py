"""Sample prompt files in sd-scripts' syntax: .txt, .toml, .json. No torch.

A line is a text and options: `a red fox --w 1024 --h 768 --d 7 --s 20 --l 4.5 --n blurry`. Negative numbers work
(`--d -1` is a new seed in every run); an option that is not known or not readable is an error that names the line.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from library.errors import ConfigError, nearest
from library.option_kinds import is_path


@dataclass(frozen=True)
class Prompt:
    prompt: str
    negative_prompt: str = ""
    width: int | None = None  # None: the family's usual size
    height: int | None = None
    seed: int | None = None  # None: the run's seed plus the prompt's place; below 0: a new one in every run
    sample_steps: int = 20
    scale: float = 1.0  # classifier-free guidance; 1 = off
    guidance_scale: float | None = None  # embedded guidance, for families that have it
    flow_shift: float | None = None  # None: --discrete_flow_shift
    controls: tuple[str, ...] = ()  # files of control pictures
    sample_sampler: str | None = None  # None: --sample_sampler, for families with several samplers
    frame_count: int | None = None  # of a video; None: as many as usual
    image_path: str | None = None  # file of a video's first frame


BLANK = Prompt("")

FLAGS = {
    "w": "width", "h": "height", "d": "seed", "s": "sample_steps", "l": "scale", "g": "guidance_scale",
    "n": "negative_prompt", "fs": "flow_shift", "ci": "controls", "ss": "sample_sampler", "f": "frame_count",
    "i": "image_path",
}  # fmt: skip
ELSEWHERE = {
    "cn": "control images belong to edit models", "ctr": "lumina_minimal_inference.py has --cfg_trunc_ratio",
    "rcfg": "lumina_minimal_inference.py has --cfg_normalization",
    "ei": "no model here is given a last frame", "cv": "no model here is given a control video",
    "of": "one-frame inference is --f 1",
}  # fmt: skip
WHOLE = {"width", "height", "seed", "sample_steps", "frame_count"}
TEXTS = {"prompt", "negative_prompt", "sample_sampler"}
FILES = {"controls": "control picture", "image_path": "first frame"}


def parse_prompts(path: Path, defaults: Prompt = BLANK) -> list[Prompt]:
    """The prompts of a file; what one does not say is as in `defaults`. Raises ConfigError naming file and line."""
    path = Path(path)
    if path.suffix not in (".txt", ".toml", ".json"):
        raise ConfigError(f"--sample_prompts {path}: a prompt file is .txt, .toml or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--sample_prompts {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--sample_prompts {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if path.suffix == ".txt":
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
        found = [parse_line(line, f"{path}:{n}", defaults) for n, line in lines if line and not line.startswith("#")]
        return _some(found, path)
    entries = _from_toml(path) if path.suffix == ".toml" else _from_json(text, path)
    return _some([_entry(e, f"{path}, prompt {n}", defaults) for n, e in enumerate(entries, 1)], path)


def _from_toml(path: Path) -> list[dict[str, Any]]:
    from library.options import read_toml

    table = read_toml(path).get("prompt", {})
    subsets = table.get("subset", []) if isinstance(table, dict) else None
    if not isinstance(subsets, list) or not all(isinstance(one, dict) for one in subsets):
        raise ConfigError(f"--sample_prompts {path}: a [prompt] table with [[prompt.subset]] tables is expected")
    return [{**{k: v for k, v in table.items() if k != "subset"}, **one} for one in subsets]


def _from_json(text: str, path: Path) -> list[Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--sample_prompts {path} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"--sample_prompts {path}: a list of texts or tables is expected")
    return entries


def _some(prompts: list[Prompt], path: Path) -> list[Prompt]:
    if not prompts:
        raise ConfigError(f"--sample_prompts {path}: there is no prompt in it")
    return prompts


def parse_line(line: str, where: str, defaults: Prompt = BLANK) -> Prompt:
    """One line of a .txt file."""
    pieces = re.split(r"(?:^|\s)--(?=[a-zA-Z]+\b)", line)
    values: dict[str, Any] = {"prompt": pieces[0].strip()}
    for piece in pieces[1:]:
        word, _, value = piece.partition(" ")
        flag = word.lower()  # as in sd-scripts
        if flag in ELSEWHERE:
            raise ConfigError(f"{where}: --{flag} is not read here: {ELSEWHERE[flag]}")
        if flag not in FLAGS:
            raise ConfigError(
                f"{where}: --{word} is not an option of a prompt (known: {', '.join('--' + f for f in FLAGS)})"
            )
        if FLAGS[flag] == "controls":  # may be given several times
            values.setdefault("controls", []).append(value.strip())
        else:
            values[FLAGS[flag]] = value.strip()
    return _entry(values, where, defaults)


def _entry(entry: Any, where: str, defaults: Prompt) -> Prompt:
    if isinstance(entry, str):
        return parse_line(entry, where, defaults)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: neither a text nor a table")
    names = {f.name for f in fields(Prompt)}
    values = {}
    for name, value in entry.items():
        if name == "enum":
            continue
        if name not in names:
            raise ConfigError(f"{where}: '{name}' is not known{nearest(name, names)}")
        read = read_files if name in FILES else _text if name in TEXTS else _number
        values[name] = read(name, value, where)
    if "prompt" not in values:
        raise ConfigError(f"{where}: there is no prompt in it")
    return check(replace(defaults, **values), where)


def _text(name: str, value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} {value!r} is not a text")
    return value


def read_files(name: str, value: Any, where: str) -> tuple[str, ...] | str:
    """Control pictures, or a first frame, that exist. Raises ConfigError."""
    paths = (value,) if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"{where}: {name} {value!r} is not a file name or a list of such")
    if name == "image_path" and len(paths) != 1:
        raise ConfigError(f"{where}: {name} {value!r}: a video has one first frame")
    for path in paths:
        if not is_path(path) or not Path(path).is_file():
            raise ConfigError(f"{where}: {FILES[name]} {path[:200]}: no such file")
    return paths[0] if name == "image_path" else tuple(paths)


def _number(name: str, value: Any, where: str) -> int | float:
    try:
        number = int(str(value)) if name in WHOLE else float(value)
        is_finite = math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where}: {name} {value!r} is not a {'whole ' if name in WHOLE else ''}number") from None
    if not is_finite:
        raise ConfigError(f"{where}: {name} {value!r} is not a finite number")
    return number


def check(prompt: Prompt, where: str) -> Prompt:
    """The prompt, if pictures can be made with its numbers. Raises ConfigError."""
    for name in ("width", "height"):
        if getattr(prompt, name) is not None and getattr(prompt, name) < 1:
            raise ConfigError(f"{where}: {name} {getattr(prompt, name)} is not a size")
    if prompt.frame_count is not None and prompt.frame_count < 1:
        raise ConfigError(f"{where}: {prompt.frame_count} frames; a video has at least one")
    if not 1 <= prompt.sample_steps <= 1000:
        raise ConfigError(f"{where}: {prompt.sample_steps} steps; 1 to 1000 are possible")
    if prompt.flow_shift is not None and prompt.flow_shift <= 0:
        raise ConfigError(f"{where}: flow shift {prompt.flow_shift:g}; it must be above 0 (1 = no shift)")
    if prompt.seed is not None and prompt.seed >= 2**64:
        raise ConfigError(f"{where}: seed {prompt.seed} is too large; it must be below 2^64")
    return prompt


def defaults_of(family: Any) -> Prompt:
    """What a prompt of this family gets that says nothing."""
    return replace(BLANK, **family.sampling)


def training_defaults(family: Any) -> Prompt:
    """The same in a run, where the data decides size and length."""
    return replace(defaults_of(family), width=None, height=None, frame_count=None)


def timed(prompts: Sequence[Prompt], family: Any, usual: int) -> list[Prompt]:
    """The prompts with the frames that they get: rounded down to what a video model takes, `usual` if unsaid."""
    rule = family.frames
    return [
        replace(prompt, frame_count=max(rule.fit(prompt.frame_count or usual), rule.least) if rule else None)
        for prompt in prompts
    ]


def of_run(path: str | None, family: Any, usual_frames: int) -> tuple[list[Prompt], list[str]]:
    """The prompts of --sample_prompts, if it is given, and notes about them."""
    found = parse_prompts(Path(path), training_defaults(family)) if path else []
    return timed(found, family, usual_frames), notes(found, family)


def requests_of(prompt: Prompt, family: Any) -> tuple[Any, Any]:
    """What the text encoders are asked for: the prompt, and its negative prompt, which is of no first frame."""
    from library.data.first_frames import FirstFrame
    from library.strategies import Request

    first = FirstFrame(prompt.image_path) if prompt.image_path else None
    cond = Request.of(family, prompt.prompt, prompt.controls, prompt.frame_count or 0, first)
    return cond, replace(cond, caption=prompt.negative_prompt, first=None)


def asked_of_text(prompts: Sequence[Prompt], family: Any) -> list[Any]:
    """Everything that the text encoders are asked for besides captions; the empty text is what dropout leaves."""
    from library.strategies import Request

    empty = {Request(""), Request("", is_still=family.encode_still is not None)}
    return [*empty, *(request for prompt in prompts for request in requests_of(prompt, family))]


def check_for(prompts: Sequence[Prompt], family: Any) -> None:
    """Raise ConfigError for a prompt that asks for what the family cannot make."""
    check_controls(prompts, family)
    check_samplers(prompts, family)
    check_video(prompts, family)


def check_controls(prompts: Sequence[Prompt], family: Any) -> None:
    """Raise ConfigError for a prompt with more control pictures than the model takes, or fewer than it needs."""
    most, least = family.max_controls, family.least_controls
    for number, prompt in enumerate(prompts, 1):
        count = len(prompt.controls)
        if count > most:
            raise ConfigError(
                f"prompt {number} has {count} control pictures, {family.title} takes {most or 'none'}; remove them"
            )
        if count < least:
            raise ConfigError(f"prompt {number} has no control picture, and {family.title} edits pictures; give one")


def check_samplers(prompts: Sequence[Prompt], family: Any) -> None:
    """Raise ConfigError for a sampler that the family has not."""
    known = family.objective.sampler_names
    for number, prompt in enumerate(prompts, 1):
        if prompt.sample_sampler not in (None, *known):
            raise ConfigError(
                f"prompt {number}: the sampler '{prompt.sample_sampler}' is not offered for {family.title} "
                f"(known: {', '.join(known)})"
            )


def check_video(prompts: Sequence[Prompt], family: Any) -> None:
    """Raise ConfigError for a prompt that asks a model of pictures for a video, or lacks or has a first frame that the
    model needs or cannot take."""
    rule, title = family.frames, family.title
    for number, prompt in enumerate(prompts, 1):
        if rule is None and (prompt.image_path or (prompt.frame_count or 1) > 1):
            given = "a first frame (--i)" if prompt.image_path else f"{prompt.frame_count} frames (--f)"
            raise ConfigError(f"prompt {number} has {given}, and {title} makes pictures; remove it")
        if rule is None:
            continue
        if prompt.image_path and rule.first_frame == "none":
            raise ConfigError(f"prompt {number} has a first frame (--i), which {title} does not take; remove it")
        if not prompt.image_path and rule.first_frame == "needed":
            raise ConfigError(f"prompt {number} has no first frame, and {title} continues a picture; give one with --i")
        if prompt.frame_count is not None and prompt.frame_count < rule.least:
            raise ConfigError(f"prompt {number}: {prompt.frame_count} frames; {title} makes at least {rule.least}")


def seed_of(prompt: Prompt, number: int, run_seed: int) -> int:
    """The seed of the `number`-th prompt; one drawn now if it asks for a new one."""
    if prompt.seed is None:
        return run_seed + number
    return prompt.seed if prompt.seed >= 0 else int.from_bytes(os.urandom(4), "big")


def fitted(side: int, multiple: int) -> int:
    """The side of a picture, rounded down to the family's multiple."""
    return max(multiple, side // multiple * multiple)


def notes(prompts: list[Prompt], family: Any) -> list[str]:
    """What prompts ask for and do not get, one sentence each."""
    said, multiple, title = [], family.pixel_multiple, family.title
    has_guidance = "guidance_scale" in family.sampling
    for number, prompt in enumerate(prompts, 1):
        sides = [side for side in (prompt.width, prompt.height) if side and side != fitted(side, multiple)]
        if sides:
            said.append(
                f"prompt {number}: side {sides[0]} becomes {fitted(sides[0], multiple)}, a multiple of {multiple}"
            )
        frames = prompt.frame_count
        if family.frames and frames and frames != family.frames.fit(frames):
            said.append(f"prompt {number}: {frames} frames become {family.frames.fit(frames)}, which {title} makes")
        if prompt.negative_prompt.strip() and prompt.scale == 1:
            said.append(f"prompt {number}: a negative prompt has no effect without guidance (--l, not 1)")
        if prompt.guidance_scale is not None and not has_guidance:
            said.append(f"prompt {number}: --g is embedded guidance, which {title} has not; guidance is --l")
    return said
