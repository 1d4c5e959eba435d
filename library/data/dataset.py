"""The items of a run: found = trained + held out + dropped, each with its bucket; and the order of every epoch.

Preparing reads headers and captions only and imports no torch. The order is a pure function of seed and epoch.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data import buckets, clips, controls
from library.data.buckets import Placement
from library.data.captions import has_tags
from library.data.config import DatasetSpec, load_dataset_config
from library.data.items import Fault, Item, Report, names, sentence
from library.data.sources import items_of, read_subset
from library.data.video_table import video_table
from library.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from library.families.family import FrameRule


MOST = 20_000_000  # items of an epoch; more would fill the memory


@dataclass(frozen=True)
class BatchPlan:
    dataset: int
    bucket: tuple[int, ...]
    entries: tuple[tuple[int, int], ...]  # (item, repeat)


def _digest(*parts: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def item_seed(seed: int, step: int, item: int, repeat: int) -> int:
    """A 63-bit seed for one item in one optimizer step."""
    return _digest(seed, step, item, repeat)


def item_rng(seed: int, step: int, item: int, repeat: int) -> random.Random:
    return random.Random(item_seed(seed, step, item, repeat))


class Dataset:
    def __init__(
        self,
        specs: tuple[DatasetSpec, ...],
        items: list[Item],
        held_out: list[Item],
        report: Report,
        seed: int,
        rule: FrameRule | None = None,
    ) -> None:
        self.specs, self.items, self.validation, self.report, self.seed = specs, items, held_out, report, seed
        self.rule = rule  # of a video model
        # (dataset, bucket, buckets of the controls) -> (item, repeat): what can be in one batch
        self.groups: dict[tuple[int, tuple, tuple], list[tuple[int, int]]] = defaultdict(list)
        for item in items:
            entries = self.groups[item.dataset, item.bucket, item.control_buckets]
            entries += [(item.index, k) for k in range(item.repeats)]
        self._order: tuple[int, list[BatchPlan]] = (-1, [])

    def batches(self, epoch: int) -> list[BatchPlan]:
        """Every batch of an epoch: repeats shuffled inside their bucket, the last batch short, batches shuffled."""
        if self._order[0] != epoch:
            rng, plans = random.Random(_digest(self.seed, epoch)), []
            for (dataset, bucket, _), entries in self.groups.items():
                entries, size = list(entries), self.specs[dataset].batch_size
                rng.shuffle(entries)
                plans += [
                    BatchPlan(dataset, bucket, tuple(entries[i : i + size])) for i in range(0, len(entries), size)
                ]
            rng.shuffle(plans)
            self._order = (epoch, plans)
        return self._order[1]

    def print_table(self) -> str:
        """found = trained + held out + dropped in files, the buckets, and what becomes of every video."""
        r, what = self.report, "pictures"
        if r.videos:
            what = "videos" if len(r.videos) == r.found else "pictures and videos"
        lines = [
            f"{what}: found {r.found} = trained {r.trained} + held out {r.held_out} + dropped {sum(r.dropped.values())}"
        ]
        lines += [f"  dropped {count}: {reason}" for reason, count in r.dropped.items()]
        for (dataset, bucket, beside), entries in sorted(self.groups.items()):
            size, seen = self.specs[dataset].batch_size, ", ".join(f"{w}x{h}" for w, h in beside)
            members = {i for i, _ in entries}
            kind = "clips" if any(self.items[i].clip for i in members) else "pictures"
            lines.append(
                f"  dataset {dataset + 1}, bucket {'x'.join(map(str, bucket))}{seen and ' with controls ' + seen}: "
                f"{len(members)} {kind}, "
                f"{len(entries)} with repeats, {math.ceil(len(entries) / size)} batches of {size}"
            )
        if r.videos:
            lines += video_table(r.videos, self.items, self.validation)
        return "\n".join(lines + [f"  note: {note}" for note in r.notes])

    def metadata(self) -> dict[str, str]:
        """sd-scripts' ss_* keys about the data; folder names only."""
        per_dataset, frequencies, folders = [], defaultdict(Counter), {}
        for number, spec in enumerate(self.specs):
            members = [item for item in self.items if item.dataset == number]
            found = Counter(item.bucket for item in members)
            info = {
                str(k): {"resolution": list(bucket[:2]), "count": count} | ({"frames": bucket[2]} if bucket[2:] else {})
                for k, (bucket, count) in enumerate(sorted(found.items()))
            }
            per_dataset.append({
                "is_dreambooth": not any(s.metadata_file for s in spec.subsets),
                "batch_size_per_device": spec.batch_size,
                "num_train_images": sum(i.repeats for i in members if not i.is_reg),
                "num_reg_images": sum(i.repeats for i in members if i.is_reg), "resolution": list(spec.resolution),
                "enable_bucket": spec.enable_bucket, "min_bucket_reso": spec.min_bucket_reso,
                "max_bucket_reso": spec.max_bucket_reso, "bucket_info": {"buckets": info},
            })  # fmt: skip
            for item in members:
                name = Path(item.subset.source).name
                entry = folders.setdefault(name, {"n_repeats": item.repeats, "img_count": 0})
                entry["img_count"] += 1
                frequencies[name].update(tag.strip() for tag in item.caption.split(",") if tag.strip())
        count = sum(item.repeats for item in self.items if not item.is_reg)
        values = {
            "ss_num_train_images": count, "ss_num_reg_images": sum(i.repeats for i in self.items if i.is_reg),
            "ss_num_validation_images": len(self.validation), "ss_num_batches_per_epoch": len(self.batches(0)),
            "ss_datasets": per_dataset, "ss_tag_frequency": {k: dict(v) for k, v in frequencies.items()},
            "ss_dataset_dirs": folders,
        }  # fmt: skip
        return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: its walks over tens of thousands of new records cost a tenth of preparing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()  # and back, among the old ones: else the first new object starts a walk over all of them
            gc.unfreeze()
            gc.enable()


