"""A finished network on a base that stays: merged where the weights can take it, attached where they are quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_network(
    network: Any,
    path: str,
    weights: Any,
    denoiser: nn.Module,
    device: Any,
    dtype: torch.dtype,
    *,
    attach: bool = False,
) -> nn.Module | None:
    """Make `network` (the file `path`, its tensors `weights`) a part of the denoiser at the network's multiplier.

    Returns the network if it was attached instead of merged, because it has to or with `attach`; it is frozen then, and
    runs in every forward.
    """
    if not attach and getattr(network, "is_mergeable", lambda: True)():  # optional in sd-scripts' interface
        network.merge_to([], denoiser, weights, None, None)
        return None
    network.apply_to([], denoiser, False, True)
    network.load_weights(path)
    return network.to(device, dtype).requires_grad_(False).eval()
