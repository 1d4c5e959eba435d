"""diffusion-pipe's dataset file: [[directory]] tables below defaults at the top level, as our [[datasets]].

Every item is trained at every one of `resolutions`, so each of these becomes a dataset of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.dialects import Refused, Translation
from library.errors import ConfigError

HERE = ("path", "mask_path", "control_path", "control_paths")  # keys of a [[directory]] alone
SHUFFLED = "captions are shuffled anew in every step here; use shuffle_tags = true"
# our key, or why there is none; the others are read together
RULES: dict[str, Any] = {
    "num_repeats": "num_repeats",
    "caption_prefix": "caption_prefix",
    "shuffle_tags": "shuffle_caption",
    "cache_shuffle_delimiter": "caption_separator",
    "cache_shuffle_num": Refused(SHUFFLED),
    "default_mask_file": Refused("give every picture a mask in mask_path"),
    "subsample_ratio": Refused("take fewer files, or fewer num_repeats"),
    "online_captions": Refused("captions are read from .txt files"),
    "shuffle_metadata": lambda t, value, where: (
        None if value else t.refuse(where, "every epoch has an order of its own")
    ),
    "path": "image_dir",
    "mask_path": "conditioning_data_dir",
    "control_path": "control_directory",
    "control_paths": "control_directory",
}
TOGETHER = ("resolutions", "enable_ar_bucket", "min_ar", "max_ar", "num_ar_buckets", "ar_buckets", "size_buckets",
            "frame_buckets", "skip_empty_caption")  # fmt: skip
MOST_BUCKETS = 1000


def translate(table: Mapping[str, Any], source: str, folder: Path, options: Any) -> dict[str, Any]:
    """The table of a native dataset file. Raises ConfigError naming the directory and the key."""
    defaults = {key: value for key, value in table.items() if key != "directory"}
    for key in defaults:
        if key in HERE:
            raise ConfigError(f"{source}: {key} belongs into a [[directory]]")
    family = getattr(options, "family", None)
    unit = getattr(family, "pixel_multiple", None) or 16
    datasets = []
    for number, entry in enumerate(table["directory"], 1):
        place = f"{source}, directory {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise ConfigError(f"{place}: path is missing")
        own = {**defaults, **entry}
        for sizes in _sizes(own, place, unit):
            datasets += [{**sizes, "subsets": [subset]} for subset in _subsets(own, place, folder)]
    return {"datasets": datasets}


def _read(own: Mapping[str, Any], place: str) -> dict[str, Any]:
    t = Translation(place)
    t.read({key: value for key, value in own.items() if key not in TOGETHER}, RULES | dict.fromkeys(TOGETHER), "")
    return t.values


def _subsets(own: Mapping[str, Any], place: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Of the pictures and of the videos of a folder."""
    values = {"caption_extension": ".txt", **_read(own, place)}
    repeats = values.get("num_repeats", 1)
    if repeats != int(repeats):
        raise ConfigError(f"{place}: num_repeats {repeats}: a whole number can be had")
    values["num_repeats"] = int(repeats)
    if own.get("skip_empty_caption") is False:
        values["class_tokens"] = ""  # the caption of a file that has none
    path = values.pop("image_dir")
    pictures, videos = _kinds(_beside(folder, path))
    if _captions_file(_beside(folder, path)):
        raise ConfigError(f"{place}: {path}/captions.json is not read; write a .txt file beside every picture")
    if pictures or not videos:
        yield {"image_dir": path, **values}
    if videos:
        yield {"video_directory": path, **values, **_frames(own, place)}


def _beside(folder: Path, value: str) -> Path:
    there = folder / value
    return there if there.exists() else Path(value)


def _kinds(path: Path) -> tuple[bool, bool]:
    """Whether there are pictures, and videos."""
    from library.data.scan import EXTENSIONS, VIDEOS

    suffixes = {one.suffix.lower() for one in path.iterdir()} if path.is_dir() else set()
    return bool(suffixes & set(EXTENSIONS)), bool(suffixes & set(VIDEOS))


def _captions_file(path: Path) -> bool:
    return (path / "captions.json").is_file()


def _frames(own: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A video goes into the longest of `frame_buckets` that it fills."""
    wanted = own.get("frame_buckets", [1])
    if own.get("size_buckets"):
        wanted = [frames for _, _, frames in own["size_buckets"]]
    longer = sorted({frames for frames in wanted if frames > 1})
    if not longer:
        raise ConfigError(
            f"{place}: frame_buckets {wanted}: there are videos in it, which need one of more than 1 frame"
        )
    return {"target_frames": longer, "frame_extraction": "longest"} if len(longer) > 1 else {"target_frames": longer}


def _sizes(own: Mapping[str, Any], place: str, unit: int) -> list[dict[str, Any]]:
    """resolution and buckets of each dataset that a directory becomes."""
    if own.get("size_buckets"):
        pairs = sorted({(w, h) for w, h, *_ in own["size_buckets"]})
        return [{"resolution": list(pairs[0]), "enable_bucket": True, "bucket_sizes": [list(p) for p in pairs]}]
    resolutions = own.get("resolutions")
    if not isinstance(resolutions, list) or not resolutions:
        raise ConfigError(f"{place}: resolutions is missing, a list of side lengths")
    return [_one(own, place, unit, one) for one in resolutions]


def _one(own: Mapping[str, Any], place: str, unit: int, resolution: Any) -> dict[str, Any]:
    width, height = resolution if isinstance(resolution, list) else (resolution, resolution)
    area = width * height
    if own.get("ar_buckets"):
        ratios = [one[0] / one[1] if isinstance(one, list) else float(one) for one in own["ar_buckets"]]
    elif own.get("enable_ar_bucket"):
        lacking = [key for key in ("min_ar", "max_ar", "num_ar_buckets") if key not in own]
        if lacking:
            raise ConfigError(f"{place}: enable_ar_bucket needs {lacking[0]} too, or ar_buckets")
        low, high, count = math.log(own["min_ar"]), math.log(own["max_ar"]), own["num_ar_buckets"]
        if count > MOST_BUCKETS:
            raise ConfigError(f"{place}: num_ar_buckets {count} is above {MOST_BUCKETS}")
        ratios = [math.exp(low + (high - low) * k / max(1, count - 1)) for k in range(count)]
    else:
        side = math.sqrt(area)
        return {"resolution": [_rounded(side, unit)] * 2}
    sizes = dict.fromkeys((_rounded(math.sqrt(area * r), unit), _rounded(math.sqrt(area / r), unit)) for r in ratios)
    return {"resolution": [width, height], "enable_bucket": True, "bucket_sizes": [list(size) for size in sizes]}


def _rounded(side: float, unit: int) -> int:
    return max(unit, round(side / unit) * unit)


def facts(t: Translation) -> tuple[bool, bool, bool]:
    """Whether a run's dataset shuffles captions, has masks, trains files without a caption."""
    from library.options import read_toml

    value = t.values.get("dataset_config")
    if not value or str(value).endswith(".json"):
        return False, False, False
    path = Path(t.source).parent / value
    path = path if path.is_file() else Path(value)
    if not path.is_file():
        return False, False, False  # said when it is read
    table = read_toml(path)
    entries = [table, *table.get("directory", [])]
    keys = {key for entry in entries for key, value in entry.items() if value}
    empty = any(entry.get("skip_empty_caption") is False for entry in entries)
    return "shuffle_tags" in keys, "mask_path" in keys, empty
