"""What HunyuanVideo's image-to-video models are given of the first frame, and what they give back.

SkyReels V1 takes its latents as more channels, Tencent's first model ("latent_concat") a mask besides; Tencent's second
("token_replace") takes them in place of the noisy ones, as clean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.components import frames, vae_hunyuan_video
from library.families.family import Cond, ItemInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def continued(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput) -> Cond:
    """{"image_latents": [16,F,h,w]}: the latents of a clip's first frame, zeros after it."""
    import torch

    first = vae_hunyuan_video.encode(vae, given.pixels[None, :, :1])[0]
    after = -(-given.frames // vae_hunyuan_video.TIME) - 1
    return {"image_latents": torch.cat([first, first.new_zeros(()).expand(first.shape[0], after, *first.shape[2:])], 1)}


def concatenated(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput) -> Cond:
    """{"image_latents": [17,F,h,w]}: the same and a mask, 1 in the first frame; of a sample also "start"."""
    import torch

    latents = continued(vae, image_encoders, given)["image_latents"]
    mask = torch.zeros_like(latents[:1])
    mask[:, 0] = 1
    return {"image_latents": torch.cat([latents, mask])} | _start(latents[:, :1], given)


def replaced(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput) -> Cond:
    """{"first_frame": [16,1,h,w], "loss_mask": [1,F,1,1]}: the latents of the first frame alone (those of a clip have
    seen the other frames: the VAE normalises over time); of a sample also "start"."""
    first = vae_hunyuan_video.encode(vae, given.pixels[None, :, :1])[0]
    count = -(-given.frames // vae_hunyuan_video.TIME)
    return {frames.KEY: first, "loss_mask": frames.loss_mask(count, 1, first)} | _start(first, given)


def _start(first: Tensor, given: ItemInput) -> Cond:
    return {} if given.pixels.shape[1] == given.frames else {frames.HINT: first}


def decode_after_first(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Pixels without the first latent frame's time, four frames, which Tencent's code cuts off its first model's."""
    pixels = vae_hunyuan_video.decode(vae, latents)
    return pixels[:, :, vae_hunyuan_video.TIME :] if pixels.ndim == 5 and pixels.shape[2] > 1 else pixels
