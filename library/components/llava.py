"""LLaVA-Llama-3 looking at a picture: what Tencent's HunyuanVideo I2V conditions a video with besides the caption.

The picture tower, CLIP ViT-L/14 at 336 and two Linear layers (the "projector"), makes 576 states of Llama's width,
which stand in the prompt in place of one token. ComfyUI keeps the tower in a file of its own
(`llava_llama3_vision.safetensors`), a folder `llava-llama-3-8b-v1_1-transformers` holds both halves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import decoder, vision
from library.components.sizes import finish, stated
from library.families.family import Part
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD = 64  # width of a head of CLIP ViT-L
LAYER = -2  # `vision_feature_layer` of LLaVA's configuration; its first state, of the whole picture, is not used
PROJECTOR = "multi_modal_projector"
# Where a file has CLIP's modules: ComfyUI's; a folder of transformers 4; of transformers 5, which has no `vision_model`
PREFIX = {"comfy": "vision_model.", "original": "vision_tower.vision_model.", "flat": "vision_tower."}
LAYOUTS: dict[str, list[Row]] = {
    name: [*(row(prefix + module, module) for module in vision.MODULES), row(PROJECTOR)]
    for name, prefix in PREFIX.items()
}
# Tencent's prompt (`PROMPT_TEMPLATE_ENCODE_VIDEO_I2V` of its code) around the picture and the caption.
START, END, STOP = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
BEFORE = f"<|begin_of_text|>{START}system{END}"
AFTER = f"{STOP}\n\n{START}user{END}"
ANSWER, LAST = f"{STOP}{START}assistant{END}", "\n\n"
ANSWER_TOKENS = 4  # of the answer's head in front of LAST: they are cut out of the states, LAST stays


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """CLIP and a projector; without the projector it is another model's CLIP."""
    if f"{PROJECTOR}.linear_2.weight" not in shapes:
        return None
    return next((name for name, prefix in PREFIX.items() if f"{prefix}embeddings.class_embedding" in shapes), None)


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """{"vision": CLIPVisionConfig, "inner" and "hidden_size": widths of the projector's layers}."""
    prefix = PREFIX[layout]
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    clip = vision.config(own, metadata, "flat", clip=True)
    heads = clip["hidden_size"] // math.gcd(clip["hidden_size"], HEAD)
    clip |= {"num_attention_heads": stated(metadata, "vision_num_heads", heads), "hidden_act": "quick_gelu"}
    return {
        "vision": clip,
        "inner": shapes[f"{PROJECTOR}.linear_1.weight"][0],
        "hidden_size": shapes[f"{PROJECTOR}.linear_2.weight"][0],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    clip, inner = configuration["vision"], configuration["inner"]
    model = CLIPVisionModel(CLIPVisionConfig(**clip))
    model.multi_modal_projector = torch.nn.ModuleDict(
        {
            "linear_1": torch.nn.Linear(clip["hidden_size"], inner),
            "linear_2": torch.nn.Linear(inner, configuration["hidden_size"]),
        }
    )
    return model


def tower(option: str = "image_encoder") -> Part:
    """`option` says in whose file it is: its own, or that of the text encoder."""
    return Part(
        name="llava_vision",
        title="LLaVA's picture tower (llava_llama3_vision)",
        option=option,
        layouts=LAYOUTS,
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "model."),
        carried=("language_model.", "lm_head.weight", "visual_projection.weight", ".position_ids"),
        diffusers_folder="text_encoder",
        finish=finish,
    )


def shown(model: torch.nn.Module, picture: Tensor | None) -> Tensor:
    """[N,D], what the tower makes of a picture [3,H,W] in -1..1, its middle square; None = a black one."""
    import torch

    device = next(model.parameters()).device
    if picture is None:
        picture = torch.full((3, model.config.image_size, model.config.image_size), -1.0)
    prepared = vision.prepare(model, picture[None].to(device), crop=True)
    states, projector = vision.states(model, prepared, LAYER)[0, 1:], model.multi_modal_projector
    return projector["linear_2"](torch.nn.functional.gelu(projector["linear_1"](states)))


def tokenize(tokenizer: Any, message: str, caption: str, most: int) -> tuple[list[int], list[int], slice, str]:
    """(ids before the picture, ids after it, which of these are the answer's head, what is cut off the caption).

    Of what follows `message`, `most` tokens are kept as Tencent's code cuts them, which then takes the last four for
    the answer's head.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head = len(ids_of(message + AFTER))
    ids, length = ids_of(message + AFTER + caption + ANSWER), head + most
    end = min(len(ids) - len(ids_of(LAST)), length)
    written = len(ids) - len(ids_of(ANSWER))  # where the caption ends
    return (
        ids_of(BEFORE),
        ids[:length],
        slice(end - ANSWER_TOKENS, end),
        tokenizer.decode(ids[min(end - ANSWER_TOKENS, written) : written]),
    )


def states(
    llama: torch.nn.Module, picture: Tensor, before: list[int], after: list[int], layer: int
) -> tuple[Tensor, Tensor]:
    """Llama's states after `layer` of the picture's tokens [N,D] and of the text that follows it [T,D]."""
    import torch

    embed = llama.get_input_embeddings()
    first, rest = (embed(torch.tensor(ids, device=embed.weight.device)) for ids in (before, after))
    whole = torch.cat([first, picture.to(first), rest])[None]
    out = decoder.states(llama, None, layer, inputs_embeds=whole)[0, len(before) :]
    return out[: len(picture)], out[len(picture) :]
