"""Where and under which names TensorBoard and wandb are told about a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError
from library.options import read_toml

if TYPE_CHECKING:
    from library.options import Options

TRACKERS = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}


def tracker_names(options: Options) -> list[str]:
    """What Accelerator's `log_with` takes; empty without --log_with."""
    return TRACKERS.get(options.log_with, [])


def project_dir(options: Options) -> str | None:
    """Folder of this run's log: `<logging_dir>/<log_prefix><YYYYmmddHHMMSS>`, as in sd-scripts."""
    if not options.logging_dir:
        return None
    return str(Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}")


def init_arguments(options: Options) -> dict[str, Any]:
    """Arguments of `Accelerator.init_trackers` besides the configuration: project name and each tracker's own.

    --log_tracker_config is a TOML file with a table of arguments per tracker (`[wandb]`). Raises ConfigError.
    """
    own: dict[str, Any] = {}
    if options.log_tracker_config:
        path = Path(options.log_tracker_config)
        own = read_toml(path)
        for name, table in own.items():
            if name not in tracker_names(options) or not isinstance(table, dict):
                raise ConfigError(
                    f"{path}: '{name}' is no table of a tracker of --log_with {options.log_with} "
                    f"([{'], ['.join(tracker_names(options))}])"
                )
    if options.wandb_run_name:
        own.setdefault("wandb", {})["name"] = options.wandb_run_name
    return {"project_name": options.log_tracker_name or "network_train", "init_kwargs": own}


def check(options: Options) -> None:
    """Raise ConfigError for a tracker that is not installed or a tracker configuration that is wrong."""
    import importlib.util

    for name in tracker_names(options):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--log_with {options.log_with} needs the package {name}: pip install {name}")
    init_arguments(options)
