"""The videos of a folder with their captions; what decoding a file once has shown is remembered beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import groupby
from pathlib import Path

from library.data import scan, videos
from library.data.scan import Found, Index
from library.data.videos import Video

INDEX = "videos.json"
RECIPE = 2  # raised when more, or something else, is found out about a video
ANNOUNCED = 256 * 1024**2  # bytes of new files from which on a line says what takes the time


def scan_folder(folder: Path, caption_extension: str, index_folder: Path | None) -> tuple[list[Found], list[str]]:
    """Every video and every folder of frames directly in `folder`, by name; names of files that are neither."""
    entries, captions, others = [], {}, []
    with os.scandir(folder) as listing:
        for entry in sorted(listing, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir() or Path(entry.name).suffix.lower() in scan.VIDEOS:
                entries.append(entry)
            elif entry.name.endswith(caption_extension):
                captions[entry.name[: -len(caption_extension)]] = entry
            else:
                others.append(entry.name)
    entries = [entry for entry in entries if not entry.is_dir() or _has_pictures(entry.path)]
    found = look_at([entry.path for entry in entries], index_folder)
    for one, entry in zip(found, entries, strict=True):
        text = captions.get(entry.name if entry.is_dir() else Path(entry.name).stem)
        if text is not None and not one.problem:
            one.caption, one.problem = scan.read_caption(text.path)
    return found, others


def _has_pictures(folder: str) -> bool:
    with os.scandir(folder) as listing:
        return any(Path(entry.name).suffix.lower() in scan.EXTENSIONS for entry in listing)


def look_at(paths: list[str], index_folder: Path | None) -> list[Found]:
    """The facts of videos and folders of frames, from the index or by decoding; what is wrong is in `problem`."""
    index = Index(index_folder, INDEX, recipe=RECIPE)
    found, new = [], []
    for path in paths:
        stat = os.stat(path)
        one = Found(path, (stat.st_size, stat.st_mtime_ns), None, None)
        found.append(one)
        if os.path.isdir(path):
            _frame_folder(one, index_folder)
        elif (known := index.get(os.path.abspath(path), one.stat)) is not None:
            one.video = _from_json(path, known)
        else:
            new.append(one)
    total = sum(one.stat[0] for one in new)
    if total > ANNOUNCED:
        print(f"videos: {len(new)} new files ({total / 1024**3:.1f} GiB) are decoded once to count frames", flush=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # a decoder has threads of its own
        for one in pool.map(_probed, new):
            if one.video is not None:
                index.put(os.path.abspath(one.path), one.stat, _to_json(one.video))
    index.write()
    for one in found:
        one.size = one.video.size if one.video else None
    return found


def _probed(one: Found) -> Found:
    try:
        one.video = videos.probe(one.path)
    except (ValueError, OSError) as error:
        one.problem = str(error)
    return one


def _frame_folder(one: Found, index_folder: Path | None) -> None:
    """Pictures of one size; the natural order of their names is the order of the frames."""
    index = index_folder / "frames" / Path(one.path).name if index_folder else None
    frames, _ = scan.scan_folder(Path(one.path), None, index)
    if faults := scan.problems(frames):
        one.problem = f"{len(faults)} of its frames cannot be used: {faults[0]}"
        return
    if not frames:
        one.problem = "there is no picture in it"
        return
    frames.sort(key=lambda frame: videos.natural(Path(frame.path).name))
    if other := next((frame for frame in frames if frame.size != frames[0].size), None):
        sizes = f"{other.size[0]}x{other.size[1]}, not {frames[0].size[0]}x{frames[0].size[1]}"
        one.problem = f"its frames are not of one size: {Path(other.path).name} is {sizes}"
        return
    names = tuple(Path(frame.path).name for frame in frames)
    one.video = Video(one.path, frames[0].size, len(names), None, names=names, remarks=("a folder of frames",))


def _to_json(video: Video) -> tuple:
    """Ticks as runs of equal steps: a constant rate is one run."""
    steps = [b - a for a, b in zip(video.ticks, video.ticks[1:], strict=False)]
    runs = [[step, len(list(same))] for step, same in groupby(steps)]
    first = list(video.ticks[:1])
    return (video.size, video.frames, str(video.fps) if video.fps else None, str(video.base), first, runs,
            video.turn, video.remarks, video.content, video.thumbnail)  # fmt: skip


def _from_json(path: str, values: Iterable) -> Video:
    size, frames, fps, base, first, runs, turn, remarks, content, thumbnail = values
    ticks = list(first)
    for step, count in runs:
        ticks += range(ticks[-1] + step, ticks[-1] + step * count + 1, step)
    return Video(path, tuple(size), frames, Fraction(fps) if fps else None, Fraction(base), tuple(ticks), tuple(turn),
                 (), tuple(remarks), content, thumbnail)  # fmt: skip
