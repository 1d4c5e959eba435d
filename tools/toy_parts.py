"""Toy dimensions of VAEs, text encoders and tokenizers, and which of them each family's toy is made of.

A part's function returns the configuration that `Part.build` takes and the header metadata that its file needs (what
no shape shows). Widths are those that the toy denoisers of `toy_configs.json` read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools import toy_vaes

Made = tuple[dict[str, Any], dict[str, str]]  # configuration, header metadata


@dataclass(frozen=True)
class ToyText:
    config: Callable[[int, int], Made]  # (width, vocabulary)
    width: int
    tokenizer: str | None = "chat"  # one of TOKENIZERS; None: the encoder has none


@dataclass(frozen=True)
class Toy:
    vae: Made
    text: Mapping[str, ToyText]  # part name -> its toy
    images: Mapping[str, Made] = field(default_factory=dict)  # image encoders by part name
    options: Mapping[str, Any] = field(default_factory=dict)  # of toy.toml
    tokenizers: Mapping[str, str] = field(default_factory=dict)  # without an encoder: option -> one of TOKENIZERS
    denoiser: dict[str, Any] | None = None  # its configuration, if it is not in toy_configs.json


def vae_ldm(channels: int, quant: bool = False) -> Made:
    return {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": channels, "norm_num_groups": 4, "use_quant_conv": quant, "use_post_quant_conv": quant,
    }, {"norm_num_groups": "4"}  # fmt: skip


def qwen3(width: int, vocabulary: int) -> Made:
    from library.components import qwen3

    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": qwen3.NORM_EPS,
        "rope_parameters": {"rope_theta": qwen3.ROPE_THETA, "rope_type": "default"}, "attention_bias": False,
    }, {}  # fmt: skip


def qwen25_vl(width: int, vocabulary: int) -> Made:
    from library.components import qwen25_vl

    heads = 4
    text = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4,
        "num_attention_heads": heads, "num_key_value_heads": 2, "rms_norm_eps": qwen25_vl.NORM_EPS,
        "rope_parameters": {
            "rope_theta": qwen25_vl.ROPE_THETA, "rope_type": "default", "mrope_section": [2, 3, 3],
        },
    }  # fmt: skip
    return {"text_config": text, "vision_config": None}, {"head_dim": str(width // heads)}


VISION = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def qwen25_vl_seeing(width: int, vocabulary: int) -> Made:
    """With a picture tower, for a tokenizer of the kind "vision"."""
    configuration, metadata = qwen25_vl(width, vocabulary)
    tower = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "patch_size": 14,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
        "out_hidden_size": width,
    }  # fmt: skip
    stated = {"vision_num_heads": "2", "fullatt_block_indexes": "[1]", "image_token_id": str(VISION.index(VISION[-1]))}
    return configuration | {"vision_config": tower}, metadata | stated


def mistral(width: int, vocabulary: int) -> Made:
    """As ComfyUI's pruned file: 30 layers and no norm after them."""
    from library.components import mistral

    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 30,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": mistral.NORM_EPS,
        "rope_parameters": {"rope_theta": mistral.ROPE_THETA, "rope_type": "default"}, "sliding_window": None,
        "final_norm": False,
    }, {"head_dim": "8"}  # fmt: skip


def llama31(width: int, vocabulary: int) -> Made:
    from library.components import llama3

    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": llama3.NORM_EPS,
        "rope_parameters": {"rope_theta": llama3.ROPE_THETA, "rope_type": "llama3"} | llama3.STRETCHED,
    }, {"head_dim": "16"}  # fmt: skip


def llama3(width: int, vocabulary: int) -> Made:
    from library.components import llama3

    configuration, metadata = llama31(width, vocabulary)
    rope = {"rope_theta": llama3.ROPE_THETA, "rope_type": "default"}
    return configuration | {"rope_parameters": rope}, metadata


def gemma2(width: int, vocabulary: int) -> Made:
    from library.components import gemma2

    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": gemma2.SOFT_CAP, "sliding_window": gemma2.WINDOW, "rms_norm_eps": gemma2.NORM_EPS,
        "rope_parameters": {"rope_theta": gemma2.ROPE_THETA, "rope_type": "default"},
        "hidden_activation": "gelu_pytorch_tanh", "attn_implementation": "eager",
    }, {"head_dim": "16"}  # fmt: skip


