"""T5 encoders: T5 v1.1 XXL, the old T5 11B, UMT5 XXL, AuraFlow's Pile-T5 XL and the glyph ByT5.

All sizes are in the shapes: heads and distance buckets in the relative position bias, gated feed-forward by `wi_0`.
UMT5 (and Pile-T5, the same architecture) has a position bias in every block, T5 in the first one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import tokenizers
from library.components.sizes import count
from library.families.family import Part, Tokenizer
from library.layout import Shape, block, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS, MAX_DISTANCE = 1e-6, 128  # published for every T5; farther tokens share the last bucket
T5_WORDS, UMT5_WORDS, BYT5_WORDS = 32128, 256384, 1510  # published vocabularies; Pile-T5 has as many as T5

BIAS = "layer.0.SelfAttention.relative_attention_bias"
ORIGINAL = [
    row("shared", "embed_tokens"),
    row("encoder.block", "block"),
    row("encoder.final_layer_norm", "final_layer_norm"),
]
# Wan's own names of UMT5, which Kijai's umt5-xxl-enc files keep.
WAN = [
    row("token_embedding", "embed_tokens"),
    row("norm", "final_layer_norm"),
    *block(
        "blocks.{i}",
        "block.{i}",
        *(row(f"attn.{name}", f"layer.0.SelfAttention.{name}") for name in "qkvo"),
        row("pos_embedding.embedding", BIAS),
        row("norm1", "layer.0.layer_norm"),
        row("norm2", "layer.1.layer_norm"),
        row("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
        row("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
        row("ffn.fc2", "layer.1.DenseReluDense.wo"),
    ),
]


def recognise(shapes: Mapping[str, Shape], gated: bool, every: bool, others: tuple[int, ...]) -> str | None:
    """The spelling; None for another kind of T5, or for one whose published vocabulary is one of `others`."""
    if "blocks.0.pos_embedding.embedding.weight" in shapes and "token_embedding.weight" in shapes:
        layout, embedding, is_gated, in_every = "wan", "token_embedding.weight", True, True
    else:
        layout, embedding = "original", "shared.weight"
        is_gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
        in_every = f"encoder.block.1.{BIAS}.weight" in shapes
        if f"encoder.block.0.{BIAS}.weight" not in shapes or embedding not in shapes:
            return None
    fits = is_gated == gated and in_every == every and shapes[embedding][0] not in others
    return layout if fits else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """T5Config or UMT5Config of the encoder alone; `model_type` says which."""
    if layout == "wan":
        first, embedding, bias = "blocks.0.", "token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"
        query, inner, blocks, gated, every = first + "attn.q.weight", first + "ffn.fc1.weight", "blocks.", True, True
    else:
        first, embedding, blocks = "encoder.block.0.", "shared.weight", "encoder.block."
        query, bias = first + "layer.0.SelfAttention.q.weight", f"{first}{BIAS}.weight"
        gated = first + "layer.1.DenseReluDense.wi_0.weight" in shapes
        inner = first + f"layer.1.DenseReluDense.{'wi_1' if gated else 'wi'}.weight"
        every = f"encoder.block.1.{BIAS}.weight" in shapes
    buckets, heads = shapes[bias]
    return {
        "model_type": "umt5" if every else "t5",
        "vocab_size": shapes[embedding][0],
        "d_model": shapes[embedding][1],
        "d_kv": shapes[query][0] // heads,
        "d_ff": shapes[inner][0],
        "num_layers": count(shapes, blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": MAX_DISTANCE,
        "layer_norm_epsilon": EPS,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    """The encoder stack with its own embedding: transformers' T5EncoderModel only holds the same embedding twice."""
    from transformers import T5Config, UMT5Config
    from transformers.models.t5.modeling_t5 import T5Stack
    from transformers.models.umt5.modeling_umt5 import UMT5Stack

    rest = {key: value for key, value in configuration.items() if key != "model_type"}
    if configuration["model_type"] == "umt5":
        return UMT5Stack(UMT5Config(**rest))
    return T5Stack(T5Config(**rest))


