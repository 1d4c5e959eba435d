"""Videos: what a file holds, found out by decoding it once, and exactly the frames that are asked for.

Decoding is PyAV's (FFmpeg). Frames come upright (rotation and mirroring of the file's display matrix), with alpha on
white, and are never all in memory: a clip in the middle of a long file is reached from the key frame before it. A
folder of pictures is a video, too; its frames are in the natural order of their names (frame_2 before frame_10).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data import images
from library.data.decoded import spread, thumbnail
from library.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import random

    from library.data.cache import ContentHashes
    from library.data.clips import Clip
    from library.data.items import Item

REORDER = 16  # frames: more than any codec moves a frame from the order of decoding to the order of showing
KEPT = 128  # thumbnails while the length of a video is not known yet: a choice is off by 0.8 % of it at most
SMALL = 64  # pixels a side to which FFmpeg shrinks a frame before its thumbnail: of 1080p that costs 1.3 ms of one core
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics (ITU-T H.273)
ALPHA = {"vp9": "libvpx-vp9", "vp8": "libvpx"}  # decoders that read the alpha that Matroska keeps beside a frame


@dataclass(frozen=True)
class Video:
    file: str
    size: tuple[int, int]  # width, height as shown: turned, pixels made square
    frames: int
    fps: Fraction | None  # mean frames a second; None: unknown
    base: Fraction = Fraction(0)  # seconds of a tick
    ticks: Sequence[int] = ()  # when each frame is shown, strictly ascending; () = the file does not say
    turn: tuple[bool, bool, bool] = (False, False, False)  # exchange rows and columns, then mirror x, mirror y
    names: tuple[str, ...] = ()  # of the frames, where the video is a folder
    remarks: tuple[str, ...] = ()  # what is worth knowing about the file
    content: str = ""  # of a file: hash of its packets, equal for equal videos in whatever container, with any sound
    thumbnail: str = ""  # of a file: the look of a few frames, as in decoded.Look

    def times(self) -> list[Fraction]:
        """Seconds from the first frame. Raises ValueError where the file does not say."""
        if not self.ticks:
            raise ValueError("it has no usable timestamps; give source_fps, or no rate at all")
        return [(tick - self.ticks[0]) * self.base for tick in self.ticks]


def library() -> Any:
    """PyAV, from 17 on: those before ignore the colour matrix of a file. Raises ConfigError saying how to get it."""
    try:
        import av
    except ImportError:
        raise ConfigError("videos are decoded by PyAV, which is not installed; pip install av") from None
    if int(av.__version__.split(".")[0]) < 17:
        raise ConfigError(f"PyAV {av.__version__} gives HD videos wrong colours; pip install 'av>=17'")
    return av


@contextlib.contextmanager
def _opened(file: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream). Raises ValueError with the reason if there is none."""
    av = library()
    with av.open(file) as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("nothing here decodes its format")
        stream.thread_type = "AUTO"
        yield container, stream


def _decoded(container: Any, stream: Any, whole: bool = True, digest: Any = None) -> Iterator[Any]:
    """Every frame in the order of showing; at a damaged one raises ValueError, or leaves it out if not `whole`.

    `digest` (of hashlib) is given every packet.
    """
    av = library()
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA:
        decoder = av.CodecContext.create(ALPHA[decoder.name], "r")
    for packet in container.demux(stream):
        if packet.is_corrupt and whole:
            raise ValueError("it is damaged or cut off")
        if digest is not None:
            digest.update(bytes(packet))
        for frame in decoder.decode(packet):
            if not frame.is_corrupt:
                yield frame
            elif whole:
                raise ValueError("it is damaged or cut off")


# ---------------------------------------------------------------- what a file holds


