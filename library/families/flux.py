"""FLUX.1 dev, schnell and Kontext (Black Forest Labs, 2024-2025), and what is made of them: Flex.1 and Flex.2, for one.

Facts: the model is given sigma and multiplies by 1000 itself, in its own number format, and returns noise - x0.
Latents are [B,16,h,w], 2x2 patches. Text is T5-XXL's last states without a mask and CLIP-L's pooled vector. All but
schnell also embed a guidance. Kontext sees reference pictures as more tokens, one further on the index axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import flux_blocks, ragged, tokens
from library.errors import ConfigError
from library.families.family import Cond, Part
from library.layout import Shape, block, count, identity, our_view, row, swap_halves

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMES = "time_text_embed"
COMFY = [  # Black Forest Labs' own names
    *flux_blocks.ROWS,
    row("time_in.in_layer", f"{TIMES}.timestep_embedder.linear_1"),
    row("time_in.out_layer", f"{TIMES}.timestep_embedder.linear_2"),
    row("guidance_in.in_layer", f"{TIMES}.guidance_embedder.linear_1"),
    row("guidance_in.out_layer", f"{TIMES}.guidance_embedder.linear_2"),
    row("vector_in.in_layer", f"{TIMES}.text_embedder.linear_1"),
    row("vector_in.out_layer", f"{TIMES}.text_embedder.linear_2"),
    row("final_layer.adaLN_modulation.1", "norm_out.linear", op=swap_halves),
    *block(
        "double_blocks.{i}",
        "transformer_blocks.{i}",
        row("img_mod.lin", "norm1.linear"),
        row("txt_mod.lin", "norm1_context.linear"),
    ),
    *block("single_blocks.{i}", "single_transformer_blocks.{i}", row("modulation.lin", "norm.linear")),
]
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")
FLEX2_CONTROLS = 33  # channels of Flex.2 for a masked picture, its mask and a control picture: all 0 = none of them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """HunyuanVideo has these names too, but embeds patches of a video; Chroma has no modulation in its blocks."""
    if "vector_in.in_layer.weight" in shapes and "double_blocks.0.img_mod.lin.weight" in shapes:
        return "comfy" if "img_in.weight" in shapes else None
    guided = f"{TIMES}.text_embedder.linear_1.weight" in shapes and "x_embedder.weight" in shapes
    return "diffusers" if guided and "single_transformer_blocks.0.proj_mlp.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(COMFY, shapes) if layout == "comfy" else shapes
    width, channels = ours["x_embedder.weight"]
    head, out = ours["transformer_blocks.0.attn.norm_q.weight"][0], ours["proj_out.weight"][0]
    if channels not in (out, out + 4 * FLEX2_CONTROLS):
        raise ConfigError(
            f"this Flux model takes {channels} channels of input, which are made for filling or for control pictures; "
            f"give one that takes {out} (dev, schnell, Kontext, Flex.1) or {out + 4 * FLEX2_CONTROLS} (Flex.2)"
        )
    return {
        "in_channels": channels,
        "out_channels": out,
        "num_layers": count(ours, "transformer_blocks"),
        "num_single_layers": count(ours, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": ours["context_embedder.weight"][1],
        "pooled_projection_dim": ours[f"{TIMES}.text_embedder.linear_1.weight"][1],
        "guidance_embeds": f"{TIMES}.guidance_embedder.linear_1.weight" in ours,
        "axes_dims_rope": tokens.rope_axes(head),
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Flux denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
)


def channels_of(denoiser: torch.nn.Module) -> int:
    return denoiser.config.out_channels // 4


def placing(pictures: list[Tensor], method: str) -> list[tuple[int, int, int]]:
    """(index, row, column) of the first token of each reference picture."""
    placed, height, width = [], 0, 0
    for k, picture in enumerate(pictures, 1):
        if method == "index":
            placed.append((k, 0, 0))
            continue
        rows, columns = picture.shape[-2] // 2, picture.shape[-1] // 2
        top, left = (0, width) if rows + height > columns + width else (height, 0)
        height, width = max(height, top + rows), max(width, left + columns)
        placed.append((1, top, left))
    return placed


def predict(
    denoiser: torch.nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    conds: list[Cond],
    *,
    guidance: float = 1.0,
    bypass_guidance_embedding: bool = False,
    references: str = "offset",
) -> Tensor:
    """Velocity [B,C,h,w] float32.

    Conds: "text" [T,D], "pooled" [D]; "control.0", .. [C,h,w] for Kontext; "guidance" [] where an item's differs from
    `guidance`. `references` places several references as ComfyUI's methods of these names do: "offset" side by side
    at index 1, "index" at 1, 2, .. `bypass_guidance_embedding` leaves the guidance out, as Flex.1-alpha is trained.
    """
    run = partial(_of_one_size, denoiser, guidance, bypass_guidance_embedding, references)
    return tokens.in_groups(run, noisy, sigma, conds)


def _of_one_size(
    denoiser: torch.nn.Module, guidance: float, bypass: bool, method: str, noisy: Tensor, sigma: Tensor, conds: list
) -> Tensor:
    import torch

    from library.checkpointing import exact_times

    dtype, device, (height, width) = denoiser.x_embedder.weight.dtype, noisy.device, noisy.shape[-2:]
    texts, others = [cond["text"].to(dtype) for cond in conds], tokens.references(conds)
    text = ragged.pad(texts)
    controls = noisy.new_zeros(len(noisy), denoiser.config.in_channels // 4 - noisy.shape[1], height, width)
    hidden = torch.cat([tokens.pack(torch.cat([noisy, controls], 1)), *map(tokens.pack, others)], 1).to(dtype)
    keys = tokens.key_mask(ragged.mask(texts), hidden)
    places = [tokens.grid(height // 2, width // 2, device)]
    for picture, (index, top, left) in zip(others, placing(others, method), strict=True):
        rows, columns = picture.shape[-2] // 2, picture.shape[-1] // 2
        places.append(tokens.grid(rows, columns, device, index=index, row=top, column=left))
    guided = denoiser.config.guidance_embeds
    scale = ragged.scalars(conds, "guidance", guidance, sigma) if guided else None
    times = [sigma.float() * 1000, scale * 1000] if guided else [sigma.float() * 1000]
    embed = denoiser.time_text_embed
    with exact_times(embed.time_proj, times), _silent(embed.guidance_embedder if guided and bypass else None):
        out = denoiser(
            hidden,
            text,
            torch.stack([cond["pooled"] for cond in conds]).to(dtype),
            sigma,
            torch.cat(places),
            torch.zeros(text.shape[1], 3, device=device),
            scale,
            None if keys is None else {"attention_mask": keys},
            return_dict=False,
        )[0]
    return tokens.unpack(out, height, width).float()


@contextlib.contextmanager
def _silent(module: torch.nn.Module | None) -> Iterator[None]:
    """Inside, the module gives zeros."""
    if module is None:
        yield
        return
    handle = module.register_forward_hook(lambda module, args, out: out.new_zeros(out.shape))
    try:
        yield
    finally:
        handle.remove()
