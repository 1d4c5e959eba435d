"""From a subset's folder or metadata file to items with captions, masks, controls; what is wrong is said by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from library.data import controls, scan
from library.data.config import SubsetSpec
from library.data.items import BLANK, SHOWN, Item, Report
from library.errors import ConfigError, DatasetError

KNOWN = (".txt", ".caption", ".json", ".npz", ".toml", ".md")  # what lies beside pictures


def index_folder(folder: Path, options: Any) -> Path:
    """Where what was read of a folder is remembered."""
    if options.cache_dir:
        return Path(options.cache_dir) / hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return folder / ".lorasmith"


def read_subset(subset: SubsetSpec, options: Any, report: Report) -> list[scan.Found]:
    """The pictures of a subset with captions and controls. Raises DatasetError naming what cannot be used."""
    if subset.metadata_file:
        from library.data.metadata_file import read_metadata

        rows = read_metadata(subset)
    else:
        rows = _read_folder(subset, options, report)
    if faults := scan.problems(rows):
        raise DatasetError(
            f"{len(faults)} pictures cannot be used: {'; '.join(faults[:SHOWN])}; repair them or take them out"
        )
    if subset.control_directory:
        report.notes += controls.attach(rows, subset, lambda folder: index_folder(folder, options))
    controls.check(rows)
    return rows


def _read_folder(subset: SubsetSpec, options: Any, report: Report) -> list[scan.Found]:
    folder = Path(subset.image_dir or "")
    if not folder.is_dir():
        raise DatasetError(f"image_dir {folder}: no such folder")
    rows, others = scan.scan_folder(folder, subset.caption_extension, index_folder(folder, options))
    strange = [
        name for name in others if Path(name).suffix not in (".txt", ".caption", ".json", ".npz", ".toml", ".md")
    ]
    if strange:
        report.notes.append(f"{folder}: {len(strange)} files are no pictures ({', '.join(sorted(strange)[:3])})")
    if not rows:
        raise DatasetError(f"image_dir {folder}: there is no picture in it ({', '.join(sorted(scan.EXTENSIONS))})")
    return rows


def item_of(row: scan.Found, subset: SubsetSpec, number: int, options: Any) -> Item:
    """The item of one picture, not yet placed. Raises DatasetError for a missing caption or mask."""
    caption = row.caption or subset.class_tokens
    if caption is None:
        what = "is empty" if row.caption is not None else "is missing"
        raise DatasetError(
            f"{row.path}: its caption ({Path(row.path).stem}{subset.caption_extension}) {what}; "
            "write one, or give the subset class_tokens as the caption of all"
        )
    mask = _mask_of(Path(row.path), subset) if subset.conditioning_data_dir else None
    weight = options.prior_loss_weight if subset.is_reg else 1.0
    item = Item(
        0, row.path, caption, row.size, row.stat, subset, number, BLANK, subset.num_repeats, subset.is_reg, weight, mask
    )
    if row.controls:
        if moving := subset.moving:
            raise ConfigError(
                f"{subset.source}: {', '.join(moving)} would change {Path(row.path).name} and not its controls; "
                "leave out one or the other"
            )
        item.controls = tuple(Path(control.path) for control in row.controls)
        item.control_sizes = tuple(control.size for control in row.controls)
    return item


def _mask_of(path: Path, subset: SubsetSpec) -> Path:
    folder = Path(subset.conditioning_data_dir or "")
    mask = next((p for e in sorted(scan.EXTENSIONS) if (p := folder / (path.stem + e)).is_file()), None)
    if mask is None:
        raise DatasetError(f"{path}: there is no mask {path.stem}.* in {folder}")
    return mask
