"""What is worth knowing about the files of a dataset besides whether they can be used; pure functions, no torch.

A finding is of one file. Warnings are what as a rule is a mistake, notes what a user may not expect.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.data.captions import has_tags, whole
from library.data.decoded import NAMES, Look, look_of_video, thumbnails
from library.data.items import names

if TYPE_CHECKING:
    from library.data.dataset import Dataset
    from library.data.items import Item

WARNING, NOTE = "warning", "note"
ENLARGED = 2.0  # times, from which on an enlarged picture is a warning
CROPPED = 0.25  # part of the picture, from which on what is cut off is a warning
LEAST_CROP = 0.05  # and from which on it is a note
TINY = 128  # pixels of the shorter side of a picture that has little to teach, whatever it is enlarged to
ALIKE = 0.99  # correlation of thumbnails from which on pictures are nearly the same: crops of 1 % have 0.991
CLOSE = 4.0  # of 255: mean values of such pictures do not lie further apart
PLAIN = 4.0  # of 255: a thumbnail that varies less shows nothing that could be compared
RATIO = 0.03  # by which the proportions of a control may differ from its picture's
SHARE = 10  # times that the pictures of one subset may be seen as often as those of another
ENOUGH = 1.05  # times, from which on an enlarged picture is a note
# Control characters, surrogates and private use, the replacement character, a zero-width space, a byte-order mark
ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\uf8ff\ufffd\u200b\ufeff]")
BLOCK = 512  # rows of the table of thumbnails that are compared at a time
TITLES = {  # kind -> (how bad it is, what these files do)
    "name": (WARNING, "are not what their names say"),
    "tiny": (WARNING, "are very small"),
    "enlarged much": (WARNING, f"are enlarged more than {ENLARGED:g} times"),
    "cropped much": (WARNING, f"lose more than {CROPPED:.0%} to the crop"),
    "same": (WARNING, "are the same picture or video as another file"),
    "both sides": (WARNING, "are trained and, nearly the same, held out: validation will look too good"),
    "alike": (WARNING, "are nearly the same as another picture or video"),
    "plain": (WARNING, "have one colour only"),
    "moves": (WARNING, "are animations, of which only the first picture is used"),
    "mask": (WARNING, "have a mask that leaves nothing to train"),
    "caption text": (WARNING, "have a caption that looks damaged"),
    "caption lines": (WARNING, "have captions of several lines, of which only the first is used"),
    "caption cut": (WARNING, "have captions that are longer than the model reads"),
    "control shape": (WARNING, "have a control picture of other proportions"),
    "no transparency": (WARNING, "have no transparent pixel, so with alpha_mask all of them is trained"),
    "share": (WARNING, "or folders are seen far less often than others"),
    "turned": (NOTE, "are turned or mirrored as their EXIF data says"),
    "transparent": (NOTE, "are transparent in part, which becomes white"),
    "enlarged": (NOTE, "are enlarged"),
    "cropped": (NOTE, f"lose more than {LEAST_CROP:.0%} to the crop"),
    "class tokens": (NOTE, "have no caption file and take the class_tokens"),
    "short batch": (NOTE, "are in a bucket with fewer pictures than a batch has"),
}


@dataclass(frozen=True)
class Finding:
    kind: str
    file: str
    text: str  # about this file: "enlarged 2.4 times, from 300x200 to 720x480"

    @property
    def level(self) -> str:
        return TITLES[self.kind][0]


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes what is trained."""

    scale: float  # sides are multiplied by this
    lost: float  # part of the picture that the crop cuts off

    @classmethod
    def of(cls, item: Item) -> Geometry:
        place = item.placement
        kept = math.prod(place.bucket) / math.prod(place.resized)
        return cls(max(place.resized[k] / item.size[k] for k in (0, 1)), max(0.0, 1 - kept))


def find(dataset: Dataset, looks: Mapping[str, Look], cut: Mapping[str, str] | None = None) -> list[Finding]:
    """All findings, by kind in the order of TITLES. `cut`: file -> the end of its caption that is not read."""
    items = one_a_file((*dataset.items, *dataset.validation))
    found: list[Finding] = []
    for item in items:
        found += _of_size(item)
        found += _of_caption(item, (cut or {}).get(item.file, ""))
        if item.clip is None:
            found += _of_look(item, looks)
    pictures = [item for item in items if item.file in looks and not looks[item.file].problem]
    held_out = {item.file for item in dataset.validation}
    found += _repeated(pictures, looks, held_out)
    clips = [item for item in items if item.clip is not None]
    moving = {item.file: one for item in clips if (one := look_of_video(item.clip.video, looks)) is not None}
    found += _repeated([item for item in clips if item.file in moving], moving, held_out)
    found += _balance(dataset)
    order = {kind: n for n, kind in enumerate(TITLES)}
    return sorted(found, key=lambda one: order[one.kind])  # stable: within a kind in the order of the dataset


