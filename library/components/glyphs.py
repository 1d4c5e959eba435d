"""Text that is to be drawn as letters: what a caption puts in quotation marks, in the states of the glyph ByT5."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from library.components import t5

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_TOKENS = 128  # Tencent's published pipelines of HunyuanImage-2.1 and HunyuanVideo-1.5
# ASCII apostrophes do not count: "it's" and "don't" are no quotation.
QUOTED = (r'"(.*?)"', r"‘(.*?)’", r"“(.*?)”")


def prompt(caption: str) -> str:
    """ByT5's prompt; empty if nothing is quoted."""
    quoted = [text for pattern in QUOTED for text in re.findall(pattern, caption)]
    return ". ".join(f'Text "{text}"' for text in quoted) + ". " if quoted else ""


def encode(encoder: torch.nn.Module, tokenizer: Any, caption: str, device: Any) -> dict[str, Tensor]:
    """{"byt5": [T,D]} at true length, or nothing where nothing is quoted."""
    import torch

    quoted = prompt(caption)
    if not quoted:
        return {}
    ids = tokenizer(quoted, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return {"byt5": t5.states(encoder, torch.tensor([ids], device=device))[0]}
