"""The dataset description: sd-scripts' TOML (or JSON) and its command-line form, strict.

A value is looked up in the subset, the dataset, [general], then the command line. Unknown keys, keys in the wrong
table and values of the wrong type are errors that name file, table and key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from library.data import unread
from library.data.clips import EXTRACTIONS, TIMESTAMPS
from library.dialects import translated_dataset
from library.errors import ConfigError, DatasetError, nearest
from library.option_kinds import is_path

LARGEST = 65536  # pixels of a side
NAMING = "<repeats>_<name>"  # of the folders in --train_data_dir
MOST = 10**6  # repeats of a picture, frames of a clip: more is a slip, and would fill the memory
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")


@dataclass(frozen=True)
class SubsetSpec:
    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    num_repeats: int = 1
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    resize_interpolation: str | None = None
    control_directory: tuple[str, ...] = ()
    no_resize_control: bool = False
    control_resolution: tuple[int, int] | None = None  # width, height: an area
    video_directory: str | None = None
    target_frames: tuple[int, ...] = ()  # () = not given, which is (1,)
    frame_extraction: str = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None
    fps_resample_mode: str | None = None

    @property
    def source(self) -> str:
        return self.metadata_file or self.image_dir or self.video_directory or ""

    @property
    def folder(self) -> Path:
        """Where what is known of the subset's files is kept beside them."""
        own = self.image_dir or self.video_directory
        return Path(own) if own else Path(self.metadata_file or "").parent

    @property
    def frame_keys(self) -> tuple:
        """What decides which frames of its videos are trained."""
        names = ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
        return tuple(getattr(self, name) for name in (*names, "fps_resample_mode")) if self.video_directory else ()

    @property
    def moving(self) -> list[str]:
        """Names of the options that are on and change the pixels of a picture every time."""
        return [name for name in ("color_aug", "random_crop", "face_crop_aug_range") if getattr(self, name)]


@dataclass(frozen=True)
class DatasetSpec:
    subsets: tuple[SubsetSpec, ...]
    resolution: tuple[int, int]  # width, height
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    bucket_sizes: tuple[tuple[int, int], ...] = ()  # the buckets themselves, width and height, instead of a rule
    validation_split: float = 0.0
    validation_seed: int | None = None


BOOL, INT, NUMBER, TEXT, SIZE, RANGE = "true or false", "a whole number", "a number", "a text", "a size", "two numbers"
TEXTS, INTS = "a text or a list of texts", "a whole number or a list of them, each at least 1"
SIZES = "a list of [width, height]"
DATASET_KEYS = {
    "batch_size": INT, "resolution": SIZE, "enable_bucket": BOOL, "min_bucket_reso": INT, "max_bucket_reso": INT,
    "bucket_reso_steps": INT, "bucket_no_upscale": BOOL, "bucket_sizes": SIZES,
    "validation_split": NUMBER, "validation_seed": INT,
}  # fmt: skip
SUBSET_ONLY = {
    "image_dir": TEXT, "metadata_file": TEXT, "conditioning_data_dir": TEXT, "is_reg": BOOL, "control_directory": TEXTS,
    "video_directory": TEXT,
}  # fmt: skip
SHARED = {
    "num_repeats": INT, "shuffle_caption": BOOL, "caption_separator": TEXT, "keep_tokens": INT,
    "keep_tokens_separator": TEXT, "secondary_separator": TEXT, "enable_wildcard": BOOL, "caption_prefix": TEXT,
    "caption_suffix": TEXT,
    "caption_dropout_rate": NUMBER, "caption_dropout_every_n_epochs": INT, "caption_tag_dropout_rate": NUMBER,
    "token_warmup_min": INT, "token_warmup_step": NUMBER, "color_aug": BOOL, "flip_aug": BOOL, "random_crop": BOOL,
    "face_crop_aug_range": RANGE, "alpha_mask": BOOL, "resize_interpolation": TEXT, "class_tokens": TEXT,
    "caption_extension": TEXT, "no_resize_control": BOOL, "control_resolution": SIZE,
    "target_frames": INTS, "frame_extraction": TEXT, "frame_stride": INT, "frame_sample": INT, "max_frames": INT,
    "source_fps": NUMBER, "fps_resample_mode": TEXT,
}  # fmt: skip
LEVELS = {
    "[general]": {**DATASET_KEYS, **SHARED},
    "[[datasets]]": {**DATASET_KEYS, **SHARED},
    "[[datasets.subsets]]": {**SHARED, **SUBSET_ONLY},
}
ALIASES = {  # musubi-tuner's names
    "image_directory": "image_dir",
    "image_jsonl_file": "metadata_file",
    "video_jsonl_file": "metadata_file",
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
NOT_READ = {
    "cache_directory": "entries are found by their content and may share a folder; give --cache_dir",
    "network_multiplier": "sd-scripts accepts it and never uses it",
    "custom_attributes": "its one use in sd-scripts, diff_output_preservation, is not offered",
    "cache_info": "sizes and captions are always remembered",
    "prior_loss_weight": "it belongs on the command line (--prior_loss_weight)",
}
OPTION_OF = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}  # command-line name where it differs


