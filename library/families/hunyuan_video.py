"""HunyuanVideo (Tencent, 2024) and SkyReels V1: double- and single-stream blocks on 8x latents with Llama-3 states.

Facts: the model is given sigma * 1000 and, being distilled, guidance * 1000; noise - x0 is returned. Latents are
[B,16,F,h,w], patches 1x2x2. Text is the third-last layer of llava-llama-3-8b without its template, and CLIP-L's
pooled vector. SkyReels' image-to-video model of 32 channels also takes the given frame's latents, Tencent's of 33
a mask besides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.components import clip, decoder, hunyuan, llama3, ragged, vae_hunyuan_video
from library.components.tokenizers import ended
from library.errors import ConfigError
from library.families.family import Cond, Family, FrameRule, ItemInput, Part, Text
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
# Tencent's prompts for LLaVA, of clips and of pictures (`PROMPT_TEMPLATE` of its code). What stands before the caption,
# 95 and 36 tokens of Llama's, is cut off the states.
START, END, TAIL = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
HEAD = f"<|begin_of_text|>{START}system{END}{{}}{TAIL}{START}user{END}"
VIDEO = HEAD.format(
    "Describe the video by detailing the following aspects: 1. The main content and theme of the video.2. The color, "
    "shape, size, texture, quantity, text, and spatial relationships of the objects.3. Actions, events, behaviors "
    "temporal relationships, physical movement changes of the objects.4. background environment, light, style and "
    "atmosphere.5. camera angles, movements, and transitions used in the video:"
)
PICTURE = HEAD.format(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
LAYER, MAX_TOKENS, CLIP_TOKENS = -3, 256, 77  # of the hidden states; of LLaVA's states that are kept; of CLIP-L


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """HunyuanVideo-1.5 has no single blocks and takes no pooled text."""
    if "vector_in.in_layer.weight" not in shapes and f"{TIMES}.text_embedder.linear_1.weight" not in shapes:
        return None
    return hunyuan.layout_of(shapes, 3, (*TABLES, "diffusers"))


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(TABLES[layout], shapes) if layout in TABLES else shapes
    kind = metadata.get(KIND)  # of a diffusers folder of Tencent's image-to-video models
    return (
        hunyuan.sizes(ours, patch=2)
        | ({KIND: json.loads(kind)} if kind else {})
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


def tokenize(tokenizers: list[Any], caption: str, *, head: str = VIDEO) -> tuple[list[int], str]:
    """Llama's ids of the prompt, cut where Tencent's code cuts it, and the end of the caption that did not fit."""
    llama = tokenizers[0]
    ids = llama(head + caption + TAIL, add_special_tokens=False)["input_ids"]
    length = _length(llama, head) + MAX_TOKENS
    return ids[:length], llama.decode(ids[length:-1])


def _length(tokenizer: Any, head: str) -> int:
    return len(tokenizer(head, add_special_tokens=False)["input_ids"])


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, head: str = VIDEO
) -> Cond:
    """{"text": [T,D] without the template's head, "pooled": [D2] of CLIP-L, not projected}."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption, head=head)
    short, _ = ended(tokenizers[1], text.caption, CLIP_TOKENS)  # what follows its end token cannot change the vector
    states = decoder.states(encoders[0], torch.tensor([ids], device=device), LAYER)
    vector = clip.pooled(encoders[1], torch.tensor([short], device=device), projected=False)
    return {"text": states[0, _length(tokenizers[0], head) :], "pooled": vector[0]}


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, guidance: float = 1.0
) -> Tensor:
    """Velocity [B,C,F,h,w] float32.

    Conds: "text" [T,D], ragged; "pooled" [D]; "guidance" [], else `guidance`; "image_latents" [16,F,h,w] of SkyReels'
    image-to-video model, [17,F,h,w] with Tencent's mask. `guidance` is what the peers train a distilled model with.
    """
    import torch

    dtype = denoiser.x_embedder.proj.weight.dtype
    video = noisy
    if "image_latents" in conds[0]:
        video = torch.cat([noisy, torch.stack([cond["image_latents"] for cond in conds]).to(noisy.dtype)], 1)
    scale = ragged.scalars(conds, "guidance", guidance, sigma) * 1000 if denoiser.config.guidance_embeds else None
    texts = [cond["text"].to(dtype) for cond in conds]
    pooled = torch.stack([cond["pooled"] for cond in conds]).to(dtype)
    return denoiser(video.to(dtype), sigma.float() * 1000, texts, pooled, scale).float()


