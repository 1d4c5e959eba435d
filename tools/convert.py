"""Convert a LoRA between file formats: python tools/convert.py SRC DST --to comfy|kohya|diffusers

Metadata is kept and hashes are recomputed. Widths come from the base model: from `--base FILE` (only its header is
read), or without it from the family's released size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its inspect.py hides the standard one

from library.errors import ConfigError, run
from library.families import FAMILIES, get_family

if TYPE_CHECKING:
    from library.families.family import Part
    from library.layout import Layout


def arguments() -> argparse.Namespace:
    from networks.formats import FORMATS

    parser = argparse.ArgumentParser(description="Convert a LoRA between file formats, metadata kept.")
    parser.add_argument("source", type=Path, metavar="SRC", help="a LoRA in any known format (.safetensors)")
    parser.add_argument("target", type=Path, metavar="DST", help="the file to write (.safetensors)")
    parser.add_argument("--to", required=True, choices=list(FORMATS), help="format to write")
    parser.add_argument(
        "--model_type", choices=list(FAMILIES), help="family; default: the one whose names the file has"
    )
    parser.add_argument("--base", type=Path, help="the denoiser's file, for a model that is not of the released size")
    return parser.parse_args()


def convert(source: Path, target: Path, to: str, model_type: str | None = None, base: Path | None = None) -> str:
    """Convert one file; returns lines for people. Raises ConfigError if it is not a LoRA of a known family."""
    from networks import formats

    if source.resolve() == target.resolve():
        raise ConfigError(f"{target} is the source itself; name another file")
    tensors = formats.load_file(source)
    if not formats.is_lora(tensors):
        raise ConfigError(f"{source} is not a LoRA: none of its {len(tensors)} keys is an adapter's")
    metadata = formats.header_of(source)[1]
    names = [model_type] if model_type else families_of(base)
    errors = []
    for name in names:
        try:
            layout = layout_of(get_family(name).denoiser, base)
            modules = formats.read(tensors, layout, str(source))
            break
        except ConfigError as error:
            errors.append(f"{name}: {error}")
    else:
        hint = "" if base else " (for a model that is not of the released size give --base FILE)"
        nearest = min(errors, key=lambda error: "another size" not in error)  # the names fit, the widths do not
        others = f" (and to none of the other {len(errors) - 1} families)" if len(errors) > 1 else ""
        raise ConfigError(f"{nearest}{others}{hint}")
    before = formats.detect_format(tensors)
    dtype = next(value.dtype for key, value in tensors.items() if formats.split_key(key)[1] == "down")
    line = formats.save_file(modules, target, to, layout, dtype, metadata)
    return "\n".join([f"{source} ({before}) -> {target} ({to}): {len(modules)} modules, {line}", *cost(modules, to)])


def families_of(base: Path | None) -> list[str]:
    """The families whose denoiser the base file can be; all without one. Raises ConfigError for a file of none."""
    from library import checkpoints

    if base is None:
        return list(FAMILIES)
    names, first = [], None
    for name in FAMILIES:
        try:
            checkpoints.find_part(get_family(name).denoiser, base)
            names.append(name)
        except ConfigError as error:
            first = first or error
    if not names:
        raise first or ConfigError(f"{base} is no denoiser")
    return names


def layout_of(part: Part, base: Path | None) -> Layout:
    """The original layout of a model of the base file's size, or of the released size, built on the meta device."""
    import torch

    from library import checkpoints
    from library.layout import shapes_of

    config = {}
    if base:
        checkpoint, name = checkpoints.find_part(part, base)
        config = part.config(checkpoint.shapes, checkpoints.facts(part, checkpoint), name)
    with torch.device("meta"):
        shapes = shapes_of(part.build(config))
    return checkpoints.layout_of(part, next(iter(part.layouts)), shapes)


def cost(modules: dict, to: str) -> list[str]:
    """What putting separate q, k, v adapters on fused modules costs, if it had to be done."""
    from networks.formats import FORMATS

    joined = {name: content for name, content in modules.items() if content.get("blocks", 1) > 1}
    if not joined or FORMATS[to].layout != "original":
        return []
    ranks = sorted({content["down"].shape[0] for content in joined.values()})
    return [
        f"{len(joined)} fused modules hold several separate adapters side by side, exactly, at rank "
        f"{', '.join(map(str, ranks))}: the sum of theirs"
    ]


def main() -> None:
    options = arguments()
    print(convert(options.source, options.target, options.to, options.model_type, options.base))


if __name__ == "__main__":
    run(main)
