"""What decoding every picture of a dataset once shows: whole or damaged, its format, orientation, alpha, its look.

Pictures are decoded in parallel and once: what was seen is kept in an index beside them, by path, size and
modification time, so that the next start decodes only what is new or changed. The index is written while it grows, so
that an interrupted look goes on where it was, and of several processes only the first one decodes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.data import images, scan
from library.data.scan import Index
from library.errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image

    from library.data.videos import Video

INDEX = "decoded.json"
RECIPE = 1  # raised when a look begins to see something else
SIDE = 8  # of the thumbnails that are compared
FRAMES = 4  # of a video, whose thumbnails are compared
ANNOUNCED = 256 * 1024**2  # bytes of new files from which on a line says what takes the time
WRITTEN = 10.0  # seconds between two states of the index
PATIENCE = 60.0  # seconds without news after which a process no longer waits for the first one
# What PIL calls the formats that belong to an extension; iPhones write several pictures (MPO) into a .jpg
NAMES = {
    ".png": ("PNG",), ".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".webp": ("WEBP",), ".bmp": ("BMP", "DIB"),
    ".avif": ("AVIF",), ".jxl": ("JXL",),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    problem: str  # why it cannot be used, "" if it can
    size: tuple[int, int] = (0, 0)  # width, height as shown
    format: str = ""  # "PNG": what the file is, whatever its name
    orientation: int = 1  # of its EXIF data; 1 = upright
    transparent: bool = False  # some pixel is
    moves: bool = False  # an animation, of which only the first picture is used
    low: int = 0  # the darkest and the brightest value of any channel
    high: int = 255
    content: str = ""  # hash of the pixels as shown: equal for equal pictures, however they are stored
    thumbnail: str = ""  # SIDE x SIDE RGB bytes, base64; of a video FRAMES of them, one below the other


def look(path: str) -> Look:
    """Decode one picture. What is wrong with it is in `problem`; an error of the disk is raised as OSError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return Look("it is no regular file")
        with scan.opened(path) as file:
            facts = (file.format or "", file.getexif().get(0x0112, 1), _moves(file))
        pixels, alpha = images.decode(path, with_alpha=True)
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        cause = (error.__cause__ or error) if isinstance(error, DatasetError) else error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None
        return Look(scan.reason(path, cause, "it cannot be decoded"))
    size, transparent = (pixels.shape[1], pixels.shape[0]), bool(alpha.min() < 255)
    low, high = int(pixels.min()), int(pixels.max())
    return Look("", size, facts[0], facts[1], transparent, facts[2], low, high, _digest(pixels), thumbnail(pixels))


def _moves(file: Image.Image) -> bool:
    return file.format != "MPO" and bool(getattr(file, "is_animated", False))


def _digest(pixels: np.ndarray) -> str:
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=12)
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def thumbnail(pixels: np.ndarray) -> str:
    """SIDE x SIDE RGB bytes of uint8 [H,W,3], base64. Such texts may be joined: their bytes are a multiple of three."""
    from PIL import Image

    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    return base64.b64encode(small.tobytes()).decode()


# ---------------------------------------------------------------- all of a dataset


def look_at(
    files: Mapping[str, Path], say: Callable[[str], None] = print, rank: int = 0, patience: float = PATIENCE
) -> dict[str, Look]:
    """The look of every file; `files`: path -> folder of the index that remembers it.

    A process of another rank than 0 waits for the first one's index as long as that grows, and then does the rest.
    A file that cannot be read at all has that as its problem, which is not remembered.
    """
    keys = {path: key for path in files if (key := _key(path))}
    found = {path: Look("it cannot be read") for path in files if path not in keys}
    indexes = _indexes(files)
    if rank:
        indexes = _waited(files, keys, indexes, patience)
    for path, key in keys.items():
        if (known := indexes[files[path]].get(os.path.abspath(path), key)) is not None:
            found[path] = Look(known[0], tuple(known[1]), *known[2:])
    new = [path for path in files if path not in found]
    size = sum(keys[path][0] for path in new)
    if size > ANNOUNCED:
        say(f"pictures: {len(new)} new files ({size / 1024**3:.1f} GiB) are decoded once to find damage")
    written = time.monotonic()
    for path, one, lasting in _looks(new):
        found[path] = one
        if lasting:
            indexes[files[path]].put(os.path.abspath(path), keys[path], astuple(one))
        if time.monotonic() - written > WRITTEN:
            _write(indexes)
            written = time.monotonic()
    _write(indexes)
    return found


def _key(path: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def _indexes(files: Mapping[str, Path]) -> dict[Path, Index]:
    return {folder: Index(folder, INDEX, recipe=RECIPE) for folder in set(files.values())}


def _write(indexes: Mapping[Path, Index]) -> None:
    for index in indexes.values():
        index.write()


def _waited(
    files: Mapping[str, Path], keys: Mapping[str, tuple[int, int]], indexes: dict[Path, Index], patience: float
) -> dict[Path, Index]:
    """The indexes once they know all files, or once nothing has come for `patience` seconds."""
    before, since = -1, time.monotonic()
    while True:
        known = sum(indexes[files[p]].get(os.path.abspath(p), key) is not None for p, key in keys.items())
        if known > before:
            before, since = known, time.monotonic()
        if known == len(keys) or time.monotonic() - since > patience:
            return indexes
        time.sleep(min(1.0, patience / 4))
        indexes = _indexes(files)


def _looks(paths: list[str]) -> Iterator[tuple[str, Look, bool]]:
    """(path, its look, whether that lasts), in parallel."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        yield from pool.map(safe_look, paths)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest


def safe_look(path: str) -> tuple[str, Look, bool]:
    try:
        return path, look(path), True
    except OSError as error:
        return path, Look(f"it cannot be read ({error.strerror or error})"), False
    except MemoryError:
        return path, Look("there is not enough memory to decode it"), False


def spread(count: int) -> list[int]:
    """Numbers of FRAMES frames spread evenly over `count`: the first of equal parts, so that they stay the same ones
    where every second is left out."""
    return [k * count // FRAMES for k in range(FRAMES)]


def look_of_video(video: Video, looks: Mapping[str, Look]) -> Look | None:
    """What videos are compared by. Of a folder of frames it is made from the looks of these; None: one is damaged."""
    if not video.names:
        return Look("", video.size, content=video.content, thumbnail=video.thumbnail)
    frames = [looks.get(str(Path(video.file) / name)) for name in video.names]
    if any(one is None or one.problem for one in frames):
        return None
    content = hashlib.blake2b(" ".join(one.content for one in frames).encode(), digest_size=12).hexdigest()
    shown = "".join(frames[n].thumbnail for n in spread(len(frames)))
    return Look("", video.size, content=content, thumbnail=shown)


def thumbnails(looks: list[Look]) -> np.ndarray:
    """float32 [N,SIDE,SIDE,3], 0..255; of videos [N,FRAMES*SIDE,SIDE,3]."""
    raw = np.frombuffer(b"".join(base64.b64decode(one.thumbnail) for one in looks), np.uint8)
    return raw.reshape(len(looks), -1, SIDE, 3).astype(np.float32)
