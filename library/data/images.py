"""One picture from its file to the pixels that are trained: orientation, alpha, resize, crop, augmentation, mask."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from library.data import scan
from library.errors import DatasetError

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.buckets import Placement
    from library.data.cache import ContentHashes
    from library.data.config import SubsetSpec
    from library.data.items import Item

RECIPE = 1  # raised when the same options begin to give other pixels


@dataclass
class Picture:
    pixels: np.ndarray  # uint8 [H,W,3] at the bucket's size; [F,H,W,3] for a video model
    mask: np.ndarray | None  # float32 [H,W] in 0..1
    flipped: bool
    crop: tuple[int, int] = (0, 0)  # left and top of what was cut out of the resized picture, mirrored with it


def content(item: Item, hashes: ContentHashes) -> str:
    """What the pixels of an item are made from, for the identity of a cache entry."""
    if item.clip is None:
        return hashes.of(item.path)
    from library.data import videos

    return videos.content(item.clip, hashes)


def preprocessing_key(item: Item) -> str:
    """Everything besides the file's bytes that decides the pixels of an unaugmented picture."""
    return f"{placement_key(item.placement, item.subset)} alpha {item.subset.alpha_mask}"


def placement_key(placement: Placement, subset: SubsetSpec) -> str:
    """How a decoded picture became its pixels."""
    where = f"bucket {placement.bucket} resized {placement.resized} crop {placement.left},{placement.top}"
    return f"recipe {RECIPE} {where} by {subset.resize_interpolation}"


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H,W,3] or [F,H,W,3] -> float32 [3,H,W] or [3,F,H,W] in -1..1."""
    import torch

    values = pixels.astype(np.float32)  # in NumPy: torch would start threads of its own in every thread that decodes
    values /= np.float32(127.5)
    values -= np.float32(1)
    return torch.from_numpy(values).movedim(-1, 0)


def load(item: Item, rng: random.Random, flip: bool | None = None) -> Picture:
    """The picture or clip of an item. `flip` decides the mirroring; None draws it from `rng` where flip_aug is on.

    Raises DatasetError naming a file that cannot be decoded.
    """
    if item.clip is not None:
        from library.data import videos

        return videos.load(item, rng, flip)
    subset = item.subset
    pixels, mask = decode(item.path, subset.alpha_mask)
    if item.mask_path is not None:
        mask = read_mask(item.mask_path, (pixels.shape[1], pixels.shape[0]))
    placement = item.placement
    if subset.face_crop_aug_range or subset.random_crop:
        placement = moved(placement, rng)
    pixels = place(pixels, placement, subset.resize_interpolation)
    if mask is not None:
        mask = place(mask, placement, "area").astype(np.float32) / 255
    flipped = (subset.flip_aug and rng.random() < 0.5) if flip is None else flip
    left = placement.left
    if flipped:
        left = placement.resized[0] - placement.bucket[0] - left
        pixels = np.ascontiguousarray(pixels[:, ::-1])
        mask = None if mask is None else np.ascontiguousarray(mask[:, ::-1])
    if subset.color_aug:
        pixels = change_colours(pixels, rng)
    return Picture(pixels[None] if item.frames else pixels, mask, flipped, (left, placement.top))


def decode(path, with_alpha: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB uint8 [H,W,3] upright as EXIF says, alpha composed on white; the alpha channel [H,W] if asked for.

    Raises DatasetError naming a file that cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with scan.opened(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I;16", "I"):  # 16-bit grey: PIL's own conversion would clip instead of scale
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            if not has_alpha:
                mask = np.full((image.height, image.width), 255, np.uint8) if with_alpha else None
                return np.asarray(image.convert("RGB")), mask
            pixels = np.asarray(image.convert("RGBA"))
            return on_white(pixels), pixels[:, :, 3] if with_alpha else None
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        raise DatasetError(f"{path} cannot be decoded ({error}); repair it or take it out") from error


def on_white(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGBA [H,W,4] -> RGB [H,W,3]."""
    from PIL import Image

    paper = Image.new("RGBA", (pixels.shape[1], pixels.shape[0]), "white")
    paper.alpha_composite(Image.fromarray(pixels))
    return np.asarray(paper.convert("RGB"))


def read_mask(path, size: tuple[int, int]) -> np.ndarray:
    """The red channel of a mask, [H,W]; it has to have the picture's size."""
    mask, _ = decode(path)
    if (mask.shape[1], mask.shape[0]) != size:
        raise DatasetError(
            f"mask {path} is {mask.shape[1]}x{mask.shape[0]}, its picture {size[0]}x{size[1]}; make them equal"
        )
    return mask[:, :, 0]


def moved(placement: Placement, rng: random.Random) -> Placement:
    """The same crop at a random place."""
    from dataclasses import replace

    left = rng.randint(0, placement.resized[0] - placement.bucket[0])
    return replace(placement, left=left, top=rng.randint(0, placement.resized[1] - placement.bucket[1]))


def place(pixels: np.ndarray, placement: Placement, interpolation: str | None) -> np.ndarray:
    """Resize to cover the bucket and crop it out. Default: area where both sides shrink, Lanczos otherwise."""
    height, width = pixels.shape[:2]
    if (width, height) != placement.resized:
        shrinks = placement.resized[0] <= width and placement.resized[1] <= height
        pixels = resize(pixels, placement.resized, interpolation or ("area" if shrinks else "lanczos"))
    x, y, (w, h) = placement.left, placement.top, placement.bucket
    return np.ascontiguousarray(pixels[y : y + h, x : x + w])


def resize(pixels: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """uint8 [H,W] or [H,W,3] -> (width, height) `size`; Lanczos and box by PIL, the others by OpenCV, as sd-scripts."""
    if how in ("lanczos", "box"):
        from PIL import Image

        return np.asarray(Image.fromarray(pixels).resize(size, getattr(Image.Resampling, how.upper())))
    import cv2

    codes = {
        "area": cv2.INTER_AREA,
        "nearest": cv2.INTER_NEAREST,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
    }
    return cv2.resize(pixels, size, interpolation=codes[how])


def change_colours(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """With p 1/3: the hue turned by up to 8 of 180, or gamma 0.95 to 1.05, as sd-scripts."""
    import cv2

    if rng.random() >= 0.33:
        return pixels
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(np.int16) + rng.randint(-8, 8)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    gamma = rng.uniform(0.95, 1.05)
    table = (255 * (np.arange(256) / 255) ** gamma).round().astype(np.uint8)
    return table[pixels]
