"""Control pictures of edit models: which ones belong to a picture, in which size the model sees them, their pixels.

In a control folder `cat.png` belongs to the picture `cat.jpg`, and so do `cat_0.png`, `cat_1.png`, ... in the order
of their numbers; with several folders those of the first folder come first. Sizes are musubi-tuner's: each control
keeps its own size (`no_resize_control`), or has its own proportions in an area of its own (`control_resolution`; both
together: only where it is larger). Without both it has the size that the model's own pipeline gives it, if the family
says one, and else covers the bucket of its picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.data import buckets, scan
from library.data.items import Fault, names
from library.errors import DatasetError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from library.data.buckets import Placement, Size
    from library.data.cache import ContentHashes
    from library.data.config import SubsetSpec
    from library.data.items import Item, Report

RULE = "a control has the name of its picture, or that name with _0, _1, ..., in any picture format"
NUMBERED = re.compile(r"(.+)_(\d+)$")


class _Folder:
    """The control pictures of one folder by stem, and by the stem of the picture that a numbered one belongs to."""

    def __init__(self, folder: Path, index: Path | None) -> None:
        self.folder, self.used = folder, set()
        self.exact: dict[str, scan.Found] = {}
        self.numbered: dict[str, dict[int, scan.Found]] = {}
        self.double: dict[str, list[list[str]]] = {}  # stem of a picture -> pairs of names that are the same control
        for found in scan.scan_folder(folder, None, index)[0]:
            stem = Path(found.path).stem
            self._put(self.exact, stem, stem, found)
            if match := NUMBERED.match(stem):
                self._put(self.numbered.setdefault(match[1], {}), int(match[2]), match[1], found)

    def _put(self, table: dict, key: str | int, picture: str, found: scan.Found) -> None:
        if key in table:
            both = sorted(Path(one.path).name for one in (table[key], found))
            self.double.setdefault(picture, []).append(both)
        table[key] = found

    def of(self, path: str, stems: set[str]) -> list[scan.Found]:
        """The controls of the picture `path`, in order; `stems` are those of all pictures. Raises DatasetError."""
        stem = Path(path).stem
        for one, other in self.double.get(stem, ()):
            if not {Path(one).stem, Path(other).stem} & stems - {stem}:  # else they are another picture's
                raise DatasetError(f"{self.folder}: {one} and {other} are the same control picture; remove one")
        numbered = self.numbered.get(stem, {})
        own = {n: found for n, found in numbered.items() if Path(found.path).stem not in stems}
        if stem not in self.exact and len(own) < len(numbered):
            rival = next(Path(found.path).name for n, found in sorted(numbered.items()) if n not in own)
            raise DatasetError(
                f"{self.folder}: {rival} fits the picture {Path(path).name} by its number and the picture "
                f"{Path(rival).stem} by its name; rename one of them"
            )
        numbers = sorted(own)
        first = min(numbers[0], 1) if numbers else 0  # 0 or 1, as people count
        if gaps := [n for n in range(first, first + len(numbers)) if n not in own]:
            raise DatasetError(
                f"{self.folder}: {names([Path(own[n].path).name for n in numbers])}, the control pictures of "
                f"{Path(path).name}, are not complete: number {gaps[0]} is missing"
            )
        chosen = ([self.exact[stem]] if stem in self.exact else []) + [own[n] for n in numbers]
        self.used |= {found.path for found in chosen}
        return chosen


def attach(rows: list[scan.Found], subset: SubsetSpec, index_of: Callable[[Path], Path | None], report: Report) -> None:
    """Give every row the controls of the subset's folders. Rows that name their own keep them.

    Faults: pictures without a control or a folder of them, gaps in numbers, a control that fits two pictures, one that
    is there twice.
    """
    open_rows = [row for row in rows if not row.controls]
    stems = {Path(row.path).stem for row in rows}
    chosen = {id(row): [] for row in open_rows}
    for path in map(Path, subset.control_directory):
        if not path.is_dir():
            missing = f"control_directory {path}: no such folder"
            for row in open_rows:
                _fault(report, row, f"it has no control picture, {missing}", f"have no control picture, {missing}")
            continue
        folder = _Folder(path, index_of(path))
        for row in open_rows:
            try:
                own = folder.of(row.path, stems)
            except DatasetError as error:
                _fault(report, row, str(error))
                continue
            chosen[id(row)] += own
            if not own:
                _fault(report, row, f"it has no control picture in {path}", f"have no control picture in {path}", RULE)
        if lone := sorted(Path(f.path).name for f in folder.exact.values() if f.path not in folder.used):
            report.notes.append(f"{path}: {len(lone)} control pictures belong to no picture ({names(lone, 3)})")
    for row in open_rows:
        row.controls = tuple(chosen[id(row)])


def _fault(report: Report, row: scan.Found, reason: str, *shared: str) -> None:
    if not row.problem:
        row.problem = reason
        report.faults.append(Fault(row.path, "picture", reason, *shared))


def check(rows: list[scan.Found], report: Report) -> None:
    """A control picture that cannot be read is a fault of its picture."""
    for row in rows:
        for control in row.controls:
            if problem := control.problem or report.bad.get(control.path, ""):
                _fault(report, row, f"its control picture {control.path}: {problem}")


def placement(
    size: Size, bucket: Size, subset: SubsetSpec, unit: int, published: Callable[[Size], Size | Placement] | None = None
) -> Placement:
    """How a control of `size` becomes what the model sees beside a picture in `bucket`; sides: multiples of `unit`.

    `published` is the family's `control_size`.
    """
    area = subset.control_resolution
    if area and not (subset.no_resize_control and size[0] * size[1] <= area[0] * area[1]):
        return buckets.of_area(size, area, unit)
    if subset.no_resize_control:
        return buckets.cropped(size, unit)
    return buckets.published(published(size)) if published else buckets.single(size, bucket)


def load(item: Item, flipped: bool = False) -> tuple[Tensor, ...]:
    """The controls of an item, each float32 [3,H,W] in -1..1, mirrored with their picture.

    Upright as EXIF says, alpha composed on white. Raises DatasetError naming a file that cannot be decoded.
    """
    from library.data import images

    return tuple(images.to_tensor(one[:, ::-1] if flipped else one) for one in pixels(item))


def pixels(item: Item) -> Iterator[np.ndarray]:
    """The controls of an item as `load` gives them, uint8 [H,W,3], not mirrored."""
    from library.data import images

    for path, placed in zip(item.controls, item.control_placements, strict=True):
        yield images.place(images.decode(path)[0], placed, item.subset.resize_interpolation)


def identity(item: Item, hashes: ContentHashes) -> str:
    """What the controls of an item are made from, for the identity of a cache entry; "" if there are none."""
    from library.data.images import placement_key

    pairs = zip(item.controls, item.control_placements, strict=True)
    return "".join(f" control {hashes.of(path)} {placement_key(placed, item.subset)}" for path, placed in pairs)
