"""Sizes and captions of a folder of pictures, fast and remembered.

Only headers are read, by small parsers of our own for the common formats and by PIL for the rest. What was read is
kept in an index beside the pictures, keyed by name, size and modification time, so that the
next start only lists the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

    from library.data.videos import Video

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "AVIF", "JXL", "GIF")  # PIL's names; its JPEG reads MPO, too
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"}
VIDEOS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".gif"}
LONGEST = 1024**2  # bytes of a caption file
INDEX = "scan.json"
HEAD = 1024  # bytes: in most PNG files the pixels begin within them
PNG = b"\x89PNG\r\n\x1a\n"
_ENDINGS = {extension[1:] for extension in EXTENSIONS}


@dataclass(slots=True)
class Found:
    path: str
    stat: tuple[int, int]  # bytes, modification time in ns
    size: tuple[int, int] | None  # width, height as shown (after EXIF orientation); None: the header cannot be read
    caption: str | None  # text of the caption file; None: there is none
    problem: str = ""
    controls: tuple[Found, ...] = ()  # control pictures, in their order
    video: Video | None = None  # where the file is one


def scan_folder(
    folder: Path, caption_extension: str | None, index_folder: Path | None
) -> tuple[list[Found], list[str]]:
    """Every picture directly in `folder`, sorted by name, and the names of files that are neither picture nor text.

    Without a caption extension no captions are read.
    """
    entries: list[tuple[str, str, os.DirEntry]] = []  # name, stem, entry
    captions: dict[str, os.DirEntry] = {}
    others = []
    with os.scandir(folder) as listing:
        for entry in listing:
            name = entry.name
            stem, _, extension = name.rpartition(".")  # os.path.splitext costs three times as much
            if extension in _ENDINGS or extension.lower() in _ENDINGS:
                entries.append((name, stem, entry))
            elif caption_extension and name.endswith(caption_extension):
                captions[name[: -len(caption_extension)]] = entry
            elif not name.startswith(".") and entry.is_file():
                others.append(name)
    entries.sort()
    index = Index(index_folder, INDEX, folder=str(folder.resolve()), extension=caption_extension)
    known, text_of = index.known.get, captions.get
    found = [_one(entry, text_of(stem), known(name), index) for name, stem, entry in entries]
    index.write()
    return found, others


def _one(entry: os.DirEntry, text_entry: os.DirEntry | None, known: list | None, index: Index) -> Found:
    """A picture with its caption; `known` is what the index says of it: [key, width, height, caption]."""
    try:
        facts = entry.stat()
        size, time = facts.st_size, facts.st_mtime_ns
        text_size, text_time = -1, -1
        if text_entry is not None:
            text = text_entry.stat()
            text_size, text_time = text.st_size, text.st_mtime_ns
    except OSError as error:  # a link to nothing
        name = Path(error.filename or entry.name).name
        return Found(entry.path, (0, 0), None, None, f"{name} cannot be read ({error.strerror or error})")
    if known and known[0] == [size, time, text_size, text_time]:
        return Found(entry.path, (size, time), (known[1], known[2]), known[3])
    found = Found(entry.path, (size, time), None, None)
    found.size, found.problem = size_of(entry.path, facts.st_mode)
    if found.problem:
        return found
    if text_entry:
        found.caption, found.problem = read_caption(text_entry)
        if found.problem:
            return found
    index.put(entry.name, (size, time, text_size, text_time), (*found.size, found.caption))
    return found


def read_caption(entry: os.DirEntry) -> tuple[str | None, str]:
    """The text of a caption file, and what is wrong with it."""
    try:
        if not entry.is_file():
            return None, f"its caption {entry.name} is no regular file"
        if entry.stat().st_size > LONGEST:
            return None, f"its caption {entry.name} has {entry.stat().st_size:,} bytes, which is no caption"
        with open(entry.path, "rb", buffering=0) as file:
            return file.readall().decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError as error:
        return None, f"its caption {entry.name} is not UTF-8 (byte {error.start}); save it as UTF-8"
    except OSError as error:
        return None, f"its caption {entry.name} cannot be read ({error.strerror or error})"


class Index:
    """name -> [key, *values] of one folder; a damaged or foreign file is as good as none."""

    def __init__(self, place: Path | None, name: str, **head: Any) -> None:
        self.path = place / name if place else None
        self.head, self.known = {"version": 1, **head}, {}
        self.changed = False
        try:
            content = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
            if content.get("head") == self.head:
                self.known = content["entries"]
        except (OSError, ValueError, KeyError, AttributeError):
            self.known = {}

    def get(self, name: str, key: tuple) -> tuple | None:
        entry = self.known.get(name)
        return tuple(entry[1:]) if entry and tuple(entry[0]) == key else None

    def put(self, name: str, key: tuple, value: tuple) -> None:
        self.known[name] = [key, *value]
        self.changed = True

    def write(self) -> None:
        if not (self.path and self.changed):
            return
        partial = self.path.with_name(f".{uuid.uuid4().hex[:8]}.{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "w", encoding="utf-8") as file:
                content = {"head": self.head, "entries": self.known}
                file.write(json.dumps(content, ensure_ascii=False, separators=(",", ":")))  # `dump` is in Python
            os.replace(partial, self.path)
        except OSError:  # a read-only folder of pictures: the next start reads the headers again
            partial.unlink(missing_ok=True)


def opened(path: str | os.PathLike) -> Image.Image:
    """A picture file, not yet decoded; only the formats that a dataset may hold are tried.

    PIL knows some forty more, among them PostScript, for which it starts another program.
    """
    from PIL import Image

    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401  (makes PIL read JPEG XL, where it is installed)
    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


def size_of(path: str, mode: int | None = None) -> tuple[tuple[int, int] | None, str]:
    """(width, height) as shown, or None; and what is wrong with the file. `mode`: its `st_mode`, if that is known."""
    try:
        if not stat.S_ISREG(
            os.stat(path).st_mode if mode is None else mode
        ):  # a pipe would wait for somebody who writes into it
            return None, "it is no regular file"
        return picture_size(path), ""
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        return None, reason(path, error, "its header cannot be read")


def reason(path: str, error: Exception, what: str) -> str:
    """What is wrong with a picture that gives this error, as far as its first bytes show it."""
    try:
        with open(path, "rb") as file:
            head = file.read(256).lstrip().lower()
    except OSError as fault:
        return f"it cannot be read ({fault.strerror or fault})"
    if head.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not a picture; load it anew"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not a picture; load it anew with git lfs pull"
    if not head:
        return "it is empty"
    return f"{what} ({str(error).splitlines()[0][:160] if str(error) else type(error).__name__})"


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) as shown. A PNG's from its fixed header; the others through PIL, with EXIF orientation."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEAD)
        if head[:8] == PNG and head[12:16] == b"IHDR" and not _png_may_turn(file, head):
            width, height = struct.unpack_from(">II", head, 16)
            if not width or not height:
                raise ValueError("a size of 0")
            return width, height
    with opened(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 exchange width and height
        return (image.height, image.width) if turned else image.size


def _png_may_turn(file: BinaryIO, head: bytes) -> bool:
    """Whether a PNG has a chunk before its pixels that may hold an orientation; chunks are skipped by their lengths.

    `head` are the file's first bytes; more is read only where the pixels begin after them.
    """
    at = 8
    while True:
        chunk = head[at : at + 8]
        if len(chunk) < 8:
            file.seek(at)
            chunk = file.read(8)
            if len(chunk) < 8:
                raise ValueError("it ends before its pixels begin")
        length, kind = struct.unpack(">I4s", chunk)
        if kind == b"IDAT":
            return False
        if kind in (b"eXIf", b"iTXt"):  # the latter may be XMP, which can say it, too
            return True
        at += 12 + length


def problems(found: Iterable[Found]) -> list[str]:
    return [f"{f.path}: {f.problem}" for f in found if f.problem]
