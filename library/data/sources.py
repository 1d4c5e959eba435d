"""From a subset's folder or metadata file to items with captions, masks, controls, clips; faults are said by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data import clips, controls, scan
from library.data.config import NAMING, SubsetSpec
from library.data.items import BLANK, Account, Fault, Item, Report
from library.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from library.families.family import FrameRule

TEXTS = (".txt", ".caption")  # usual extensions of captions
KNOWN = (".txt", ".caption", ".json", ".npz", ".toml", ".md")  # what lies beside pictures


def index_folder(folder: Path, options: Any) -> Path:
    """Where what was read of a folder is remembered."""
    if options.cache_dir:
        return Path(options.cache_dir) / hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return folder / ".lorasmith"


def read_subset(subset: SubsetSpec, options: Any, report: Report) -> list[scan.Found]:
    """The pictures and videos of a subset with captions and controls; all files of it are counted as found.

    Files that cannot be used are faults of the report, and so is a folder or a metadata file that gives none.
    """
    try:
        rows, what = _listed(subset, options, report)
    except DatasetError as error:
        kind = "metadata file" if subset.metadata_file else "folder"
        reason = str(error).removeprefix(f"metadata_file {subset.source}").lstrip(": ")  # its name stands before it
        report.faults.append(Fault(subset.source, kind, reason, counted=False))
        return []
    report.found += len(rows)
    if report.bad:
        for row in rows:
            row.problem = row.problem or report.bad.get(row.path, "")
    if faulty := [row for row in rows if row.problem]:
        report.faults += [Fault(row.path, what, row.problem) for row in faulty]
        rows = [row for row in rows if not row.problem]
    if subset.control_directory:
        controls.attach(rows, subset, lambda folder: index_folder(folder, options), report)
    controls.check(rows, report)
    return [row for row in rows if not row.problem]


def _listed(subset: SubsetSpec, options: Any, report: Report) -> tuple[list[scan.Found], str]:
    """(all files of a subset, what they are). Raises DatasetError where it holds nothing."""
    if subset.metadata_file:
        from library.data.metadata_file import read_metadata

        return read_metadata(subset, index_folder(subset.folder, options)), "file"
    if subset.video_directory:
        from library.data import scan_videos

        return _read_folder("video", scan.VIDEOS, scan_videos.scan_folder, subset, options, report), "video"
    return _read_folder("picture", scan.EXTENSIONS, scan.scan_folder, subset, options, report), "picture"


def _read_folder(
    what: str, extensions: set[str], scan_folder: Any, subset: SubsetSpec, options: Any, report: Report
) -> list[scan.Found]:
    folder, key = subset.folder, "video_directory" if subset.video_directory else "image_dir"
    if not folder.is_dir():
        raise DatasetError(f"there is no such folder{', 10_cat for instance' * (folder.name == NAMING)} ({key})")
    rows, others = scan_folder(folder, subset.caption_extension, index_folder(folder, options))
    if strange := sorted(name for name in others if Path(name).suffix not in KNOWN):
        report.notes.append(f"{folder}: {len(strange)} files are no {what}s ({', '.join(strange[:3])})")
    if not rows:
        raise DatasetError(f"there is no {what} in it ({key}; {', '.join(sorted(extensions))})")
    return rows


def items_of(
    row: scan.Found, number: int, subset: SubsetSpec, dataset: int, options: Any, rule: FrameRule | None, report: Report
) -> list[Item]:
    """The item of one picture, or one for every clip of a video, not yet placed; `number` is the row's own.

    None for one without caption or mask and for a video that gives no times: faults of the report.
    """
    caption = row.caption or subset.class_tokens
    if caption is None:
        state = "is empty" if row.caption is not None else "is missing"
        file = f"{Path(row.path).stem}{subset.caption_extension}"
        other = next((e for e in TEXTS if row.caption is None and Path(row.path).with_suffix(e).is_file()), None)
        advice = "write one, or give the subset class_tokens as the caption of all"
        advice = f"there is {Path(row.path).stem}{other}: set caption_extension = '{other}'" if other else advice
        return _fault(row, report, f"its caption ({file}) {state} ({advice})")
    weight = options.prior_loss_weight if subset.is_reg else 1.0
    item = Item(
        0, row.path, caption, row.size, row.stat, subset, dataset, BLANK, subset.num_repeats, subset.is_reg, weight
    )
    item.row, item.frames = number, 1 if rule else 0
    if row.video is not None:
        try:
            return _clips_of(item, row, subset, rule, report)
        except ValueError as error:
            return _fault(row, report, str(error))
    if subset.conditioning_data_dir:
        item.mask_path = _mask_of(Path(row.path), subset)
        if item.mask_path is None:
            return _fault(row, report, f"there is no mask {Path(row.path).stem}.* in {subset.conditioning_data_dir}")
        if problem := report.bad.get(str(item.mask_path)):
            return _fault(row, report, f"its mask {item.mask_path}: {problem}")
    if row.controls:
        if moving := subset.moving:
            raise ConfigError(
                f"{subset.source}: {', '.join(moving)} would change {Path(row.path).name} and not its controls; "
                "leave out one or the other"
            )
        item.controls = tuple(Path(control.path) for control in row.controls)
        item.control_sizes = tuple(control.size for control in row.controls)
    return [item]


def _fault(row: scan.Found, report: Report, reason: str) -> list[Item]:
    report.faults.append(Fault(row.path, "picture" if row.video is None else "video", reason))
    return []


def _clips_of(item: Item, row: scan.Found, subset: SubsetSpec, rule: FrameRule | None, report: Report) -> list[Item]:
    name, video = Path(row.path).name, row.video
    if rule is None:
        raise ConfigError(f"{subset.source}: {name} is a video, and this model makes pictures; take it out")
    if subset.conditioning_data_dir or subset.alpha_mask:
        raise ConfigError(f"{subset.source}: masks belong to pictures, and {name} is a video; give it its own subset")
    cut = clips.cut(video, subset, rule)
    report.videos.append(Account(item.row, item.dataset, video, cut))
    report.drop("videos that are shorter than every clip that was asked for", not cut.windows)
    return [
        replace(item, frames=frames, clip=clips.Clip(video, cut.order, start, frames, cut.fps))
        for start, frames in cut.windows
    ]


def _mask_of(path: Path, subset: SubsetSpec) -> Path | None:
    folder = Path(subset.conditioning_data_dir or "")
    return next((p for e in sorted(scan.EXTENSIONS) if (p := folder / (path.stem + e)).is_file()), None)
