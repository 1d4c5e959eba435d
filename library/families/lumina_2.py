"""Lumina Image 2.0 (Alpha-VLLM, 2025): a single-stream transformer on Flux latents with a Gemma-2-2B encoder.

Facts: the model is given 1 - sigma, without a factor, and returns x0 - noise. Latents are Flux's, [B,16,h,w], 2x2
patches. Keys and values have a third of the queries' heads, so the fused qkv is cut in unequal parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.families.family import Cond, Part
from library.layout import Shape, block, count, identity, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = [
    row("attention.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    row("attention.out", "attn.to_out.0"),
    row("attention.q_norm", "attn.norm_q"),
    row("attention.k_norm", "attn.norm_k"),
    row("feed_forward.w1", "feed_forward.linear_1"),
    row("feed_forward.w2", "feed_forward.linear_2"),
    row("feed_forward.w3", "feed_forward.linear_3"),
    row("attention_norm2", "norm2"),
    row("ffn_norm1"),
    row("ffn_norm2"),
]
MODULATED = [*BLOCK, row("attention_norm1", "norm1.norm"), row("adaLN_modulation.1", "norm1.linear")]
EMBED = "time_caption_embed"
COMFY = [
    row("x_embedder"),
    row("t_embedder.mlp.0", f"{EMBED}.timestep_embedder.linear_1"),
    row("t_embedder.mlp.2", f"{EMBED}.timestep_embedder.linear_2"),
    row("cap_embedder", f"{EMBED}.caption_embedder"),
    row("final_layer.linear", "norm_out.linear_2"),
    row("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    *block("context_refiner.{i}", "context_refiner.{i}", *BLOCK, row("attention_norm1", "norm1")),
    *block("noise_refiner.{i}", "noise_refiner.{i}", *MODULATED),
    *block("layers.{i}", "layers.{i}", *MODULATED),
]
BLOCKS = ("layers", "noise_refiner", "context_refiner")
# All of JointTransformerBlock, refiners and modulation included, as diffusion-pipe trains it (the seed's system).
ADAPTED = ("layers.", "noise_refiner.", "context_refiner.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Z-Image has the same names and pad tokens besides; OmniGen2 has diffusers' names and reference pictures."""
    if "cap_pad_token" in shapes or "image_index_embedding" in shapes:
        return None
    if "layers.0.attention.qkv.weight" in shapes and "cap_embedder.1.weight" in shapes:
        return "comfy"
    ours = f"{EMBED}.caption_embedder.1.weight" in shapes and "layers.0.attn.to_q.weight" in shapes
    return "diffusers" if ours else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    caption = "cap_embedder" if layout == "comfy" else f"{EMBED}.caption_embedder"
    out = "final_layer.linear" if layout == "comfy" else "norm_out.linear_2"
    if layout == "comfy":
        head = shapes["layers.0.attention.q_norm.weight"][0]
        rows, width = shapes["layers.0.attention.qkv.weight"]
        inner = shapes["layers.0.feed_forward.w1.weight"][0]
        keys = (rows - width) // 2
    else:
        head = shapes["layers.0.attn.norm_q.weight"][0]
        keys, width = shapes["layers.0.attn.to_k.weight"]
        inner = shapes["layers.0.feed_forward.linear_1.weight"][0]
    side = head // 6 * 2  # three even axes share a head; what is left goes to the first
    return {
        "patch_size": 2,
        "hidden_size": width,
        "num_attention_heads": width // head,
        "num_kv_heads": keys // head,
        "axes_dim_rope": (head - 2 * side, side, side),
        # diffusers takes 4 * width times a factor and rounds it up to a multiple: half of `inner`, rounded up to it.
        "multiple_of": inner,
        "ffn_dim_multiplier": inner / (8 * width),
        "in_channels": shapes["x_embedder.weight"][1] // 4,
        "out_channels": shapes[f"{out}.weight"][0] // 4,
        "cap_feat_dim": shapes[f"{caption}.1.weight"][1],
        "num_layers": count(shapes, "layers"),
        "num_refiner_layers": count(shapes, "noise_refiner"),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.lumina import Lumina2

    return Lumina2(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Lumina 2 denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    carried=("norm_final.weight",),
    diffusers_folder="transformer",
    high_precision=("adaLN_modulation", "norm1.linear"),
)


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], ragged."""
    dtype = denoiser.x_embedder.weight.dtype
    texts = [cond["text"].to(dtype) for cond in conds]
    return -denoiser(noisy.to(dtype), 1.0 - sigma.float(), texts).float()
