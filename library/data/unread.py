"""Keys of a dataset description that have no effect where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from library.data.captions import has_tags
from library.errors import ConfigError

if TYPE_CHECKING:
    from library.data.config import DatasetSpec, SubsetSpec


def _may_have_videos(subset: SubsetSpec) -> bool:
    return bool(subset.video_directory or subset.metadata_file)


def _may_have_controls(subset: SubsetSpec) -> bool:
    return bool(subset.control_directory or subset.metadata_file)


def _extracts(name: str) -> Callable[[SubsetSpec], bool]:
    return lambda subset: _may_have_videos(subset) and subset.frame_extraction == name


OF_SUBSETS: dict[str, tuple[Callable[[SubsetSpec], object], str]] = {  # key -> (who reads it, what is lacking)
    "keep_tokens": (has_tags, "without shuffle_caption, caption_tag_dropout_rate or token_warmup_step"),
    "token_warmup_min": (lambda subset: subset.token_warmup_step, "without token_warmup_step"),
    "target_frames": (_may_have_videos, "without videos"),
    "frame_extraction": (_may_have_videos, "without videos"),
    "source_fps": (_may_have_videos, "without videos"),
    "fps_resample_mode": (_may_have_videos, "without videos"),
    "frame_stride": (_extracts("slide"), "without frame_extraction = 'slide'"),
    "frame_sample": (_extracts("uniform"), "without frame_extraction = 'uniform'"),
    "max_frames": (_extracts("full"), "without frame_extraction = 'full'"),
    "no_resize_control": (_may_have_controls, "without control pictures"),
    "control_resolution": (_may_have_controls, "without control pictures"),
}
OF_DATASETS: dict[str, tuple[Callable[[DatasetSpec], object], str]] = {
    "min_bucket_reso": (lambda spec: spec.enable_bucket, "without enable_bucket"),
    "max_bucket_reso": (lambda spec: spec.enable_bucket, "without enable_bucket"),
    "bucket_reso_steps": (lambda spec: spec.enable_bucket, "without enable_bucket"),
    "bucket_no_upscale": (lambda spec: spec.enable_bucket, "without enable_bucket"),
    "validation_seed": (lambda spec: spec.validation_split, "without validation_split"),
}


def check(given: Mapping[str, Any], specs: Iterable[Any], where: str) -> None:
    """Raise ConfigError for a key of a table that none of the datasets or subsets below it reads.

    A key that says what holds anyway is let be.
    """
    specs = list(specs)
    for key, value in given.items():
        for rules in (OF_SUBSETS, OF_DATASETS):
            own = [spec for spec in specs if any(field.name == key for field in fields(spec))]
            if key in rules and own and value != _default(own[0], key) and not any(map(rules[key][0], own)):
                raise ConfigError(f"{where}: {key} = {value!r} has no effect {rules[key][1]}; remove it")


def _default(spec: Any, key: str) -> Any:
    return next(field.default for field in fields(spec) if field.name == key)
