"""Models that were distilled to few steps: training them as a flow unlearns these steps, and the plan says so.

Most have the shapes of the model that they were made of, so that only the name of the file tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.families.family import Part


def sentence(what: str, options: Any) -> tuple[str, ...]:
    """The advice for a model of which `what` is true; none where a training adapter is already there."""
    if options.base_weights:
        return ()
    return (
        f"{what}: it is distilled, and training unlearns that; train a LoRA on the model that it was made of and use "
        "it on this one, or name a training adapter as --base_weights",
    )


def word_in(path: Any, part: Part, words: str) -> str:
    """The first of these words that a word of the file's or the repository folder's name begins with; or ""."""
    path = Path(path or "")
    name = (path.parent if path.name == part.diffusers_folder and path.is_dir() else path).name.lower()
    return next((word for word in words.split() if re.search(rf"(?<![a-z]){re.escape(word)}", name)), "")


def by_name(part: Part, words: str) -> Callable[..., tuple[str, ...]]:
    """`Family.advice` for a family whose few-step models have one of these words in their names."""
    return partial(_by_name, part, words)


def joined(*advices: Callable[..., tuple[str, ...]]) -> Callable[..., tuple[str, ...]]:
    """`Family.advice` that says what each of these says."""
    return lambda options: tuple(text for advice in advices for text in advice(options))


def _by_name(part: Part, words: str, options: Any) -> tuple[str, ...]:
    from library.checkpoints import path_of

    path = path_of(part, options)
    word = word_in(path, part, words)
    return sentence(f"{path} has '{word}' in its name", options) if word else ()
