"""Training states: written whole or not at all, resumed to the bit.

A state is a folder `<name>-step00000010-state`: the trained weights (safetensors), the optimizer, scheduler and
scaler (torch files read with `weights_only=True`), and `state.json` with the position and the effective options.
It is written under a temporary name and renamed when everything in it is on the disk. Random numbers need no
storing: they are keyed by (seed, step, item), and torch's own generator is seeded anew in every micro-step.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library import checkpoints
from library.errors import ConfigError, DiskError

VERSION = 1
# Options that may change between a run and its continuation without changing a single loss.
FREE = frozenset(
    "resume output_dir output_name max_train_steps max_train_epochs save_every_n_steps save_every_n_epochs save_state "
    "save_state_on_train_end save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state "
    "sample_every_n_steps sample_every_n_epochs sample_prompts sample_at_first logging_dir log_with log_prefix "
    "config_file dump_batch_at_step max_data_loader_n_workers print_config cache_dir vae_batch_size "
    "text_encoder_batch_size save_n_epoch_ratio save_format save_precision wandb_run_name resume_anyway "
    "validate_every_n_steps validate_every_n_epochs max_validation_steps training_comment no_metadata".split()
)


@dataclass
class Position:
    """Where a run stands, in optimizer steps."""

    step: int = 0
    epoch: int = 0
    loss_average: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0  # spent in training so far
    losses: list[float] = field(default_factory=list)  # of the current averaging window


def state_path(output_dir: Path, name: str, step: int) -> Path:
    return output_dir / f"{name}-step{step:08d}-state"


def save_state(
    folder: Path,
    tensors: dict,
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
    position: Position,
    options: dict[str, Any],
) -> None:
    """Write a complete state under its final name, replacing an older one of the same name only when done."""
    import torch

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        checkpoints.save(tensors, partial / "trained.safetensors", {"format": "pt"})
        rest = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict()}
        for name, value in rest.items():
            with open(partial / f"{name}.pt", "wb") as file:
                torch.save(value, file)
                file.flush()
                os.fsync(file.fileno())
        text = json.dumps({"version": VERSION, "position": asdict(position), "options": options}, indent=1, default=str)
        with open(partial / "state.json", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DiskError(
            f"the state {folder} could not be written ({error}); make room or choose another --output_dir"
        ) from None


def read_state(folder: Path, options: dict[str, Any], resume_anyway: bool) -> tuple[Position, list[str]]:
    """Position of a state and the free options that changed since. Before any weight loads.

    Raises ConfigError if it is no complete state, or if options changed that change the result and
    `resume_anyway` is not given.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise ConfigError(
            f"--resume {folder}: no state.json in it, so it is no complete state; give a '...-state' folder"
        )
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("version") != VERSION:
        raise ConfigError(f"--resume {folder}: state version {stored.get('version')}, this program reads {VERSION}")
    before, now = stored["options"], json.loads(json.dumps(options, default=str))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    binding = [name for name in changed if name not in FREE]
    if binding and not resume_anyway:
        listed = ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in binding[:5])
        raise ConfigError(
            f"--resume {folder}: options that change the result differ: {listed}; set them back or add --resume_anyway"
        )
    return Position(**stored["position"]), changed


def load_state(folder: Path, trained: dict, optimizer: Any, scheduler: Any, scaler: Any) -> None:
    """Put a state's tensors into the live objects. `trained` maps names to the tensors that are being trained."""
    import torch
    from safetensors import safe_open

    with safe_open(folder / "trained.safetensors", framework="pt") as file:
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
    for name, value in {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}.items():
        value.load_state_dict(torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))


def find_state(value: str, output_dir: Path, name: str) -> Path | None:
    """The folder that `--resume VALUE` means; 'auto' is the newest complete state of this name, or None."""
    if value != "auto":
        return Path(value)
    states = sorted(output_dir.glob(f"{name}-step*-state"))
    return next((state for state in reversed(states) if (state / "state.json").is_file()), None)
