"""Training states: written whole or not at all, resumed to the bit.

A state is a folder `<name>-step00000010-state`: the trained weights (safetensors), the optimizer, scheduler, scaler and
average (torch files read with `weights_only=True`), and `state.json` with the position, the effective options, marks
of the model files and of the data, and size and checksum of every other file. It is written under a temporary name
and renamed when everything in it is on the disk. Random numbers need no storing: they are keyed by (seed, step, item),
and torch's own generator is seeded anew in every micro-step.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library import checkpoints
from library.errors import ConfigError, DiskError

VERSION = 2
WEIGHTS, MANIFEST = "trained.safetensors", "state.json"
# Options that may change between a run and its continuation without changing a single loss.
FREE = frozenset(
    "resume output_dir output_name max_train_steps max_train_epochs save_every_n_steps save_every_n_epochs save_state "
    "save_state_on_train_end save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state "
    "sample_every_n_steps sample_every_n_epochs sample_prompts sample_at_first logging_dir log_with log_prefix "
    "config_file dump_batch_at_step max_data_loader_n_workers print_config cache_dir vae_batch_size "
    "text_encoder_batch_size save_n_epoch_ratio save_format save_precision wandb_run_name resume_anyway "
    "validate_every_n_steps validate_every_n_epochs max_validation_steps training_comment no_metadata "
    "network_weights fallback_output_dir log_every_n_steps log_tracker_name log_tracker_config ddp_timeout skip_bad "
    "check_data save_model_as metadata_title metadata_author metadata_description metadata_license metadata_tags "
    "metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor "
    "metadata_is_negative_embedding "
    "fused_backward_pass blocks_to_swap sample_blocks_to_swap block_swap_ring_size use_pinned_memory_for_block_swap "
    "highvram".split()
)
# Options without which nothing of a state can be loaded.
INCOMPATIBLE = frozenset("model_type network_module network_dim optimizer_type dim_from_weights".split())
# What these name is compared by its content, so that it may move.
BY_CONTENT = frozenset("dataset_config train_data_dir reg_data_dir in_json".split())


@dataclass
class Position:
    """Where a run stands, in optimizer steps."""

    step: int = 0
    epoch: int = 0
    loss_average: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0  # spent in training so far
    losses: list[float] = field(default_factory=list)  # of the current averaging window
    skipped: int = 0  # steps whose loss or gradient was no number
    suspect: bool = False  # the last steps were such, and the data was not the cause: the weights may be


@dataclass
class Origin:
    """What a run is made from, as a state keeps it."""

    options: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)  # option that names a file -> mark of its content
    data: Mapping[str, Any] = field(default_factory=dict)  # provenance.data_mark
    versions: Mapping[str, str] = field(default_factory=dict)


def state_path(output_dir: Path, name: str, step: int) -> Path:
    return output_dir / f"{name}-step{step:08d}-state"


def of_part(file: str, output_name: str, which: str) -> str:
    """The name of a file that holds only a part of what is trained: `<name>-high_noise-000002.safetensors`."""
    return f"{output_name}-{which}{file.removeprefix(output_name)}" if which else file


# ---------------------------------------------------------------- writing


def save_state(
    folder: Path, tensors: Mapping[str, Any], parts: Mapping[str, Any], position: Position, origin: Origin
) -> None:
    """Write a complete state under its final name, replacing an older one of the same name only when done.

    `parts` are objects with a `state_dict()`: optimizer, scheduler, scaler, average. Raises DiskError.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        checkpoints.save(tensors, partial / WEIGHTS, {"format": "pt"})
        files = {WEIGHTS: _checksum(partial / WEIGHTS)}
        for name, part in parts.items():
            files[f"{name}.pt"] = _write_part(partial / f"{name}.pt", part.state_dict())
        content = {"version": VERSION, "position": asdict(position), **asdict(origin), "files": files}
        content = json.loads(json.dumps(content, default=str))
        with open(partial / MANIFEST, "w", encoding="utf-8") as file:
            json.dump({**content, "checksum": _self_check(content)}, file, indent=1)
        checkpoints.flush(partial / MANIFEST)
        checkpoints.sync_folder(partial)
        _publish(partial, folder)
    except OSError as error:
        raise DiskError(
            f"the state {folder} could not be written ({error.strerror or error}); make room or change the folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _self_check(content: Mapping[str, Any]) -> int:
    """Checksum of a manifest, its own entry left out."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _publish(partial: Path, folder: Path) -> None:
    """Rename; a state that is there already stays readable as `.<name>.old` until the new one has its name."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(partial, folder)
    checkpoints.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class _Checked(io.RawIOBase):
    """A file that keeps the checksum of what is written into it."""

    def __init__(self, file: Any) -> None:
        self.file, self.crc, self.size = file, 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc, self.size = zlib.crc32(view, self.crc), self.size + len(view)
        self.file.write(view)
        return len(view)


def _write_part(path: Path, value: Any) -> list[int]:
    """torch.save, on the disk and read back; returns [bytes, crc32]. Raises DiskError if it reads differently."""
    import torch

    with open(path, "wb") as file:
        checked = _Checked(file)
        try:
            torch.save(value, checked)
        except RuntimeError as error:  # its writer's word for a write that failed
            raise OSError(str(error.__cause__ or error.__context__ or error)) from None
    checkpoints.flush(path)
    if _checksum(path) != [checked.size, checked.crc]:
        raise DiskError(f"{path} was written but reads back differently; the disk may be failing")
    return [checked.size, checked.crc]


def _checksum(path: Path) -> list[int]:
    """[bytes, crc32] of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


# ---------------------------------------------------------------- finding


def find_state(value: str, folders: Iterable[Path], name: str) -> tuple[Path | None, list[str]]:
    """The folder that `--resume VALUE` means, and notes about states that were passed over.

    'auto' is the newest state of this name in `folders` of which every byte is right, or None.
    """
    if value != "auto":
        return Path(value), []
    states = sorted((found for folder in folders for found in _states(folder, name)), reverse=True)
    notes, suspect = [], None
    for _, path in states:
        fault = damage(path)
        if not fault and not _is_suspect(path):
            return path, notes
        suspect = suspect or (path if not fault else None)
        notes.append(f"--resume auto passes over {path.name}: {fault or 'with its weights the loss was no number'}")
    return suspect, notes if suspect is None else []


def _is_suspect(folder: Path) -> bool:
    return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["position"].get("suspect"))


def _states(folder: Path, name: str) -> Iterable[tuple[int, Path]]:
    """(step, path) of each state; one that a kill left under its `.old` name counts where the new name is missing."""
    for path in folder.glob(f"*{name}-step*-state*"):
        found = re.fullmatch(rf"(\.?){re.escape(name)}-step(\d+)-state(\.old)?", path.name)
        if found and bool(found[1]) == bool(found[3]) and path.is_dir():
            if found[3] and state_path(folder, name, int(found[2])).exists():
                continue
            yield int(found[2]), path


def damage(folder: Path) -> str:
    """What is wrong with a state, in words; "" if every file has the size and checksum that it was written with."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("version") == VERSION and manifest["checksum"] != _self_check(manifest):
            return f"{MANIFEST} is damaged"
        for file, (size, crc) in manifest.get("files", {}).items():
            if Path(file).name != file:
                return f"{MANIFEST} points outside of its folder ({file!r})"
            found = _checksum(folder / file)
            if found != [size, crc]:
                return f"{file} is damaged" if found[0] == size else f"{file} has {found[0]} bytes of {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return ""


def recover(folder: Path, name: str) -> None:
    """After a kill: give a state back its name, and remove what this run's name left half-written."""
    for _, path in _states(folder, name) if folder.is_dir() else ():
        if path.name.endswith(".old"):
            os.replace(path, path.with_name(path.name.removeprefix(".").removesuffix(".old")))
    what = r"(-step\d{8}(-state)?|-\d{6}|-best)?(-ema)?(\.safetensors)?"
    mine = re.compile(rf"\.{re.escape(name)}{what}\.([0-9a-f]{{8}}\.partial|old)")
    for path in folder.iterdir() if folder.is_dir() else ():
        if mine.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------- reading


def read_state(folder: Path, origin: Origin, resume_anyway: bool) -> tuple[Position, list[str]]:
    """Position of a state, and what changed since that changes nothing. Before any weight loads.

    Raises ConfigError if it is no complete state, if what changed makes it impossible to load, or if something
    changed that changes the result and `resume_anyway` is not given.
    """
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"--resume {folder}: no {MANIFEST} in it, so it is no complete state; give a '...-state' folder"
        )
    if fault := damage(folder):
        raise ConfigError(f"--resume {folder}: {fault}; resume another state ('auto' finds the newest whole one)")
    stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if stored.get("version") != VERSION:
        raise ConfigError(f"--resume {folder}: state version {stored.get('version')}, this program reads {VERSION}")
    now = json.loads(json.dumps(asdict(origin), default=str))
    hopeless, binding, free = changes(stored, now)
    if hopeless:
        raise ConfigError(
            f"--resume {folder}: it cannot be loaded with {'; '.join(hopeless)}; set that back, or start anew from its "
            "weights (--network_weights for a network, the saved model otherwise)"
        )
    if binding and not resume_anyway:
        raise ConfigError(
            f"--resume {folder}: what changes the result differs: {'; '.join(binding[:8])}; "
            "set it back or add --resume_anyway"
        )
    return Position(**stored["position"]), [*(f"{one} (it changes the result)" for one in binding), *free]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """What differs between two origins, in words: (cannot be loaded, changes the result, changes nothing)."""
    hopeless, binding, free = [], [], []
    old, new = before["options"], now["options"]
    inputs_before, inputs_now = before.get("inputs", {}), now.get("inputs", {})
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        text = f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        moved = name in inputs_before and inputs_before[name] == inputs_now.get(name)
        if name in FREE or name in BY_CONTENT or moved:
            free.append(text)
        else:
            (hopeless if name in INCOMPATIBLE else binding).append(text)
    for name in sorted(inputs_before.keys() & inputs_now.keys()):
        if inputs_before[name] != inputs_now[name] and old.get(name) == new.get(name):
            binding.append(f"the file of {name} has another content")
    return hopeless, binding + _data_changes(before.get("data", {}), now.get("data", {})), free


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before == now or not before or not now:
        return []
    if before["pictures"] != now["pictures"]:
        return [f"the data, {before['pictures']} pictures -> {now['pictures']}"]
    what = {"items": "pictures, repeats or crops", "captions": "captions", "rules": "the dataset description"}
    return ["the data: " + ", ".join(words for key, words in what.items() if before[key] != now[key]) + " changed"]


def load_state(folder: Path, trained: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Put a state's tensors into the live objects. `trained` maps names to the tensors that are being trained.

    Raises ConfigError if they are of another model, network or optimizer.
    """
    import torch
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = set(file.keys())
        if keys != trained.keys():
            raise ConfigError(
                f"--resume {folder}: its weights are of another model or network "
                f"({len(keys ^ trained.keys())} names differ, {sorted(keys ^ trained.keys())[:2]})"
            )
        with torch.no_grad():
            for name, tensor in trained.items():
                stored = file.get_tensor(name)
                if stored.shape != tensor.shape:
                    raise ConfigError(
                        f"--resume {folder}: {name} is {tuple(stored.shape)} there, "
                        f"{tuple(tensor.shape)} here; --network_dim changed?"
                    )
                tensor.copy_(stored)
    for name, part in parts.items():
        try:
            part.load_state_dict(torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise ConfigError(f"--resume {folder}: it holds no {name}; the run that wrote it had none") from None
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"--resume {folder}: its {name} does not fit this run ({error})") from None
