"""The text of HiDream: Llama 3.1's states after every layer, T5's, and the vectors of CLIP-L and CLIP-G; 128 tokens.

The padding is masked inside of the encoders, and its states are part of the text. Llama's are 34 MB a caption in bf16,
so they are made in the step; a cache holds the caption's token ids in their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.components import clip, decoder, t5
from library.components.tokenizers import ended, padded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Cond, Text

TOKENS = 128  # HiDream's published inference code, for all four


def tokenize(tokenizers: list[Any], caption: str, *, length: int = TOKENS) -> tuple[list[int], str]:
    """Llama's ids, which carry most of the meaning, at most `length`, and the end of the caption that did not fit."""
    return ended(tokenizers[3], caption, length)


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, length: int = TOKENS
) -> Cond:
    """{"text" [128,D], "pooled" [D2], "llama" [layers,length,D3]}."""
    cond = encode_cached(encoders, tokenizers, text, device, length=length)
    return complete(encoders[3:], cond)


def encode_cached(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, length: int = TOKENS
) -> Cond:
    """As `encode`, but "llama_ids" and "llama_mask" [length] for Llama's states."""
    import torch

    clip_l, clip_g, t5xxl = encoders[:3]
    vectors = [_vector(*pair, text, device) for pair in zip((clip_l, clip_g), tokenizers[:2], strict=True)]
    ids, _ = ended(tokenizers[2], text.caption, TOKENS)
    ids, mask = (_row(values, device) for values in padded(ids, TOKENS, tokenizers[2].pad_token_id))
    states = t5.states(t5xxl, ids, mask)[0]
    ids, _ = tokenize(tokenizers, text.caption, length=length)
    # Llama has no padding token; HiDream's code takes the one that ends a text.
    llama = [torch.tensor(values, device=device) for values in padded(ids, length, tokenizers[3].eos_token_id)]
    return {"text": states, "pooled": torch.cat(vectors), "llama_ids": llama[0], "llama_mask": llama[1]}


def complete(encoders: list[torch.nn.Module], cond: Cond) -> Cond:
    """`encode_cached`'s with the states of Llama, the one encoder given: after every layer, the embeddings not."""
    rest = dict(cond)
    ids, mask = rest.pop("llama_ids")[None], rest.pop("llama_mask")[None]
    layers = range(1, encoders[0].config.num_hidden_layers + 1)
    return rest | {"llama": decoder.states(encoders[0], ids, layers, mask)[0]}


def _vector(encoder: torch.nn.Module, tokenizer: Any, text: Text, device: Any) -> Tensor:
    """[D]. HiDream's own CLIP files have 248 positions, the usual ones 77."""
    ids, _ = ended(tokenizer, text.caption, min(TOKENS, encoder.config.max_position_embeddings))
    return clip.pooled(encoder, _row(ids, device))[0]


def _row(values: list[int], device: Any) -> Tensor:
    import torch

    return torch.tensor([values], device=device)
