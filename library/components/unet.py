"""The UNet of Stable Diffusion 1, 2 and XL: original (LDM) names, sizes from the file.

LDM numbers its blocks through: input_blocks.0 is the first convolution, then every resnet (`.0`, its attention `.1`)
and every downsampling takes a number; output_blocks likewise. diffusers counts levels and, in each, layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from library.families.family import Part
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What no shape shows, and with which metadata a file of another size says its own. The numbers are Stability's
# configurations': 32 groups in every norm, heads 64 wide where the projections are linear (SD 2, SDXL), else 8 heads
# (SD 1), sizes and crop embedded in 256 numbers each.
GROUPS, HEAD_WIDTH, HEADS, SIZE_WIDTH = 32, 64, 8, 256
GROUPS_KEY, HEAD_KEY, SIZE_KEY = "norm_num_groups", "num_head_channels", "addition_time_embed_dim"

# Checkpointed one by one: residual blocks, and the transformer blocks inside of the attentions.
BLOCKS = tuple(
    f"{level}.{rest}"
    for level in ("down_blocks.*", "mid_block", "up_blocks.*")
    for rest in ("resnets", "attentions.*.transformer_blocks")
)

FIXED = [
    row("time_embed.0", "time_embedding.linear_1"),
    row("time_embed.2", "time_embedding.linear_2"),
    row("label_emb.0.0", "add_embedding.linear_1"),
    row("label_emb.0.2", "add_embedding.linear_2"),
    row("input_blocks.0.0", "conv_in"),
    row("out.0", "conv_norm_out"),
    row("out.2", "conv_out"),
    row("middle_block.1", "mid_block.attentions.0"),
]
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _resnet(theirs: str, ours: str) -> list[Row]:
    return [row(f"{theirs}.{a}", f"{ours}.{b}") for a, b in RESNET.items()]


def _table(levels: int, layers: int, attended: frozenset[int]) -> list[Row]:
    """The rows for a UNet of that many levels and layers; `attended` are its up blocks with attention."""
    rows = [
        *FIXED,
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
    ]
    for level in range(levels):
        first, ours = 1 + level * (layers + 1), f"down_blocks.{level}"
        for j in range(layers):
            rows += _resnet(f"input_blocks.{first + j}.0", f"{ours}.resnets.{j}")
            rows.append(row(f"input_blocks.{first + j}.1", f"{ours}.attentions.{j}"))
        rows.append(row(f"input_blocks.{first + layers}.0.op", f"{ours}.downsamplers.0.conv"))
    for level in range(levels):
        first, ours = level * (layers + 1), f"up_blocks.{level}"
        for j in range(layers + 1):
            rows += _resnet(f"output_blocks.{first + j}.0", f"{ours}.resnets.{j}")
            rows.append(row(f"output_blocks.{first + j}.1", f"{ours}.attentions.{j}"))
        place = 2 if level in attended else 1  # behind the attention, where there is one
        upsampler = row(f"output_blocks.{first + layers}.{place}.conv", f"{ours}.upsamplers.0.conv")
        rows.append(upsampler)
        if level not in attended:  # LDM calls this module .1 too
            rows.remove(row(f"output_blocks.{first + layers}.1", f"{ours}.attentions.{layers}"))
    return rows


def ldm_rows(ours: Mapping[str, Shape]) -> list[Row]:
    """The table for a model with these (diffusers) names."""
    levels, layers = _count(ours, "down_blocks.{}.resnets.0.conv1"), _count(ours, "down_blocks.0.resnets.{}.conv1")
    return _table(levels, layers, _attended(ours, "up_blocks.{}.attentions.0.proj_in", levels))


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    n = 0
    while f"{pattern.format(n)}.weight" in shapes:
        n += 1
    return n


def _attended(shapes: Mapping[str, Shape], pattern: str, levels: int, stride: int = 1) -> frozenset[int]:
    return frozenset(i for i in range(levels) if f"{pattern.format(i * stride)}.weight" in shapes)


def ours_of(shapes: Mapping[str, Shape], layout: str) -> dict[str, Shape]:
    """Shapes under our names, from a file of either layout."""
    if layout != "ldm":
        return dict(shapes)
    downsamplers = sorted(int(key.split(".")[1]) for key in shapes if key.endswith(".0.op.weight"))
    levels, layers = len(downsamplers) + 1, downsamplers[0] - 1
    rows = _table(levels, layers, _attended(shapes, "output_blocks.{}.1.proj_in", levels, layers + 1))
    out = {}
    for r in rows:
        out |= {r.ours[0] + key[len(r.theirs) :]: s for key, s in shapes.items() if key.startswith(r.theirs + ".")}
    return out


def names_of(shapes: Mapping[str, Shape]) -> str | None:
    """Which names a UNet's shapes have: "ldm" or "diffusers"; None: it is no UNet of this kind."""
    if "input_blocks.0.0.weight" in shapes and "middle_block.1.proj_in.weight" in shapes:
        return "ldm" if any(key.endswith(".0.op.weight") for key in shapes) else None
    found = "conv_in.weight" in shapes and "mid_block.attentions.0.proj_in.weight" in shapes
    return "diffusers" if found and "down_blocks.0.downsamplers.0.conv.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' UNet2DConditionModel configuration."""
    s = ours_of(shapes, layout)
    levels, layers = _count(s, "down_blocks.{}.resnets.0.conv1"), _count(s, "down_blocks.0.resnets.{}.conv1")
    widths = [s[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    down = [_depth(s, f"down_blocks.{i}.attentions", layers) for i in range(levels)]
    up = [_depth(s, f"up_blocks.{i}.attentions", layers + 1) for i in range(levels)]
    mid = _depth(s, "mid_block.attentions", 1)
    linear = len(s["mid_block.attentions.0.proj_in.weight"]) == 2
    head = int(metadata.get(HEAD_KEY) or 0) or (HEAD_WIDTH if linear else None)
    cross = s["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
    out = {
        "in_channels": s["conv_in.weight"][1],
        "out_channels": s["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in down],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in up],
        # diffusers gives the middle block as many as the last level
        "transformer_layers_per_block": [d or 1 for d in down[:-1]] + [down[-1] or mid],
        "reverse_transformer_layers_per_block": [d or 1 for d in up] if up != down[::-1] else None,
        "cross_attention_dim": cross,
        "use_linear_projection": linear,
        # diffusers means the number of heads by this name
        "attention_head_dim": [max(1, width // head) for width in widths] if head else HEADS,
        "norm_num_groups": int(metadata.get(GROUPS_KEY) or math.gcd(GROUPS, *widths)),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if "add_embedding.linear_1.weight" in s:
        out |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": int(metadata.get(SIZE_KEY) or SIZE_WIDTH),
            "projection_class_embeddings_input_dim": s["add_embedding.linear_1.weight"][1],
        }
    return out


def _depth(shapes: Mapping[str, Shape], attentions: str, layers: int) -> int | list[int]:
    """Transformer blocks of the attentions of one level, one number if they all have as many; 0 = no attention."""
    block = "{}.{}.transformer_blocks.{{}}.attn1.to_q"
    depths = [_count(shapes, block.format(attentions, j)) for j in range(layers)]
    return depths[0] if len(set(depths)) == 1 else depths


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**configuration)


def recognise(shapes: Mapping[str, Shape], kinds: tuple[str, ...]) -> str | None:
    """The layout, if the file is a text-to-image UNet of one of these kinds ("sd1", "sd2", "sdxl")."""
    layout = names_of(shapes)
    return layout if layout and kind_of(shapes, layout) in kinds else None


def kind_of(shapes: Mapping[str, Shape], layout: str) -> str:
    """ "sd1" (projections are convolutions), "sd2", "sdxl", or "other": in- and outpainting, unCLIP, the refiner."""
    s = ours_of(shapes, layout)
    label, levels = "add_embedding.linear_1.weight" in s, _count(s, "down_blocks.{}.resnets.0.conv1")
    if s["conv_in.weight"][1] != s["conv_out.weight"][0] or "class_embedding.linear_1.weight" in s:
        return "other"
    if label:  # SDXL has three levels and no attention in the first; its refiner and SD 2 unCLIP have four
        return "sdxl" if levels == 3 and "down_blocks.0.attentions.0.norm.weight" not in s else "other"
    return "sd2" if len(s["mid_block.attentions.0.proj_in.weight"]) == 2 else "sd1"


def call(denoiser: torch.nn.Module, noisy: Tensor, t: Tensor, conds: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The prediction [B,C,h,w] float32 at timesteps t [B]; texts of several lengths are padded and masked.

    Each of conds has "text" [T,D] and, for SDXL, "pooled" [P] and "size" [6]: original, crop and trained size.
    """
    import torch

    dtype = denoiser.conv_in.weight.dtype
    texts = [cond["text"].to(dtype) for cond in conds]
    lengths = [len(text) for text in texts]
    mask = None
    if len(set(lengths)) > 1:
        mask = torch.arange(max(lengths), device=noisy.device) < torch.tensor(lengths, device=noisy.device)[:, None]
    added = None
    if "pooled" in conds[0]:  # sizes stay float32 until they are embedded
        added = {
            "text_embeds": torch.stack([cond["pooled"].to(dtype) for cond in conds]),
            "time_ids": torch.stack([cond["size"].float() for cond in conds]),
        }
    states = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    out = denoiser(noisy.to(dtype), t.float(), states, encoder_attention_mask=mask, added_cond_kwargs=added)
    return out.sample.float()


def part(title: str, kinds: tuple[str, ...], kohya: str = "") -> Part:
    """The UNet part of a family; `kohya` is the layout of the names in sd-scripts' LoRA files, if it is not LDM's."""
    return Part(
        name="denoiser",
        title=title,
        option="pretrained_model_name_or_path",
        layouts={"ldm": ldm_rows, "diffusers": identity},
        recognise=partial(recognise, kinds=kinds),
        config=config,
        build=build,
        view=ours_of,
        prefixes=("model.diffusion_model.", "", "diffusion_model."),
        diffusers_folder="unet",
        kohya=kohya,
    )


def identity(ours: Mapping[str, Shape]) -> list[Row]:
    return [row(key) for key in ours]
