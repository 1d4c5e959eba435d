"""What any safetensors file or folder is, from its header alone.

python tools/inspect.py FILE [--json]
python tools/inspect.py LORA --base MODEL [TEXT_ENCODER ...] [--json]

The second holds every key of a LoRA, its name and its shape, against the model that it is meant for, as ComfyUI would;
the exit code is 2 if not all of them match.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Before anything else: this folder holds a file named like the standard library's `inspect`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from library.errors import ConfigError, run  # noqa: E402
from library.fingerprints import identify_path  # noqa: E402

LISTED = 8  # names shown of a long list


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    parser.add_argument(
        "--base", nargs="+", metavar="MODEL", help="hold a LoRA against this model (and the text encoders that follow)"
    )
    arguments = parser.parse_args()
    if arguments.base:
        hold_against(arguments.file, arguments.base, arguments.json)
        return
    found = identify_path(arguments.file)
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=1))
        return
    print(f"{arguments.file}: {found.sentence}")
    for name, value in found.as_dict().items():
        if isinstance(value, list):
            more = f" ... ({len(value)} in all)" if len(value) > LISTED else ""
            value = ", ".join(value[:LISTED]) + more
        elif isinstance(value, dict):
            value = ", ".join(f"{count} {dtype}" for dtype, count in value.items())
        print(f"  {name:<11} {value}")


def hold_against(lora: str, base: list[str], as_json: bool) -> None:
    """Print how a LoRA fits a model. Raises ConfigError if it does not wholly."""
    from networks.check import check, text

    found = check(lora, base)
    print(json.dumps(found.as_dict(), indent=1) if as_json else text(found))
    if found.unmatched:
        raise ConfigError(
            f"{lora} does not fit {found.base}: {len(found.unmatched)} of {found.total} keys would change nothing; "
            "take the model that it was trained on, or convert it (tools/convert.py)"
        )


if __name__ == "__main__":
    run(main)
