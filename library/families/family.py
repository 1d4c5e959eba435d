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
    title: str  # for people, with an article: "a Z-Image denoiser"
    option: str  # the option that holds its path
    layouts: Mapping[str, Sequence[Row] | Callable[[Shapes], Sequence[Row]]]  # name -> table, or table from our shapes
    recognise: Callable[[Shapes], str | None]  # name of the layout that (prefix-free) keys are in, None = another model
    config: Callable[[Shapes, Mapping[str, str], str], dict[str, Any]]  # from the file's shapes, metadata and layout
    build: Callable[[dict[str, Any]], torch.nn.Module]  # from that configuration, on whatever device is current
    prefixes: tuple[str, ...] = ("",)  # container prefixes under which the part is found, tried in order
    carried: tuple[str, ...] = ()  # keys that a file may hold and no model reads; a full save writes them back
    diffusers_folder: str = ""  # sub-folder of a diffusers repository that holds this part
    finish: Callable[..., None] = lambda model, device: None  # buffers that no file holds, after the weights are in

    def may_carry(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether an unread key is known: listed, or a marker, which is a tensor without a single value."""
        return key in self.carried or 0 in shape


@dataclass(frozen=True)
class Family:
    name: str  # as in --model_type and <name>_train_network.py
    title: str  # for people
    denoiser: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    tokenizers: Callable[..., list[Any]]  # (options) -> the tokenizers, in the order of the text encoders
    tokenizer_paths: Callable[..., list[str]]  # (options) -> the folder, file or hub id of each; no import, no network
    tokenize: Callable[
        ..., tuple[Any, str]
    ]  # (tokenizers, caption) -> (token ids, the part of the caption that is cut)
    encode: Callable[..., Cond]  # (text_encoders, tokenizers, caption, device) -> Cond of one caption, on the CPU
    encode_image: Callable[..., Tensor]  # (vae, pixels [B,3,H,W] in [-1,1]) -> normalised latents [B,C,h,w]
    decode_latents: Callable[..., Tensor]  # (vae, latents) -> pixels [B,3,H,W] in [-1,1]
    predict: Callable[
        ..., Tensor
    ]  # (denoiser, noisy [B,C,h,w], sigma [B] float32, conds: list[Cond]) -> velocity, float32
    blocks: tuple[str, ...]  # module lists of OUR denoiser that are checkpointed, swapped, compiled block by block
    adapted: tuple[str, ...]  # prefixes of ORIGINAL module names that an adapter trains by default
    pixel_multiple: int  # sides of a training picture are multiples of this
    latent_channels: int  # published value; the file decides
    latent_downscale: int
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # option defaults that differ, each with its source in the file
    options: tuple[Option, ...] = ()  # the family's own options
    save_formats: tuple[str, ...] = ("comfy",)  # LoRA formats, default first
    architecture: str = ""  # modelspec.architecture without "/lora"
    base_model_version: str = ""  # ss_base_model_version
    resolution: int = 1024  # the model's usual side length
