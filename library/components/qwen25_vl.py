"""Qwen2.5-VL (7B, 3B) as a text encoder that may also look at pictures, in the names of its release and ComfyUI's file.

The picture tower is built if the file holds it; without it text is encoded just the same. A picture takes as many
`<|image_pad|>` tokens in the prompt as `picture_tokens` says, one for every 28 x 28 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from library.components import decoder
from library.components.sizes import count, finish, stated
from library.errors import ConfigError
from library.families.family import Part, Tokenizer
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The published configuration of Qwen2.5-VL 3B and 7B: what no shape shows.
ROPE_THETA, NORM_EPS, MAX_POSITIONS = 1_000_000.0, 1e-6, 128_000
ROPE_PARTS = (2, 3, 3)  # a head's rotary pairs for time, row, column: 16, 24, 24 of 64
TOWER_HEAD, MERGE, WINDOW = 80, 2, 112  # width of a head, patches to a token's side, pixels of an attention window
WHOLE_PICTURE = 8  # every eighth block of the tower attends beyond its window
IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = 151655, 151656, 151652, 151653
# CLIP's means and deviations of red, green and blue, from the published preprocessor configuration.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 16384  # of one picture, from the same file

TOWER = "visual.blocks.0.attn.qkv.weight"
RELEASE = [
    *(row(f"model.{name}", f"language_model.{name}") for name in ("embed_tokens", "layers", "norm")),
    row("visual"),
]
RENAMED = [row("language_model"), row("visual")]  # transformers' names since 4.52, below `model.`
BARE = [row(name, f"language_model.{name}") for name in ("embed_tokens", "layers", "norm")]
LAYOUTS: dict[str, Sequence[Row]] = {"original": RELEASE, "renamed": RENAMED, "flat": BARE}


def _text(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The text half's keys without `language_model.`."""
    return {key.removeprefix("language_model."): shape for key, shape in shapes.items()}


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Qwen2.5 has biases in q, k and v and no q_norm."""
    text = _text(shapes)
    layout = decoder.spelling(text)
    first = decoder.first_layer(text, layout) if layout else {}
    if "self_attn.q_proj.bias" not in first or "self_attn.q_norm.weight" in first:
        return None
    return "renamed" if "language_model.embed_tokens.weight" in shapes else layout


def recognise_seeing(shapes: Mapping[str, Shape]) -> str | None:
    """One that holds its picture tower."""
    return recognise(shapes) if TOWER in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """{"text_config", "vision_config", token ids}; `vision_config` is None for a file without the picture tower."""
    text = decoder.sizes(_text(shapes), metadata, "flat" if layout == "renamed" else layout, theta=ROPE_THETA)
    pairs = text.pop("head_dim") // 2
    rest = [part * pairs // sum(ROPE_PARTS) for part in ROPE_PARTS[1:]]
    text["rope_parameters"]["mrope_section"] = [pairs - sum(rest), *rest]
    text |= {"rms_norm_eps": NORM_EPS, "max_position_embeddings": MAX_POSITIONS}
    return {
        "text_config": text,
        "vision_config": _tower(shapes, metadata) if TOWER in shapes else None,
        "image_token_id": stated(metadata, "image_token_id", min(IMAGE_PAD, text["vocab_size"] - 1)),
        "video_token_id": stated(metadata, "video_token_id", VIDEO_PAD),
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def _tower(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> dict[str, Any]:
    width, channels, frames, patch, _ = shapes["visual.patch_embed.proj.weight"]
    depth = count(shapes, "visual.blocks.")
    whole = [n for n in range(depth) if (n + 1) % WHOLE_PICTURE == 0]
    return {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": shapes["visual.blocks.0.mlp.gate_proj.weight"][0],
        "num_heads": stated(metadata, "vision_num_heads", width // math.gcd(width, TOWER_HEAD)),
        "in_channels": channels,
        "patch_size": patch,
        "temporal_patch_size": frames,
        "spatial_merge_size": MERGE,
        "window_size": stated(metadata, "window_size", WINDOW),
        "fullatt_block_indexes": stated(metadata, "fullatt_block_indexes", whole),
        "out_hidden_size": shapes["visual.merger.mlp.2.weight"][0],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    tower = configuration["vision_config"]
    model = Qwen2_5_VLModel(Qwen2_5_VLConfig(**(configuration | {"vision_config": tower or {"depth": 0}})))
    if not tower:
        model.visual = None
    return model


def part(
    title: str = "a Qwen2.5-VL text encoder", hub: str = "Qwen/Qwen2.5-VL-7B-Instruct", option: str = "text_encoder"
) -> Part:
    """Qwen-Image, HunyuanImage 2.1, HunyuanVideo 1.5 (7B); OmniGen2 (3B)."""
    return Part(
        name="text_encoder",
        title=title,
        option=option,
        layouts=LAYOUTS,
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "model.", *decoder.inside("qwen25_7b", "qwen25_3b")),
        carried=decoder.CARRIED,
        diffusers_folder="text_encoder",
        finish=finish,
        tokenizer=Tokenizer("tokenizer", hub),
        precision_options="vl",
        high_precision=("visual.",),  # a tenth of the weights, and every control picture goes through them
    )


def seeing(title: str = "a Qwen2.5-VL text encoder with its picture tower (visual.*)") -> Part:
    """Of the edit models of Qwen-Image."""
    return replace(part(title), recognise=recognise_seeing)


def states(
    model: torch.nn.Module,
    ids: Tensor,
    layers: int | Sequence[int] = -1,
    mask: Tensor | None = None,
    pictures: Sequence[Tensor] = (),
) -> Tensor:
    """States of token ids [B,T] as decoder.states gives them.

    `pictures` [3,H,W] in -1..1, sides multiples of 28 (see `fit`), stand for the runs of `<|image_pad|>` in `ids` in
    their order. Raises ConfigError if the file has no picture tower.
    """
    if not pictures:
        return decoder.states(model, ids, layers, mask)
    if model.visual is None:
        raise ConfigError(
            f"{model.binding.source} holds no picture tower (visual.*), which prompts with pictures need; "
            "take a file that holds it"
        )
    import torch

    cut = [patches(picture) for picture in pictures]
    device = ids.device
    return decoder.states(
        model,
        ids,
        layers,
        mask,
        pixel_values=torch.cat([values for values, _ in cut]).to(device),
        image_grid_thw=torch.tensor([grid for _, grid in cut], device=device),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),  # gives pictures their rows and columns
    )


def fit(height: int, width: int, smallest: int = MIN_PIXELS, largest: int = MAX_PIXELS) -> tuple[int, int]:
    """The sides at which the published preprocessor shows a picture: multiples of 28, the area within the limits."""
    step = 14 * MERGE
    rows, columns = round(height / step) * step, round(width / step) * step
    if rows * columns > largest:
        scale = math.sqrt(height * width / largest)
        return tuple(max(step, math.floor(side / scale / step) * step) for side in (height, width))
    if rows * columns < smallest:
        scale = math.sqrt(smallest / (height * width))
        return tuple(math.ceil(side * scale / step) * step for side in (height, width))
    return rows, columns


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [3,H,W] in -1..1 at `size`, bicubic and rounded to 256 steps as the published preprocessor does it."""
    import torch.nn.functional as F

    if tuple(picture.shape[-2:]) != tuple(size):
        picture = F.interpolate(picture[None].float(), size=size, mode="bicubic", antialias=True)[0]
        picture = ((picture.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return picture


def patches(picture: Tensor, patch: int = 14, frames: int = 2) -> tuple[Tensor, tuple[int, int, int]]:
    """(values [N, 3 * frames * patch²], grid (1, rows, columns)) of a picture [3,H,W] in -1..1.

    Patches that become one token follow each other. Raises ValueError if a side is no multiple of 28.
    """
    import torch

    channels, height, width = picture.shape
    if height % (patch * MERGE) or width % (patch * MERGE):
        raise ValueError(f"a picture of {width}x{height} is not made of tokens of {patch * MERGE} pixels")
    mean, std = (torch.tensor(v, device=picture.device)[:, None, None] for v in (MEAN, STD))
    values = ((picture.float() + 1) / 2 - mean) / std
    rows, columns = height // patch, width // patch
    values = values.reshape(channels, rows // MERGE, MERGE, patch, columns // MERGE, MERGE, patch)
    values = values.permute(1, 4, 2, 5, 0, 3, 6)  # token row, token column, row and column in it, then the patch itself
    values = values[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, frames, -1, -1)  # a still picture: equal frames
    return values.reshape(rows * columns, -1), (1, rows, columns)


def picture_tokens(picture: Tensor) -> int:
    """How many `<|image_pad|>` stand for a picture [3,H,W] whose sides are multiples of 28."""
    return picture.shape[-2] * picture.shape[-1] // (14 * MERGE) ** 2