def one_a_file(items: Iterable[Item]) -> list[Item]:
    """The first item of every file: one may be in several datasets, and a video gives several clips."""
    return list({item.file: item for item in reversed(list(items))}.values())[::-1]


def _of_size(item: Item) -> Iterator[Finding]:
    """Sizes of the file, of what it is resized to and cut to."""
    facts, place = Geometry.of(item), item.placement
    sizes = f"from {_size(item.size)} to {_size(place.resized)}"
    if min(item.size) < TINY and facts.scale > 1:
        yield Finding("tiny", item.file, f"{_size(item.size)}")
    if facts.scale > ENOUGH:
        yield Finding("enlarged much" if facts.scale > ENLARGED else "enlarged", item.file,
                      f"enlarged {facts.scale:.2f} times, {sizes}")  # fmt: skip
    if facts.lost > LEAST_CROP:
        kind = "cropped much" if facts.lost > CROPPED else "cropped"
        yield Finding(kind, item.file, f"{facts.lost:.0%} lost, {_size(place.resized)} cut to {_size(place.bucket)}")


def _size(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _of_look(item: Item, looks: Mapping[str, Look]) -> Iterator[Finding]:
    """What decoding its files has shown."""
    for file, what in ((item.file, ""), *((str(c), "control picture ") for c in item.controls)):
        one = looks.get(file)
        if one is None or one.problem:
            continue
        expected = NAMES.get(Path(file).suffix.lower(), ())
        if expected and one.format not in expected:
            yield Finding("name", file, f"{what}it is a {one.format}, named {Path(file).suffix}")
        if one.orientation != 1:
            yield Finding("turned", file, f"{what}EXIF orientation {one.orientation}")
        if one.moves:
            yield Finding("moves", file, f"{what}an animated {one.format}")
        if one.transparent and (what or not item.subset.alpha_mask):
            yield Finding("transparent", file, f"{what}transparent in part")
    one = looks.get(item.file)
    if one is None or one.problem:
        return
    if one.low == one.high:
        yield Finding("plain", item.file, f"every value is {one.low}")
    if item.subset.alpha_mask and not item.mask_path and not one.transparent:
        yield Finding("no transparency", item.file, "nothing is transparent")
    mask = looks.get(str(item.mask_path))
    if mask is not None and not mask.problem and mask.high == 0:
        yield Finding("mask", item.file, f"{item.mask_path.name} is black everywhere")
    for control, size in zip(item.controls, item.control_sizes, strict=True):
        if abs(size[0] / size[1] * item.size[1] / item.size[0] - 1) > RATIO and not item.subset.no_resize_control:
            text = f"{control.name} is {_size(size)}, the picture {_size(item.size)}"
            yield Finding("control shape", item.file, text)


def _of_caption(item: Item, cut: str) -> Iterator[Finding]:
    text = item.caption
    if odd := sorted(set(ODD.findall(text))):
        yield Finding("caption text", item.file, f"it holds {', '.join(f'U+{ord(c):04X}' for c in odd[:5])}")
    elif _misread(text):
        yield Finding("caption text", item.file, "UTF-8 that was once read as another encoding")
    if len([line for line in text.splitlines() if line.strip()]) > 1 and not item.subset.enable_wildcard:
        yield Finding("caption lines", item.file, f"not used: {' / '.join(text.splitlines()[1:])[:80]!r}")
    if cut:
        yield Finding("caption cut", item.file, f"not read: {cut!r}")
    if text == item.subset.class_tokens:
        yield Finding("class tokens", item.file, f"{text!r}")


def _misread(text: str) -> bool:
    """Whether it becomes other valid text when its characters are taken for the bytes of UTF-8."""
    if not any("\u00c2" <= c <= "\u00f4" for c in text):
        return False
    try:
        return text.encode("cp1252").decode("utf-8") != text
    except UnicodeError:
        return False


# ---------------------------------------------------------------- pictures and videos that are there twice


def _repeated(items: list[Item], looks: Mapping[str, Look], held_out: set[str]) -> Iterator[Finding]:
    """Files with equal content, and those whose thumbnails correlate, mirrored ones too."""
    same: dict[str, list[Item]] = defaultdict(list)
    for item in {os.path.realpath(item.file): item for item in items}.values():
        same[looks[item.file].content].append(item)
    for first, *others in same.values():
        for other in others:
            text = f"as {first.file}"
            text += "" if other.caption == first.caption else ", with another caption"
            yield Finding("same", other.file, text)
            if (first.file in held_out) != (other.file in held_out):
                yield Finding("both sides", other.file, text)
    single = [group[0] for group in same.values()]
    for a, b, correlation, mirrored in alike([looks[item.file] for item in single]):
        one, other = single[a], single[b]
        text = f"as {one.file} ({'mirrored, ' if mirrored else ''}correlation {correlation:.4f})"
        yield Finding("alike", other.file, text)
        if (one.file in held_out) != (other.file in held_out):
            yield Finding("both sides", other.file, text)


def alike(looks: list[Look]) -> Iterator[tuple[int, int, float, bool]]:
    """(a, b, correlation, whether mirrored) with a < b: pairs of pictures, or of videos, that are nearly the same.

    Each b once, with the a that is most alike. Compared are thumbnails minus their mean, in blocks: memory stays
    bounded, and pictures whose mean values differ are not compared at all.
    """
    if len(looks) < 2:
        return
    pixels = thumbnails(looks)
    means = pixels.mean((1, 2, 3))
    order = np.argsort(means, kind="stable")
    centred = pixels - means[:, None, None, None]
    norms = np.sqrt((centred**2).sum((1, 2, 3)))
    shown = norms > PLAIN * math.sqrt(centred[0].size)
    unit = np.where(shown[:, None, None, None], centred / np.maximum(norms, 1e-6)[:, None, None, None], 0)[order]
    rows, turned, ordered = unit.reshape(len(unit), -1), unit[:, :, ::-1].reshape(len(unit), -1), means[order]
    best: dict[int, tuple[float, int, bool]] = {}
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        first = int(np.searchsorted(ordered, ordered[start] - CLOSE, "left"))
        last = int(np.searchsorted(ordered, ordered[stop - 1] + CLOSE, "right"))
        later = order[None, first:last] >= order[start:stop, None]  # each pair once, and none with itself
        for mirrored, table in ((False, rows), (True, turned)):
            scores = np.where(later, 0, rows[start:stop] @ table[first:last].T)
            nearest = scores.argmax(1)
            for i in np.nonzero(scores.max(1) > ALIKE)[0]:
                score, b = float(scores[i, nearest[i]]), int(order[start + i])
                if score > best.get(b, (0.0,))[0]:
                    best[b] = (score, int(order[first + nearest[i]]), mirrored)
    for b, (score, a, mirrored) in sorted(best.items()):
        yield a, b, score, mirrored


# ---------------------------------------------------------------- what is seen how often


def seen(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Source of a subset -> (its files that are trained, how many items of it an epoch has)."""
    out = {}
    for source in dict.fromkeys(item.subset.source for item in dataset.items):
        own = [item for item in dataset.items if item.subset.source == source]
        out[source] = (len({item.file for item in own}), sum(item.repeats for item in own))
    return out


def _balance(dataset: Dataset) -> Iterator[Finding]:
    shares = {source: count for source, (_, count) in seen(dataset).items()}
    total, most = sum(shares.values()), max(shares.values(), default=0)
    for source, count in shares.items():
        if count * SHARE < most:
            text = f"{count} of {total} items an epoch ({count / total:.1%}); raise num_repeats"
            yield Finding("share", source, text)
    for (dataset_number, bucket, _), entries in dataset.groups.items():
        size = dataset.specs[dataset_number].batch_size
        if len(entries) < size:
            for index in dict.fromkeys(index for index, _ in entries):
                text = f"bucket {_size(bucket)} has {len(entries)} for batches of {size}"
                yield Finding("short batch", dataset.items[index].file, text)


def final_caption(item: Item) -> str:
    """As it is trained without shuffling and dropout."""
    return whole(item.caption, item.subset)


def is_shuffled(item: Item) -> bool:
    return has_tags(item.subset)


def summary(found: Iterable[Finding]) -> list[str]:
    """One line a kind: how many, the first by name."""
    kinds: dict[str, list[Finding]] = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one)
    lines = []
    for kind, own in kinds.items():
        level, title = TITLES[kind]
        files = list(dict.fromkeys(Path(one.file).name for one in own))
        lines.append(f"{level}: {len(own)} files {title}: {names(files, 3)}")
    return lines


def counts(found: Iterable[Finding]) -> dict[str, int]:
    return dict(Counter(one.kind for one in found))
