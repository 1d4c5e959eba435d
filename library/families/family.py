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
from library.objective import FLOW, Objective

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.data.buckets import Placement
    from library.options import Option

Shapes = Mapping[str, tuple[int, ...]]
Cond = dict[str, "Tensor"]  # what conditions ONE item: text at its true length (ragged), controls, sizes


@dataclass(frozen=True)
class Text:
    """What is encoded for one item: its caption, and the pictures that a vision-language encoder sees with it."""

    caption: str
    pictures: tuple[Tensor, ...] = ()  # each [3,H,W] float32 in -1..1


@dataclass(frozen=True)
class ItemInput:
    """One item for `encode_item`: its pixels (None while sampling), its control pictures and the facts of its crop."""

    # [3,H,W], a clip [3,F,H,W], float32 in -1..1; while sampling only a clip's first frame, if the prompt gives one
    pixels: Tensor | None
    controls: tuple[Tensor, ...] = ()  # each [3,H,W] float32 in -1..1
    original_size: tuple[int, int] = (0, 0)  # width, height of the file
    crop: tuple[int, int] = (0, 0)  # left, top, in pixels of the resized picture
    size: tuple[int, int] = (0, 0)  # width, height that is trained
    frames: int = 1  # of the whole clip


@dataclass(frozen=True)
class PartlyLive:
    """Text of which a cache holds a part, because all of it would fill the disk; the rest is made in every step."""

    encode: Callable[..., Cond]  # (text encoders, tokenizers, Text, device) -> what is cached
    encoders: tuple[str, ...]  # names of the text encoders that stay loaded
    complete: Callable[..., Cond]  # (those encoders, what is cached, on their device) -> what `Family.encode` gives


