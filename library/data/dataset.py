"""The items of a run: found = trained + held out + dropped, each with its bucket; and the order of every epoch.

Preparing reads headers and captions only and imports no torch. The order is a pure function of seed and epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data import buckets, scan
from library.data.buckets import Placement
from library.data.captions import has_tags
from library.data.config import DatasetSpec, SubsetSpec, load_dataset_config
from library.errors import ConfigError, DatasetError

SHOWN = 5  # file names in one message
BLANK = Placement((0, 0), (0, 0), 0, 0)  # before an item is placed


@dataclass(slots=True)
class Item:
    index: int
    file: str
    caption: str
    size: tuple[int, int]
    stat: tuple[int, int]
    subset: SubsetSpec
    dataset: int
    placement: Placement
    repeats: int
    is_reg: bool
    weight: float
    mask_path: Path | None = None

    @property
    def path(self) -> Path:
        """Made when it is asked for: 20,000 Path objects cost more than listing their folder."""
        return Path(self.file)


@dataclass(frozen=True)
class BatchPlan:
    dataset: int
    bucket: tuple[int, int]
    entries: tuple[tuple[int, int], ...]  # (item, repeat)


@dataclass
class Report:
    found: int = 0
    trained: int = 0
    held_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> pictures
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count


def _digest(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def item_seed(seed: int, step: int, item: int, repeat: int) -> int:
    """A 63-bit seed for one item in one optimizer step."""
    return _digest(seed, step, item, repeat)


def item_rng(seed: int, step: int, item: int, repeat: int) -> random.Random:
    return random.Random(item_seed(seed, step, item, repeat))


class Dataset:
    def __init__(
        self, specs: tuple[DatasetSpec, ...], items: list[Item], held_out: list[Item], report: Report, seed: int
    ) -> None:
        self.specs, self.items, self.validation, self.report, self.seed = specs, items, held_out, report, seed
        self.groups: dict[tuple[int, tuple[int, int]], list[tuple[int, int]]] = defaultdict(list)
        for item in items:
            self.groups[item.dataset, item.placement.bucket] += [(item.index, k) for k in range(item.repeats)]
        self._order: tuple[int, list[BatchPlan]] = (-1, [])

    def batches(self, epoch: int) -> list[BatchPlan]:
        """Every batch of an epoch: repeats shuffled inside their bucket, the last batch short, batches shuffled."""
        if self._order[0] != epoch:
            rng, plans = random.Random(_digest(self.seed, epoch)), []
            for (dataset, bucket), entries in self.groups.items():
                entries, size = list(entries), self.specs[dataset].batch_size
                rng.shuffle(entries)
                plans += [
                    BatchPlan(dataset, bucket, tuple(entries[i : i + size])) for i in range(0, len(entries), size)
                ]
            rng.shuffle(plans)
            self._order = (epoch, plans)
        return self._order[1]

    def print_table(self) -> str:
        """found = trained + held out + dropped, and the buckets."""
        r = self.report
        lines = [
            f"pictures: found {r.found} = trained {r.trained} + held out {r.held_out} "
            f"+ dropped {sum(r.dropped.values())}"
        ]
        lines += [f"  dropped {count}: {reason}" for reason, count in r.dropped.items()]
        for (dataset, bucket), entries in sorted(self.groups.items()):
            size = self.specs[dataset].batch_size
            lines.append(
                f"  dataset {dataset + 1}, bucket {bucket[0]}x{bucket[1]}: {len({i for i, _ in entries})} pictures, "
                f"{len(entries)} with repeats, {math.ceil(len(entries) / size)} batches of {size}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in r.notes])

    def metadata(self) -> dict[str, str]:
        """sd-scripts' ss_* keys about the data; folder names only."""
        per_dataset, frequencies, folders = [], defaultdict(Counter), {}
        for number, spec in enumerate(self.specs):
            members = [item for item in self.items if item.dataset == number]
            found = Counter(item.placement.bucket for item in members)
            info = {
                str(k): {"resolution": list(bucket), "count": count}
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


def prepare(options: Any, family: Any, pixel_multiple: int) -> Dataset:
    """Scan, check, split and place. Raises ConfigError for the description and DatasetError for the files."""
    specs = load_dataset_config(options)
    report, trained, held_out = Report(), [], []
    seen: set[tuple] = set()
    for number, spec in enumerate(specs):
        _check_steps(spec, pixel_multiple, number)
        items = []
        for subset in spec.subsets:
            key = (number, subset.source, subset.conditioning_data_dir)
            rows = _read_subset(subset, options, report)
            report.found += len(rows)
            if key in seen or subset.num_repeats < 1:
                report.drop(
                    f"{subset.source} is there twice" if key in seen else f"num_repeats {subset.num_repeats}", len(rows)
                )
                continue
            seen.add(key)
            items += [_item(row, subset, number, options) for row in rows]
        items = _balance(items, report)
        train, held = _split(items, spec, options)
        _place(train + held, spec)
        trained += train
        held_out += held
    for k, item in enumerate(trained):
        item.index = k
    for k, item in enumerate(held_out):
        item.index, item.repeats = len(trained) + k, 1
    report.trained, report.held_out = len(trained), len(held_out)
    if not trained:
        raise DatasetError(
            f"there is nothing to train on: found {report.found} pictures, held out {len(held_out)}, "
            f"dropped {report.dropped or 'none'}; look at the paths in the dataset description"
        )
    return Dataset(specs, trained, held_out, report, options.seed)


def _check_steps(spec: DatasetSpec, multiple: int, number: int) -> None:
    if spec.enable_bucket:
        if spec.bucket_reso_steps % multiple:
            raise ConfigError(
                f"dataset {number + 1}: bucket_reso_steps {spec.bucket_reso_steps} is no multiple of {multiple}, "
                "which this model needs"
            )
        low, high = min(spec.resolution), max(spec.resolution)
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


def _read_subset(subset: SubsetSpec, options: Any, report: Report) -> list[scan.Found]:
    if subset.metadata_file:
        from library.data.metadata_file import read_metadata

        rows = read_metadata(subset)
    else:
        folder = Path(subset.image_dir or "")
        if not folder.is_dir():
            raise DatasetError(f"image_dir {folder}: no such folder")
        index = (
            Path(options.cache_dir) / _digest_text(str(folder.resolve()))
            if options.cache_dir
            else folder / ".lorasmith"
        )
        rows, others = scan.scan_folder(folder, subset.caption_extension, index)
        masks_or_texts = [
            name for name in others if Path(name).suffix not in (".txt", ".caption", ".json", ".npz", ".toml", ".md")
        ]
        if masks_or_texts:
            report.notes.append(
                f"{folder}: {len(masks_or_texts)} files are no pictures ({', '.join(sorted(masks_or_texts)[:3])})"
            )
        if not rows:
            raise DatasetError(f"image_dir {folder}: there is no picture in it ({', '.join(sorted(scan.EXTENSIONS))})")
    if faults := scan.problems(rows):
        raise DatasetError(
            f"{len(faults)} pictures cannot be used: {'; '.join(faults[:SHOWN])}; repair them or take them out"
        )
    return rows


def _digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _item(row: scan.Found, subset: SubsetSpec, number: int, options: Any) -> Item:
    caption = row.caption or subset.class_tokens
    if caption is None:
        what = "is empty" if row.caption is not None else "is missing"
        raise DatasetError(
            f"{row.path}: its caption ({Path(row.path).stem}{subset.caption_extension}) {what}; "
            "write one, or give the subset class_tokens as the caption of all"
        )
    mask = _mask_of(Path(row.path), subset) if subset.conditioning_data_dir else None
    weight = options.prior_loss_weight if subset.is_reg else 1.0
    return Item(
        0, row.path, caption, row.size, row.stat, subset, number, BLANK, subset.num_repeats, subset.is_reg, weight, mask
    )


def _mask_of(path: Path, subset: SubsetSpec) -> Path:
    folder = Path(subset.conditioning_data_dir or "")
    mask = next((p for e in sorted(scan.EXTENSIONS) if (p := folder / (path.stem + e)).is_file()), None)
    if mask is None:
        raise DatasetError(f"{path}: there is no mask {path.stem}.* in {folder}")
    return mask


def _balance(items: list[Item], report: Report) -> list[Item]:
    """Regularisation pictures, repeated one by one until they match the training pictures; the surplus is dropped."""
    train, reg = [i for i in items if not i.is_reg], [i for i in items if i.is_reg]
    wanted = sum(item.repeats for item in train)
    if not reg:
        return items
    kept = reg[: max(wanted, 0)]
    report.drop("regularisation pictures beyond the number of training pictures", len(reg) - len(kept))
    for k, item in enumerate(kept):
        item.repeats = wanted // len(kept) + (k < wanted % len(kept))
    return train + kept


def _split(items: list[Item], spec: DatasetSpec, options: Any) -> tuple[list[Item], list[Item]]:
    """Held-out pictures by one permutation of files; regularisation pictures are never held out."""
    if not spec.validation_split:
        return items, []
    candidates = [item for item in items if not item.is_reg]
    seed = spec.validation_seed if spec.validation_seed is not None else options.seed
    count = round(len(candidates) * spec.validation_split)
    chosen = {id(item) for item in random.Random(_digest(seed, -1)).sample(candidates, count)}
    return [i for i in items if id(i) not in chosen], [i for i in items if id(i) in chosen]


def _place(items: Iterable[Item], spec: DatasetSpec) -> None:
    predefined = buckets.bucket_list(
        spec.resolution, spec.min_bucket_reso // spec.bucket_reso_steps * spec.bucket_reso_steps,
        -(-spec.max_bucket_reso // spec.bucket_reso_steps) * spec.bucket_reso_steps, spec.bucket_reso_steps,
    )  # fmt: skip
    known: dict[tuple[int, int], Placement] = {}  # pictures of one size are placed once
    for item in items:
        if item.size not in known:
            if not spec.enable_bucket:
                known[item.size] = buckets.single(item.size, spec.resolution)
            elif spec.bucket_no_upscale:
                known[item.size] = buckets.assign_no_upscale(item.size, spec.resolution, spec.bucket_reso_steps)
            else:
                known[item.size] = buckets.assign(item.size, predefined)
        item.placement = known[item.size]


def changing_items(items: Iterable[Item]) -> list[Item]:
    """Items whose caption is taken apart into tags."""
    return [item for item in items if has_tags(item.subset)]