def load_dataset_config(options: Any) -> tuple[DatasetSpec, ...]:
    """The datasets of a run. Raises ConfigError for the description, DatasetError where there is none."""
    if options.dataset_config:
        for rival in ("train_data_dir", "in_json", "reg_data_dir"):
            if getattr(options, rival):
                raise ConfigError(
                    f"--{rival} is not read beside --dataset_config; move it into {options.dataset_config}"
                )
        path = Path(options.dataset_config)
        return _from_table(_read(path), str(path), path.parent, options)
    if not options.train_data_dir:
        raise DatasetError("there is no dataset: give --dataset_config, or --train_data_dir with --resolution")
    if options.in_json:
        subsets: list[dict] = [
            {
                "metadata_file": options.in_json,
                "image_dir": options.train_data_dir,
                "num_repeats": options.dataset_repeats,
            }
        ]
    else:
        subsets = _folders(options.train_data_dir, False)
        subsets += _folders(options.reg_data_dir, True) if options.reg_data_dir else []
    return _from_table({"datasets": [{"subsets": subsets}]}, "the command line", Path("."), options)


def _folders(parent: str, is_reg: bool) -> list[dict]:
    """sd-scripts' command-line form: `<repeats>_<class tokens>` folders in a parent folder.

    A parent that is not there or has none gives one subset whose folder does not exist.
    """
    root, found = Path(parent), []
    if not root.is_dir():  # the reader of subsets names it, together with all else that is wrong
        return [{"image_dir": parent, "is_reg": is_reg}]
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        repeats, _, tokens = folder.name.partition("_")
        if repeats.isdigit():
            found.append(
                {
                    "image_dir": str(folder),
                    "num_repeats": int(repeats),
                    "class_tokens": tokens or None,
                    "is_reg": is_reg,
                }
            )
    if not found:
        return [{"image_dir": str(root / NAMING), "is_reg": is_reg}]
    return [{k: v for k, v in entry.items() if v is not None} for entry in found]


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
    from library.options import read_toml

    return read_toml(path)


def _from_table(table: Mapping[str, Any], source: str, folder: Path, options: Any) -> tuple[DatasetSpec, ...]:
    table = translated_dataset(table, source, folder, options)
    for key in table:
        if key not in ("general", "datasets"):
            raise ConfigError(
                f"{source}: '{key}' at the top level is not known; only [general] and [[datasets]] are"
                + nearest(key, ("general", "datasets"))
            )
    general = _checked(table.get("general", {}), "[general]", source)
    datasets = table.get("datasets", [])
    if not isinstance(datasets, Sequence) or isinstance(datasets, str) or not datasets:
        raise ConfigError(f"{source}: there is no [[datasets]] table in it")
    specs = tuple(
        _dataset(entry, general, f"{source}, dataset {n}", folder, options) for n, entry in enumerate(datasets, 1)
    )
    unread.check(general, [one for spec in specs for one in (spec, *spec.subsets)], f"{source}, [general]")
    return specs


