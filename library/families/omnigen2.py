"""OmniGen2 (VectorSpaceLab, 2025): Lumina 2's blocks on Flux latents, Qwen2.5-VL-3B states and reference pictures.

Facts: the model is given 1 - sigma (times 1000 inside) and returns x0 - noise. Reference pictures are latents of any
size, put between text and picture. diffusers has its blocks, not the model
(library/models/lumina.py); released files have our names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.families.family import Cond, Part
from library.layout import Shape, count, identity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS = ("layers", "noise_refiner", "context_refiner", "ref_image_refiner")
# All of OmniGen2TransformerBlock, refiners and modulation included, as diffusion-pipe trains it (the seed's system).
ADAPTED = ("layers.", "noise_refiner.", "context_refiner.", "ref_image_refiner.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """The released file's names are the model's own, so a folder and a single file look the same."""
    return "comfy" if "image_index_embedding" in shapes and "ref_image_patch_embedder.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    keys, width = shapes["layers.0.attn.to_k.weight"]
    head, inner = shapes["layers.0.attn.norm_q.weight"][0], shapes["layers.0.feed_forward.linear_1.weight"][0]
    side = head // 6 * 2  # three even axes share a head; what is left goes to the first
    return {
        "patch_size": 2,
        "in_channels": shapes["x_embedder.weight"][1] // 4,
        "out_channels": shapes["norm_out.linear_2.weight"][0] // 4,
        "hidden_size": width,
        "num_attention_heads": width // head,
        "num_kv_heads": keys // head,
        "axes_dim_rope": (head - 2 * side, side, side),
        # diffusers takes 4 * width times a factor and rounds it up to a multiple: half of `inner`, rounded up to it.
        "multiple_of": inner,
        "ffn_dim_multiplier": inner / (8 * width),
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.1.weight"][1],
        "num_layers": count(shapes, "layers"),
        "num_refiner_layers": count(shapes, "noise_refiner"),
        "references": shapes["image_index_embedding"][0],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.lumina import OmniGen2

    return OmniGen2(**configuration)


DENOISER = Part(
    name="denoiser",
    title="an OmniGen2 denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
    high_precision=("norm1.linear",),
)


def references_of(cond: Cond) -> list[Tensor]:
    """ "control.0", "control.1", ... in order."""
    found = []
    while f"control.{len(found)}" in cond:
        found.append(cond[f"control.{len(found)}"])
    return found


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], ragged; "control.0", ... [C,h,w] of any number and size."""
    dtype = denoiser.x_embedder.weight.dtype
    texts = [cond["text"].to(dtype) for cond in conds]
    references = [[picture.to(dtype) for picture in references_of(cond)] for cond in conds]
    return -denoiser(noisy.to(dtype), 1.0 - sigma.float(), texts, references).float()
