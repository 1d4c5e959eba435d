"""Aspect-ratio buckets, exactly as sd-scripts makes and chooses them. Sizes are (width, height) in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """How a picture becomes its bucket: resized to cover it, then cropped from (left, top)."""

    bucket: Size
    resized: Size
    left: int
    top: int


def bucket_list(resolution: Size, smallest: int, largest: int, steps: int) -> list[Size]:
    """All buckets whose area is at most that of `resolution`, sides multiples of `steps`, sorted.

    The square of that area, and for every width the tallest height, with both orientations.
    """
    area = resolution[0] * resolution[1]
    smallest = max(smallest, steps)
    side = math.isqrt(area) // steps * steps
    found = {(side, side)}
    for width in range(smallest, largest + 1, steps):
        height = min(largest, area // width // steps * steps)
        if height >= smallest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def _half_up(value: float) -> int:
    return int(value + 0.5)


def _cover(size: Size, bucket: Size) -> Size:
    """The size, with the picture's proportions, that just covers the bucket."""
    width, height = size
    if width / height > bucket[0] / bucket[1]:  # wider than the bucket: the height decides
        return (_half_up(width * bucket[1] / height), bucket[1])
    return (bucket[0], _half_up(height * bucket[0] / width))


def _placed(bucket: Size, resized: Size) -> Placement:
    return Placement(bucket, resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)


def assign(size: Size, buckets: list[Size]) -> Placement:
    """The bucket of a picture where enlarging is allowed: its own size, else the nearest ratio of width to height."""
    if size in buckets:
        return _placed(size, size)
    ratio = size[0] / size[1]
    bucket = min(buckets, key=lambda b: abs(b[0] / b[1] - ratio))  # the first of equals, as sd-scripts' argmin
    resized = _cover(size, bucket)
    return _placed(bucket, (max(resized[0], bucket[0]), max(resized[1], bucket[1])))


def nearest(size: Size, sizes: Iterable[Size]) -> Placement:
    """Of given buckets the one whose ratio of width to height is nearest in the logarithm."""
    ratio = math.log(size[0] / size[1])
    bucket = min(sizes, key=lambda b: abs(math.log(b[0] / b[1]) - ratio))
    return single(size, bucket)


def assign_no_upscale(size: Size, resolution: Size, steps: int) -> Placement:
    """A bucket made for the picture: shrunk to the area of `resolution` if larger, both sides cut to `steps`."""
    width, height = size
    area, ratio = resolution[0] * resolution[1], size[0] / size[1]
    if width * height > area:
        w = math.sqrt(area * ratio)
        h = area / w
        rounded_w, rounded_h = _to_steps(w, steps), _to_steps(h, steps)
        error_w = abs(rounded_w / _to_steps(rounded_w / ratio, steps) - ratio)  # of the bucket that would follow
        error_h = abs(_to_steps(rounded_h * ratio, steps) / rounded_h - ratio)
        by_width, by_height = (rounded_w, _half_up(rounded_w / ratio)), (_half_up(rounded_h * ratio), rounded_h)
        resized = by_width if error_w < error_h else by_height
    else:
        resized = size
    bucket = (max(steps, resized[0] // steps * steps), max(steps, resized[1] // steps * steps))
    return _placed(bucket, resized)


def _to_steps(value: float, steps: int) -> int:
    """Rounded half up, then down to a multiple of `steps`."""
    return max(steps, _half_up(value) // steps * steps)


def single(size: Size, resolution: Size) -> Placement:
    """Without buckets: the picture covers `resolution` and is cropped to it."""
    resized = _cover(size, resolution)
    return _placed(resolution, (max(resized[0], resolution[0]), max(resized[1], resolution[1])))


def cropped(size: Size, unit: int) -> Placement:
    """The picture as it is, its sides cut in the middle to multiples of `unit`; enlarged only below one unit."""
    bucket = (max(unit, size[0] // unit * unit), max(unit, size[1] // unit * unit))
    return _placed(bucket, size) if min(size) >= unit else single(size, bucket)


def stretched(size: Size) -> Placement:
    """The whole picture at exactly `size`, whatever its own proportions."""
    return Placement(size, size, 0, 0)


def published(given: Size | Placement) -> Placement:
    """What a family says of a control: the size that the whole of it is stretched to, or the placement itself."""
    return given if isinstance(given, Placement) else stretched(given)


def of_area(size: Size, resolution: Size, unit: int) -> Placement:
    """In the picture's own proportions, with the area of `resolution`: musubi-tuner's rule for control pictures.

    Of the widths within two units of the exact one, each with the greatest height that the area allows, the pair
    whose ratio is nearest to the picture's.
    """
    area, ratio = resolution[0] * resolution[1], size[0] / size[1]
    near = int(math.sqrt(area * ratio)) // unit * unit
    widths = [w for w in range(near - 2 * unit, near + 3 * unit, unit) if w >= unit and area // w >= unit]
    pairs = [(w, area // w // unit * unit) for w in widths or [area // unit // unit * unit]]
    return single(size, min(pairs, key=lambda pair: abs(pair[0] / pair[1] - ratio)))
