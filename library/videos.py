"""What was drawn as files: pictures as PNG, videos as MP4 with a strip of their frames beside it, written whole.

No torch; PyAV is imported when the first video is written.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.pictures import save_png, strip

if TYPE_CHECKING:
    import numpy as np


def save(pixels: np.ndarray, path: Path, text: Mapping[str, str], fps: float | None) -> tuple[Path, np.ndarray]:
    """Write uint8 [H,W,3] as `path` with .png, or [F,H,W,3] as .mp4 at `fps` and a strip of its frames as .png.

    Returns the file and what stands for it in a grid: the picture, or the strip [h,w,3].
    """
    still = strip(pixels) if pixels.ndim == 4 else pixels
    save_png(still, path.with_suffix(".png"), text)
    if pixels.ndim == 3:
        return path.with_suffix(".png"), still
    save_mp4(pixels, path.with_suffix(".mp4"), text, fps)
    return path.with_suffix(".mp4"), still


def save_mp4(pixels: np.ndarray, path: Path, text: Mapping[str, str], fps: float) -> None:
    """uint8 [F,H,W,3] as MP4 with its text as the comment; the final name appears with the whole file."""
    from library.data.videos import write

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        write(partial, pixels, fps, {"comment": "\n".join(text.values())} if text else {})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
