"""The text of Flux 2: three layers of Mistral Small or Qwen3 side by side, 512 tokens with their padding.

The published models were trained with the states of padding as part of the text. Mistral's padding is on the left,
where it attends to nothing, so that all of it has one state; Qwen3's is on the right and sees the caption.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.components import decoder
from library.components.tokenizers import padded, wrapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Cond, Text

TOKENS = 512
# Black Forest Labs' system message of dev (its published code, `system_messages.py`), in Mistral's chat.
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
MISTRAL = (f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST]", "[/INST]")
QWEN3 = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
MISTRAL_LAYERS, QWEN3_LAYERS = (10, 20, 30), (9, 18, 27)  # of Black Forest Labs' code
MISTRAL_PAD = 11  # <pad> in Mistral's vocabulary, if the tokenizer does not say


def tokenize_mistral(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """Ids of the chat, at most 512, and the end of the caption that did not fit."""
    return wrapped(tokenizers[0], caption.replace("[IMG]", ""), TOKENS, MISTRAL)


def tokenize_qwen3(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    return wrapped(tokenizers[0], caption, TOKENS, QWEN3)


def _joined(encoder: torch.nn.Module, ids: list[int], mask: list[int], layers: tuple[int, ...], device: Any) -> Tensor:
    import torch

    given = (torch.tensor([values], device=device) for values in (ids, mask))
    states = decoder.states(encoder, next(given), layers, next(given))[0]  # [N,T,D]
    return states.transpose(0, 1).flatten(1)


def encode_mistral(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [T,3D], "fill": [3D]}: the chat's own states, and that of each padding token before them."""
    ids, _ = tokenize_mistral(tokenizers, text.caption)
    pad = tokenizers[0].pad_token_id
    ids, mask = padded(ids, len(ids) + 1, MISTRAL_PAD if pad is None else pad, left=True)
    states = _joined(encoders[0], ids, mask, MISTRAL_LAYERS, device)
    return {"text": states[1:], "fill": states[0]}


def encode_qwen3(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [512,3D]}, the states of padding included."""
    ids, _ = tokenize_qwen3(tokenizers, text.caption)
    ids, mask = padded(ids, TOKENS, tokenizers[0].pad_token_id)
    return {"text": _joined(encoders[0], ids, mask, QWEN3_LAYERS, device)}


def filled(cond: Cond) -> Tensor:
    """The text [512,3D] as the denoiser takes it; without "fill" as it is."""
    import torch

    text = cond["text"]
    missing = TOKENS - len(text)
    if "fill" not in cond or missing <= 0:
        return text
    return torch.cat([cond["fill"].expand(missing, -1), text])
