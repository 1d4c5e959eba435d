"""HunyuanVideo's text: Llama's states of a caption in Tencent's prompt, CLIP-L's vector, for I2V a picture besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.components import clip, decoder, llava
from library.components.tokenizers import ended
from library.families.family import Cond, Text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Tencent's prompts for LLaVA, of clips and of pictures (`PROMPT_TEMPLATE` of its code). What stands before the caption,
# 95 and 36 tokens of Llama's, is cut off the states.
TAIL = llava.STOP
HEAD = f"{llava.BEFORE}{{}}{TAIL}{llava.START}user{llava.END}"
ASPECTS = (
    "1. The main content and theme of the video.2. The color, "
    "shape, size, texture, quantity, text, and spatial relationships of the objects.3. Actions, events, behaviors "
    "temporal relationships, physical movement changes of the objects.4. background environment, light, style and "
    "atmosphere.5. camera angles, movements, and transitions used in the video:"
)
VIDEO = HEAD.format(f"Describe the video by detailing the following aspects: {ASPECTS}")
PICTURE = HEAD.format(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
# What follows the picture in the prompt of image-to-video.
CONTINUE = f"\nDescribe the video by detailing the following aspects according to the reference image: {ASPECTS}"
LAYER, MAX_TOKENS, CLIP_TOKENS = -3, 256, 77  # of the hidden states; of LLaVA's states that are kept; of CLIP-L


def tokenize(tokenizers: list[Any], caption: str, *, head: str = VIDEO) -> tuple[list[int], str]:
    """Llama's ids of the prompt, cut where Tencent's code cuts it, and the end of the caption that did not fit."""
    llama = tokenizers[0]
    ids = llama(head + caption + TAIL, add_special_tokens=False)["input_ids"]
    length = _length(llama, head) + MAX_TOKENS
    return ids[:length], llama.decode(ids[length:-1])


def _length(tokenizer: Any, head: str) -> int:
    return len(tokenizer(head, add_special_tokens=False)["input_ids"])


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, head: str = VIDEO
) -> Cond:
    """{"text": [T,D] without the template's head, "pooled": [D2] of CLIP-L, not projected}."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption, head=head)
    states = decoder.states(encoders[0], torch.tensor([ids], device=device), LAYER)
    return {"text": states[0, _length(tokenizers[0], head) :], "pooled": pooled(encoders, tokenizers, text, device)}


def pooled(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Tensor:
    import torch

    short, _ = ended(tokenizers[1], text.caption, CLIP_TOKENS)  # what follows its end token cannot change the vector
    return clip.pooled(encoders[1], torch.tensor([short], device=device), projected=False)[0]


def tokenize_seen(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """Llama's ids of what follows the picture in the prompt, and the end of the caption that did not fit."""
    _, ids, _, cut = llava.tokenize(tokenizers[0], CONTINUE, caption, MAX_TOKENS)
    return ids, cut


def encode_seen(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, every: int) -> Cond:
    """{"text": [N/every+T,D], "pooled": [D2]}: every so many of the picture's states, then the caption's.

    Without a picture, as of a negative prompt, a black one is shown, as in Tencent's code.
    """
    import torch

    before, after, answer, _ = llava.tokenize(tokenizers[0], CONTINUE, text.caption, MAX_TOKENS)
    picture = llava.shown(encoders[2], text.pictures[0] if text.pictures else None)
    seen, states = llava.states(encoders[0], picture, before, after, LAYER)
    head = _length(tokenizers[0], CONTINUE + llava.AFTER)
    kept = torch.cat([seen[::every], states[head : answer.start], states[answer.stop :]])
    return {"text": kept, "pooled": pooled(encoders, tokenizers, text, device)}
