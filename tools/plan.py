"""The memory and the noise levels of a run before it starts: python tools/plan.py --model_type F <options> [--json]

Takes the options of training. Where a file is not given the released model's size is taken; where no dataset is
given, --resolution W,H with --frames, --batch_size and --items says what is trained. Needs no weights and no GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its inspect.py hides the standard one

from library import options as option_machinery
from library.errors import ConfigError, run
from library.option_kinds import Option

OWN = {
    "--resolution": Option("resolution", "size", None, "size of the pictures, where no dataset is given"),
    "--frames": Option(
        "frames", "int", None, "frames of a clip, where no dataset is given; else what the model is for", low=1
    ),
    "--batch_size": Option("batch_size", "int", 1, "items of a batch, where no dataset is given", low=1),
    "--items": Option("items", "int", 0, "pictures or clips that are cached, where no dataset is given", low=0),
    "--released": Option("released", "str", None, "another released model of the family, where no file is given"),
    "--vram": Option("vram", "float", None, "GB of the device: name the cheapest settings that fit", low=0.1),
    "--json": Option("json", "flag", False, "print JSON (docs/memory.md says what is in it)"),
}


def split(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(this tool's own values, the words that are training options)."""
    own: dict[str, Any] = {option.name: option.default for option in OWN.values()}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        option = OWN.get(word)
        if option is None:
            words.append(word + equals + value)
        elif option.kind == "flag":
            own[option.name] = True
        else:
            if not equals and not rest:
                raise ConfigError(f"{word} needs a value ({option.help})")
            own[option.name] = option.read(value if equals else rest.pop(0), "command line")
    return own, words


def work_of(own: dict[str, Any], options: Any, family: Any) -> Any:
    """The largest batch of the dataset, or what --resolution says."""
    from library.memory.plan_table import largest
    from library.memory.planner import Work

    if options.dataset_config or options.train_data_dir or options.in_json:
        from library.data.dataset import prepare

        return largest(prepare(options, family, family.pixel_multiple))
    width, height = own["resolution"] or (family.resolution, family.resolution)
    step = family.pixel_multiple
    if width % step or height % step:
        raise ConfigError(f"--resolution {width},{height}: sides of {family.title} are multiples of {step}")
    frames = own["frames"] or (family.sampling.get("frame_count", 1) if family.frames else 1)
    controls = ((width, height),) * family.least_controls
    return Work(width, height, own["batch_size"], frames, own["items"], own["items"], controls=controls)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"  {word:14} {option.help}" for word, option in OWN.items()))
        return
    own, words = split(sys.argv[1:])
    if "--output_dir" not in words:
        words += ["--output_dir", "."]
    options = option_machinery.parse(None, words, "plan.py")
    from library import noise_levels
    from library.memory import advice, plan_table, planner, released

    with released.completed(options, own["released"]) as (options, family, notes):
        work = work_of(own, options, family)
        plan = planner.make(options, family, work)
        plan["notes"] += notes
        if own["vram"]:
            plan["advice"] = advice.fitting(options, family, work, plan, own["vram"], last_resort=True)
        tokens = {(work.width // family.pixel_multiple) * (work.height // family.pixel_multiple): 1}
        found = noise_levels.levels(family, options, tokens)
    plan["noise_levels"] = found.as_dict()
    text = f"{plan_table.table(plan)}\n{noise_levels.text(found, options)}"
    print(json.dumps(plan, indent=2) if own["json"] else text)


if __name__ == "__main__":
    run(main)