@_uncollected()
def prepare(
    options: Any, family: Any, pixel_multiple: int, *, bad: Mapping[str, str] | None = None, collect: bool = False
) -> Dataset:
    """Scan, check, split and place. Raises ConfigError for the description and DatasetError for the files.

    Files that cannot be used are an error, with --skip_bad they are left out; with `collect` they only are
    `report.faults`. `bad` are more of them, file -> reason. Without a family nothing is refused that only some models
    take, except videos.
    """
    specs = load_dataset_config(options)
    report, trained, held_out = Report(bad=bad or {}), [], []
    rule, sizes = (None, ()) if family is None else (family.frames, family.sizes)
    seen: set[tuple] = set()
    for number, spec in enumerate(specs):
        _check_fixed(spec, family, number) if sizes else _check_steps(spec, pixel_multiple, number)
        items = []
        for subset in spec.subsets:
            key = (number, subset.source, subset.conditioning_data_dir, subset.control_directory, subset.frame_keys)
            rows = read_subset(subset, options, report)
            if key in seen or subset.num_repeats < 1:
                report.drop(
                    f"{subset.source} is there twice" if key in seen else f"num_repeats {subset.num_repeats}", len(rows)
                )
                continue
            seen.add(key)
            for k, row in enumerate(rows, report.found - len(rows)):
                items += items_of(row, k, subset, number, options, rule, report)
            if rule:
                report.notes += clips.notes([row.video for row in rows if row.video], subset, rule)
        if family is not None and (collect or options.skip_bad):
            items = _fitting(items, family, report)
        items = _balance(items, report)
        train, held = _split(items, spec, options)
        _place(train + held, spec, sizes)
        if family is not None:
            _check_controls(train + held, family)
            _check_frames(train + held, family)
        _place_controls(train + held, pixel_multiple, family.control_size if family else None)
        trained += train
        held_out += held
    trained, held_out = _on_one_side(trained, held_out, report)
    for k, item in enumerate(trained):
        item.index = k
    for k, item in enumerate(held_out):
        item.index, item.repeats = len(trained) + k, 1
    report.trained, report.held_out = len(rows_of(trained)), len(rows_of(held_out))
    _settle_faults(report, bool(options.skip_bad), collect)
    if not trained and not collect:
        raise DatasetError(
            f"there is nothing to train on: found {report.found} files, held out {report.held_out}, "
            f"dropped {report.dropped or 'none'}; look at the paths in the dataset description"
        )
    if (count := sum(item.repeats for item in trained)) > MOST:
        raise ConfigError(f"an epoch would have {count} items, above {MOST}; lower num_repeats")
    return Dataset(specs, trained, held_out, report, options.seed, rule)


def _settle_faults(report: Report, skip: bool, collect: bool) -> None:
    """Raise DatasetError, or count and name the files that are left out."""
    if not report.faults:
        return
    if not skip and not collect:
        raise DatasetError(
            f"{sentence(report.faults)}; repair them, take them out, or go on without them with --skip_bad"
        )
    report.drop("cannot be used", sum(fault.counted for fault in report.faults))
    report.notes += [f"left out {fault.file}: {fault.reason}" for fault in report.faults if skip]


