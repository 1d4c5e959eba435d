"""networks.lora by the name that sd-scripts has for Lumina, with the arguments that name parts of it."""

from __future__ import annotations

from typing import Any

from library.errors import ConfigError
from networks import lora, lora_flux
from networks.lora import create_network_from_weights

__all__ = ["create_network", "create_network_from_weights"]

PARTS = {  # argument -> the modules whose rank it is; the last that fits counts
    "attn_dim": r"\.attention\.",
    "mlp_dim": r"\.feed_forward\.",
    "mod_dim": r"\d\.adaLN_modulation\.",
    "refiner_dim": r"^(noise|context)_refiner\.",
}
OUTSIDE = ("x_embedder", r"t_embedder\..*", r"cap_embedder\..*")  # in the order of embedder_dims
LISTS = {"transformer": ("layers",), "refiners": ("noise_refiner", "context_refiner"),
         "noise_refiner": ("noise_refiner",), "context_refiner": ("context_refiner",)}  # fmt: skip


def create_network(*given: Any, neuron_dropout: float | None = None, **kwargs: Any) -> Any:
    """`networks.lora.create_network` with sd-scripts' arguments for Lumina translated. Raises ConfigError."""
    return lora.create_network(*given, neuron_dropout=neuron_dropout, **translated(kwargs))


def translated(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of networks.lora."""
    out = dict(kwargs)
    ranks = lora_flux.ranks_of(out, PARTS)
    added, more = lora_flux.outside(out, "embedder_dims", OUTSIDE)
    chosen = out.pop("train_blocks", None) or "all"
    if chosen not in ("all", *LISTS):
        raise ConfigError(f"network_args: train_blocks={chosen} is none of all, {', '.join(LISTS)}")
    every = (*LISTS["transformer"], *LISTS["refiners"])
    skipped = [name for name in every if name not in LISTS.get(chosen, every)]
    lora_flux.join(out, "network_reg_dims", [*ranks, *more], first=True)
    lora_flux.join(out, "exclude_patterns", [rf"{name}\..*" for name in skipped])
    lora_flux.join(out, "include_patterns", added)
    return out