def probe(file: str) -> Video:
    """The facts of a video file. It is decoded to its end once: only so its frames are counted and known to be whole.

    Raises ValueError with what is wrong with it.
    """
    av = library()
    ticks, first, end = array("q"), None, Fraction(0)
    digest, glimpses = hashlib.blake2b(digest_size=12), _Glimpses()
    try:
        with _opened(file) as (container, stream):
            for frame in _decoded(container, stream, digest=digest):
                first = first or frame
                if (frame.width, frame.height) != (first.width, first.height):
                    raise ValueError(f"its frames change their size to {frame.width}x{frame.height}")
                glimpses.see(len(ticks), frame, first)
                ticks.append(-1 if frame.pts is None else frame.pts)
                end = max(end, (ticks[-1] + (frame.duration or 0)) * (stream.time_base or 0))
            if first is None:
                raise ValueError("there is no frame in it")
            facts = _facts(file, stream, first, ticks)
            told = _told_seconds(container, stream)
            if told and facts.fps and "variable rate" not in facts.remarks and told - end > max(0.25, 3 / facts.fps):
                raise ValueError(f"it is cut off: {float(end):.2f} s of the {float(told):.2f} s that it tells of")
            digest.update(repr((stream.codec_context.name, facts.size, facts.turn, facts.frames)).encode())
            digest.update(stream.codec_context.extradata or b"")
            return replace(facts, content=digest.hexdigest(), thumbnail=glimpses.of(len(ticks)))
    except av.error.FFmpegError as error:
        raise ValueError(f"{error.strerror or error}" + (f" after frame {len(ticks)}" if ticks else "")) from None
    except ValueError as error:
        raise ValueError(f"{error}" + (f" (after frame {len(ticks)})" if ticks else "")) from None


