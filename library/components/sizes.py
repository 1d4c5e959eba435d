"""Sizes that a file's shapes and header tell, and the buffers that no file holds: shared by all encoders.

Heads, rotary bases and the like leave no trace in a shape. They are the published model's constants; a file of other
sizes (a toy, a pruned model) states its own in the header metadata, under the name of transformers' configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def stated(metadata: Mapping[str, str], name: str, published: Any) -> Any:
    """The published number, unless the header states another as JSON. Raises ValueError if that is no JSON."""
    try:
        return json.loads(metadata[name]) if name in metadata else published
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None


def width_of(configuration: Mapping[str, Any]) -> int:
    """Width of the states that a text encoder with this configuration gives."""
    inner = configuration.get("text_config", configuration)
    return int(inner["d_model"] if "d_model" in inner else inner["hidden_size"])


def count(keys: Iterable[str], prefix: str) -> int:
    """Blocks below `prefix` ("model.layers."): 1 + the highest number that follows it."""
    return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in keys if key.startswith(prefix)), default=-1)


def finish(model: torch.nn.Module, device: Any) -> None:
    """Compute rotary frequencies, positions and embedding scales, which a model built on the meta device lacks.

    They stay in the number format that transformers gives them (float32), whatever the weights are in.
    """
    for module in model.modules():
        absent = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in absent:
            setattr(module, name, _computed(module, name, device))


def _computed(module: torch.nn.Module, name: str, device: Any) -> torch.Tensor:
    import torch

    with torch.device(device):
        if name == "position_ids":
            return torch.arange(module.position_ids.shape[-1])[None]
        if name == "embed_scale":
            return torch.tensor(module.scalar_embed_scale)
        return getattr(type(module)(module.config), name)  # a rotary embedding