def t5(width: int, vocabulary: int) -> Made:
    return {
        "model_type": "t5", "vocab_size": vocabulary, "d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2,
        "num_heads": 4, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
        "is_encoder_decoder": False, "use_cache": False,
    }, {}  # fmt: skip


VAE_HUNYUAN_IMAGE: Made = (
    {
        "in_channels": 3, "out_channels": 3, "latent_channels": 64, "block_out_channels": (32, 32, 32, 32, 32, 128),
        "layers_per_block": 1, "spatial_compression_ratio": 32, "sample_size": 384,
    },
    {},
)  # fmt: skip


def clip(width: int, vocabulary: int) -> Made:
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 1, "max_position_embeddings": 77, "projection_dim": width, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }, {}  # fmt: skip


def clip_long(width: int, vocabulary: int) -> Made:
    """With as many positions as HiDream's own files have."""
    return clip(width, vocabulary)[0] | {"max_position_embeddings": 248}, {}


def clip_bare(width: int, vocabulary: int) -> Made:
    """Without the projection, which the CLIP-L of Stable Diffusion's checkpoints has not."""
    return clip(width, vocabulary)[0] | {"projection_dim": 0}, {}


def unet(levels: tuple[int, ...], depths: tuple[int, ...], cross: int, **more: Any) -> dict[str, Any]:
    """A UNet of these widths and of so many transformer blocks in the attentions of each level, 0 = none."""
    types = ["CrossAttn" if depth else "" for depth in depths]
    return {
        "in_channels": 4, "out_channels": 4, "block_out_channels": levels, "layers_per_block": 2,
        "down_block_types": [f"{kind}DownBlock2D" for kind in types],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(types)],
        "transformer_layers_per_block": [depth or 1 for depth in depths], "cross_attention_dim": cross,
        "norm_num_groups": 32, **more,
    }  # fmt: skip


def vae_whole(channels: int) -> Made:
    """With as many groups as need no metadata, since a checkpoint has one header for all of its parts."""
    return vae_ldm(channels, quant=True)[0] | {"norm_num_groups": 8}, {}


SDXL_TOY = unet(
    (32, 64, 128), (0, 1, 2), 96, attention_head_dim=[1, 1, 2], use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=64 + 6 * 256,
)  # fmt: skip


def old_t5(width: int, vocabulary: int) -> Made:
    configuration, metadata = t5(width, vocabulary)
    return configuration | {"feed_forward_proj": "relu"}, metadata


def umt5(width: int, vocabulary: int) -> Made:
    configuration, metadata = t5(width, vocabulary)
    return configuration | {"model_type": "umt5"}, metadata


def clip_vision(width: int = 1280, side: int = 28) -> Made:
    """As wide as Wan's denoisers want it, and of few patches."""
    return {
        "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": width // 80,
        "num_channels": 3, "patch_size": 14, "image_size": side, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    }, {}  # fmt: skip


def llava_vision(width: int = 64, side: int = 56) -> Made:
    """LLaVA's picture tower for a Llama of that width; a picture is `side`² / 14² states."""
    return {
        "vision": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_channels": 3, "patch_size": 14, "image_size": side, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        },
        "inner": width, "hidden_size": width,
    }, {"vision_num_heads": "2"}  # fmt: skip


