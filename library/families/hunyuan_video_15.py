"""HunyuanVideo-1.5 (Tencent, 2025): double-stream blocks on 16x latents with Qwen2.5-VL, ByT5 and SigLIP states.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,32,F,h,w], one token each; the model
takes 33 channels more, the latents of given frames and a mask, all 0 for text-to-video. Text is the third-last layer
of Qwen2.5-VL without its template and the ByT5 states of what a caption puts in quotation marks, if anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.components import few_steps, glyphs, hunyuan, qwen25_vl, t5, vae_hunyuan_video15, vision
from library.errors import ConfigError
from library.families.family import Cond, Family, FrameRule, ItemInput, Part, Text
from library.layout import Shape, identity, our_view
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Tencent's system message, of clips and pictures alike, with the indentation that its code has in it: that is part of
# the prompt, whose head before the caption (108 tokens) is cut off the states.
ASPECTS = (
    "Describe the video by detailing the following aspects:",
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video.",
)
MESSAGE = "You are a helpful assistant. " + (" " + " " * 8).join(ASPECTS)
HEAD = f"<|im_start|>system\n{MESSAGE}<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
STATED = ("task_type", "target_size")  # of a diffusers folder
LAYER, MAX_TOKENS = -3, 1000  # of the hidden states; of Qwen's states that are kept
TIMES = "time_embed"
OUTSIDE = [
    *hunyuan.times(TIMES, "time_in", "timestep_embedder"),
    *hunyuan.times(TIMES, "time_r_in", "timestep_embedder_r"),  # distilled models
    *hunyuan.GLYPHS,
    *((f"vision_in.proj.{n}", f"vision_in.proj.{n}", f"image_embedder.{ours}")
      for n, ours in ((0, "norm_in"), (1, "linear_1"), (3, "linear_2"), (4, "norm_out"))),
    ("cond_type_embedding", "cond_type_embedding", "cond_type_embed"),
]  # fmt: skip
TABLES = {
    "comfy": hunyuan.table(0, OUTSIDE),
    "original": hunyuan.table(1, OUTSIDE),  # Tencent's names, q, k and v in one, as ComfyUI's repack has them
    "split": hunyuan.table(1, OUTSIDE, apart=True),  # as Tencent released them
}
BLOCKS = ("transformer_blocks",)
ADAPTED = ("double_blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if "cond_type_embedding.weight" not in shapes and "cond_type_embed.weight" not in shapes:
        return None
    return hunyuan.layout_of(shapes, 3, (*TABLES, "diffusers"))


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, and the inner width of the ByT5 mapper, which diffusers fixes at 2048."""
    ours = our_view(TABLES[layout], shapes) if layout in TABLES else shapes
    glyph_width, glyph_dim = ours["context_embedder_2.linear_1.weight"]
    told = {name: json.loads(metadata[name]) for name in STATED if name in metadata}
    return (
        hunyuan.sizes(ours, patch=1)
        | told
        | {
            "use_meanflow": f"{TIMES}.timestep_embedder_r.linear_1.weight" in ours,
            "text_embed_2_dim": glyph_dim,
            "image_embed_dim": ours["image_embedder.linear_1.weight"][1],
            "glyph_width": glyph_width,
        }
    )


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection

    from library.models.hunyuan_video import HunyuanVideo15

    model = HunyuanVideo15(**{key: value for key, value in configuration.items() if key != "glyph_width"})
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    width = configuration.get("glyph_width", 2048)
    model.context_embedder_2 = HunyuanVideo15ByT5TextProjection(model.config.text_embed_2_dim, width, inner)
    return model


