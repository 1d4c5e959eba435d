"""networks.lora by the name that sd-scripts has for Stable Diffusion 3, with the arguments that name parts of it."""

from __future__ import annotations

from typing import Any

from networks import lora, lora_flux
from networks.lora import create_network_from_weights

__all__ = ["create_network", "create_network_from_weights"]

BLOCK = r"joint_blocks\.\d+\."
PARTS = {  # argument -> the modules whose rank it is
    "context_attn_dim": rf"{BLOCK}context_block\.attn\.",
    "context_mlp_dim": rf"{BLOCK}context_block\.mlp\.",
    "context_mod_dim": rf"{BLOCK}context_block\.adaLN_modulation\.",
    "x_attn_dim": rf"{BLOCK}x_block\.attn2?\.",
    "x_mlp_dim": rf"{BLOCK}x_block\.mlp\.",
    "x_mod_dim": rf"{BLOCK}x_block\.adaLN_modulation\.",
}
OUTSIDE = (  # in the order of emb_dims
    "context_embedder", r"t_embedder\..*", r"x_embedder\..*", r"y_embedder\..*", r"final_layer\.adaLN_modulation\..*",
    r"final_layer\.linear",
)  # fmt: skip


def create_network(*given: Any, neuron_dropout: float | None = None, **kwargs: Any) -> Any:
    """`networks.lora.create_network` with sd-scripts' arguments for SD3 translated. Raises ConfigError."""
    return lora.create_network(*given, neuron_dropout=neuron_dropout, **translated(kwargs))


def translated(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of networks.lora."""
    out = dict(kwargs)
    ranks = lora_flux.ranks_of(out, PARTS)
    added, more = lora_flux.outside(out, "emb_dims", OUTSIDE)
    left_out = lora_flux.left_out(out, "train_block_indices", "joint_blocks")
    lora_flux.join(out, "network_reg_dims", [*ranks, *more], first=True)
    lora_flux.join(out, "exclude_patterns", left_out)
    lora_flux.join(out, "include_patterns", added)
    return out
