"""Qwen-Image and its edit models, Edit, Edit-2509 and Edit-2511 (Alibaba, 2025): a double-stream transformer.

Facts: the model is given sigma, times 1000 inside, and returns noise - x0. Latents are [B,16,h,w], 2x2 patches. Text
is Qwen2.5-VL's last states. Edit models see reference pictures as more tokens, each at a frame index of its own; 2511
takes them as clean, at time 0. Positions are those of Qwen's own code, as diffusers has them: ComfyUI's differ by one
where a side has an odd number of patches, and for text beside references that are larger than the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import ragged, tokens
from library.components.sizes import stated
from library.families.family import Cond, Part
from library.layout import Shape, count, identity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MARKER = "__index_timestep_zero__"  # an empty tensor: ComfyUI's sign that references are at time 0
BLOCKS = ("transformer_blocks",)
ADAPTED = ("transformer_blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Original and diffusers' names are the same."""
    return "comfy" if "txt_norm.weight" in shapes and "transformer_blocks.0.img_mod.1.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,  # per pixel of a 2x2 patch, unlike in_channels
        "num_layers": count(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": tokens.rope_axes(head),
        "zero_cond_t": stated(metadata, "zero_cond_t", MARKER in shapes),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.qwen_image import QwenImage

    return QwenImage(**configuration)


def markers(model: torch.nn.Module) -> dict[str, Tensor]:
    import torch

    return {MARKER: torch.empty(0)} if model.config.zero_cond_t else {}


def finish(model: torch.nn.Module, device: Any) -> None:
    """The table of rotary positions, which no file holds."""
    rope = model.pos_embed
    model.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)


DENOISER = Part(
    name="denoiser",
    title="a Qwen-Image denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
    stated=("zero_cond_t",),
    markers=markers,
    finish=finish,
)


def channels_of(denoiser: torch.nn.Module) -> int:
    return denoiser.config.in_channels // 4


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D]; "control.0", .. [C,h,w] for edit models."""
    return tokens.in_groups(partial(_of_one_size, denoiser), noisy, sigma, conds)


def _of_one_size(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    import torch

    dtype, pictures = denoiser.img_in.weight.dtype, [noisy, *tokens.references(conds)]
    texts = [cond["text"].to(dtype) for cond in conds]
    out = denoiser(
        torch.cat([tokens.pack(picture) for picture in pictures], 1).to(dtype),
        sigma.float(),
        ragged.pad(texts),
        ragged.mask(texts),
        [(1, picture.shape[-2] // 2, picture.shape[-1] // 2) for picture in pictures],
    )
    return tokens.unpack(out, *noisy.shape[-2:]).float()
