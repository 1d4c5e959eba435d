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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from library.data.videos import Video

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "AVIF", "JXL", "GIF")  # PIL's names; its JPEG reads MPO, too
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"}
VIDEOS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".gif"}
LONGEST = 1024**2  # bytes of a caption file
INDEX = "scan.json"
HEAD = 64  # bytes that are enough for the formats with a fixed header


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
    entries: dict[str, os.DirEntry] = {}
    captions: dict[str, os.DirEntry] = {}
    others = []
    with os.scandir(folder) as listing:
        for entry in listing:
            _, _, extension = entry.name.rpartition(".")  # os.path.splitext costs three times as much
            if "." + extension.lower() in EXTENSIONS:
                entries[entry.name] = entry
            elif caption_extension and entry.name.endswith(caption_extension):
                captions[entry.name[: -len(caption_extension)]] = entry
            elif not entry.name.startswith(".") and entry.is_file():
                others.append(entry.name)
    index = Index(index_folder, INDEX, folder=str(folder.resolve()), extension=caption_extension)
    found = [_one(entries[name], captions, index) for name in sorted(entries)]
    index.write()
    return found, others


def _one(entry: os.DirEntry, captions: dict[str, os.DirEntry], index: Index) -> Found:
    text_entry = captions.get(entry.name.rpartition(".")[0])
    try:
        facts = entry.stat()
        text_stat = text_entry.stat() if text_entry else None
    except OSError as error:  # a link to nothing
        name = Path(error.filename or entry.name).name
        return Found(entry.path, (0, 0), None, None, f"{name} cannot be read ({error.strerror or error})")
    key = (
        facts.st_size,
        facts.st_mtime_ns,
        text_stat.st_size if text_stat else -1,
        text_stat.st_mtime_ns if text_stat else -1,
    )
    known = index.get(entry.name, key)
    if known is not None:
        width, height, caption = known
        return Found(entry.path, key[:2], (width, height), caption)
    found = Found(entry.path, key[:2], None, None)
    found.size, found.problem = size_of(entry.path)
    if found.problem:
        return found
    if text_entry:
        found.caption, found.problem = read_caption(text_entry)
        if found.problem:
            return found
    index.put(entry.name, key, (*found.size, found.caption))
    return found


def read_caption(entry: os.DirEntry) -> tuple[str | None, str]:
    """The text of a caption file, and what is wrong with it."""
    try:
        if not entry.is_file():
            return None, f"its caption {entry.name} is no regular file"
        if entry.stat().st_size > LONGEST:
            return None, f"its caption {entry.name} has {entry.stat().st_size:,} bytes, which is no caption"
        with open(entry.path, "rb") as file:
            return file.read().decode("utf-8-sig").strip(), ""
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
                json.dump({"head": self.head, "entries": self.known}, file, ensure_ascii=False, separators=(",", ":"))
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


def size_of(path: str) -> tuple[tuple[int, int] | None, str]:
    """(width, height) as shown, or None; and what is wrong with the file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for somebody who writes into it
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
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and not _png_may_turn(path):
        width, height = struct.unpack(">II", head[16:24])
        if not width or not height:
            raise ValueError("a size of 0")
        return width, height
    with opened(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 exchange width and height
        return (image.height, image.width) if turned else image.size


def _png_may_turn(path: str) -> bool:
    """Whether a PNG has a chunk before its pixels that may hold an orientation; chunks are skipped by their lengths."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IDAT":
                return False
            if kind in (b"eXIf", b"iTXt"):  # the latter may be XMP, which can say it, too
                return True
            file.seek(length + 4, os.SEEK_CUR)
    raise ValueError("it ends before its pixels begin")


def problems(found: Iterable[Found]) -> list[str]:
    return [f"{f.path}: {f.problem}" for f in found if f.problem]
