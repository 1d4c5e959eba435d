"""Prompts for CLIP encoders as Stable Diffusion reads them: chunks of 75 tokens, weights of words.

A prompt longer than 75 tokens is cut into chunks, each encoded by itself with its own start and end token, and their
states stand one after the other: 77 of them a chunk, as ComfyUI and A1111 sample. (sd-scripts keeps the inner 75 of
each and the first and last state of all, and always fills up to --max_token_length.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

CHUNK = 75  # CLIP has 77 positions, two of which are start and end
UP, DOWN = 1.1, 1 / 1.1  # what one pair of round or square brackets multiplies by
PIECES = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|:")


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """A1111's syntax as (text, weight): `(a)` 1.1, `[a]` 1 / 1.1, `(a:1.3)`; `\\(` is a bracket itself.

    Brackets that never close count to the end of the prompt; a closing one without an opening one is text.
    """
    parts: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        for part in parts[opened[kind].pop() :]:
            part[1] *= factor

    for piece in PIECES.findall(prompt):
        if piece in opened:
            opened[piece].append(len(parts))
        elif piece.startswith(":") and piece.endswith(")") and opened["("]:
            close("(", float(piece[1:-1]))
        elif piece == ")" and opened["("]:
            close("(", UP)
        elif piece == "]" and opened["["]:
            close("[", DOWN)
        else:
            parts.append([piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0])
    for kind, factor in (("(", UP), ("[", DOWN)):
        while opened[kind]:
            close(kind, factor)
    joined: list[list[Any]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1][0] += text
        else:
            joined.append([text, weight])
    return [(text, weight) for text, weight in joined]


@dataclass(frozen=True)
class Tokens:
    """A caption's tokens, without start, end and padding, at most as many as are read."""

    ids: list[int]
    weights: list[float]  # one a token
    cut: str  # the end of the caption that is not read

    def rows(self, bos: int, eos: int, pad: int) -> list[list[int]]:
        """Chunks of 77 ids, at least one."""
        found = [self.ids[i : i + CHUNK] for i in range(0, max(len(self.ids), 1), CHUNK)]
        return [[bos, *chunk, eos, *[pad] * (CHUNK - len(chunk))] for chunk in found]

    def factors(self) -> list[list[float]]:
        """The weight of every position of `rows`: 1 for start, end and padding."""
        found = [self.weights[i : i + CHUNK] for i in range(0, max(len(self.weights), 1), CHUNK)]
        return [[1.0, *chunk, *[1.0] * (CHUNK + 1 - len(chunk))] for chunk in found]


def tokens_of(tokenizer: Any, caption: str, most: int = CHUNK, weighted: bool = False) -> Tokens:
    """The first `most` tokens of a caption."""
    ids, weights = [], []
    for text, weight in weighted_parts(caption) if weighted else [(caption, 1.0)]:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        weights += [weight] * len(found)
    return Tokens(ids[:most], weights[:most], tokenizer.decode(ids[most:]) if len(ids) > most else "")


def tokenize(tokenizers: list[Any], caption: str, *, most: int = CHUNK, weighted: bool = False) -> tuple[Any, str]:
    """(token ids, the part of the caption that is cut)."""
    tokens = tokens_of(tokenizers[0], caption, most, weighted)
    return tokens.ids, tokens.cut


def rows_for(tokens: Tokens, tokenizer: Any, device: Any, pad: int | None = None) -> Any:
    """[chunks, 77] int64 on the device; `pad` None = filled up with the end token, as CLIP-L is."""
    import torch

    eos = tokenizer.eos_token_id
    return torch.tensor(tokens.rows(tokenizer.bos_token_id, eos, eos if pad is None else pad), device=device)


def weighed(states: Any, tokens: Tokens) -> Any:
    """States [chunks,77,D] times the weight of each position, as sd-scripts does it; nothing is normalised."""
    factors = tokens.factors()
    if all(value == 1.0 for row in factors for value in row):
        return states
    return states * states.new_tensor(factors)[..., None]
