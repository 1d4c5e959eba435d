"""Sizes and captions of a folder of pictures, fast and remembered.

Only headers are read, by small parsers of our own for the common formats and by PIL for the rest. What was read is
kept in an index beside the pictures, keyed by name, size and modification time, so that the
next start only lists the folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import stat
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
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
MISSING = (-1, -1)  # bytes, time of a file that is not there
_KEY = operator.attrgetter("st_size", "st_mtime_ns")
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
    index = Index(index_folder, INDEX, folder=str(folder.resolve()), extension=caption_extension)
    pictures, others, text = [], [], caption_extension or "\0"  # which no name has
    with _listing(folder) as (names, stat_of):
        for name in names:
            if name.endswith(text):
                continue
            if name[name.rfind(".") + 1 :].lower() in _ENDINGS:
                pictures.append(name)
            elif name[0] != "." and os.path.isfile(os.path.join(folder, name)):
                others.append(name)
        pictures.sort()
        keys = _keys(pictures, stat_of)
        texts = _keys([f"{name[: name.rfind('.')]}{text}" for name in pictures], stat_of) if caption_extension else None
    known, path, found = index.known.get, os.path.join(folder, ""), []
    for name, key, text_key in zip(pictures, keys, texts or [MISSING] * len(keys), strict=True):
        entry = known(name)  # [key, width, height, caption]
        if entry and entry[0] == [*key, *text_key]:
            found.append(Found(path + name, key, (entry[1], entry[2]), entry[3]))
        else:
            found.append(_read(path, name, key, text_key, caption_extension, index))
    index.write()
    return found, others


@contextlib.contextmanager
def _listing(folder: Path) -> Iterator[tuple[list[str], Callable[[str], os.stat_result]]]:
    """The names in a folder, and what gives a name's `stat`; that raises OSError.

    By the open folder where the system can: by path costs a tenth more, and entries of `os.scandir`, which keep what
    they gave, half as much again. On Windows these know it from the listing, without asking once more.
    """
    if os.stat in os.supports_dir_fd and os.listdir in os.supports_fd:
        place = os.open(folder, os.O_RDONLY)
        try:
            yield os.listdir(place), functools.partial(os.stat, dir_fd=place)
        finally:
            os.close(place)
        return
    with os.scandir(folder) as listing:
        entries = {entry.name: entry for entry in listing}
    yield list(entries), lambda name: (entries[name] if name in entries else Path(folder, name)).stat()


def _keys(names: list[str], stat_of: Callable[[str], os.stat_result]) -> list[tuple[int, int]]:
    """(bytes, modification time) of each; MISSING for what is not there or cannot be asked."""
    try:
        return [*map(_KEY, map(stat_of, names))]
    except OSError:
        return [_key(name, stat_of) for name in names]


def _key(name: str, stat_of: Callable[[str], os.stat_result]) -> tuple[int, int]:
    try:
        return _KEY(stat_of(name))
    except OSError:
        return MISSING


def _read(
    folder: str, name: str, key: tuple[int, int], text_key: tuple[int, int], extension: str | None, index: Index
) -> Found:
    """A picture that the index does not have in this state."""
    found = Found(folder + name, key, None, None)
    found.size, found.problem = size_of(found.path)
    text = f"{folder}{name[: name.rfind('.')]}{extension}"
    if not found.problem and extension and (text_key != MISSING or os.path.islink(text)):  # a link to nothing
        found.caption, found.problem = read_caption(text)
    if not found.problem:
        index.put(name, (*key, *text_key), (*found.size, found.caption))
    return found


def read_caption(path: str) -> tuple[str | None, str]:
    """The text of a caption file, and what is wrong with it."""
    name = os.path.basename(path)
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            return None, f"its caption {name} is no regular file"
        if facts.st_size > LONGEST:
            return None, f"its caption {name} has {facts.st_size:,} bytes, which is no caption"
        with open(path, "rb", buffering=0) as file:
            return file.readall().decode("utf-8-sig").strip(), ""
    except UnicodeDecodeError as error:
        return None, f"its caption {name} is not UTF-8 (byte {error.start}); save it as UTF-8"
    except OSError as error:
        return None, f"its caption {name} cannot be read ({error.strerror or error})"


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

    def put(self, name: str, key: Sequence[int], value: tuple) -> None:
        self.known[name] = [list(key), *value]
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
