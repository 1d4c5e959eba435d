"""HunyuanVideo (Tencent, 2024): double- and single-stream blocks on 8x latents with Llama-3 states.

Facts: the model is given sigma * 1000 and, being distilled, guidance * 1000; noise - x0 is returned. Latents are
[B,16,F,h,w], patches 1x2x2. Text is the third-last layer of llava-llama-3-8b without its template, and CLIP-L's
pooled vector. Image-to-video models of 33 channels also take the given frame's latents and a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import hunyuan, ragged
from library.families.family import Cond, Part
from library.layout import Shape, count, identity, our_view

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMES = "time_text_embed"
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


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(TABLES[layout], shapes) if layout in TABLES else shapes
    return hunyuan.sizes(ours, patch=2) | {
        "num_single_layers": count(ours, "single_transformer_blocks"),
        "guidance_embeds": f"{TIMES}.guidance_embedder.linear_1.weight" in ours,
        "pooled_projection_dim": ours[f"{TIMES}.text_embedder.linear_1.weight"][1],
    }


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
)


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, guidance: float = 1.0
) -> Tensor:
    """Velocity [B,C,F,h,w] float32.

    Conds: "text" [T,D], ragged; "pooled" [D]; "guidance" [], else `guidance`; "image_latents" [17,F,h,w] of an
    image-to-video model. `guidance` is what the peers train a distilled model with.
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
