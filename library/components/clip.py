"""CLIP text encoders: CLIP-L, OpenCLIP bigG and OpenCLIP H, from ComfyUI's files, LDM checkpoints and folders.

Three spellings of the same weights: transformers' (`text_model.encoder.layers`), the same without its first level (what
transformers 5 calls CLIPTextModel), and OpenCLIP's inside SDXL and SD 2 checkpoints (q, k and v fused, the projection
transposed). Ours is CLIPTextModelWithProjection, whose projection is None where the file has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components.sizes import count, finish, stated
from library.errors import ConfigError
from library.families.family import Part, Tokenizer
from library.layout import Op, Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# openai/clip-vit-large-patch14 and laion's CLIP-ViT-bigG-14 and CLIP-ViT-H-14: heads of 64, the same norms.
HEAD, EPS = 64, 1e-5
LARGE, HUGE, BIG = 768, 1024, 1280  # published widths

transpose = Op("transpose", lambda t: t.T, lambda t, shape: t.T, lambda shape: shape[::-1])  # OpenCLIP's projection

ORIGINAL = [row("text_model"), row("text_projection")]
FLAT = [
    *(row(name, f"text_model.{name}") for name in ("embeddings", "encoder", "final_layer_norm")),
    row("text_projection"),
]
TOKENS = {
    "original": "text_model.embeddings.token_embedding.weight",
    "flat": "embeddings.token_embedding.weight",
    "open_clip": "token_embedding.weight",
}
BLOCKS = {"original": "text_model.encoder.layers.", "flat": "encoder.layers.", "open_clip": "transformer.resblocks."}


def _open_clip() -> list[Row]:
    theirs, ours = "transformer.resblocks.{i}", "text_model.encoder.layers.{i}"
    rows = [
        row(f"{theirs}.attn.in_proj_{leaf}", *(f"{ours}.self_attn.{p}_proj.{leaf}" for p in "qkv"))
        for leaf in ("weight", "bias")
    ]
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    return [
        row("token_embedding", "text_model.embeddings.token_embedding"),
        row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        row("ln_final", "text_model.final_layer_norm"),
        row("text_projection", "text_projection.weight", op=transpose),
        *rows,
        *(row(f"{theirs}.{a}", f"{ours}.{b}") for a, b in names.items()),
    ]


OPEN_CLIP = _open_clip()


def recognise(shapes: Mapping[str, Shape], widths: tuple[int, ...]) -> str | None:
    """The spelling; None for another model, or for the published width of another CLIP, which has `widths`."""
    for layout, key in TOKENS.items():
        if key in shapes and count(shapes, BLOCKS[layout]):
            return layout if shapes[key][1] not in widths else None
    return None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str, activation: str) -> dict[str, Any]:
    """CLIPTextConfig; `projection_dim` 0 means that the file holds no projection."""
    vocabulary, width = shapes[TOKENS[layout]]
    blocks = BLOCKS[layout]
    fc1 = "mlp.c_fc" if layout == "open_clip" else "mlp.fc1"
    positions = "positional_embedding" if layout == "open_clip" else "embeddings.position_embedding.weight"
    positions = f"text_model.{positions}" if layout == "original" else positions
    projection = shapes.get("text_projection") or shapes.get("text_projection.weight", (0,))[::-1]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{blocks}0.{fc1}.weight"][0],
        "num_hidden_layers": count(shapes, blocks),
        "num_attention_heads": stated(metadata, "num_attention_heads", width // math.gcd(width, HEAD)),
        "max_position_embeddings": shapes[positions][0],
        "projection_dim": projection[-1],
        "hidden_act": stated(metadata, "hidden_act", activation),
        "layer_norm_eps": EPS,
        # The last two of the vocabulary are the start and the end of a caption; the first end is what is pooled.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    projected = configuration["projection_dim"]
    model = CLIPTextModelWithProjection(CLIPTextConfig(**(configuration | {"projection_dim": projected or 1})))
    if not projected:
        model.text_projection = None
    return model


def _part(
    name: str,
    title: str,
    option: str,
    folder: str,
    *,
    activation: str,
    others: tuple[int, ...],
    inside: tuple[str, ...],
    hub: str,
) -> Part:
    own = f"tokenizer_{name}"
    return Part(
        name=name,
        title=title,
        option=option,
        layouts={"original": ORIGINAL, "flat": FLAT, "open_clip": OPEN_CLIP},
        recognise=partial(recognise, widths=others),
        config=partial(config, activation=activation),
        build=build,
        prefixes=("", *inside),
        # position_ids and logit_scale are no weights; a whole CLIP also holds its picture tower.
        carried=(
            "text_model.embeddings.position_ids",
            "embeddings.position_ids",
            "logit_scale",
            "vision_model.",
            "visual_projection.weight",
        ),
        diffusers_folder=folder,
        finish=finish,
        tokenizer=Tokenizer(own, hub, (folder.replace("text_encoder", "tokenizer"), own)),
    )


def large(title: str = "a CLIP-L text encoder", option: str = "clip_l", folder: str = "text_encoder") -> Part:
    """OpenAI's CLIP ViT-L/14 text tower: SD 1, SDXL's first, SD3's first, Flux, HunyuanVideo, HiDream."""
    return _part(
        "clip_l",
        title,
        option,
        folder,
        activation="quick_gelu",
        others=(BIG, HUGE),
        # ComfyUI's all-in-one files, SDXL checkpoints, SD 1 checkpoints
        inside=(
            "text_encoders.clip_l.transformer.",
            "conditioner.embedders.0.transformer.",
            "cond_stage_model.transformer.",
        ),
        hub="openai/clip-vit-large-patch14",
    )


