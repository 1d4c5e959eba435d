"""What is trained, as files to look at: every picture, every frame of every clip, controls and captions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data import controls, images, videos
from library.data.captions import whole
from library.data.dataset import item_rng
from library.errors import DiskError

if TYPE_CHECKING:
    from library.data.dataset import Dataset
    from library.data.items import Item


def write_preview(dataset: Dataset, folder: Path) -> int:
    """Write all items, those that are held out last; returns how many. Raises DiskError where that is not possible.

    A picture is `0000_<name>.png`; a clip is the folder `0000_<name>_<first frame>-<frames>` of its frames as PNG,
    exactly as the model gets them, and the same as an .mp4 that plays at the model's rate. Augmentation is left out,
    except that a random crop is some crop.
    """
    items = (*dataset.items, *dataset.validation)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item in items:
            _write_item(item, folder, dataset.rule.fps if dataset.rule else None)
    except OSError as error:
        raise DiskError(f"--write_preview {folder} cannot be written ({error.strerror or error})") from None
    return len(items)


def _write_item(item: Item, folder: Path, fps: float | None) -> None:
    from PIL import Image

    name = f"{item.index:04d}_" + re.sub(r"[^\w.-]", "_", item.path.stem)
    if item.clip is not None:
        name += f"_{item.clip.start:05d}-{item.clip.frames:03d}"
    pixels = images.load(item, item_rng(0, 0, item.index, 0), flip=False).pixels
    if item.clip is not None:
        (folder / name).mkdir(exist_ok=True)
        for number, frame in enumerate(pixels):
            Image.fromarray(frame).save(folder / name / f"{number:04d}.png")
        videos.write(folder / f"{name}.mp4", pixels, fps)
    else:
        Image.fromarray(pixels[0] if pixels.ndim == 4 else pixels).save(folder / f"{name}.png")
    for number, control in enumerate(controls.load(item)):
        Image.fromarray(_bytes(control)).save(folder / f"{name}_control_{number}.png")
    (folder / f"{name}.txt").write_text(whole(item.caption, item.subset), encoding="utf-8")


def _bytes(tensor: Any) -> np.ndarray:
    return tensor.add(1).mul(127.5).round().byte().movedim(0, -1).contiguous().numpy()
