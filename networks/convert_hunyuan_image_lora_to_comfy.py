"""Convert a HunyuanImage-2.1 LoRA from sd-scripts' names to ComfyUI's, or back with --reverse.

    python networks/convert_hunyuan_image_lora_to_comfy.py SRC DST [--reverse]

Only names change: the bytes are copied, metadata is kept, hashes are made anew. `--reverse` takes what this script
wrote and what training saves by default. Other conversions: tools/convert.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, for a script run as a file

from library.errors import ConfigError, run
from library.families import get_family
from library.headers import read_header
from library.rename import refuse, rename

WORDS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}  # of ComfyUI's own format
ENDINGS = (".lora_down.weight", ".lora_up.weight", ".alpha")
MOST_BLOCKS = 100  # of one kind; the released model has 20 and 40


def lora_names() -> dict[str, str]:
    """sd-scripts' module name -> ComfyUI's, both with underscores for dots, of a model of any number of blocks."""
    layouts = get_family("hunyuan_image").denoiser.layouts
    comfy = {row.ours: row.theirs for row in layouts["comfy"]}
    pairs = [(row.theirs, comfy[row.ours]) for row in layouts["original"]]
    out = {}
    for theirs, ours in pairs:
        for i in range(MOST_BLOCKS if "{i}" in theirs else 1):
            out[theirs.replace("{i}", str(i)).replace(".", "_")] = ours.replace("{i}", str(i))
    return out


def new_names(keys: list[str], is_reverse: bool) -> dict[str, str]:
    """Old key -> new key. Raises ValueError naming a key that is not of the expected kind."""
    names = lora_names()  # sd-scripts' module -> ComfyUI's
    table = {f"lora_unet_{a}": f"lora_unet_{b.replace('.', '_')}" for a, b in names.items()}
    if is_reverse:
        dotted = {f"diffusion_model.{b}": f"lora_unet_{a}" for a, b in names.items()}
        table = {b: a for a, b in table.items()} | dotted
    out = {}
    for key in keys:
        plain = next((key.removesuffix(a) + b for a, b in WORDS.items() if key.endswith(a)), key) if is_reverse else key
        ending = next((e for e in ENDINGS if plain.endswith(e)), "")
        stem = plain.removesuffix(ending)
        if not ending or stem not in table:
            raise ValueError(key)
        out[key] = table[stem] + ending
    return out


def convert(source: Path, target: Path, is_reverse: bool = False) -> str:
    """Convert one file; returns a line for people. Raises ConfigError if it is not what this script takes."""
    refuse(source, target)
    keys = list(read_header(source).tensors)
    expected = "ComfyUI's" if is_reverse else "sd-scripts'"
    try:
        names = new_names(keys, is_reverse)
    except ValueError as error:
        way = "without --reverse" if is_reverse else "with --reverse"
        hint = f"; it can be converted {way}" if _taken(keys, not is_reverse) else ""
        raise ConfigError(
            f"{source} is not a HunyuanImage-2.1 LoRA with {expected} names: {str(error)!r} is none of them{hint}"
        ) from None
    if not names:
        raise ConfigError(f"{source} holds no tensor")
    rename(source, target, names)
    changed = sum(old != new for old, new in names.items())
    return f"{source} -> {target}: {len(names)} tensors, {changed} renamed"


def _taken(keys: list[str], is_reverse: bool) -> bool:
    try:
        return bool(new_names(keys, is_reverse))
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="the LoRA to convert (.safetensors)")
    parser.add_argument("dst", type=Path, help="the file to write (.safetensors)")
    parser.add_argument("--reverse", action="store_true", help="from ComfyUI's names to sd-scripts'")
    arguments = parser.parse_args()
    print(convert(arguments.src, arguments.dst, arguments.reverse))


if __name__ == "__main__":
    run(main)
