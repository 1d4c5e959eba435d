"""Text that is to be drawn as letters: what a caption puts in quotation marks, in the states of the glyph ByT5."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.components import t5

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Quotation:
    """How a model finds what is to be drawn. ASCII apostrophes never count: "it's" and "don't" are no quotation."""

    patterns: tuple[str, ...]  # each in the order of the caption, one after the other
    tokens: int  # of ByT5 that are kept
    is_once: bool  # a text that is quoted twice is drawn once

    def prompt(self, caption: str) -> str:
        """ByT5's prompt; empty if nothing is quoted."""
        quoted = ["".join(match) for pattern in self.patterns for match in re.findall(pattern, caption)]
        quoted = list(dict.fromkeys(quoted)) if self.is_once else quoted
        return ". ".join(f'Text "{text}"' for text in quoted) + ". " if quoted else ""


# Tencent's published pipelines of HunyuanImage-2.1 and of HunyuanVideo-1.5.
IMAGE = Quotation((r'"(.*?)"', r"‘(.*?)’", r"“(.*?)”"), 128, False)
VIDEO = Quotation((r'"(.*?)"|“(.*?)”',), 256, True)


def encode(
    encoder: torch.nn.Module, tokenizer: Any, caption: str, device: Any, quotation: Quotation = IMAGE
) -> dict[str, Tensor]:
    """{"byt5": [T,D]} at true length, or nothing where nothing is quoted."""
    import torch

    quoted = quotation.prompt(caption)
    if not quoted:
        return {}
    ids = tokenizer(quoted, truncation=True, max_length=quotation.tokens)["input_ids"]
    return {"byt5": t5.states(encoder, torch.tensor([ids], device=device))[0]}
