"""Clean frames at the start of a noisy video: models that take a time per frame train from a first frame this way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.family import Cond, ItemInput

KEY = "first_frame"  # of an item's conditions: latents [C,f,h,w] of its first frame or frames
HINT = "start"  # latents [C,1,h,w], of which the noise that a sample begins with has a little in every frame
HINTED = 0.001  # how much, in Tencent's `i2v_stability`


def with_first_frames(noisy: Tensor, sigma: Tensor, conds: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """[B,C,F,h,w] with the given frames in place of noisy ones, and the sigma of each frame, [B,F] float32, 0 there.

    Without any given frame sigma stays [B], which the models take more cheaply.
    """
    import torch

    if not any(KEY in cond for cond in conds):
        return noisy, sigma.float()
    videos, sigmas = [], []
    for video, level, cond in zip(noisy, sigma.float(), conds, strict=True):
        given = cond[KEY].to(video.dtype) if KEY in cond else video[:, :0]
        kept = given.shape[1]
        videos.append(torch.cat([given, video[:, kept:]], 1))
        sigmas.append(torch.cat([level.new_zeros(kept), level.expand(video.shape[1] - kept)]))
    return torch.stack(videos), torch.stack(sigmas)


def begun(encode: Callable[[Tensor], Tensor], given: ItemInput) -> Cond:
    """ "first_frame" [C,1,h,w] of a sample whose prompt gives one; while training `vary` decides in every step.

    `encode` is the VAE's, pixels [1,3,1,H,W] -> latents [1,C,1,h,w].
    """
    if given.pixels is None or given.pixels.shape[1] == given.frames:
        return {}
    return {KEY: encode(given.pixels[None, :, :1])[0]}


def vary(cond: Cond, latents: Tensor, choice: float, options: Any) -> Cond:
    """A clip's first frame is given in a share of the steps. Its latent is the clip's own: the VAE is causal."""
    count = latents.shape[1]
    if count == 1 or choice >= options.first_frame_conditioning_p:
        return cond
    return cond | {KEY: latents[:, :1], "loss_mask": loss_mask(count, 1, latents)}


def hinted(noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """The noise [B,C,F,h,w] that a sample begins with, with its hint if the model's samples begin with one."""
    return noise if HINT not in cond else (1 - HINTED) * noise + HINTED * cond[HINT].to(noise)


def put_back(video: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """A finished video [B,C,F,h,w] with the given frames in their place, if there are any."""
    import torch

    if KEY not in cond:
        return video
    given = cond[KEY].to(video)[None].expand(len(video), -1, -1, -1, -1)
    return torch.cat([given, video[:, :, given.shape[2] :]], 2)


def loss_mask(frames: int, given: int, like: Tensor) -> Tensor:
    """[1,F,1,1], 0 at the `given` first frames, which a model has nothing to predict of, and 1 at the others."""
    import torch

    return torch.cat([like.new_zeros(given), like.new_ones(frames - given)]).view(1, -1, 1, 1)
