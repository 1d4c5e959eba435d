"""The text of Flux: T5-XXL's last states, padded and unmasked, and CLIP-L's vector of the first 77 tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.components import clip, t5
from library.components.tokenizers import ended, padded

if TYPE_CHECKING:
    import torch

    from library.families.family import Cond, Text

CLIP_TOKENS = 77  # positions that CLIP-L has


def tokenize(tokenizers: list[Any], caption: str, *, length: int) -> tuple[list[int], str]:
    """T5's ids, at most `length`, and the end of the caption that did not fit. CLIP reads less of it in any case."""
    return ended(tokenizers[1], caption, length)


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, length: int, masked: bool
) -> Cond:
    """{"text": [T,D], "pooled": [D2]}.

    T is `length`: the padding is attended to like any token, and its states are part of the text, as the published
    models were trained. `masked` instead gives the caption's own tokens, unpadded, which is what T5 makes of them with
    a mask.
    """
    import torch

    (clip_l, t5xxl), (clip_tokenizer, tokenizer) = encoders, tokenizers
    ids, _ = tokenize(tokenizers, text.caption, length=length)
    if not masked:
        ids, _ = padded(ids, length, tokenizer.pad_token_id)
    short, _ = ended(clip_tokenizer, text.caption, CLIP_TOKENS)  # what follows its end token cannot change the vector
    states = t5.states(t5xxl, torch.tensor([ids], device=device))
    vector = clip.pooled(clip_l, torch.tensor([short], device=device), projected=False)
    return {"text": states[0], "pooled": vector[0]}
