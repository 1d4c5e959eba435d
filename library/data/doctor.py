"""The data doctor: a dataset with every file decoded once, what cannot be used left out or refused, what is odd found.

The same before a run and in tools/check_dataset.py. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data import findings, wording
from library.data.dataset import Dataset, prepare
from library.data.decoded import Look, look_at
from library.data.findings import Finding
from library.data.sources import index_folder

if TYPE_CHECKING:
    from library.data.items import Item


@dataclass
class Examined:
    dataset: Dataset
    looks: Mapping[str, Look] = field(default_factory=dict)  # of every picture, mask, control and frame of a folder
    findings: list[Finding] = field(default_factory=list)
    lengths: wording.Lengths | None = None  # of the captions; None = not measured
    unmeasured: str = ""  # why not
    words: list[wording.Coverage] = field(default_factory=list)  # only where they were asked for


def examine(
    options: Any,
    family: Any,
    pixel_multiple: int,
    *,
    collect: bool = False,
    rank: int = 0,
    say: Callable[[str], None] = print,
) -> Examined:
    """Prepare the dataset and look at all of its files. Raises as `prepare`; of `collect` see there.

    With --check_data headers nothing is decoded.
    """
    if options.check_data == "headers":
        return Examined(prepare(options, family, pixel_multiple, collect=collect))
    dataset = prepare(options, family, pixel_multiple, collect=True)
    items = (*dataset.items, *dataset.validation)
    files = {file: index_folder(item.subset.folder, options) for item in items for file in _files(item)}
    looks = look_at(files, say, rank)
    bad = _problems(items, looks)
    if bad or dataset.report.faults or not dataset.items:
        dataset = prepare(options, family, pixel_multiple, bad=bad, collect=collect)
    return Examined(dataset, looks, findings.find(dataset, looks))


def _files(item: Item) -> Iterator[str]:
    """Every picture file that belongs to an item; a video file was decoded when its frames were counted."""
    if item.clip is None:
        yield item.file
    else:
        yield from (str(Path(item.file) / name) for name in item.clip.video.names)
    if item.mask_path is not None:
        yield str(item.mask_path)
    yield from map(str, item.controls)


def _problems(items: tuple[Item, ...], looks: Mapping[str, Look]) -> dict[str, str]:
    """File -> why it cannot be used: damaged, or of another size than its header, or its picture, says."""
    bad: dict[str, str] = {}

    def expect(file: str, size: tuple[int, int], whose: str) -> None:
        one = looks[file]
        if one.problem:
            bad[file] = one.problem
        elif one.size != tuple(size):
            bad[file] = f"it is {one.size[0]}x{one.size[1]}, {whose} {size[0]}x{size[1]}; make them equal"

    for item in items:
        if item.clip is None:
            expect(item.file, item.size, "its header says")
        for name in item.clip.video.names if item.clip else ():
            if problem := looks[str(Path(item.file) / name)].problem:
                bad.setdefault(item.file, f"its frame {name}: {problem}")
        if item.mask_path is not None:
            expect(str(item.mask_path), item.size, "its picture")
        for control, size in zip(item.controls, item.control_sizes, strict=True):
            expect(str(control), size, "its header says")
    return bad


def as_dict(examined: Examined) -> dict[str, Any]:
    """Everything, for machines."""
    data, report, lengths = examined.dataset, examined.dataset.report, examined.lengths
    return {
        "found": report.found,
        "trained": report.trained,
        "held_out": report.held_out,
        "dropped": report.dropped,
        "notes": report.notes,
        "faults": [{"file": one.file, "reason": one.reason} for one in dict.fromkeys(report.faults)],
        "findings": [
            {"kind": one.kind, "level": one.level, "file": one.file, "text": one.text} for one in examined.findings
        ],
        "captions_measured": lengths is not None,
        "captions_unmeasured": examined.unmeasured,
        "tokens": lengths.summary() if lengths else {},
        "words": [wording.as_dict(one) for one in examined.words],
        "subsets": {
            source: {"files": files, "items_an_epoch": count} for source, (files, count) in findings.seen(data).items()
        },
        "items": [
            *(_item(item, False, lengths) for item in data.items),
            *(_item(item, True, lengths) for item in data.validation),
        ],
    }


def _item(item: Item, held_out: bool, lengths: wording.Lengths | None) -> dict[str, Any]:
    place, facts = item.placement, findings.Geometry.of(item)
    return {
        "file": item.file,
        "caption": findings.final_caption(item),
        "caption_changes": findings.is_shuffled(item),
        "cut": lengths.ends.get(item.file, "") if lengths else "",
        "tokens": dict(lengths.tokens[item.file]) if lengths else {},
        "size": list(item.size),
        "resized": list(place.resized),
        "crop": [place.left, place.top, *place.bucket],
        "scale": round(facts.scale, 4),
        "lost": round(facts.lost, 4),
        "frames": item.frames,
        "first_frame": item.clip.start if item.clip else 0,
        "repeats": item.repeats,
        "held_out": held_out,
        "mask": str(item.mask_path) if item.mask_path else None,
        "controls": [str(path) for path in item.controls],
    }
