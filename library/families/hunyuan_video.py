"""HunyuanVideo (Tencent, 2024) and SkyReels V1: double- and single-stream blocks on 8x latents with Llama-3 states.

Facts: the model is given sigma * 1000 and, being distilled, guidance * 1000; noise - x0 is returned. Latents are
[B,16,F,h,w], patches 1x2x2. Text is the third-last layer of llava-llama-3-8b without its template, and CLIP-L's
pooled vector. SkyReels' image-to-video model of 32 channels also takes the given frame's latents, Tencent's first one
(33) a mask besides. Tencent's second (16) takes the frame itself as clean, at time 0. Both of Tencent's show LLaVA the
frame in the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.components import (
    clip,
    few_steps,
    frames,
    hunyuan,
    hunyuan_first,
    hunyuan_text,
    llama3,
    llava,
    ragged,
    vae_hunyuan_video,
)
from library.errors import ConfigError
from library.families.family import Cond, Family, FrameRule, Part
from library.layout import Shape, count, identity, our_view
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMES, KIND = "time_text_embed", "image_condition_type"
OUTSIDE = [
    *hunyuan.times(TIMES, "time_in", "timestep_embedder"),
    *hunyuan.times(TIMES, "guidance_in", "guidance_embedder"),
    *((f"vector_in.{n}", f"vector_in.{n}", f"{TIMES}.text_embedder.linear_{k}")
      for n, k in (("in_layer", 1), ("out_layer", 2))),
]  # fmt: skip
TABLES = {"comfy": hunyuan.table(0, OUTSIDE), "original": hunyuan.table(1, OUTSIDE)}
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """HunyuanVideo-1.5 has no single blocks and takes no pooled text."""
    if "vector_in.in_layer.weight" not in shapes and f"{TIMES}.text_embedder.linear_1.weight" not in shapes:
        return None
    return hunyuan.layout_of(shapes, 3, (*TABLES, "diffusers"))


def config(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str, kind: str | None = None
) -> dict[str, Any]:
    """diffusers' configuration. `kind` = which of Tencent's image-to-video models it is, if the file does not say."""
    ours = our_view(TABLES[layout], shapes) if layout in TABLES else shapes
    kind = kind or json.loads(metadata.get(KIND) or "null")
    return (
        hunyuan.sizes(ours, patch=2)
        | ({KIND: kind} if kind else {})
        | {
            "num_single_layers": count(ours, "single_transformer_blocks"),
            "guidance_embeds": f"{TIMES}.guidance_embedder.linear_1.weight" in ours,
            "pooled_projection_dim": ours[f"{TIMES}.text_embedder.linear_1.weight"][1],
        }
    )


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.hunyuan_video import HunyuanVideo

    return HunyuanVideo(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a HunyuanVideo denoiser",
    option="pretrained_model_name_or_path",
    layouts={**TABLES, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model.", "model.model."),
    diffusers_folder="transformer",
    high_precision=hunyuan.MODULATION,
    stated=(KIND,),
    kohya="original",
)


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, guidance: float = 1.0
) -> Tensor:
    """Velocity [B,C,F,h,w] float32.

    Conds: "text" [T,D], ragged; "pooled" [D]; "guidance" [], else `guidance`; "image_latents" [16,F,h,w] of SkyReels'
    image-to-video model, [17,F,h,w] with Tencent's mask; "first_frame" [16,1,h,w] of the one that takes it as clean.
    `guidance` is what the peers train a distilled model with.
    """
    import torch

    dtype = denoiser.x_embedder.proj.weight.dtype
    video, _ = frames.with_first_frames(noisy, sigma, conds)
    if "image_latents" in conds[0]:
        video = torch.cat([video, torch.stack([cond["image_latents"] for cond in conds]).to(noisy.dtype)], 1)
    scale = ragged.scalars(conds, "guidance", guidance, sigma) * 1000 if denoiser.config.guidance_embeds else None
    texts = [cond["text"].to(dtype) for cond in conds]
    pooled = torch.stack([cond["pooled"] for cond in conds]).to(dtype)
    return denoiser(video.to(dtype), sigma.float() * 1000, texts, pooled, scale).float()


def kind_of(path: str, config: Mapping[str, Any], task: str | None) -> str:
    """ "t2v", "skyreels", "latent_concat" or "token_replace": by the channels, and where these are those of text to
    video by the configuration of a diffusers folder, by --task or by the name. Raises ConfigError for other models.
    """
    channels, told = (config["in_channels"], config["out_channels"]), config.get(KIND)
    kind = {(16, 16): told or "t2v", (32, 16): "skyreels", (33, 16): "latent_concat"}.get(channels)
    if kind is None:
        raise ConfigError(
            f"{path} is a HunyuanVideo denoiser with {channels[0]} channels in and {channels[1]} out, which is no "
            "text- or image-to-video model that is known"
        )
    if task == "t2v" and kind != "t2v":
        raise ConfigError(f"--task t2v: {path} is an image-to-video model; remove the option")
    names = (Path(path).name.lower(), Path(path).parent.name.lower())
    found = next(
        filter(None, (re.search(r"(i2v|image[-_]to[-_]video)|t2v|text[-_]to[-_]video", n) for n in names)), None
    )
    named = "i2v" if found and found.group(1) else "t2v"
    return "token_replace" if kind == "t2v" and (task or named) == "i2v" else kind


def variant_of(options: Any) -> Family:
    """The record of the model that the file is, with the run's guidance. Raises ConfigError for other models."""
    from library.checkpoints import configuration_of, path_of

    path = path_of(DENOISER, options)
    configuration, is_training = configuration_of(DENOISER, path), hasattr(options, "given")
    kind = kind_of(path, configuration, options.task)
    if options.image_encoder and kind not in TENCENTS:
        hint = ", or add --task i2v" if kind == "t2v" else ""
        raise ConfigError(f"--image_encoder {options.image_encoder} has no effect: {path} shows LLaVA no picture; "
                          f"remove it{hint}")  # fmt: skip
    if is_training and options.given("guidance_scale") and not configuration["guidance_embeds"]:
        raise ConfigError(
            f"--guidance_scale {options.guidance_scale:g} has no effect: {path} embeds no guidance; remove it"
        )
    sampling = HUNYUAN_VIDEO.sampling | (SKYREELS if kind == "skyreels" else {})
    if not configuration["guidance_embeds"]:
        sampling = {name: value for name, value in sampling.items() if name != "guidance_scale"}
    trained = options.guidance_scale if is_training else TRAINED_WITH
    changes = {"predict": partial(predict, guidance=trained), "sampling": sampling}
    if kind != "t2v":
        changes["frames"] = FrameRule(4, 1, 24.0, least=5, first_frame="needed")
    if kind == "skyreels":
        changes |= {"title": "SkyReels V1 I2V", "encode_item": hunyuan_first.continued, "recipe": "i2v"}
    if kind in TENCENTS:
        changes |= TENCENTS[kind] | {
            "denoiser": replace(DENOISER, config=partial(config, kind=kind)),
            "text_encoders": (*HUNYUAN_VIDEO.text_encoders, tower(options)),
            "tokenize": hunyuan_text.tokenize_seen,
            "encode_still": None,
            "text_frame": lambda first: first,
            "text_widths": lambda denoiser: (*widths(denoiser), denoiser["text_embed_dim"]),
        }
    return replace(HUNYUAN_VIDEO, **changes)


