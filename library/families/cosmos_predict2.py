"""Cosmos-Predict2 text-to-image, 2B and 14B (NVIDIA, 2025): cross attention to the old T5-11B's states.

Facts: rectified flow with sigma in 0..1 as the time (the released sampler's sigma s is s / (1 + s) here), noise - x0
is returned. Latents are the Wan 2.1 VAE's, one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import cosmos, ragged
from library.families.family import Cond, Part
from library.layout import Shape, identity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS = cosmos.BLOCKS
ADAPTED = ("blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    return None if "llm_adapter.embed.weight" in shapes else cosmos.recognise(shapes)


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    return cosmos.config(shapes, layout)


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Cosmos-Predict2 text-to-image denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": cosmos.ROWS, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=cosmos.PREFIXES,
    carried=cosmos.CARRIED,
    diffusers_folder="transformer",
    high_precision=cosmos.MODULATION,
)


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, tokens: int = cosmos.TOKENS
) -> Tensor:
    """Velocity [B,C,h,w] float32 ([B,C,F,h,w] of videos). Conds: "text" [T,D], zero-padded to `tokens`."""
    dtype = denoiser.proj_out.weight.dtype
    text = ragged.pad([cond["text"].to(dtype) for cond in conds], tokens)
    out = denoiser(cosmos.video_of(noisy).to(dtype), sigma.float(), text, return_dict=False)[0]
    return out.float().reshape(noisy.shape)