def big(title: str = "a CLIP-G text encoder", option: str = "clip_g", folder: str = "text_encoder_2") -> Part:
    """LAION's OpenCLIP ViT-bigG/14 text tower: SDXL's second, SD3's second, HiDream. Its prompts are padded with 0."""
    return _part(
        "clip_g",
        title,
        option,
        folder,
        activation="gelu",
        others=(LARGE, HUGE),
        inside=("text_encoders.clip_g.transformer.", "conditioner.embedders.1.model."),
        hub="laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    )


def huge(title: str = "an OpenCLIP-H text encoder", option: str = "clip_h", folder: str = "text_encoder") -> Part:
    """LAION's OpenCLIP ViT-H/14 text tower: SD 2. Its prompts are padded with 0."""
    return _part(
        "clip_h",
        title,
        option,
        folder,
        activation="gelu",
        others=(LARGE, BIG),
        inside=("text_encoders.clip_h.transformer.", "cond_stage_model.model."),
        hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    )


def projected(part: Part) -> Part:
    """The same encoder for a model that reads its projected vector, so that a file has to hold the projection."""
    return replace(
        part,
        title=f"{part.title} with its projection (text_projection)",
        recognise=partial(_recognise_projected, known=part.recognise),
    )


def _recognise_projected(shapes: Mapping[str, Shape], known: Callable[..., str | None]) -> str | None:
    return known(shapes) if {"text_projection", "text_projection.weight"} & set(shapes) else None


def hidden_and_pooled(
    model: torch.nn.Module, ids: Tensor, layer: int = -2, final_norm: bool = False, projected: bool = True
) -> tuple[Tensor, Tensor]:
    """(states [B,T,D], vector [B,D]) of token ids [B,T] in one pass.

    `layer` counts as in the literature: -1 what the last block gives, -2 what the next-to-last gives ("clip skip 2").
    The vector is read at the first end token after the final norm. Raises ConfigError if it is to be projected and the
    file has no projection.
    """
    if projected and model.text_projection is None:
        raise ConfigError(f"{_source(model)} has no text_projection, which this model needs; take a file that holds it")
    out = model.text_model(input_ids=ids, output_hidden_states=True)
    states = out.hidden_states[layer]
    states = model.text_model.final_layer_norm(states) if final_norm else states
    return states, model.text_projection(out.pooler_output) if projected else out.pooler_output


def hidden(model: torch.nn.Module, ids: Tensor, layer: int = -2, final_norm: bool = False) -> Tensor:
    """States [B,T,D] of one layer, as `hidden_and_pooled` counts them."""
    return hidden_and_pooled(model, ids, layer, final_norm, projected=False)[0]


def pooled(model: torch.nn.Module, ids: Tensor, projected: bool = True) -> Tensor:
    """The vector [B,D] of the first end token: projected for SDXL and SD3's CLIP-G, bare for Flux."""
    return hidden_and_pooled(model, ids, projected=projected)[1]


def _source(model: torch.nn.Module) -> str:
    binding = getattr(model, "binding", None)
    return str(binding.source) if binding else "this text encoder"
