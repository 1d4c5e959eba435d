"""Which options hold the weights of which part in fewer bits. No torch in here: the option checks ask too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.families.family import Family, Part

DENOISER = ("fp8_scaled", "fp8_base", "nf4")  # options, the stronger first; each is also the name of a scheme
TEXT_KINDS = {  # what `Part.precision_options` may say, "" = never quantised; and what such a text encoder is
    "vl": "vision-language text encoder",
    "t5": "T5 text encoder",
    "llm": "language model that encodes text",
}


@dataclass(frozen=True)
class Recipe:
    """How the Linear weights of one part are held.

    `scheme` is fp8_scaled, fp8_base or nf4; `fp8_format` e4m3 or e5m2; `within` the module lists of our model that
    are meant, empty = the whole model; `kept` parts of original names whose weights stay as they are.
    """

    scheme: str
    fp8_format: str
    within: tuple[str, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        return {
            "fp8_scaled": f"{self.fp8_format} with a scale for every 64 values",
            "fp8_base": self.fp8_format,
            "nf4": "nf4",
        }[self.scheme]


def denoiser_recipe(options: Any, family: Family) -> Recipe | None:
    """What --fp8_scaled, --fp8_base or --nf4 mean for a family; None = weights as trained."""
    for scheme in DENOISER:
        if getattr(options, scheme, False):
            return Recipe(scheme, getattr(options, "fp8_format", "e4m3"), family.blocks, family.denoiser.high_precision)
    return None


def text_recipe(options: Any, part: Part) -> Recipe | None:
    """What --fp8_t5, --nf4_llm, ... mean for a text encoder. fp8 is always with scales: it costs no more memory."""
    if not part.precision_options:
        return None
    for prefix, scheme in (("fp8", "fp8_scaled"), ("nf4", "nf4")):
        if getattr(options, f"{prefix}_{part.precision_options}", False):
            return Recipe(scheme, "e4m3", (), part.high_precision)
    return None