def _check_steps(spec: DatasetSpec, multiple: int, number: int) -> None:
    if spec.bucket_sizes:
        odd = [size for size in spec.bucket_sizes if size[0] % multiple or size[1] % multiple]
        if odd or not spec.enable_bucket or spec.bucket_no_upscale:
            why = f"{odd[0][0]}x{odd[0][1]} is no multiple of {multiple}" if odd else "enable_bucket alone goes with it"
            raise ConfigError(f"dataset {number + 1}: bucket_sizes: {why}; change it")
    elif spec.enable_bucket:
        if spec.bucket_reso_steps % multiple:
            raise ConfigError(
                f"dataset {number + 1}: bucket_reso_steps {spec.bucket_reso_steps} is no multiple of {multiple}, "
                "which this model needs"
            )
        low, high = min(spec.resolution), max(spec.resolution)
        if spec.bucket_reso_steps > low:
            raise ConfigError(
                f"dataset {number + 1}: bucket_reso_steps {spec.bucket_reso_steps} is above the resolution "
                f"{spec.resolution[0]}x{spec.resolution[1]}; lower it"
            )
        if not spec.bucket_no_upscale and not spec.min_bucket_reso <= low <= high <= spec.max_bucket_reso:
            raise ConfigError(
                f"dataset {number + 1}: resolution {spec.resolution[0]}x{spec.resolution[1]} is outside of "
                f"min_bucket_reso {spec.min_bucket_reso} to max_bucket_reso {spec.max_bucket_reso}; change one of them"
            )
    elif spec.resolution[0] % multiple or spec.resolution[1] % multiple:
        raise ConfigError(
            f"dataset {number + 1}: resolution {spec.resolution[0]}x{spec.resolution[1]} is no multiple of {multiple}; "
            "change it or set enable_bucket = true"
        )


def _check_fixed(spec: DatasetSpec, family: Any, number: int) -> None:
    """Of a model that takes a few sizes and numbers of frames only. Raises ConfigError for others."""
    sizes, only = family.sizes, family.frames.only if family.frames else ()
    where = f"dataset {number + 1}"
    if tuple(spec.resolution) not in sizes:
        known = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise ConfigError(
            f"{where}: resolution {spec.resolution[0]}x{spec.resolution[1]} is none that {family.title} was trained "
            f"at ({known}); take one of these, or add --i_know_what_i_am_doing"
        )
    if spec.bucket_no_upscale:
        raise ConfigError(f"{where}: bucket_no_upscale does not go with the fixed sizes of {family.title}; remove it")
    for subset in spec.subsets:
        if wrong := [frames for frames in subset.target_frames or () if only and frames not in only]:
            raise ConfigError(
                f"{where}: target_frames {wrong[0]} is none that {family.title} was trained at "
                f"({', '.join(map(str, only))}); take one of these, or add --i_know_what_i_am_doing"
            )


def rows_of(items: Iterable[Item]) -> set[int]:
    """The files that these items are of."""
    return {item.row for item in items}


def _balance(items: list[Item], report: Report) -> list[Item]:
    """Regularisation pictures, repeated one by one until they match the training pictures; the surplus is dropped."""
    train, reg = [i for i in items if not i.is_reg], [i for i in items if i.is_reg]
    wanted = sum(item.repeats for item in train)
    if not reg:
        return items
    kept = reg[: max(wanted, 0)]
    lost = len(rows_of(reg) - rows_of(kept))
    report.drop("regularisation pictures beyond the number of training pictures", lost)
    for k, item in enumerate(kept):
        item.repeats = wanted // len(kept) + (k < wanted % len(kept))
    return train + kept


def _split(items: list[Item], spec: DatasetSpec, options: Any) -> tuple[list[Item], list[Item]]:
    """Held-out pictures: those of the files that come first in an order which depends on seed and names alone.

    So a file that is added moves at most one other to the other side, and a folder may be moved. Regularisation
    pictures are never held out.
    """
    if not spec.validation_split:
        return items, []
    candidates = list(dict.fromkeys(item.file for item in items if not item.is_reg))
    seed = spec.validation_seed if spec.validation_seed is not None else options.seed
    count = round(len(candidates) * spec.validation_split)
    chosen = set(sorted(candidates, key=lambda file: _digest(seed, *Path(file).parts[-2:]))[:count])
    held = [item for item in items if item.file in chosen and not item.is_reg]
    return [item for item in items if item.file not in chosen or item.is_reg], held


def _on_one_side(trained: list[Item], held_out: list[Item], report: Report) -> tuple[list[Item], list[Item]]:
    """A file that one dataset holds out is held out of the others, too."""
    if not held_out or len({item.dataset for item in (*trained, *held_out)}) < 2:
        return trained, held_out
    held = {os.path.realpath(item.file) for item in held_out}
    moved = [item for item in trained if not item.is_reg and os.path.realpath(item.file) in held]
    if not moved:
        return trained, held_out
    files = list(dict.fromkeys(item.path.name for item in moved))
    report.notes.append(f"{len(files)} files are held out of every dataset, since one holds them out: {names(files)}")
    rows = rows_of(moved)
    return [item for item in trained if item.row not in rows], [*held_out, *moved]