def tower(options: Any) -> Part:
    """LLaVA's picture tower, in the file or folder of the text encoder if that holds it and no other is named."""
    from library.checkpoints import find_part, path_of

    part, path = llava.tower(), path_of(HUNYUAN_VIDEO.text_encoders[0], options)
    if options.image_encoder or not path or not Path(path).exists():
        return part
    try:
        find_part(part, path)
    except ConfigError:
        return part
    return replace(part, option="text_encoder")


def widths(denoiser: Mapping[str, Any]) -> tuple[int, int]:
    return denoiser["text_embed_dim"], denoiser["pooled_projection_dim"]


TRAINED_WITH = 1.0  # guidance that diffusion-pipe and musubi-tuner train a LoRA with
# SkyReels' own inference: classifier-free guidance beside an embedded one of 1, 97 frames.
SKYREELS = {"scale": 6.0, "frame_count": 97, "guidance_scale": 1.0}
# Every second and every fourth of the picture's 576 states are text, as in Tencent's `image_embed_interleave`.
TENCENTS: dict[str, dict[str, Any]] = {
    "latent_concat": {
        "title": "HunyuanVideo I2V",
        "encode": partial(hunyuan_text.encode_seen, every=2),
        "encode_item": hunyuan_first.concatenated,
        "decode_latents": hunyuan_first.decode_after_first,
        "recipe": "i2v concat",
    },
    "token_replace": {
        "title": "HunyuanVideo I2V v2",
        "encode": partial(hunyuan_text.encode_seen, every=4),
        "encode_item": hunyuan_first.replaced,
        "recipe": "i2v replace",
    },
}
TOWER = Option("image_encoder", "path", None, "LLaVA's picture tower, if the text encoder's folder does not hold it: "
               "only Tencent's image-to-video models show it the first frame")  # fmt: skip
TASK = Option(
    "task", "str", None, "of a file of 16 channels whose name says neither; text to video if not set",
    choices=("t2v", "i2v"),
)  # fmt: skip
HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    denoiser=DENOISER,
    vae=vae_hunyuan_video.part(),
    text_encoders=(llama3.llava(), clip.large(folder="text_encoder_2")),
    tokenize=hunyuan_text.tokenize,
    encode=hunyuan_text.encode,
    encode_still=partial(hunyuan_text.encode, head=hunyuan_text.PICTURE),
    encode_image=vae_hunyuan_video.encode,
    decode_latents=vae_hunyuan_video.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # musubi-tuner's advice for HunyuanVideo; 7 is also Tencent's shift at inference.
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 7.0},
    options=(
        Option("guidance_scale", "float", TRAINED_WITH, "guidance that the model is given in training", low=0),
        TOWER,
        TASK,
    ),
    save_formats=("original", "comfy", "kohya", "diffusers"),
    architecture="hunyuan-video",
    base_model_version="hunyuan_video",
    resolution=720,  # an area about that of 960 x 544, the smaller of Tencent's two
    frames=FrameRule(4, 1, 24.0),
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "fasthunyuan fast_hunyuan fast-hunyuan"),
    channels_of=lambda denoiser: int(denoiser.config.out_channels),
    # Tencent's own inference script
    sampling={"sample_steps": 50, "guidance_scale": 6.0, "flow_shift": 7.0, "frame_count": 129},
    text_widths=widths,
    inference_options=(TOWER, TASK),
)
