"""Pictures as files: labelled grids and PNGs with text, written whole. No torch."""

from __future__ import annotations

import os
import textwrap
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

CELL, LARGEST, MARGIN, LABEL = 128, 512, 8, 150  # a cell's smallest and largest side, space, row labels; in pixels
SHOWN, STRIP_SIDE = 8, 480  # frames of a strip, their largest side in pixels


def grid(
    images: list[list[np.ndarray]], row_labels: list[str], column_labels: list[str], title: str = ""
) -> Image.Image:
    """Pictures [row][column] uint8 [H,W,3] with labels; small ones are enlarged pixel by pixel, large ones shrunk."""
    from PIL import Image, ImageDraw, ImageFont

    cells = [[_cell(Image.fromarray(picture)) for picture in row] for row in images]
    width, height = (max(cell.size[axis] for row in cells for cell in row) for axis in (0, 1))
    font = ImageFont.load_default(size=14)
    top = 24 + (22 if title else 0)
    size = (LABEL + len(column_labels) * (width + MARGIN), top + len(images) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, 2), title, fill="black", font=font)
    for x, label in enumerate(column_labels):
        draw.text((LABEL + x * (width + MARGIN), top - 20), label, fill="black", font=font)
    for y, row in enumerate(cells):
        text = "\n".join(textwrap.wrap(row_labels[y], 19, max_lines=7, placeholder=" ..."))
        draw.multiline_text((MARGIN, top + y * (height + MARGIN)), text, fill="black", font=font)
        for x, cell in enumerate(row):
            sheet.paste(cell, (LABEL + x * (width + MARGIN), top + y * (height + MARGIN)))
    return sheet


def strip(frames: np.ndarray, most: int = SHOWN) -> np.ndarray:
    """A video uint8 [F,H,W,3] as one picture [H,n*W,3]: up to `most` frames side by side, the first and last included.

    Frames are at most STRIP_SIDE pixels high or wide.
    """
    import numpy as np
    from PIL import Image

    count = min(most, len(frames))
    chosen = [frames[round(k * (len(frames) - 1) / max(1, count - 1))] for k in range(count)]
    height, width = frames.shape[1:3]
    scale = min(1.0, STRIP_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in chosen]
    return np.concatenate([np.asarray(frame) for frame in small], axis=1)


def _cell(picture: Image.Image) -> Image.Image:
    from PIL import Image

    small, large = min(picture.size), max(picture.size)
    if small < CELL:
        factor = -(-CELL // small)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if large > LARGEST:
        size = (max(1, round(picture.width * LARGEST / large)), max(1, round(picture.height * LARGEST / large)))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def save_png(image: Any, path: Path, text: Mapping[str, str]) -> None:
    """A PIL image or a uint8 array [H,W,3] as PNG with text chunks; the final name appears with the whole file."""
    from PIL import Image, PngImagePlugin

    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    picture.save(partial, format="PNG", pnginfo=chunks)
    os.replace(partial, path)