def _part(
    name: str,
    title: str,
    option: str,
    folder: str,
    *,
    inside: str,
    others: tuple[int, ...],
    tokenizer: Tokenizer,
    gated: bool = True,
    every: bool = False,
) -> Part:
    published = tuple(name for name in tokenizer.beside if "/" in name)
    beside = (folder.replace("text_encoder", "tokenizer"), tokenizer.option, *published)
    return Part(
        name=name,
        title=title,
        option=option,
        layouts={"original": ORIGINAL, "wan": WAN},
        recognise=partial(recognise, gated=gated, every=every, others=others),
        config=config,
        build=build,
        prefixes=("", f"text_encoders.{inside}.transformer."),
        # A copy of `shared`, the tokenizer of ComfyUI's UMT5 files, and what a whole T5 has besides its encoder.
        carried=("encoder.embed_tokens.weight", tokenizers.SPIECE, "decoder.", "lm_head.weight"),
        diffusers_folder=folder,
        tokenizer=replace(tokenizer, beside=beside),
        precision_options="t5",
    )


def xxl(title: str = "a T5-XXL text encoder", option: str = "t5xxl", folder: str = "text_encoder_2") -> Part:
    """google/t5-v1_1-xxl: Flux (text_encoder_2), SD3 and HiDream (text_encoder_3), Chroma and LTX (text_encoder)."""
    tokenizer = Tokenizer("tokenizer_t5xxl", "google/t5-v1_1-xxl")
    return _part("t5xxl", title, option, folder, inside="t5xxl", others=(BYT5_WORDS,), tokenizer=tokenizer)


def old(title: str = "an old T5-11B text encoder", option: str = "t5xxl", folder: str = "text_encoder") -> Part:
    """google-t5/t5-11b, plain ReLU: Cosmos 1 and Cosmos-Predict2 (`oldt5_xxl`)."""
    tokenizer = Tokenizer("tokenizer_t5xxl", "google-t5/t5-11b")
    return _part("t5xxl", title, option, folder, inside="t5xxl", others=(), tokenizer=tokenizer, gated=False)


def umt5(title: str = "a UMT5-XXL text encoder", option: str = "t5", folder: str = "text_encoder") -> Part:
    """google/umt5-xxl: Wan. ComfyUI's file holds its tokenizer, Wan's own folders have it under its hub id."""
    name = "google/umt5-xxl"
    tokenizer = Tokenizer("tokenizer", name, beside=(name,), inside=tokenizers.SPIECE, load=tokenizers.load_umt5)
    return _part("t5", title, option, folder, inside="umt5xxl", others=(T5_WORDS,), tokenizer=tokenizer, every=True)


def pile(title: str = "a Pile-T5-XL text encoder", option: str = "text_encoder", folder: str = "text_encoder") -> Part:
    """EleutherAI's Pile-T5-XL as UMT5: AuraFlow."""
    tokenizer = Tokenizer("tokenizer", "fal/AuraFlow", subfolder="tokenizer")
    return _part(
        "text_encoder",
        title,
        option,
        folder,
        inside="pile_t5xl",
        others=(UMT5_WORDS,),
        tokenizer=tokenizer,
        every=True,
    )


def byt5(title: str = "a glyph ByT5 text encoder", option: str = "byt5", folder: str = "text_encoder_2") -> Part:
    """ByT5-small with glyph tokens: HunyuanImage 2.1 and HunyuanVideo 1.5. Its tokens are bytes: no file is needed."""
    tokenizer = Tokenizer("tokenizer_byt5", "google/byt5-small", load=tokenizers.load_byt5)
    return _part("byt5", title, option, folder, inside="byt5_small", others=(T5_WORDS, UMT5_WORDS), tokenizer=tokenizer)


def states(model: torch.nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last states [B,T,D] of token ids [B,T], after the final norm.

    With a `mask` [B,T] (1 = token, 0 = padding) nothing attends to the padding; without one padding is attended to as
    any token, as Flux and SD3 want it. The padding's own rows are not zeroed: see `zeroed`.
    """
    return model(input_ids=ids, attention_mask=mask if mask is not None else ids.new_ones(ids.shape))[0]


def zeroed(states: Tensor, mask: Tensor) -> Tensor:
    """The states [B,T,D] with those of padding set to zero, as Wan, Cosmos and AuraFlow want them."""
    return states * mask[..., None].to(states.dtype)
