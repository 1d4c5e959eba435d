"""From the text of a caption file to the caption of one training step: sd-scripts' pipeline, in its order.

Prefix and suffix; dropout of the whole caption; wildcards; fixed and shuffled tags; tag dropout; separators. Where
sd-scripts differs from its documents, the documents hold: tags are joined by `caption_separator` (there always ", "),
and the text of `keep_tokens_separator` never stays in a caption.
"""

from __future__ import annotations

import math
import random
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.data.config import SubsetSpec


def make_caption(raw: str, subset: SubsetSpec, rng: random.Random, step: int, epoch: int, max_steps: int) -> str:
    """The caption of one item in one step. Every random choice comes from `rng`."""
    every = subset.caption_dropout_every_n_epochs
    if every and (epoch + 1) % every == 0 or rng.random() < subset.caption_dropout_rate:
        return ""
    lines = [line.strip() for line in raw.splitlines() if line.strip()] or [""]
    text = rng.choice(lines) if subset.enable_wildcard else lines[0]
    if subset.caption_prefix:
        text = f"{subset.caption_prefix} {text}"
    if subset.caption_suffix:
        text = f"{text} {subset.caption_suffix}"
    if subset.enable_wildcard:
        text = _wildcards(text, rng)
    if has_tags(subset):
        text = _tags(text, subset, rng, step, max_steps)
    if subset.secondary_separator:
        text = text.replace(subset.secondary_separator, subset.caption_separator)
    return text


def has_tags(subset: SubsetSpec) -> bool:
    """Whether the caption is taken apart into tags."""
    return bool(
        subset.shuffle_caption
        or subset.token_warmup_step
        or subset.caption_tag_dropout_rate
        or subset.keep_tokens_separator
    )


def is_changing(subset: SubsetSpec) -> list[str]:
    """Names of the options that give one picture more captions than can be cached; empty if there are few."""
    return [
        name
        for name in ("shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate", "enable_wildcard")
        if getattr(subset, name)
    ]


def variants(raw: str, subset: SubsetSpec) -> list[str]:
    """Every caption that this picture can have, where `is_changing` is empty."""
    fixed = SubsetView(subset)
    out = [make_caption(raw, fixed, random.Random(0), 0, 0, 1)]  # type: ignore[arg-type]
    return [*out, ""] if subset.caption_dropout_rate or subset.caption_dropout_every_n_epochs else out


def whole(raw: str, subset: SubsetSpec) -> str:
    """The caption with all of its tags in the order of the file; of wildcards one choice."""
    return make_caption(raw, WholeView(subset), random.Random(0), 0, 0, 1)  # type: ignore[arg-type]


class SubsetView:
    """A subset with caption dropout off."""

    caption_dropout_rate = 0.0
    caption_dropout_every_n_epochs = 0

    def __init__(self, subset: SubsetSpec) -> None:
        self._subset = subset

    def __getattr__(self, name: str) -> object:
        return getattr(self._subset, name)


class WholeView(SubsetView):
    """And with nothing shuffled, dropped or held back."""

    shuffle_caption = False
    caption_tag_dropout_rate = 0.0
    token_warmup_step = 0


def _wildcards(text: str, rng: random.Random) -> str:
    """One of each {a|b}; {{ and }} are braces."""
    text = text.replace("{{", "\0").replace("}}", "\1")
    text = re.sub(r"\{([^{}]+)\}", lambda found: rng.choice(found[1].split("|")), text)
    return text.replace("\0", "{").replace("\1", "}")


def _tags(text: str, subset: SubsetSpec, rng: random.Random, step: int, max_steps: int) -> str:
    """Fixed tags, flexible tags (warmed up, shuffled, dropped), fixed tags at the end."""
    separator = subset.caption_separator
    mark = subset.keep_tokens_separator
    if mark and mark in text:
        first, flexible, last = (*text.split(mark, 2), "")[:3]
        head, body, tail = (_split(part, separator) for part in (first, flexible, last))
    else:
        tags = _split(text, separator)
        head, body, tail = tags[: subset.keep_tokens], tags[subset.keep_tokens :], []
    if subset.token_warmup_step:
        until = subset.token_warmup_step * (max_steps if subset.token_warmup_step < 1 else 1)
        if step < until:
            count = math.floor(step * (len(body) - subset.token_warmup_min) / until) + subset.token_warmup_min
            body = body[: max(count, 0)]
    if subset.shuffle_caption:
        rng.shuffle(body)
    if subset.caption_tag_dropout_rate:
        body = [tag for tag in body if rng.random() >= subset.caption_tag_dropout_rate]
    joiner = separator if separator.endswith(" ") else separator + " "
    return joiner.join(tag for tag in (*head, *body, *tail) if tag)


def _split(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.strip().split(separator) if tag.strip()]