TOYS: dict[str, Toy] = {
    "anima": Toy(toy_vaes.wan21(), {"text_encoder": ToyText(qwen3, 64)}, tokenizers={"t5_tokenizer_path": "t5"}),
    "auraflow": Toy(vae_ldm(4, quant=True), {"text_encoder": ToyText(umt5, 2048, "t5")}),
    "chroma": Toy(vae_ldm(16), {"t5xxl": ToyText(t5, 64, "t5")}),
    "cosmos": Toy(toy_vaes.cosmos(), {"t5xxl": ToyText(old_t5, 64, "t5")}, options={"i_know_what_i_am_doing": True}),
    "cosmos_predict2": Toy(toy_vaes.wan21(), {"t5xxl": ToyText(old_t5, 64, "t5")}),
    "flux": Toy(vae_ldm(16), {"clip_l": ToyText(clip_bare, 32, "clip"), "t5xxl": ToyText(t5, 64, "t5")}),
    "flux2": Toy(toy_vaes.flux2(), {"text_encoder": ToyText(mistral, 32, "mistral")}),
    "hidream": Toy(
        vae_ldm(16),
        {
            "clip_l": ToyText(clip_long, 32, "clip"),
            "clip_g": ToyText(clip_long, 32, "clip"),
            "t5xxl": ToyText(t5, 64, "t5"),
            "llama3": ToyText(llama31, 64, "bos"),
        },
    ),
    "hunyuan_image": Toy(
        VAE_HUNYUAN_IMAGE, {"text_encoder": ToyText(qwen25_vl, 64), "byt5": ToyText(t5, 1472, "bytes")}
    ),
    "hunyuan_video": Toy(
        toy_vaes.hunyuan_video(),
        {"text_encoder": ToyText(llama3, 64, "llama"), "clip_l": ToyText(clip_bare, 768, "clip")},
    ),
    "hunyuan_video_15": Toy(
        toy_vaes.hunyuan_video_15(), {"text_encoder": ToyText(qwen25_vl, 64), "byt5": ToyText(t5, 1472, "bytes")}
    ),
    "lumina_2": Toy(vae_ldm(16), {"text_encoder": ToyText(gemma2, 64, "bos")}),
    "omnigen2": Toy(vae_ldm(16), {"text_encoder": ToyText(qwen25_vl, 64)}),
    "ltx_video": Toy(toy_vaes.ltx_video(), {"t5xxl": ToyText(t5, 4096, "t5")}),
    "qwen_image": Toy(
        toy_vaes.wan21(),
        {"text_encoder": ToyText(qwen25_vl_seeing, 64, "vision")},
        options={"model_version": "original"},
    ),
    "sd": Toy(
        vae_whole(4),
        {"clip_l": ToyText(clip_bare, 32, "clip")},
        denoiser=unet((32, 64, 64, 64), (1, 1, 1, 0), 32, attention_head_dim=8),
    ),
    "sd3": Toy(
        vae_ldm(16),
        {"clip_l": ToyText(clip_bare, 32, "clip"), "clip_g": ToyText(clip, 32), "t5xxl": ToyText(t5, 96, "t5")},
    ),
    "sdxl": Toy(
        vae_whole(4),
        {"clip_l": ToyText(clip_bare, 32, "clip"), "clip_g": ToyText(clip, 64)},
        denoiser=SDXL_TOY,
    ),
    "wan": Toy(toy_vaes.wan21(), {"t5": ToyText(umt5, 4096, "spiece")}),
    "z_image": Toy(vae_ldm(16), {"text_encoder": ToyText(qwen3, 64)}),
}

WORDS = (
    "a an the of on in and with picture photo thing red green blue white black cat dog house tree blurry style".split()
)
# kind -> (special tokens, what surrounds a text, keyword arguments of the tokenizer)
TOKENIZERS: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {
    "chat": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "$A", {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    ),
    "vision": (VISION, "$A", {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}),
    "mistral": (
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>"), "<s> $A",
        {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"},
    ),
    "clip": (
        ("<|startoftext|>", "<|endoftext|>"), "<|startoftext|> $A <|endoftext|>",
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "t5": (("<pad>", "</s>", "<unk>"), "$A </s>", {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "llama": (
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"),
        "<|begin_of_text|> $A",
        {"pad_token": "<pad>", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "bos": (
        ("<pad>", "<eos>", "<bos>"), "<bos> $A", {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    ),
}  # fmt: skip


def make_tokenizer(folder: Path, kind: str) -> int:
    """A tokenizer in transformers' files; returns its vocabulary size. Bytes need no vocabulary file."""
    if kind == "spiece":
        return _make_sentencepiece(folder)
    if kind == "bytes":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
        return 384
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special, template, arguments = TOKENIZERS[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    last = kind == "clip"  # whose special tokens end the vocabulary
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[] if last else list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **arguments)
    fast.save_pretrained(folder)
    return len(fast)


def _make_sentencepiece(folder: Path) -> int:
    """A sentencepiece model with byte fallback, as UMT5's is."""
    import io

    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    model, size = io.BytesIO(), 330
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 4), model_writer=model, vocab_size=size, byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return size