def _place(items: Iterable[Item], spec: DatasetSpec, sizes: tuple[tuple[int, int], ...] = ()) -> None:
    """The bucket of every item; `sizes` are the only ones that the model takes, if there are any."""
    predefined = sorted(sizes) or buckets.bucket_list(
        spec.resolution, spec.min_bucket_reso // spec.bucket_reso_steps * spec.bucket_reso_steps,
        -(-spec.max_bucket_reso // spec.bucket_reso_steps) * spec.bucket_reso_steps, spec.bucket_reso_steps,
    )  # fmt: skip
    known: dict[tuple[int, int], Placement] = {}  # pictures of one size are placed once
    for item in items:
        if item.size not in known:
            if spec.bucket_sizes:
                known[item.size] = buckets.nearest(item.size, spec.bucket_sizes)
            elif not spec.enable_bucket:
                known[item.size] = buckets.single(item.size, spec.resolution)
            elif spec.bucket_no_upscale:
                known[item.size] = buckets.assign_no_upscale(item.size, spec.resolution, spec.bucket_reso_steps)
            else:
                known[item.size] = buckets.assign(item.size, predefined)
        item.placement = known[item.size]


def _fitting(items: list[Item], family: Any, report: Report) -> list[Item]:
    """Those that this model can be trained on; the files of the others are faults of the report.

    What `_check_controls` and `_check_frames` refuse at once, for who goes on without it.
    """
    least = family.frames.least if family.frames else 0
    reasons: dict[int, str] = {}  # row -> what is wrong with the file
    for item in items:
        if len(item.controls) > family.max_controls:
            reasons[item.row] = (
                f"it has {len(item.controls)} control pictures, {family.title} takes {family.max_controls}"
            )
        elif len(item.controls) < family.least_controls:
            reasons[item.row] = f"it has no control picture, and {family.title} is trained on pairs of pictures"
        elif item.frames < least:
            reasons[item.row] = f"{family.title} is trained on clips of at least {least} frames, one of it has fewer"
    files = {item.row: item for item in items}
    for row, reason in reasons.items():
        report.faults.append(Fault(files[row].file, "video" if files[row].clip else "picture", reason))
    return [item for item in items if item.row not in reasons]


def _check_controls(items: Iterable[Item], family: Any) -> None:
    """Raises DatasetError naming items that have more controls than the model takes, or fewer than it needs."""
    items = list(items)
    with_controls, most = [item for item in items if item.controls], family.max_controls
    if over := [item.path.name for item in with_controls if len(item.controls) > most]:
        takes = f"{most} control pictures" if most else "no control pictures"
        raise DatasetError(f"{family.title} takes {takes}, but {names(over)} have more; take them out of the dataset")
    if under := [item.path.name for item in items if len(item.controls) < family.least_controls]:
        raise DatasetError(
            f"{family.title} is trained on pairs of pictures, but {names(under)} have no control picture; "
            "give control_directory, or control_path in the metadata file"
        )
    if family.text_pictures and (mirrored := [item for item in with_controls if item.subset.flip_aug]):
        raise ConfigError(
            f"{mirrored[0].subset.source}: flip_aug does not go with {family.title}, whose text encoder sees the "
            "control pictures as they are; remove it"
        )


def _check_frames(items: Iterable[Item], family: Any) -> None:
    """Raises DatasetError naming pictures and clips that are too short for the model."""
    items, least = list(items), family.frames.least if family.frames else 0
    if short := list(dict.fromkeys(item.path.name for item in items if item.frames < least)):
        raise DatasetError(
            f"{family.title} is trained on clips of at least {least} frames; {names(short)}: pictures, or clips that "
            "are shorter; take them out or raise target_frames"
        )
    if family.text_frame and (mirrored := [item for item in items if item.subset.flip_aug]):
        raise ConfigError(
            f"{mirrored[0].subset.source}: flip_aug does not go with {family.title}, whose text encoder sees the "
            "first frame as it is; remove it"
        )


def _place_controls(items: Iterable[Item], unit: int, published: Callable | None) -> None:
    for item in (item for item in items if item.controls):
        area = item.subset.control_resolution
        if area and min(area) < unit:
            raise ConfigError(f"control_resolution {area[0]}x{area[1]} is below {unit}, which this model needs")
        item.control_placements = tuple(
            controls.placement(size, item.placement.bucket, item.subset, unit, published) for size in item.control_sizes
        )


def changing_items(items: Iterable[Item]) -> list[Item]:
    """Items whose caption is taken apart into tags."""
    return [item for item in items if has_tags(item.subset)]
