"""What a saved file says about its training: sd-scripts' `ss_*` keys that have a meaning here, and modelspec 1.0.1.

Files and folders appear by their name only: no value holds an absolute path. The names of the keys and the rules of
the hashes are sd-scripts'; https://github.com/Stability-AI/ModelSpec describes the rest.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError

if TYPE_CHECKING:
    from library.families.family import Family
    from library.options import Options

VERSION = "0.1.0"
MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
HASH_LIMIT = 2 * 1024**3  # bytes; SHA-256 of a larger file would delay the start by up to a minute for a label
THUMBNAIL_LIMIT = 4 * 1024**2  # bytes; every program that reads the header reads it
THUMBNAILS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}

# Options that are written as `ss_<name>` with their value.
_COPIED = (
    "output_name learning_rate unet_lr gradient_checkpointing gradient_accumulation_steps lr_scheduler "
    "mixed_precision full_fp16 full_bf16 cache_latents seed training_comment max_grad_norm caption_dropout_rate "
    "caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range prior_loss_weight "
    "scale_weight_norms ip_noise_gamma ip_noise_gamma_random_strength loss_type huber_schedule huber_scale huber_c "
    "masked_loss validation_seed validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps "
    "resize_interpolation timestep_sampling sigmoid_scale discrete_flow_shift weighting_scheme logit_mean logit_std "
    "mode_scale model_prediction_type min_timestep max_timestep"
)
COPIED = tuple(_COPIED.split())
RENAMED = {"debiased_estimation_loss": "debiased_estimation"}  # options of families that sd-scripts writes otherwise
SPEC = ("author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor",
        "is_negative_embedding")  # fmt: skip


def training_metadata(
    options: Options,
    family: Family,
    dataset_metadata: Mapping[str, Any],
    network_info: Mapping[str, Any],
    run: Mapping[str, Any],
) -> dict[str, str]:
    """The part that is the same in every file of a run; all values are text.

    `dataset_metadata` and `network_info` hold further values under their `ss_*` names (the prefix may be left out;
    lists and tables become JSON). `run` has `total_steps` and `epochs`, optionally `steps_per_epoch`.
    Raises ConfigError for a thumbnail that cannot be used.
    """
    started = time.time()
    values = {f"ss_{name}": getattr(options, name) for name in COPIED}
    own = [option.name for option in family.options]
    values |= {f"ss_{RENAMED.get(name, name)}": getattr(options, name) for name in own}
    values |= {
        "ss_session_id": secrets.randbelow(2**32),
        "ss_training_started_at": started,
        "ss_text_encoder_lr": options.text_encoder_lr,
        "ss_v2": family.base_model_version.startswith("sd_v2"),
        "ss_base_model_version": family.base_model_version,
        "ss_model_type": family.name,
        "ss_optimizer": _optimizer(options),
        "ss_max_train_steps": run["total_steps"],
        "ss_num_epochs": run["epochs"],
        "ss_steps_per_epoch": run.get("steps_per_epoch"),
        "ss_lr_warmup_steps": _steps(options.lr_warmup_steps, run["total_steps"]),
    }
    values |= _network(options) | _models(options, family)
    for more in (dataset_metadata, network_info):
        values |= {name if name.startswith("ss_") else f"ss_{name}": value for name, value in more.items()}
    text = {name: _text(without_paths(value)) for name, value in values.items()}
    if options.no_metadata:
        text = {name: text[name] for name in MINIMUM if name in text}
    return text | model_spec(options, family, dataset_metadata, started)


def save_metadata(base: Mapping[str, str], *, step: int, epoch: int) -> dict[str, str]:
    """`base` with what belongs to one save: `step` optimizer steps were made, in `epoch` (from 1)."""
    now = time.time()
    out = dict(base) | {"modelspec.date": _date(now)}
    if "ss_training_started_at" in base:
        out |= {"ss_steps": str(step), "ss_epoch": str(epoch), "ss_training_finished_at": str(now)}
    return out


def check_thumbnail(options: Options) -> None:
    """Raise ConfigError if --metadata_thumbnail cannot be put into a file; reads the picture, loads nothing."""
    if options.metadata_thumbnail:
        _thumbnail(Path(options.metadata_thumbnail))


# ---------------------------------------------------------------- sd-scripts' keys


def _network(options: Options) -> dict[str, Any]:
    if not options.network_module:
        return {}
    pairs = dict(pair.split("=", 1) for pair in options.network_args or ())
    out: dict[str, Any] = {f"ss_{name}": getattr(options, name) for name in (
        "network_module", "network_dim", "network_alpha", "network_dropout")}  # fmt: skip
    return out | ({"ss_network_args": json.dumps(without_paths(pairs))} if pairs else {})


def _models(options: Options, family: Family) -> dict[str, Any]:
    """Name and hashes of the denoiser's and the VAE's file; a folder or a hub id has a name only."""
    out: dict[str, Any] = {}
    for option, name in ((family.denoiser.option, "sd_model"), (family.vae.option, "vae")):
        value = getattr(options, option)
        if not value:
            continue
        path = Path(value)
        local = path.exists() or path.is_absolute()
        out[f"ss_{name}_name"] = path.name if local else value  # "owner/name" of the hub stays whole
        if path.is_file():
            out[f"ss_{name}_hash"] = legacy_hash(path)
            if path.stat().st_size <= HASH_LIMIT:
                out[f"ss_new_{name}_hash"] = file_hash(path)
    return out


def legacy_hash(path: Path) -> str:
    """8 hex digits of the SHA-256 of 64 KiB at 1 MiB, by which older programs know a checkpoint."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, about 1 s for 1 GB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _optimizer(options: Options) -> str:
    """`module.Class(k=v,...)`."""
    from library.optim import optimizer_class

    cls, implied = optimizer_class(options.optimizer_type)
    given = dict(pair.split("=", 1) for pair in options.optimizer_args or ())
    arguments = without_paths({name: str(value) for name, value in implied.items()} | given)
    return f"{cls.__module__}.{cls.__name__}({','.join(f'{name}={value}' for name, value in arguments.items())})"