def continued(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], given: ItemInput) -> Cond:
    """{"image_latents": [16,F,h,w]}: the latents of a clip's first frame, zeros after it."""
    import torch

    first = vae_hunyuan_video.encode(vae, given.pixels[None, :, :1])[0]
    after = HUNYUAN_VIDEO.frames.latents(given.frames) - 1
    return {"image_latents": torch.cat([first, first.new_zeros(()).expand(first.shape[0], after, *first.shape[2:])], 1)}


def variant_of(options: Any) -> Family:
    """The record of the model that the file is, with the run's guidance. Raises ConfigError for other models."""
    from library.checkpoints import configuration_of, path_of

    path = path_of(DENOISER, options)
    config = configuration_of(DENOISER, path)
    channels, is_training = (config["in_channels"], config["out_channels"]), hasattr(options, "given")
    named = re.search(r"i2v|image[-_]to[-_]video", f"{Path(path).parent.name}/{Path(path).name}".lower())
    if channels == (33, 16) or KIND in config or channels == (16, 16) and named:
        raise ConfigError(
            f"{path} is Tencent's image-to-video model, whose prompts show LLaVA the picture; that is not offered, "
            "take a text-to-video model or SkyReels V1 I2V"
        )
    if channels not in ((16, 16), (32, 16)):
        raise ConfigError(
            f"{path} is a HunyuanVideo denoiser with {channels[0]} channels in and {channels[1]} out, which is no "
            "text- or image-to-video model that is known"
        )
    if is_training and options.given("guidance_scale") and not config["guidance_embeds"]:
        raise ConfigError(
            f"--guidance_scale {options.guidance_scale:g} has no effect: {path} embeds no guidance; remove it"
        )
    family = replace(
        HUNYUAN_VIDEO, predict=partial(predict, guidance=options.guidance_scale if is_training else TRAINED_WITH)
    )
    if not config["guidance_embeds"]:
        family = replace(family, sampling={k: v for k, v in family.sampling.items() if k != "guidance_scale"})
    if channels[0] == 16:
        return family
    # SkyReels' own inference: classifier-free guidance beside an embedded one of 1, 97 frames.
    own = {"scale": 6.0, "frame_count": 97, "guidance_scale": 1.0}
    return replace(
        family,
        title="SkyReels V1 I2V",
        encode_item=continued,
        recipe="i2v",
        frames=FrameRule(4, 1, 24.0, least=5, first_frame="needed"),
        sampling=family.sampling | {k: v for k, v in own.items() if k in family.sampling or k == "scale"},
    )


TRAINED_WITH = 1.0  # guidance that diffusion-pipe and musubi-tuner train a LoRA with

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    denoiser=DENOISER,
    vae=vae_hunyuan_video.part(),
    text_encoders=(llama3.llava(), clip.large(folder="text_encoder_2")),
    tokenize=tokenize,
    encode=encode,
    encode_still=partial(encode, head=PICTURE),
    encode_image=vae_hunyuan_video.encode,
    decode_latents=vae_hunyuan_video.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    # musubi-tuner's advice for HunyuanVideo; 7 is also Tencent's shift at inference.
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 7.0},
    options=(Option("guidance_scale", "float", TRAINED_WITH, "guidance that the model is given in training", low=0),),
    save_formats=("original", "comfy", "kohya", "diffusers"),
    architecture="hunyuan-video",
    base_model_version="hunyuan_video",
    resolution=720,  # an area about that of 960 x 544, the smaller of Tencent's two
    frames=FrameRule(4, 1, 24.0),
    variant_of=variant_of,
    channels_of=lambda denoiser: int(denoiser.config.out_channels),
    # Tencent's own inference script
    sampling={"sample_steps": 50, "guidance_scale": 6.0, "flow_shift": 7.0, "frame_count": 129},
    text_widths=lambda denoiser: (denoiser["text_embed_dim"], denoiser["pooled_projection_dim"]),
)
