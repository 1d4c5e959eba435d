"""The text of Stable Diffusion 3: both CLIPs' states side by side, then T5's; both CLIPs' vectors. None has a mask."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from library.components import clip, t5
from library.components import clip_prompts as prompts
from library.components.tokenizers import ended, padded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Cond, Text

ROWS = prompts.CHUNK + 2  # of both CLIPs
TOKENS = 256  # of T5 (diffusers' StableDiffusion3Pipeline and sd-scripts)


def tokenize(tokenizers: list[Any], caption: str, *, length: int = TOKENS) -> tuple[list[int], str]:
    """T5's ids, at most `length`, and the end of the caption that did not fit; CLIP's where there is no T5."""
    if len(tokenizers) == 1:
        return prompts.tokenize(tokenizers, caption)
    return ended(tokenizers[1], caption, length)


def encode(
    encoders: list[torch.nn.Module],
    tokenizers: list[Any],
    text: Text,
    device: Any,
    *,
    width: int,
    length: int = TOKENS,
    clip_masked: bool = False,
    t5_masked: bool = False,
) -> Cond:
    """{"text": [ROWS + length, width], "pooled": [D1 + D2]}.

    Each is filled up with padding, whose states count like any, as the models were trained; `.._masked` puts zeros
    there. Without T5 its rows are zeros. CLIP-L's vector is not projected: Stability's code and ComfyUI do without, and
    diffusers projects it by the unit matrix.
    """
    import torch

    from library.components.ragged import pad

    (first, second, *third), (tokenizer, *others) = encoders, tokenizers
    tokens = prompts.tokens_of(tokenizer, text.caption)
    large, pooled = clip.hidden_and_pooled(first, prompts.rows_for(tokens, tokenizer, device), projected=False)
    big, pooled_big = clip.hidden_and_pooled(second, prompts.rows_for(tokens, tokenizer, device, pad=0))
    both = torch.cat([large, big], dim=-1)[0]
    if clip_masked:
        both = pad([both[: len(tokens.ids) + 2]], ROWS)[0]
    both = torch.nn.functional.pad(both, (0, width - both.shape[-1]))
    if third:
        states = t5_states(third[0], others[0], text.caption, device, length, t5_masked)
    else:
        states = both.new_zeros(length, width)
    return {"text": torch.cat([both, states]), "pooled": torch.cat([pooled[0], pooled_big[0]])}


def t5_states(
    encoder: torch.nn.Module, tokenizer: Any, caption: str, device: Any, length: int, is_masked: bool
) -> Tensor:
    """[length, D]"""
    import torch

    from library.components.ragged import pad

    ids, _ = ended(tokenizer, caption, length)
    if not is_masked:
        ids, _ = padded(ids, length, tokenizer.pad_token_id)
    return pad([t5.states(encoder, torch.tensor([ids], device=device))[0]], length)[0]


def vary(cond: Cond, latents: Tensor, choice: float, options: Any, *, large: int) -> Cond:
    """Zeros for what an encoder gives, each by its own rate; CLIP-L's states and vector are `large` wide."""
    import torch

    rates = (options.clip_l_dropout_rate, options.clip_g_dropout_rate, options.t5_dropout_rate)
    if not any(rates):
        return cond
    drawn = random.Random(repr(choice))
    off_large, off_big, off_t5 = (drawn.random() < rate for rate in rates)
    text, pooled = cond["text"], cond["pooled"]

    def part(value: Tensor, is_off: bool) -> Tensor:
        return torch.zeros_like(value) if is_off else value

    both = torch.cat([part(text[:ROWS, :large], off_large), part(text[:ROWS, large:], off_big)], -1)
    vector = torch.cat([part(pooled[:large], off_large), part(pooled[large:], off_big)])
    return cond | {"text": torch.cat([both, part(text[ROWS:], off_t5)]), "pooled": vector}