def _steps(value: int | float, total: int) -> int:
    from library.optim import steps

    return steps(value, total)


# ---------------------------------------------------------------- modelspec


def model_spec(
    options: Options, family: Family, dataset_metadata: Mapping[str, Any], when: float
) -> dict[str, str]:  # fmt: skip
    """`modelspec.*`; what is not known is left out."""
    width, height = _resolution(options, family, dataset_metadata)
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": family.architecture + ("/lora" if options.network_module else ""),
        "implementation": "diffusers",
        "implementation_version": f"lorasmith/{VERSION}",
        "title": options.metadata_title or options.output_name,
        "resolution": f"{width}x{height}",
        "date": _date(when),
        "prediction_type": family.objective.prediction_type,
        "timestep_range": _timesteps(options),
        "thumbnail": _thumbnail(Path(options.metadata_thumbnail)) if options.metadata_thumbnail else None,
        **{name: getattr(options, f"metadata_{name}") for name in SPEC},
    }
    return {f"modelspec.{name}": str(value) for name, value in values.items() if value is not None}


def _date(when: float) -> str:
    return datetime.datetime.fromtimestamp(int(when), datetime.timezone.utc).isoformat()


def _timesteps(options: Options) -> str | None:
    if options.min_timestep is None and options.max_timestep is None:
        return None
    return f"{options.min_timestep or 0},{1000 if options.max_timestep is None else options.max_timestep}"


def _resolution(options: Options, family: Family, dataset_metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Of the dataset with the largest pictures, else of --resolution, else the family's usual one."""
    found = dataset_metadata.get("ss_datasets", dataset_metadata.get("datasets")) or []
    found = json.loads(found) if isinstance(found, str) else found
    sizes = [one.get("resolution") for one in found]
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes if size]
    if sizes:
        return max(sizes, key=lambda size: size[0] * size[1])
    return options.resolution or (family.resolution, family.resolution)


def _thumbnail(path: Path) -> str:
    """A picture as a data URL."""
    kind = THUMBNAILS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"--metadata_thumbnail {path}: only {', '.join(THUMBNAILS)} are taken")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--metadata_thumbnail {path} cannot be read: {error.strerror or error}") from None
    if not data or len(data) > THUMBNAIL_LIMIT:
        limit = THUMBNAIL_LIMIT // 1024**2
        raise ConfigError(f"--metadata_thumbnail {path} has {len(data):,} bytes; 1 byte to {limit} MiB are taken")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


# ---------------------------------------------------------------- values


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def without_paths(value: Any) -> Any:
    """`value` with absolute paths cut to their last part, inside lists, tables and JSON text too."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    if not isinstance(value, str):
        return value
    if value[:1] in ("[", "{"):
        try:
            return json.dumps(without_paths(json.loads(value)), ensure_ascii=False)
        except ValueError:
            return value
    for kind in (PureWindowsPath, PurePosixPath):
        if kind(value).is_absolute() or value.startswith("~/"):
            return kind(value).name or value
    return value
