"""Chroma (lodestones, 2025): Flux schnell without CLIP and guidance, its modulation made by one small network.

Facts: as Flux: the model is given sigma and multiplies by 1000 itself, in its own number format, and returns
noise - x0; latents are [B,16,h,w], 2x2 patches. Text is T5-XXL's last states, of which padding does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import flux_blocks, ragged, tokens
from library.families.family import Cond, Part
from library.layout import Shape, block, count, identity, our_view, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODULATION = "distilled_guidance_layer"
COMFY = [
    *flux_blocks.ROWS,
    row(f"{MODULATION}.in_proj"),
    row(f"{MODULATION}.out_proj"),
    *block(
        MODULATION,
        MODULATION,
        row("layers.{i}.in_layer", "layers.{i}.linear_1"),
        row("layers.{i}.out_layer", "layers.{i}.linear_2"),
        row("norms.{i}.scale", "norms.{i}.weight"),
    ),
]
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if f"{MODULATION}.in_proj.weight" not in shapes:
        return None
    if "img_in.weight" in shapes:
        return "comfy"
    return "diffusers" if "x_embedder.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(COMFY, shapes) if layout == "comfy" else shapes
    width, channels = ours["x_embedder.weight"]
    head = ours["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "num_layers": count(ours, "transformer_blocks"),
        "num_single_layers": count(ours, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": ours["context_embedder.weight"][1],
        "axes_dims_rope": tokens.rope_axes(head),
        "approximator_num_channels": ours[f"{MODULATION}.in_proj.weight"][1],
        "approximator_hidden_dim": ours[f"{MODULATION}.in_proj.weight"][0],
        "approximator_layers": count(ours, f"{MODULATION}.layers"),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models import chroma

    return chroma.build(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Chroma denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
)


def channels_of(denoiser: torch.nn.Module) -> int:
    return denoiser.config.in_channels // 4


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], without padding."""
    import torch

    from library.checkpointing import exact_times

    dtype, device, (height, width) = denoiser.x_embedder.weight.dtype, noisy.device, noisy.shape[-2:]
    texts = [cond["text"].to(dtype) for cond in conds]
    text, hidden = ragged.pad(texts), tokens.pack(noisy).to(dtype)
    keys = tokens.key_mask(ragged.mask(texts), hidden)
    with exact_times(denoiser.time_text_embed.time_proj, [sigma.float() * 1000]):
        out = denoiser(
            hidden,
            text,
            sigma,
            tokens.grid(height // 2, width // 2, device),
            torch.zeros(text.shape[1], 3, device=device),
            joint_attention_kwargs=None if keys is None else {"keys": keys},
            return_dict=False,
        )[0]
    return tokens.unpack(out, height, width).float()
