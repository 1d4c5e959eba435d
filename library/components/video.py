"""What the VAEs of videos share: pictures as videos of one frame, numbers of frames, causal models piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from library.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def as_video(tensor: Tensor) -> tuple[Tensor, bool]:
    """[B,C,H,W] as [B,C,1,H,W] and whether it was a picture; a video as it is."""
    return (tensor.unsqueeze(2), True) if tensor.ndim == 4 else (tensor, False)


def check_frames(video: Tensor, step: int, model: str) -> None:
    """Raises ConfigError unless the video [B,C,F,H,W] has a multiple of `step` frames and one more."""
    frames = video.shape[2]
    if frames % step != 1 % step:
        nearest = (frames - 1) // step * step + 1
        raise ConfigError(f"{model} takes {step}k + 1 frames, not {frames}; use {max(nearest, 1)} or {nearest + step}")


@contextlib.contextmanager
def remembering(model: torch.nn.Module, layers: Mapping[type, Callable[..., Tensor]]) -> Iterator[None]:
    """Within, a causal model may be given a video piece by piece.

    A module whose class is in `layers` runs `layers[class](module, memory, x)` instead of its `forward`; `memory`, a
    dict of its own, is empty at the first piece.
    """
    changed = [module for module in model.modules() if type(module) in layers]
    for module in changed:
        module.forward = partial(layers[type(module)], module, {})
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def with_past(memory: dict[str, Tensor], x: Tensor, kernel: int, stride: int = 1) -> Tensor:
    """Frames [B,C,F,H,W] behind those before them that a causal convolution still needs; the first is repeated.

    What this piece leaves for the next one is kept in `memory`.
    """
    import torch

    past = memory.get("past")
    frames = torch.cat([x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1) if past is None else past, x], dim=2)
    made = (frames.shape[2] - kernel) // stride + 1
    memory["past"] = frames[:, :, made * stride :].clone()  # a view would keep all of the piece
    return frames


def pieces(video: Tensor, step: int) -> Iterator[Tensor]:
    """The first frame of [B,C,F,H,W], then `step` frames at a time."""
    yield video[:, :, :1]
    for start in range(1, video.shape[2], step):
        yield video[:, :, start : start + step]