DENOISER = Part(
    name="denoiser",
    title="a HunyuanVideo-1.5 denoiser",
    option="pretrained_model_name_or_path",
    layouts={**TABLES, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model.", "model.model."),
    diffusers_folder="transformer",
    also=("original", "split"),  # ComfyUI takes the first's, musubi-tuner writes the second's
    high_precision=hunyuan.MODULATION,
    stated=STATED,
)


def tokenize(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """Qwen's ids of the prompt, cut where Tencent's code cuts it, and the end of the caption that did not fit."""
    qwen, length = tokenizers[0], _head(tokenizers) + MAX_TOKENS
    ids = qwen(HEAD + (caption or " ") + TAIL, add_special_tokens=False)["input_ids"]
    tail = len(qwen(TAIL, add_special_tokens=False)["input_ids"])
    return ids[:length], qwen.decode(ids[length:-tail])


def _head(tokenizers: list[Any]) -> int:
    return len(tokenizers[0](HEAD, add_special_tokens=False)["input_ids"])


def encode(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [T,D]} without the template's head, and {"byt5": [T2,D2]} where the caption quotes something."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption)
    states = qwen25_vl.states(encoders[0], torch.tensor([ids], device=device), LAYER)
    letters = glyphs.encode(encoders[1], tokenizers[1], text.caption, device, glyphs.VIDEO)
    return {"text": states[0, _head(tokenizers) :]} | letters


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,F,h,w] float32.

    Conds: "text" [T,D], ragged; "byt5" [T2,D2] where there is quoted text; "image_latents" [33,F,h,w] (latents and
    mask) and "clip" [729,1152] (SigLIP) of image-to-video; "next_sigma" [], the sigma that a step of a distilled
    model leads to, else the sigma itself. Items of both kinds can be in one batch.
    """
    import torch

    dtype, config = denoiser.x_embedder.proj.weight.dtype, denoiser.config
    texts = [cond["text"].to(dtype) for cond in conds]

    def optional(key: str, width: int) -> list[Tensor]:
        return [cond[key].to(dtype) if key in cond else texts[0].new_zeros(0, width) for cond in conds]

    nothing = noisy.new_zeros(config.in_channels - noisy.shape[1], *noisy.shape[2:])
    given = torch.stack([cond.get("image_latents", nothing).to(noisy.dtype) for cond in conds])
    leads_to = torch.stack([cond.get("next_sigma", level) for cond, level in zip(conds, sigma, strict=True)])
    return denoiser(
        torch.cat([noisy, given], 1).to(dtype),
        sigma.float() * 1000,
        texts,
        optional("byt5", config.text_embed_2_dim),
        optional("clip", config.image_embed_dim),
        leads_to.float() * 1000 if config.use_meanflow else None,
    ).float()


def continued(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput) -> Cond:
    """What image-to-video gets of a clip's first frame: "image_latents" [33,F,h,w], its latents, zeros after it, and a
    mask that is 1 in the first latent frame; "clip" [729,1152], SigLIP's last states of it.
    """
    import torch

    first = given.pixels[:, :1]
    latents = vae_hunyuan_video15.encode(vae, first[None])[0]
    latents = torch.cat([latents, torch.ones_like(latents[:1])])
    after = HUNYUAN_VIDEO_15.frames.latents(given.frames) - 1
    latents = torch.cat([latents, latents.new_zeros(()).expand(len(latents), after, *latents.shape[2:])], 1)
    seen = vision.prepare(image_encoders[0], first.movedim(1, 0), crop=False, clip_colours=False)
    return {"image_latents": latents, "clip": vision.states(image_encoders[0], seen)[0].float()}


def facts_of(path: str, config: Mapping[str, Any], task: str | None) -> tuple[str, int, bool]:
    """(task, lines of the published size, whether it is distilled): all files have the same shapes, so the name says
    it, or the configuration of a diffusers folder. Raises ConfigError if --task contradicts it."""
    named = f"{Path(path).parent.name}/{Path(path).name}".lower()
    found = re.search(r"t2v|i2v", Path(path).name.lower()) or re.search(r"t2v|i2v", named)
    told = config.get("task_type") or (found and found.group())
    if task and told and task != told:
        raise ConfigError(f"--task {task}: {path} is a model for {told}; remove the option")
    lines = 720 if config.get("target_size", 0) > 640 or "720p" in named else 480
    return task or told or "t2v", lines, "distill" in named


def variant_of(options: Any) -> Family:
    """The record of the model that the file is. Raises ConfigError for other models."""
    from library.checkpoints import configuration_of, find_part, path_of

    path = path_of(DENOISER, options)
    config = configuration_of(DENOISER, path)
    channels = (config["in_channels"], config["out_channels"])
    if channels[0] != 2 * channels[1] + 1:
        raise ConfigError(
            f"{path} is a HunyuanVideo-1.5 denoiser with {channels[0]} channels in and {channels[1]} out, which is no "
            "text- or image-to-video model (super-resolution is not offered)"
        )
    if any(key.startswith("guidance_in.") for key in find_part(DENOISER, path)[0].shapes):
        raise ConfigError(f"{path} is distilled with an embedded guidance, which is not offered; take the model itself")
    task, lines, is_distilled = facts_of(path, config, options.task)
    steps = config["use_meanflow"]
    if task == "t2v" and options.image_encoder:
        raise ConfigError(
            f"--image_encoder {options.image_encoder} has no effect: {path} is used for text to video; remove it, or "
            "add --task i2v"
        )
    # "Optimal Inference Configurations" of the README in Tencent-Hunyuan/HunyuanVideo-1.5.
    shift = 7.0 if steps else {480: 5.0, 720: 9.0 if task == "t2v" else 7.0}[lines]
    sampling = HUNYUAN_VIDEO_15.sampling | {"flow_shift": shift}
    if steps or is_distilled:
        sampling |= {"scale": 1.0, "sample_steps": 12 if steps else 50}
    family = replace(
        HUNYUAN_VIDEO_15,
        title=f"HunyuanVideo-1.5 {task.upper()}{', distilled' * (steps or is_distilled)}",
        sampling=sampling,
        resolution=RESOLUTIONS[lines],
        advice=partial(few_steps.sentence, f"{path} is distilled")
        if steps or is_distilled
        else HUNYUAN_VIDEO_15.advice,
    )
    if task == "t2v":
        return family
    return replace(
        family,
        image_encoders=(vision.siglip(),),
        encode_item=continued,
        recipe="i2v",
        frames=FrameRule(4, 1, 24.0, least=5, first_frame="needed"),
    )


RESOLUTIONS = {480: 640, 720: 960}  # squares with the areas of 848 x 480 and 1280 x 720
SEEN = Option("image_encoder", "path", None, "SigLIP so400m, a file or a folder: only image-to-video sees it")
TASK = Option(
    "task", "str", None, "of a file whose name says neither; text to video if not set", choices=("t2v", "i2v")
)
HUNYUAN_VIDEO_15 = Family(
    name="hunyuan_video_15",
    title="HunyuanVideo-1.5",
    denoiser=DENOISER,
    vae=vae_hunyuan_video15.part(),
    text_encoders=(qwen25_vl.part(), t5.byt5()),
    tokenize=tokenize,
    encode=encode,
    encode_image=vae_hunyuan_video15.encode,
    decode_latents=vae_hunyuan_video15.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=32,
    latent_downscale=16,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # musubi-tuner's advice; diffusion-pipe has no shift, and says that 3 may suit videos.
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 2.0},
    options=(SEEN, TASK),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="hunyuan-video-1.5",
    base_model_version="hunyuan_video_15",
    resolution=RESOLUTIONS[480],
    frames=FrameRule(4, 1, 24.0),
    variant_of=variant_of,
    channels_of=lambda denoiser: int(denoiser.config.out_channels),
    inference_options=(SEEN, TASK),
    sampling={"sample_steps": 50, "scale": 6.0, "flow_shift": 5.0, "frame_count": 121},  # Tencent's own, of 480p
    text_widths=lambda denoiser: (denoiser["text_embed_dim"], denoiser["text_embed_2_dim"]),
)
