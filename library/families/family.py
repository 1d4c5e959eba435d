"""The one contract between the trainer and a model family: a closed, frozen record.

Facts are data, behaviour is a function. The trainer asks the record and never its name.

Symbols used by every family: B batch, C latent channels, h w latent height and width, T text tokens, D text width.
Convention: x_sigma = (1 - sigma) * x0 + sigma * noise, sigma in [0, 1], 0 = data; velocity = noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.layout import Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.options import Option

Shapes = Mapping[str, tuple[int, ...]]
Cond = dict[str, "Tensor"]  # what the text encoders gave for ONE caption, at its true length (ragged)


@dataclass(frozen=True)
class Part:
    """One component whose weights come from a file: the denoiser, a VAE or a text encoder."""

    name: str  # "denoiser", "vae", "text_encoder", "byt5", ...
    option: str  # the option that holds its path
    layouts: Mapping[str, Sequence[Row]]  # layout name -> table; the first is what the released file has
    config: Callable[[Shapes, Mapping[str, str]], dict[str, Any]]  # shapes under the *first* layout's names, header metadata
    build: Callable[[dict[str, Any]], "torch.nn.Module"]  # from that configuration, on whatever device is current
    recognise: Callable[[Shapes], str | None]  # variant name if a file with these (prefix-free) keys is this part
    prefixes: tuple[str, ...] = ("",)  # container prefixes under which the part is found, tried in order
    ignored: tuple[str, ...] = ()  # original keys that a file may carry and no model reads; kept by a full save
    diffusers_folder: str = ""  # sub-folder of a diffusers repository that holds this part


@dataclass(frozen=True)
class Family:
    name: str  # as in --model_type and <name>_train_network.py
    title: str  # for people
    denoiser: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    tokenize: Callable[..., Any]  # (tokenizers, caption) -> token ids and how many tokens were cut: (ids, n_cut)
    encode: Callable[..., Cond]  # (text_encoders, tokenizers, caption, device) -> Cond of one caption, on the CPU
    encode_image: Callable[..., "Tensor"]  # (vae, pixels [B,3,H,W] in [-1,1]) -> normalised latents [B,C,h,w]
    decode_latents: Callable[..., "Tensor"]  # (vae, latents) -> pixels [B,3,H,W] in [-1,1]
    predict: Callable[..., "Tensor"]  # (denoiser, noisy [B,C,h,w], sigma [B] float32, conds: list[Cond]) -> velocity, float32
    blocks: tuple[str, ...]  # module lists of OUR denoiser that are checkpointed, swapped, compiled block by block
    adapted: tuple[str, ...]  # prefixes of ORIGINAL module names that an adapter trains by default
    pixel_multiple: int  # sides of a training picture are multiples of this
    latent_channels: int  # published value; the file decides
    latent_downscale: int
    defaults: Mapping[str, Any] = field(default_factory=dict)  # option defaults that differ, each with its source in the file
    options: tuple["Option", ...] = ()  # the family's own options
    save_formats: tuple[str, ...] = ("comfy",)  # LoRA formats, default first
    architecture: str = ""  # modelspec.architecture without "/lora"
    base_model_version: str = ""  # ss_base_model_version
    resolution: int = 1024  # the model's usual side length