class _Glimpses:
    """Thumbnails of frames at equal steps. The step doubles as the video goes on, so that there are never many."""

    def __init__(self) -> None:
        self.step, self.kept = 1, []

    def see(self, number: int, frame: Any, first: Any) -> None:
        if number % self.step:
            return
        sides = min(frame.width, SMALL), min(frame.height, SMALL)
        small = frame.reformat(*sides, format=_rgb(frame), interpolation="AREA")
        self.kept.append(thumbnail(_upright(small, _turn(first))))
        if len(self.kept) == KEPT:
            self.step, self.kept = self.step * 2, self.kept[::2]

    def of(self, count: int) -> str:
        """Those nearest to what `spread` asks for, one below the other."""
        last = len(self.kept) - 1
        return "".join(self.kept[min(last, (number + self.step // 2) // self.step)] for number in spread(count))


def _facts(file: str, stream: Any, first: Any, ticks: array) -> Video:
    base, ordered = Fraction(stream.time_base), all(a < b for a, b in zip(ticks, ticks[1:], strict=False))
    turn, aspect = _turn(first), stream.sample_aspect_ratio or Fraction(1)
    width, height = first.width, first.height
    width, height = (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))
    transfer = stream.codec_context.color_trc
    remarks = [HDR[transfer] + " colours as they are"] if transfer in HDR else []
    remarks += ["interlaced"] if first.interlaced_frame else []
    remarks += ["turned or mirrored"] if any(turn) else []
    remarks += ["pixels not square"] if aspect != 1 else []
    told, count = Fraction(stream.average_rate) if stream.average_rate else None, len(ticks)
    if not ordered or len(ticks) < 2:
        fps, ticks = told, ticks if len(ticks) == 1 and ordered else ()
        remarks += ["no usable timestamps"] if not ordered else []
    else:
        step = Fraction(ticks[-1] - ticks[0], len(ticks) - 1)
        fps = 1 / (step * base)
        if any(abs(tick - ticks[0] - n * step) > max(1, step / 2) for n, tick in enumerate(ticks)):
            remarks.append("variable rate")
        elif told and abs(told / fps - 1) < Fraction(1, 200):
            fps = told  # ticks are rounded, the rate of the header is not
    size = (height, width) if turn[0] else (width, height)
    return Video(file, size, count, fps, base, tuple(ticks), turn, (), tuple(remarks))


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """How a frame becomes upright, from its display matrix [a b u; c d v; ...], x' = a x + c y, y' = b x + d y."""
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return (False, False, False)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    turned = abs(b) > abs(a)
    return (turned, (c if turned else a) < 0, (b if turned else d) < 0)


def _told_seconds(container: Any, stream: Any) -> Fraction | None:
    """How long the header says that the video is, where it says so of the video alone."""
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        return Fraction(match[1]) * 3600 + Fraction(match[2]) * 60 + Fraction(match[3])
    alone = len(container.streams) == 1 and container.duration
    return Fraction(container.duration + (container.start_time or 0), 1_000_000) if alone else None


def natural(name: str) -> list:
    """Sorting key: numbers in a name count by their value."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


# ---------------------------------------------------------------- its frames


def read(video: Video, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """RGB uint8 [h,w,3], upright, alpha on white, of the frames `wanted` (ascending, one may be there twice).

    Raises DatasetError naming a file that does not give them.
    """
    if video.names:
        for number in wanted:
            yield images.decode(Path(video.file) / video.names[number])[0]
        return
    frames = _from(video, wanted[0])
    number, pixels = -1, None
    for want in wanted:
        while number < want:
            number, frame = next(frames, (want + 1, None))
            pixels = None
        if number > want or frame is None:
            raise DatasetError(f"{video.file}: its frame {want} cannot be decoded; has the file changed?")
        if pixels is None:
            pixels = _upright(frame, video.turn)
        yield pixels


def _from(video: Video, first: int) -> Iterator[tuple[int, Any]]:
    """(number, frame) from a frame at or before `first` on: reached by a jump where that is known to work."""
    av = library()
    try:
        with _opened(video.file) as (container, stream):
            numbered = _numbered(video, container, stream, jump_to=first if first > 2 * REORDER else 0)
            head = next(numbered, None)
            if head is not None and head[0] <= first:
                yield head
                yield from numbered
                return
        with _opened(video.file) as (container, stream):  # the jump went too far
            yield from _numbered(video, container, stream)
    except (av.error.FFmpegError, ValueError) as error:
        raise DatasetError(f"{video.file} cannot be decoded ({error}); repair it or take it out") from None


def _numbered(video: Video, container: Any, stream: Any, jump_to: int = 0) -> Iterator[tuple[int, Any]]:
    if not (jump_to and video.ticks):
        yield from enumerate(_decoded(container, stream))
        return
    container.seek(video.ticks[jump_to - REORDER], stream=stream)
    for frame in _decoded(container, stream, whole=False):  # frames may refer to some before the key frame
        number = bisect_left(video.ticks, frame.pts)
        if number < video.frames and video.ticks[number] == frame.pts:
            yield number, frame


def _rgb(frame: Any) -> str:
    """The format of pixels that loses nothing of a frame: with alpha where it has some."""
    alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    return "rgba" if alpha else "rgb24"


def _upright(frame: Any, turn: tuple[bool, bool, bool]) -> np.ndarray:
    pixels = frame.to_ndarray(format=_rgb(frame))
    pixels = images.on_white(pixels) if pixels.shape[2] == 4 else pixels
    exchanged, mirror_x, mirror_y = turn
    pixels = pixels.swapaxes(0, 1) if exchanged else pixels
    return np.ascontiguousarray(pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])


def write(path: Path, pixels: np.ndarray, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """uint8 RGB [F,H,W,3] as H.264 in .mp4, of a quality that hides nothing; odd sides keep every pixel."""
    av = library()
    height, width = pixels.shape[1:3]
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream("libx264", rate=Fraction(str(fps)), options={"crf": "10"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"  # the latter is what every player knows
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # BT.601, limited: as it is converted
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# ---------------------------------------------------------------- a clip of an item


def load(item: Item, rng: random.Random, flip: bool | None = None) -> images.Picture:
    """The pixels [F,H,W,3] of an item's clip, all of its frames placed, mirrored and coloured alike."""
    subset, clip, placement = item.subset, item.clip, item.placement
    if subset.random_crop or subset.face_crop_aug_range:
        placement = images.moved(placement, rng)
    width, height = placement.bucket
    pixels = np.empty((clip.frames, height, width, 3), np.uint8)
    for number, frame in enumerate(read(clip.video, clip.sources)):
        pixels[number] = images.place(frame, placement, subset.resize_interpolation)
    flipped = (subset.flip_aug and rng.random() < 0.5) if flip is None else flip
    if flipped:
        pixels = np.ascontiguousarray(pixels[:, :, ::-1])
    if subset.color_aug:
        pixels = images.change_colours(pixels.reshape(-1, width, 3), rng).reshape(pixels.shape)
    return images.Picture(pixels, None, flipped)


def content(clip: Clip, hashes: ContentHashes) -> str:
    """What a clip is made from, for the identity of a cache entry: the file's content and the numbers of its frames."""
    video, sources = clip.video, clip.sources
    if video.names:
        return " ".join(hashes.of(Path(video.file) / video.names[number]) for number in sources)
    return f"{hashes.of(Path(video.file))} frames {' '.join(map(str, sources))} turn {video.turn}"
