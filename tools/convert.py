"""Convert a LoRA between file formats: python tools/convert.py SRC DST --to comfy|kohya|diffusers|original

Text encoders included; metadata is kept and hashes are recomputed. Before anything is written the new file's update is
held against the old one's, module by module. Widths come from `--base FILE...` (only headers are read), or without it
from the released sizes of the family.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its inspect.py hides the standard one

from library.errors import ConfigError, run
from library.families import FAMILIES, get_family

if TYPE_CHECKING:
    from library.families.family import Family
    from networks.formats import Modules
    from networks.names import Space

DTYPES = ("float32", "float16", "bfloat16")
EXACT = 1e-6  # relative: what float32 rounds is 1e-7, what half precision rounds 1e-4 and more


def arguments() -> argparse.Namespace:
    from networks.formats import FORMATS

    parser = argparse.ArgumentParser(description="Convert a LoRA between file formats, metadata kept.")
    parser.add_argument("source", type=Path, metavar="SRC", help="a LoRA in any known format (.safetensors)")
    parser.add_argument("target", type=Path, metavar="DST", help="the file to write (.safetensors)")
    parser.add_argument("--to", required=True, choices=list(FORMATS), help="format to write")
    parser.add_argument(
        "--model_type", choices=list(FAMILIES), help="family; default: the one whose names the file has"
    )
    parser.add_argument(
        "--base", type=Path, nargs="+", default=[], help="the model's files, where it is not of a released size"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format to write; default: the source's")
    parser.add_argument("--rounded", action="store_true", help="write the file also where that rounds the update")
    return parser.parse_args()


def convert(
    source: Path,
    target: Path,
    to: str,
    model_type: str | None = None,
    base: Path | Sequence[Path] = (),
    dtype: str | None = None,
    rounded: bool = False,
) -> str:
    """Convert one file; returns lines for people.

    Raises ConfigError if it is not a LoRA of a known family, and where the target's numbers would round the update
    unless `rounded`.
    """
    import torch

    from networks import formats

    if source.resolve() == target.resolve():
        raise ConfigError(f"{target} is the source itself; name another file")
    tensors = formats.load_file(source)
    if not formats.is_lora(tensors):
        raise ConfigError(f"{source} is not a LoRA: none of its {len(tensors)} keys is an adapter's")
    family, names, modules = find(tensors, source, model_type, [base] if isinstance(base, Path) else list(base))
    if to not in family.save_formats:
        known = ", ".join(family.save_formats)
        raise ConfigError(
            f"--to {to}: no program is known that reads {family.title} LoRAs in it; choose one of {known}"
        )
    wanted = getattr(torch, dtype) if dtype else _dtype(tensors)
    loss = _loss(modules, formats.read(formats.write(modules, to, names, wanted), names))
    if loss and not rounded:
        raise ConfigError(
            f"{source}: alpha / rank is no power of two, so {to} files in {str(wanted).removeprefix('torch.')} would "
            f"round {loss}; write it exactly with --dtype float32, or accept that with --rounded"
        )
    line = formats.save_file(modules, target, to, names, wanted, formats.header_of(source)[1])
    lines = [f"{source} ({formats.detect_format(tensors, names)}) -> {target} ({to}): {len(modules)} modules, {line}"]
    lines.append(f"rounded: {loss}" if loss else "the same update in every module")
    return "\n".join([*lines, *cost(modules, to, source, target)])


def find(
    tensors: dict[str, Any], source: Path, model_type: str | None, base: Sequence[Path]
) -> tuple[Family, tuple[Space, ...], Modules]:
    """The family and size whose names and shapes the LoRA has. Raises ConfigError naming what comes nearest."""
    from networks import formats, sizes

    errors = []
    for name in sizes.likely([model_type] if model_type else families_of(base), tensors):
        family = get_family(name)
        for title, names in sizes.spaces(family, tensors, base):
            try:
                return family, names, formats.read(tensors, names, str(source))
            except ConfigError as error:
                errors.append((name, f"{name} ({title}): {error}"))
    hint = "" if base else " (for a model that is not of a released size give --base FILE)"
    nearest = min((text for _, text in errors), key=lambda text: "another size" not in text)  # the names fit
    families = {name for name, _ in errors}
    others = f" (and to none of the other {len(families) - 1} families)" if len(families) > 1 else ""
    raise ConfigError(f"{nearest}{others}{hint}")


def families_of(base: Sequence[Path]) -> list[str]:
    """The families whose denoiser the base files can be; all without one. Raises ConfigError for files of none."""
    from library import checkpoints

    if not base:
        return list(FAMILIES)
    names, first = [], None
    for name in FAMILIES:
        for file in base:
            try:
                checkpoints.find_part(get_family(name).denoiser, file)
                names.append(name)
                break
            except ConfigError as error:
                first = first or error
    if not names:
        raise first or ConfigError(f"{base[0]} is no denoiser")
    return names


def _dtype(tensors: dict[str, Any]) -> Any:
    """The narrowest number format that holds all matrices."""
    import torch

    from networks.formats import split_key

    kinds = {value.dtype for key, value in tensors.items() if (split_key(key) or ("", ""))[1] in ("down", "up")}
    return functools.reduce(torch.promote_types, kinds)


def _loss(modules: Modules, written: Modules) -> str:
    """How much of the update is lost, "" = none."""
    from networks.formats import difference

    far = {name: value for name, value in difference(modules, written).items() if value > EXACT}
    return f"{len(far)} of {len(modules)} modules by up to {max(far.values()):.1e} of their update" if far else ""


def cost(modules: Modules, to: str, source: Path, target: Path) -> list[str]:
    """What putting separate q, k, v adapters on fused modules costs, if it had to be done."""
    from networks.formats import FORMATS

    joined = {name: content for name, content in modules.items() if content.get("blocks", 1) > 1}
    if not joined or FORMATS[to].layout != "original":
        return []
    ranks = sorted({content["down"].shape[0] for content in joined.values()})
    before, after = (path.stat().st_size / 1e6 for path in (source, target))
    return [
        f"{len(joined)} fused modules hold several separate adapters side by side, exactly, at rank "
        f"{', '.join(map(str, ranks))}: the sum of theirs ({before:.1f} -> {after:.1f} MB)"
    ]


def main() -> None:
    options = arguments()
    chosen = (options.model_type, options.base, options.dtype, options.rounded)
    print(convert(options.source, options.target, options.to, *chosen))


if __name__ == "__main__":
    run(main)
