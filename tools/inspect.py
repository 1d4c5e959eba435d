"""What any safetensors file or folder is, from its header alone.

python tools/inspect.py FILE [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Before anything else: this folder holds a file named like the standard library's `inspect`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from library.errors import run  # noqa: E402
from library.fingerprints import identify_path  # noqa: E402

LISTED = 8  # names shown of a long list


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    run(main)
