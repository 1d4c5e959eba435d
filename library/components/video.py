"""What the VAEs of videos share: pictures as videos of one frame, and the numbers of frames that they take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.errors import ConfigError

if TYPE_CHECKING:
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
