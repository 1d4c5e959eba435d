"""Videos made for the tests: every frame shows its own number as 4 x 4 black and white fields."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def pattern(number: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """uint8 [H,W,3]; field k (row by row) is white where bit k of the number is set."""
    bits = np.array([number >> k & 1 for k in range(16)], np.uint8).reshape(4, 4) * 255
    rows, columns = np.arange(size[1]) * 4 // size[1], np.arange(size[0]) * 4 // size[0]
    return np.repeat(bits[rows][:, columns, None], 3, 2)


def number_of(pixels: np.ndarray) -> int:
    """The number that a frame [H,W,3] shows; the middles of the fields decide."""
    height, width = pixels.shape[:2]
    rows, columns = (np.arange(4) * 2 + 1) * height // 8, (np.arange(4) * 2 + 1) * width // 8
    fields = pixels[rows][:, columns].mean(-1).reshape(-1) > 127
    return int(sum(1 << k for k in range(16) if fields[k]))


def write_video(
    path: Path,
    frames: int | Iterable[np.ndarray],
    *,
    size: tuple[int, int] = (64, 64),
    rate: Fraction | int = 30,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,  # milliseconds, for a variable rate
    turn: tuple[int, bool] | None = None,  # of an .mp4: degrees counter-clockwise, then mirrored left to right
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """A real file of `frames` numbered patterns, or of these frames."""
    pictures = [pattern(n, size) for n in range(frames)] if isinstance(frames, int) else list(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for n, one in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(one, format="rgba" if one.shape[2] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[n], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if turn:
        _turn(path, *turn)
    return path


def _turn(path: Path, degrees: int, mirrored: bool) -> None:
    """Write the display matrix [a b u; c d v; x y w] of the track header, x' = a x + c y, y' = b x + d y."""
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}[degrees]
    a, c = (-a, -c) if mirrored else (a, c)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # after version, times, track, duration, layer, volume (ISO 14496-12)
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
