"""Qwen-Image, 2512 and the edit models, Edit, Edit-2509 and Edit-2511 (Alibaba, 2025): a double-stream transformer.

Facts: the model is given sigma, times 1000 inside, and returns noise - x0. Latents are [B,16,h,w], 2x2 patches. Text
is Qwen2.5-VL's last states of a chat. Edit models see reference pictures twice: through the text encoder, and as more
tokens, each at a frame index of its own; 2511 takes these as clean, at time 0. Positions are those of Qwen's own code,
as diffusers has them: ComfyUI's differ by one where a side has an odd number of patches, and for text beside
references that are larger than the picture. Templates, sizes and guidance are those of Qwen's pipelines in diffusers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import control_pictures, few_steps, qwen25_vl, ragged, tokens, vae_wan
from library.components.sizes import stated
from library.components.tokenizers import wrapped
from library.errors import ConfigError
from library.families.family import Cond, Family, ItemInput, Part, Text
from library.layout import Shape, count, identity
from library.objective import flow_from
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"  # 34 and 64 tokens with these two, cut off the states
DESCRIBE = HEAD.format(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
EDIT = HEAD.format(
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
SEEN = "<|vision_start|>{picture}<|vision_end|>"
MAX_TOKENS = 1024  # of a caption with its end; the edit pipelines cut nothing
MEGAPIXEL, THUMBNAIL = 1024 * 1024, 384 * 384  # areas of reference pictures: of the VAE (and Edit's encoder), of 2509's
TERMINAL = 0.02  # sigma of the last step (shift_terminal of the published schedulers)
MARKER = "__index_timestep_zero__"  # an empty tensor: ComfyUI's sign that references are at time 0
BLOCKS = ("transformer_blocks",)
ADAPTED = ("transformer_blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Original and diffusers' names are the same."""
    return "comfy" if "txt_norm.weight" in shapes and "transformer_blocks.0.img_mod.1.weight" in shapes else None


def config(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str, clean: bool = False
) -> dict[str, Any]:
    """diffusers' configuration. `clean` = references are at time 0 although the file does not say it."""
    width, channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,  # per pixel of a 2x2 patch, unlike in_channels
        "num_layers": count(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": tokens.rope_axes(head),
        "zero_cond_t": clean or stated(metadata, "zero_cond_t", MARKER in shapes),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.qwen_image import QwenImage

    return QwenImage(**configuration)


def markers(model: torch.nn.Module) -> dict[str, Tensor]:
    import torch

    return {MARKER: torch.empty(0)} if model.config.zero_cond_t else {}


def finish(model: torch.nn.Module, device: Any) -> None:
    """The table of rotary positions, which no file holds."""
    rope = model.pos_embed
    model.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)


DENOISER = Part(
    name="denoiser",
    title="a Qwen-Image denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
    stated=("zero_cond_t",),
    markers=markers,
    finish=finish,
)


def channels_of(denoiser: torch.nn.Module) -> int:
    return denoiser.config.in_channels // 4


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D]; "control.0", .. [C,h,w] for edit models."""
    return tokens.in_groups(partial(_of_one_size, denoiser), noisy, sigma, conds)


def _of_one_size(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    import torch

    dtype, pictures = denoiser.img_in.weight.dtype, [noisy, *tokens.references(conds)]
    texts = [cond["text"].to(dtype) for cond in conds]
    out = denoiser(
        torch.cat([tokens.pack(picture) for picture in pictures], 1).to(dtype),
        sigma.float(),
        ragged.pad(texts),
        ragged.mask(texts),
        [(1, picture.shape[-2] // 2, picture.shape[-1] // 2) for picture in pictures],
    )
    return tokens.unpack(out, *noisy.shape[-2:]).float()


def tokenize(
    tokenizers: list[Any], caption: str, *, head: str = DESCRIBE, most: int = MAX_TOKENS, seen: str = ""
) -> tuple[list[int], str]:
    """Qwen's ids of the chat with the pictures `seen`, and the end of the caption that did not fit."""
    return wrapped(tokenizers[0], caption, _length(tokenizers, head) + most, (head + seen, TAIL))


def _length(tokenizers: list[Any], head: str) -> int:
    return len(tokenizers[0](head, add_special_tokens=False)["input_ids"])


def encode(
    encoders: list[torch.nn.Module],
    tokenizers: list[Any],
    text: Text,
    device: Any,
    *,
    head: str = DESCRIBE,
    most: int = MAX_TOKENS,
    picture: str = SEEN,
) -> Cond:
    """{"text": [T,D]} without the system's part of the chat, the tokens of pictures included."""
    import torch

    pads = ["<|image_pad|>" * qwen25_vl.picture_tokens(one) for one in text.pictures]
    seen = "".join(picture.format(number=n, picture=pad) for n, pad in enumerate(pads, 1))
    ids, _ = tokenize(tokenizers, text.caption, head=head, most=most, seen=seen)
    states = qwen25_vl.states(encoders[0], torch.tensor([ids], device=device), pictures=text.pictures)
    return {"text": states[0, _length(tokenizers, head) :]}