def _dataset(entry: Any, general: Mapping[str, Any], source: str, folder: Path, options: Any) -> DatasetSpec:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{source}: it is no table")
    subsets, entry = entry.get("subsets"), {k: v for k, v in entry.items() if k != "subsets"}
    if subsets is None:  # musubi-tuner's form: a dataset that names its own files is its only subset
        files = {k: v for k, v in entry.items() if ALIASES.get(k, k) in SUBSET_ONLY}
        entry, subsets = {k: v for k, v in entry.items() if k not in files}, [files] if files else []
    own = _checked(entry, "[[datasets]]", source)
    if not isinstance(subsets, Sequence) or isinstance(subsets, str) or not subsets:
        raise ConfigError(f"{source}: there is no [[datasets.subsets]] table in it")
    values = {f.name: _look_up(f.name, (own, general), options) for f in fields(DatasetSpec) if f.name != "subsets"}
    if values["resolution"] is None:
        raise ConfigError(f"{source}: resolution is missing; give 1024 or [1024, 768] (width, height)")
    specs = []
    for n, subset in enumerate(subsets, 1):
        place = f"{source}, subset {n}"
        if not isinstance(subset, Mapping):
            raise ConfigError(f"{place}: it is no table")
        specs.append(_subset(_checked(subset, "[[datasets.subsets]]", place), own, general, place, folder, options))
    values = {k: v for k, v in values.items() if v is not None}
    for key in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "resolution"):
        sides = values[key] if isinstance(values.get(key), tuple) else (values.get(key, 1),)
        if not 1 <= min(sides) <= max(sides) <= LARGEST:
            raise ConfigError(f"{source}: {key} {values[key]} is not between 1 and {LARGEST} pixels")
    spec = DatasetSpec(subsets=tuple(specs), **values)
    if spec.batch_size < 1 or not 0 <= spec.validation_split < 1:
        raise ConfigError(
            f"{source}: batch_size {spec.batch_size}, validation_split {spec.validation_split}: "
            "at least 1, and at least 0 and below 1, are possible"
        )
    unread.check(own, (spec, *spec.subsets), source)
    return spec


def _subset(own: dict, dataset: dict, general: dict, place: str, folder: Path, options: Any) -> SubsetSpec:
    values = {f.name: _look_up(f.name, (own, dataset, general), options) for f in fields(SubsetSpec)}
    values = {k: v for k, v in values.items() if v is not None}
    for key in SUBSET_ONLY:
        if isinstance(values.get(key), str):
            values[key] = _beside(folder, values[key])
        elif isinstance(values.get(key), tuple):
            values[key] = tuple(_beside(folder, value) for value in values[key])
    if not any(key in values for key in ("image_dir", "video_directory", "metadata_file")):
        raise ConfigError(f"{place}: image_dir (or video_directory, or metadata_file) is missing")
    if "conditioning_data_dir" in values and not options.masked_loss:
        raise ConfigError(f"{place}: conditioning_data_dir is read only with --masked_loss")
    extension = values.get("caption_extension", ".caption")
    values["caption_extension"] = extension if extension.startswith(".") else "." + extension
    interpolation = values.get("resize_interpolation")
    if interpolation and interpolation not in INTERPOLATIONS:
        raise ConfigError(
            f"{place}: resize_interpolation '{interpolation}' is not known (known: {', '.join(INTERPOLATIONS)})"
        )
    spec = SubsetSpec(**values)
    _check_subset(spec, place, options)
    unread.check(own, (spec,), place)
    return spec


def _check_subset(spec: SubsetSpec, place: str, options: Any) -> None:
    """What excludes each other inside of a subset. Raises ConfigError."""
    if spec.moving and options.cache_latents:
        raise ConfigError(
            f"{place}: color_aug, random_crop and face_crop_aug_range change the picture every time, "
            "so its latents cannot be cached; leave out one or the other"
        )
    if not -MOST <= spec.num_repeats <= MOST:
        raise ConfigError(f"{place}: num_repeats {spec.num_repeats} is above {MOST}")
    for folder in spec.control_directory:
        if spec.image_dir and Path(folder).resolve() == Path(spec.image_dir).resolve():
            raise ConfigError(f"{place}: control_directory {folder} is the image_dir; give controls their own")
    _check_frames(spec, place)


