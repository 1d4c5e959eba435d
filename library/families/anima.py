"""Anima (CircleStone Labs, 2026): Cosmos-Predict2 2B whose text comes from Qwen3-0.6B through an adapter of its own.

Facts: plain flow, sigma in 0..1 is the time, noise - x0 is returned. The adapter lies in the denoiser's file; its
queries are the caption's T5 token ids. Latents are the Wan 2.1 VAE's, one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import cosmos
from library.families.family import Cond, Part
from library.layout import Shape, count, identity, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADAPTER = "llm_adapter"
BLOCKS = (*cosmos.BLOCKS, f"{ADAPTER}.blocks")
# The blocks; the adapter is opt-in, as in sd-scripts (`train_llm_adapter`) and diffusion-pipe (`llm_adapter_lr`).
ADAPTED = ("blocks.",)


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    return cosmos.recognise(shapes) if f"{ADAPTER}.embed.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    first = f"{ADAPTER}.blocks.0"
    width = shapes[f"{first}.norm_cross_attn.weight"][0]
    vocabulary, target = shapes[f"{ADAPTER}.embed.weight"]
    adapter = {
        "source_dim": shapes[f"{first}.cross_attn.k_proj.weight"][1],
        "target_dim": target,
        "model_dim": width,
        "num_layers": count(shapes, f"{ADAPTER}.blocks"),
        "num_attention_heads": width // shapes[f"{first}.cross_attn.q_norm.weight"][0],
        "mlp_ratio": shapes[f"{first}.mlp.0.weight"][0] / width,
        "target_vocab_size": vocabulary,
        "min_sequence_length": cosmos.TOKENS,
    }
    return cosmos.config(shapes, layout) | {"adapter": adapter}


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.anima import Anima

    return Anima(**configuration)


def finish(model: torch.nn.Module, device: Any) -> None:
    """The adapter's rotary frequencies, which no file holds."""
    import torch

    adapter = model.llm_adapter
    with torch.device(device):
        adapter.rotary_emb = type(adapter.rotary_emb)(adapter.config.model_dim // adapter.config.num_attention_heads)


DENOISER = Part(
    name="denoiser",
    title="an Anima denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": [*cosmos.ROWS, row(ADAPTER)], "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=cosmos.PREFIXES,
    carried=cosmos.CARRIED,
    diffusers_folder="transformer",
    high_precision=cosmos.MODULATION,
    finish=finish,
)


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], Qwen3's states; "t5_ids" [M] int64; both ragged."""
    dtype = denoiser.proj_out.weight.dtype
    texts, ids = [cond["text"].to(dtype) for cond in conds], [cond["t5_ids"] for cond in conds]
    out = denoiser(cosmos.video_of(noisy).to(dtype), sigma.float(), texts, ids)
    return out.float().reshape(noisy.shape)