def shown(controls: tuple[Tensor, ...], *, area: int) -> tuple[Tensor, ...]:
    """What the text encoder sees: each control in its own proportions at about `area`, then on its grid of 28."""
    sized = (
        control_pictures.lanczos(one, control_pictures.of_area((one.shape[2], one.shape[1]), area)) for one in controls
    )
    return tuple(qwen25_vl.resized(one, qwen25_vl.fit(*one.shape[-2:])) for one in sized)


def encode_item(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput) -> Cond:
    """{"control.0": [C,h,w], ..}: latents of the reference pictures."""
    return {f"control.{n}": vae_wan.encode(vae, one[None])[0] for n, one in enumerate(given.controls)}


def guide(settings: Mapping[str, Any], cond: Cond) -> Callable[..., Tensor]:
    from library.guidance import norm_kept

    return norm_kept(2)


def sampling_shift(tokens: int, steps: int) -> float:
    from library.flow import qwen_shift

    return qwen_shift(tokens)


def variant_of(options: Any) -> Family:
    """The record of the model that the file says it is, else of --model_version. Raises ConfigError."""
    from library.checkpoints import facts, find_part, path_of, pipeline_class

    path, asked = path_of(DENOISER, options), options.model_version
    checkpoint, layout = find_part(DENOISER, path)
    is_clean = DENOISER.config(checkpoint.shapes, facts(DENOISER, checkpoint), layout)["zero_cond_t"]
    told = "edit-2511" if is_clean else PIPELINES.get(pipeline_class(path))
    if is_clean and asked not in (None, told):
        raise ConfigError(f"--model_version {asked}: {path} says that it is {told}; remove the option")
    if not asked and not told:
        raise ConfigError(f"{path} does not tell which Qwen-Image it is: give --model_version ({', '.join(VERSIONS)})")
    return VERSIONS[asked or told]


MODEL_VERSION = Option(
    "model_version", "str", None, "which model it is, where the file does not tell",
    choices=("original", "2512", "edit", "edit-2509", "edit-2511"),
)  # fmt: skip
QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    denoiser=DENOISER,
    vae=vae_wan.part("a Qwen-Image VAE"),
    text_encoders=(qwen25_vl.part(),),
    tokenize=tokenize,
    encode=encode,
    encode_image=vae_wan.encode,
    decode_latents=vae_wan.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # musubi-tuner's documented recipe, about the published shift at 1328 x 1328.
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 2.2},
    options=(MODEL_VERSION,),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="Qwen-Image",
    base_model_version="qwen_image",
    resolution=1328,
    objective=flow_from(TERMINAL),
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "lightning lightx2v"),
    channels_of=channels_of,
    inference_options=(MODEL_VERSION,),
    sampling={"sample_steps": 50, "scale": 4.0, "negative_prompt": " "},  # of the published pipelines and examples
    text_widths=lambda denoiser: (denoiser["joint_attention_dim"],),
    sampling_shift=sampling_shift,
    guide=guide,
)


def _edit(title: str, most: int, area: int, picture: str, recipe: str, **changes: Any) -> Family:
    """An edit model: at most so many references, of which the text encoder sees `area` pixels each."""
    chat = {"head": EDIT, "most": sys.maxsize}
    return replace(
        QWEN_IMAGE,
        title=title,
        text_encoders=(qwen25_vl.seeing(),),
        tokenize=partial(tokenize, **chat),
        encode=partial(encode, picture=picture, **chat),
        encode_item=encode_item,
        text_pictures=partial(shown, area=area),
        max_controls=most,
        least_controls=1,
        control_size=partial(control_pictures.of_area, area=MEGAPIXEL),
        recipe=recipe,
        base_model_version="qwen_image_edit",
        resolution=1024,
        **changes,
    )


# Qwen names 1 to 3 references for 2509 and 2511; more are a matter of memory.
_several = partial(_edit, most=16, area=THUMBNAIL, picture="Picture {number}: " + SEEN, recipe="edit-2509")
VERSIONS: dict[str, Family] = {
    "original": QWEN_IMAGE,
    "2512": replace(QWEN_IMAGE, title="Qwen-Image-2512"),
    "edit": _edit("Qwen-Image-Edit", 1, MEGAPIXEL, SEEN, "edit", architecture="Qwen-Image-Edit"),
    "edit-2509": _several("Qwen-Image-Edit-2509", architecture="Qwen-Image-Edit-Plus"),
    "edit-2511": _several(
        "Qwen-Image-Edit-2511",
        architecture="Qwen-Image-Edit-2511",
        denoiser=replace(DENOISER, config=partial(config, clean=True)),
    ),
}
PIPELINES = {  # of a diffusers folder; 2511 is one of EditPlus whose denoiser says `zero_cond_t`
    "QwenImagePipeline": "original",
    "QwenImageEditPipeline": "edit",
    "QwenImageEditPlusPipeline": "edit-2509",
}
