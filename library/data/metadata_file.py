"""Metadata files: JSON {path: {caption, tags, control_path, ...}} or JSONL, a line a picture or video."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from library.data.config import SubsetSpec
from library.data.scan import EXTENSIONS, VIDEOS, Found, size_of
from library.errors import DatasetError


def read_metadata(subset: SubsetSpec, index_folder: Path | None) -> list[Found]:
    """Pictures and videos of a metadata file, in its order. Raises DatasetError for a file that cannot be read at all.

    A line or an entry that is not what it has to be has that as its problem, and so has one whose file is not there.
    What decoding a video shows is remembered in `index_folder`.
    """
    path = Path(subset.metadata_file or "")
    if path.exists() and not path.is_file():  # a device has no end, and a pipe waits for somebody who writes
        raise DatasetError(f"metadata_file {path} is no regular file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"metadata_file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"metadata_file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    rows = [entry if isinstance(entry, Found) else _row(*entry, subset, path) for entry in _entries(text, path)]
    if not rows:
        raise DatasetError(f"metadata_file {path}: there is no picture and no video in it")
    if any(_is_video(row) for row in rows if not row.problem):
        from library.data.scan_videos import look_at

        places = [n for n, row in enumerate(rows) if not row.problem and _is_video(row)]
        for n, seen in zip(places, look_at([rows[n].path for n in places], index_folder), strict=True):
            seen.caption = rows[n].caption
            rows[n] = seen
    return rows


def _entries(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]] | Found]:
    """(path, what is said of it), or what is wrong with a line. Raises DatasetError for JSON that is no table."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold other line ends
            if line.strip():
                try:
                    yield _line(line)
                except (ValueError, RecursionError) as error:
                    yield Found(f"{path}, line {number}", (0, 0), None, None, f"it is not valid ({str(error)[:160]})")
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"metadata_file {path} is not valid: {error}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"metadata_file {path}: it has to be a table of paths")
    yield from ((key, value if isinstance(value, dict) else {"caption": value}) for key, value in content.items())


def _line(text: str) -> tuple[str, dict[str, Any]]:
    """Raises ValueError."""
    entry = json.loads(text)
    key = entry.get("video_path", entry.get("image_path")) if isinstance(entry, dict) else None
    if key is None:
        raise ValueError("a line needs an image_path or a video_path")
    return key, entry


def _is_video(row: Found) -> bool:
    return Path(row.path).suffix.lower() not in EXTENSIONS or Path(row.path).is_dir()


def _text(entry: dict[str, Any], name: str) -> str:
    """A value that is a text, or is not there. Raises ValueError."""
    value = entry.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"its {name} is {str(value)[:80]!r}, and no text")
    return (value or "").strip()


def _row(key: Any, entry: dict[str, Any], subset: SubsetSpec, source: Path) -> Found:
    """The picture or video of one entry; what is wrong with it is its problem."""
    if not isinstance(key, str):
        return Found(str(key)[:200], (0, 0), None, None, f"it is no path of a file, and {source} names it")
    folders = [folder for folder in (subset.image_dir, subset.video_directory) if folder]
    path = _picture(key, folders, source)
    if path is None:
        where = f" in {' or '.join(folders)}" if folders else ""
        return Found(key[:200], (0, 0), None, None, f"{key[:200]} is not found{where}, and {source} names it")
    stat = path.stat()
    found = Found(str(path), (stat.st_size, stat.st_mtime_ns), None, None)
    try:
        _read_entry(found, entry, subset, source)
    except ValueError as error:
        found.problem = f"{error} ({source})"
    return found


def _read_entry(found: Found, entry: dict[str, Any], subset: SubsetSpec, source: Path) -> None:
    """Caption, size and controls. Raises ValueError in words that go on with "it"."""
    caption, tags = (_text(entry, name) for name in ("caption", "tags"))
    joined = subset.caption_separator.rstrip() + " "
    if tags and subset.enable_wildcard and caption:
        found.caption = "\n".join(f"{line}{joined}{tags}" for line in caption.splitlines() if line.strip())
    else:
        found.caption = joined.join(part for part in (caption, tags) if part)
    if _is_video(found):
        if beside := [name for name in entry if name.startswith("control")]:
            raise ValueError(f"it has {beside[0]}, but a video has no control pictures")
        return
    found.size, found.problem = size_of(found.path)
    found.controls, lost = _controls(entry, subset, source)
    if lost:
        found.problem = f"its control picture {lost[0]} is not found"


def _controls(entry: dict[str, Any], subset: SubsetSpec, source: Path) -> tuple[tuple[Found, ...], list[str]]:
    """The pictures of control_path, or of control_path_0, control_path_1, ... by number; and what is not found.

    Raises ValueError.
    """
    given: dict[int, str] = {}
    for name, value in entry.items():
        if not name.startswith("control") or value is None:
            continue
        match = re.fullmatch(r"control_path(?:_(\d+))?", name)
        number = int(match[1] or 0) if match else 0
        if match is None or number in given or not isinstance(value, str):
            raise ValueError(
                f"it has {name} = {str(value)[:80]!r}; a control picture is the text of control_path, "
                "several are control_path_0, control_path_1, ..."
            )
        given[number] = value
    out, lost = [], []
    for _, value in sorted(given.items()):
        control = _picture(value, subset.control_directory, source)
        if control is None:
            lost.append(value)
            continue
        size, problem = size_of(str(control))
        stat = control.stat()
        out.append(Found(str(control), (stat.st_size, stat.st_mtime_ns), size, None, problem))
    return tuple(out), lost


def _picture(key: str, folders: Sequence[str], source: Path) -> Path | None:
    """A path of the file: absolute, in one of `folders`, else in the working directory or beside the metadata file.

    The extension of a picture may be missing; a folder is a video of its pictures.
    """
    places = [Path(folder) for folder in folders] or [Path("."), source.parent]
    for base in (place / key for place in places):  # an absolute key stays what it is
        try:
            if found := _there(base):
                return found
        except (OSError, ValueError):  # a name that no file can have
            return None
    return None


def _there(base: Path) -> Path | None:
    if base.suffix.lower() in EXTENSIONS | VIDEOS:
        if base.is_file():
            return base
    elif base.name and (
        found := next((p for e in sorted(EXTENSIONS) if (p := base.with_name(base.name + e)).is_file()), None)
    ):
        return found
    return base if base.is_dir() else None