def _check_frames(spec: SubsetSpec, place: str) -> None:
    """The keys of videos. Raises ConfigError."""
    if spec.frame_extraction not in EXTRACTIONS:
        known = f"{nearest(spec.frame_extraction, EXTRACTIONS)} (known: {', '.join(EXTRACTIONS)})"
        raise ConfigError(f"{place}: frame_extraction '{spec.frame_extraction}' is not known{known}")
    for key in ("frame_stride", "frame_sample", "max_frames"):
        if getattr(spec, key) < 1:
            raise ConfigError(f"{place}: {key} {getattr(spec, key)} is below 1")
    if spec.source_fps is not None and spec.source_fps <= 0:
        raise ConfigError(f"{place}: source_fps {spec.source_fps:g} is not above 0")
    if spec.fps_resample_mode not in (None, TIMESTAMPS):
        raise ConfigError(f"{place}: fps_resample_mode '{spec.fps_resample_mode}' is not known (known: {TIMESTAMPS})")
    if spec.fps_resample_mode and spec.source_fps is not None:
        raise ConfigError(f"{place}: source_fps is not read with fps_resample_mode, which takes the file's own times")
    if not spec.video_directory:
        return
    if spec.image_dir and not spec.metadata_file:
        raise ConfigError(f"{place}: image_dir and video_directory are two subsets; make a table for each")
    for key in ("control_directory", "conditioning_data_dir", "alpha_mask"):
        if getattr(spec, key):
            raise ConfigError(f"{place}: {key} belongs to pictures; videos have neither controls nor masks; remove it")


def _beside(folder: Path, value: str) -> str:
    """A relative path: beside the dataset file if it exists there, else as it is."""
    there = folder / value
    return str(there) if not Path(value).is_absolute() and there.exists() else value


def _look_up(name: str, tables: Sequence[Mapping[str, Any]], options: Any) -> Any:
    for table in tables:
        if table.get(name) is not None:
            return table[name]
    option = OPTION_OF.get(name, name)
    if name in SUBSET_ONLY or name in ("class_tokens", "num_repeats"):
        return None
    value = getattr(options, option, None)
    return _typed(name, value, SIZE, "the command line") if name == "resolution" and value is not None else value


def _checked(table: Any, level: str, source: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: {level} is no table")
    known, out = LEVELS[level], {}
    for given, value in table.items():
        key = ALIASES.get(given, given)
        if key in NOT_READ:
            raise ConfigError(f"{source}, {level}: '{key}' is not read: {NOT_READ[key]}")
        if key in out:
            raise ConfigError(f"{source}, {level}: '{given}' is another name of '{key}', which is there, too")
        if key not in known:
            other = next((name for name, keys in LEVELS.items() if key in keys), None)
            hint = f"; it belongs in {other}" if other else nearest(key, [*known, *SUBSET_ONLY])
            raise ConfigError(f"{source}, {level}: '{key}' is not known here{hint}")
        out[key] = _typed(key, value, known[key], f"{source}, {level}")
    return out


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _typed(key: str, value: Any, kind: str, where: str) -> Any:
    """The value if it is of its kind; sizes and ranges as tuples."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    good = {
        BOOL: isinstance(value, bool),
        INT: is_int,
        NUMBER: is_int or isinstance(value, float),
        TEXT: isinstance(value, str),
    }
    if kind in good:
        if good[kind] and not (key in SUBSET_ONLY and kind == TEXT and not is_path(value)):
            return value
    elif kind == SIZES:
        if isinstance(value, list) and value and all(isinstance(p, list) and len(p) == 2 for p in value):
            return tuple(_typed(key, pair, SIZE, where) for pair in value)
    elif kind in (TEXTS, INTS):
        several = tuple(value) if isinstance(value, list | tuple) else (value,)
        wanted = (lambda one: isinstance(one, str) and is_path(one)) if kind == TEXTS else _is_count
        if several and all(map(wanted, several)):
            return several
    else:
        parts = (
            value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
        )
        try:
            numbers = tuple(int(p) if kind == SIZE else float(p) for p in parts)
        except (TypeError, ValueError, OverflowError):
            numbers = ()
        if kind == SIZE and len(numbers) in (1, 2) and min(numbers) > 0:
            return (numbers[0], numbers[-1])
        if kind == RANGE and len(numbers) == 2:
            return numbers
    raise ConfigError(f"{where}: {key} = {value!r} is not {kind}")
