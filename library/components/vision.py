"""Image encoders of image-to-video models: CLIP ViT-H/14 (Wan 2.1) and SigLIP so400m/14 at 384 (HunyuanVideo 1.5).

ComfyUI's files have transformers' older names, with `vision_model.` before all; transformers 5 has dropped it. Wan's
own file, `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, has names of its own, q, k and v in one, and a text
model beside. What is read are states, never the pooled vector, so heads and projections in a file are carried along
unread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components.sizes import count, finish, stated
from library.families.family import Part
from library.layout import Op, Row, Shape, block, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# laion's CLIP-ViT-H-14 and google/siglip-so400m-patch14-384: widths of a head and epsilons of the norms.
CLIP_HEAD, CLIP_EPS = 80, 1e-5
SIGLIP_HEAD, SIGLIP_EPS = 72, 1e-6
SIGLIP_SIDE = 384  # pixels, of which 27 patches of 14 leave six unseen
# OpenAI's means and deviations of red, green and blue in 0..1; SigLIP has 0.5 for all.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

MODULES = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
PREFIX = {"original": "vision_model.", "flat": ""}
LAYOUTS: dict[str, list[Row]] = {name: [row(prefix + m, m) for m in MODULES] for name, prefix in PREFIX.items()}
_one_more = Op(  # Wan's embeddings have the axes of a batch
    "one_more", lambda t: t.expand(1, 1, -1) if t.ndim == 1 else t[None], lambda t, shape: t.reshape(shape),
    lambda shape: (1, 1, *shape) if len(shape) == 1 else (1, *shape),
)  # fmt: skip
WAN = [  # `VisionTransformer` of Wan's wan/modules/clip.py
    row("visual.patch_embedding", "embeddings.patch_embedding"),
    row("visual.cls_embedding", "embeddings.class_embedding", op=_one_more),
    row("visual.pos_embedding", "embeddings.position_embedding.weight", op=_one_more),
    row("visual.pre_norm", "pre_layrnorm"),
    *block(
        "visual.transformer.{i}",
        "encoder.layers.{i}",
        row("norm1", "layer_norm1"),
        row("attn.to_qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        row("attn.proj", "self_attn.out_proj"),
        row("norm2", "layer_norm2"),
        row("mlp.0", "mlp.fc1"),
        row("mlp.2", "mlp.fc2"),
    ),
    row("visual.post_norm", "post_layernorm"),
]
# Layout -> names of patches, positions, the first MLP's first Linear, the list of blocks
SIZES = {
    name: (
        f"{prefix}embeddings.patch_embedding.weight",
        f"{prefix}embeddings.position_embedding.weight",
        f"{prefix}encoder.layers.0.mlp.fc1.weight",
        f"{prefix}encoder.layers.",
    )
    for name, prefix in PREFIX.items()
}
SIZES["wan"] = (
    "visual.patch_embedding.weight", "visual.pos_embedding", "visual.transformer.0.mlp.0.weight", "visual.transformer."
)  # fmt: skip


def recognise(shapes: Mapping[str, Shape], clip: bool) -> str | None:
    """CLIP has a class token and no bias in its patches; SigLIP has neither."""
    if clip and "visual.cls_embedding" in shapes and "visual.transformer.0.attn.to_qkv.weight" in shapes:
        return "wan"
    for layout, prefix in PREFIX.items():
        if f"{prefix}embeddings.patch_embedding.weight" in shapes:
            has_class = f"{prefix}embeddings.class_embedding" in shapes
            return layout if has_class == clip and count(shapes, f"{prefix}encoder.layers.") else None
    return None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str, clip: bool) -> dict[str, Any]:
    """CLIPVisionConfig or SiglipVisionConfig; the picture's side comes from the number of positions."""
    patches, places, inner, blocks = SIZES[layout]
    width, channels, patch, _ = shapes[patches]
    positions = shapes[places][-2] - clip
    head = math.gcd(width, CLIP_HEAD if clip else SIGLIP_HEAD)
    side = math.isqrt(positions)
    whole = SIGLIP_SIDE if not clip and side == SIGLIP_SIDE // patch else side * patch
    return {
        "hidden_size": width,
        "intermediate_size": shapes[inner][0],
        "num_hidden_layers": count(shapes, blocks),
        "num_attention_heads": stated(metadata, "num_attention_heads", width // head),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": stated(metadata, "image_size", whole),
        "hidden_act": "gelu" if clip else "gelu_pytorch_tanh",
        "layer_norm_eps": CLIP_EPS if clip else SIGLIP_EPS,
    }


def _build_clip(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**configuration))


def _build_siglip(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**configuration, vision_use_head=False))


def _part(name: str, title: str, option: str, clip: bool) -> Part:
    return Part(
        name=name,
        title=title,
        option=option,
        layouts=LAYOUTS | ({"wan": WAN} if clip else {}),
        recognise=partial(recognise, clip=clip),
        config=partial(config, clip=clip),
        build=_build_clip if clip else _build_siglip,
        prefixes=("", "image_encoder."),
        carried=(
            "visual_projection.weight",
            "vision_model.embeddings.position_ids",
            "vision_model.head.",
            "head.",
            "text_model.",
            "text_projection.weight",
            "logit_scale",
            "logit_bias",
            "textual.",
            "visual.head",
            "log_scale",
        ),
        diffusers_folder="image_encoder",
        finish=finish,
    )


def clip_h(title: str = "a CLIP-H image encoder", option: str = "clip") -> Part:
    """Wan 2.1 image-to-video (`clip_vision_h`): `states` of the next-to-last layer, 257 tokens of 1280."""
    return _part("clip_vision", title, option, clip=True)


def siglip(title: str = "a SigLIP image encoder", option: str = "image_encoder") -> Part:
    """HunyuanVideo 1.5 image-to-video (`sigclip_vision_patch14_384`): `states`, 729 tokens of 1152."""
    return _part("siglip_vision", title, option, clip=False)


def states(model: torch.nn.Module, prepared: Tensor, layer: int | None = None) -> Tensor:
    """States [B,N,D] of prepared pictures [B,3,S,S]: of `layer` (-2 the next-to-last), else what the model returns,
    which for SigLIP is after the final norm."""
    out = model(pixel_values=prepared, output_hidden_states=layer is not None)
    return out.last_hidden_state if layer is None else out.hidden_states[layer]


def prepare(
    model: torch.nn.Module, pixels: Tensor, *, crop: bool, antialias: bool = True, clip_colours: bool = True
) -> Tensor:
    """Pictures [B,3,H,W] in -1..1 as the encoder wants them, [B,3,S,S] in its number format.

    `crop` scales the shorter side and cuts the middle (CLIP's published way and ComfyUI's default), else the picture is
    squeezed (SigLIP's published way; Wan's reference code, which does it without `antialias`). `clip_colours` subtracts
    OpenAI's means; SigLIP takes -1..1. Bicubic, rounded to 256 steps as in the published preprocessors.
    """
    import torch
    import torch.nn.functional as F

    side = model.config.image_size
    height, width = pixels.shape[-2:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        # int() as in the published preprocessor, with the shorter side exact
        size = [side if n == min(height, width) else int(n * scale) for n in (height, width)] if crop else [side, side]
        pixels = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=antialias, align_corners=False)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = pixels[..., top : top + side, left : left + side]
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    if clip_colours:
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        pixels = ((pixels.float() + 1) / 2 - mean) / std
    return pixels.to(model.dtype)