@dataclass(frozen=True)
class FrameRule:
    """How many frames a video model takes, `multiple` * k + `offset`, and the rate that it was trained at."""

    multiple: int
    offset: int
    fps: float  # frames a second
    least: int = 1  # frames of an item; image-to-video models have nothing to learn from a picture alone
    first_frame: str = "none"  # whether a sample is given its first frame: none, possible, needed
    only: tuple[int, ...] = ()  # the numbers that it was trained at, if these are all that it takes

    def fit(self, frames: int) -> int:
        """The greatest such number that is at most `frames`; 0 if there is none."""
        if self.only:
            return max((one for one in self.only if one <= frames), default=0)
        return max(0, (frames - self.offset) // self.multiple * self.multiple + self.offset)

    def latents(self, frames: int) -> int:
        """Latent frames of a clip of that many frames."""
        return -(-frames // self.multiple)


@dataclass(frozen=True)
class Tokenizer:
    """Where the tokenizer of a text encoder is: its option, else beside the encoder's file, else a hub id."""

    option: str  # "tokenizer", "tokenizer_byt5", ...
    hub: str  # id of the published model
    beside: tuple[str, ...] = ("tokenizer",)  # names of folders that are tried beside the encoder's file
    subfolder: str = ""  # of the hub repository
    inside: str = ""  # key of the encoder's file that may hold it, for which `load` is given that file
    load: Callable[..., Any] | None = None  # (path, subfolder) -> tokenizer; None = transformers' AutoTokenizer


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
    # Keys that a file may hold and no model reads, or with a dot at the end all keys that begin so, with one at the
    # beginning all that end so; a full save writes them back.
    carried: tuple[str, ...] = ()
    diffusers_folder: str = ""  # sub-folder of a diffusers repository that holds this part
    stated: tuple[str, ...] = ()  # what `config` is told of a folder's config.json, as JSON in its metadata
    markers: Callable[..., dict[str, Tensor]] = lambda model: {}  # keys without values that a file of this model holds
    finish: Callable[..., None] = lambda model, device: None  # buffers that no file holds, after the weights are in
    tokenizer: Tokenizer | None = None  # of a text encoder
    # Modules of ours that lie in another folder of a diffusers repository: (beginning of their names, folder)
    apart: tuple[tuple[str, str], ...] = ()
    kohya: str = ""  # the layout whose names sd-scripts' LoRA files have, if it is not the first one
    also: tuple[str, ...] = ()  # more layouts whose names LoRA files may have, which are read and never written
    high_precision: tuple[str, ...] = ()  # parts of ORIGINAL names of Linear weights that quantisation leaves alone
    # (a file's shapes, its layout) -> those of our names that a table reads which depends on the model's size
    view: Callable[[Shapes, str], Shapes] = lambda shapes, layout: shapes
    precision_options: str = ""  # of a text encoder, "vl", "t5" or "llm": --fp8_<this> and --nf4_<this> quantise it

    def layout_in(self, shapes: Shapes) -> str | None:
        """Name of the layout that these keys are in; None for another model, and where what tells it is odd."""
        try:
            return self.recognise(shapes)
        except (LookupError, ValueError, ArithmeticError, TypeError):  # a file that nobody has checked yet
            return None

    def may_carry(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether an unread key is known: listed, or a marker, which is a tensor without a single value."""
        below = tuple(name for name in self.carried if name.endswith("."))
        ends = tuple(name for name in self.carried if name.startswith("."))
        return key in self.carried or 0 in shape or key.startswith(below) or key.endswith(ends)


@dataclass(frozen=True)
class Pair:
    """Two denoisers of one size share the noise levels: the family's own below `boundary`, that of `part` from it on.

    Their weights take turns in one module (`library.memory.experts`), which `predict` asks for the right ones.
    """

    part: Part
    boundary: float  # sigma
    names: tuple[str, str] = ("low_noise", "high_noise")  # in the names of files, the family's own denoiser first
    of_file: Callable[[str], int | None] = lambda path: None  # which of the two a file's name speaks of
    apart: bool = False  # an adapter for each, not one for both
    every: int = 1  # optimizer steps before the turn may change


@dataclass(frozen=True)
class Family:
    name: str  # as in --model_type
    title: str  # for people
    denoiser: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    tokenize: Callable[..., tuple[Any, str]]  # (tokenizers, caption) -> (token ids, the part of it that is cut)
    encode: Callable[..., Cond]  # (text_encoders, tokenizers, Text, device) -> Cond of one item, on the device
    encode_image: Callable[..., Tensor]  # (vae, pixels [B,3,H,W] in -1..1) -> normalised latents [B,C,h,w]
    decode_latents: Callable[..., Tensor]  # (vae, latents) -> pixels [B,3,H,W] in -1..1
    predict: Callable[..., Tensor]  # (denoiser, noisy [B,C,h,w], sigma [B] float32, conds: list[Cond]) -> float32
    blocks: tuple[str, ...]  # module lists of OUR denoiser that are checkpointed, swapped, compiled block by block
    adapted: tuple[str, ...]  # prefixes of ORIGINAL module names that an adapter trains by default
    pixel_multiple: int  # sides of a training picture are multiples of this
    latent_channels: int  # published value; the file decides, see `channels_of`
    latent_downscale: int
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # option defaults that differ, each with its source in the file
    options: tuple[Option, ...] = ()  # the family's own options
    save_formats: tuple[str, ...] = ("comfy",)  # LoRA formats, default first
    architecture: str = ""  # modelspec.architecture without "/lora"
    base_model_version: str = ""  # ss_base_model_version
    half: tuple[str, ...] = ("bf16", "fp16")  # values of --mixed_precision in which its activations are known to fit
    resolution: int = 1024  # the model's usual side length
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of all that it was trained at, if it takes no others
    objective: Objective = FLOW  # how noise is mixed in, what `predict` returns, how a sampler steps
    image_encoders: tuple[Part, ...] = ()
    # (caption or prompt) -> the text that is encoded for it; a negative prompt is encoded as it is
    caption_text: Callable[[str], str] = lambda caption: caption
    # `encode` of a picture's caption, for video models that have other words around it; None = as of a clip's
    encode_still: Callable[..., Cond] | None = None
    # (vae, image encoders, ItemInput) -> what else conditions an item, cached beside its latents: "control.0", ...
    encode_item: Callable[..., Cond] | None = None
    # (Cond, latents [C,F,h,w], number in 0..1 that is drawn for an item in every step, options) -> Cond of this step
    vary: Callable[..., Cond] | None = None
    partly_live: PartlyLive | None = None  # how text is cached that is too large for it; None = as `encode` gives it
    text_pictures: Callable[..., tuple[Tensor, ...]] | None = None  # (controls) -> what a vision-language encoder sees
    # (a clip's first frame [3,H,W]) -> what a vision-language encoder sees of it; None = it sees none
    text_frame: Callable[[Tensor], Tensor] | None = None
    max_controls: int = 0  # control pictures that one item can have
    least_controls: int = 0  # and must have
    # (width, height of a control's file) -> the size that the published pipeline stretches it to, or how it is resized
    # and cropped; the dataset may say otherwise. None = a control covers its picture's bucket
    control_size: Callable[[tuple[int, int]], tuple[int, int] | Placement] | None = None
    frames: FrameRule | None = None  # of a video model: every item is then a clip, a picture one of a single frame
    variant_of: Callable[..., Family] | None = None  # (options) -> the record for these files and options
    recipe: str = ""  # what a variant changes about `encode` and `encode_item`; a part of the caches' identity
    channels_of: Callable[..., int] = lambda denoiser: int(denoiser.config.in_channels)  # latent channels of a file
    text_prefixes: tuple[str, ...] = ()  # LoRA names ("lora_te1") of the text encoders that can be trained, in order
    adapted_with_convs: tuple[
        str, ...
    ] = ()  # what an adapter trains besides `adapted` if it has ranks for convolutions
    # Part name -> (prefix, layout) in the one file that a full fine-tune saves; {} = it saves the denoiser alone
    container: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    markers: Callable[..., dict[str, Tensor]] = lambda family: {}  # (resolved record) -> keys that this file must have
    inference_options: tuple[Option, ...] = ()  # what the family's inference script takes besides
    sampling: Mapping[str, Any] = field(default_factory=dict)  # what a prompt that does not say gets: steps, scale, ...
    # (tokens of the picture or the whole video, steps) -> the flow shift of a prompt that does not say;
    # None = --discrete_flow_shift
    sampling_shift: Callable[[int, int], float] | None = None
    # part name -> its list in library/released: what the memory plan takes where no file is given
    released: Mapping[str, str] = field(default_factory=dict)
    # (values of inference_options and "sample_steps", Cond) -> how one picture's predictions are joined;
    # None = classifier-free guidance
    guide: Callable[..., Any] | None = None
    # (the same values, Cond of the negative prompt) -> what is predicted for guidance besides the picture of the prompt
    unprompted: Callable[..., list[Cond]] = lambda settings, uncond: [uncond]
    # (the denoiser's configuration) -> how wide the states of each text encoder have to be, None = any
    text_widths: Callable[[Mapping[str, Any]], tuple[int | None, ...]] | None = None
    advice: Callable[..., tuple[str, ...]] = lambda options: ()  # what the plan says about options that harm this model
    extra_tokenizers: tuple[Tokenizer, ...] = ()  # without an encoder; after those of the text encoders
    # (option, what the ORIGINAL names of the modules have in them whose learning rate it is), the first that fits
    own_rates: tuple[tuple[str, str], ...] = ()
    pair: Pair | None = None  # of a run with two denoisers
    # (guidance scale of the prompt, sigma, values of inference_options) -> the scale at this noise level
    scale_at: Callable[..., float] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        second = (self.pair.part,) if self.pair else ()
        return (self.denoiser, self.vae, *self.text_encoders, *self.image_encoders, *second)

    @property
    def tokenizers(self) -> tuple[tuple[Tokenizer, Part], ...]:
        """Each with the text encoder beside whose file it is looked for."""
        own = [(part.tokenizer, part) for part in self.text_encoders if part.tokenizer]
        return (*own, *((one, self.text_encoders[0]) for one in self.extra_tokenizers))

    def resolved(self, options: Any) -> Family:
        """The record for the files and options of one run."""
        return self.variant_of(options) if self.variant_of else self
