"""networks.lora by the name that sd-scripts has for FLUX.1, with the arguments that name parts of that model.

They are the arguments of networks.lora in other words: ranks by regular expression, modules left out or added. What
`network_reg_dims` says besides comes later and so stands above them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from library.errors import ConfigError
from networks import lora
from networks.lora import create_network_from_weights

__all__ = ["create_network", "create_network_from_weights"]

PARTS = {  # argument -> the modules whose rank it is
    "img_attn_dim": r"double_blocks\.\d+\.img_attn\.",
    "txt_attn_dim": r"double_blocks\.\d+\.txt_attn\.",
    "img_mlp_dim": r"double_blocks\.\d+\.img_mlp\.",
    "txt_mlp_dim": r"double_blocks\.\d+\.txt_mlp\.",
    "img_mod_dim": r"double_blocks\.\d+\.img_mod\.",
    "txt_mod_dim": r"double_blocks\.\d+\.txt_mod\.",
    "single_dim": r"single_blocks\.\d+\.linear[12]",
    "single_mod_dim": r"single_blocks\.\d+\.modulation\.",
}
OUTSIDE = ("img_in", r"time_in\..*", r"vector_in\..*", r"guidance_in\..*", "txt_in")  # in the order of in_dims
LISTS = {"double": r"double_blocks", "single": r"single_blocks"}


def create_network(*given: Any, neuron_dropout: float | None = None, **kwargs: Any) -> Any:
    """`networks.lora.create_network` with sd-scripts' arguments for FLUX.1 translated. Raises ConfigError."""
    return lora.create_network(*given, neuron_dropout=neuron_dropout, **translated(kwargs))


def translated(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of networks.lora."""
    out = dict(kwargs)
    ranks = ranks_of(out, PARTS)
    skipped = _blocks(out.pop("train_blocks", None))
    for kind, regex in LISTS.items():
        skipped += left_out(out, f"train_{kind}_block_indices", regex)
    added, more = outside(out, "in_dims", OUTSIDE)
    join(out, "network_reg_dims", [*ranks, *more], first=True)
    join(out, "exclude_patterns", skipped)
    join(out, "include_patterns", added)
    return out


def ranks_of(out: dict[str, Any], parts: Mapping[str, str]) -> list[str]:
    """Ranks by pattern that the arguments named in `parts` ask for; those are taken out."""
    return [f"{regex}={_rank(name, out.pop(name))}" for name, regex in parts.items() if name in out]


def outside(out: dict[str, Any], name: str, modules: Sequence[str]) -> tuple[list[str], list[str]]:
    """(patterns of what is adapted besides the blocks, their ranks) of an argument with a rank for each module."""
    if name not in out:
        return [], []
    dims = [_rank(name, one) for one in str(out.pop(name)).strip("[] ").split(",")]
    if len(dims) != len(modules):
        known = ", ".join(one.replace(r"\..*", "").replace("\\", "") for one in modules)
        raise ConfigError(f"network_args: {name} has {len(dims)} values; it takes {len(modules)}: {known}")
    ranks = {one: dim for one, dim in zip(modules, dims, strict=True) if dim}
    return list(ranks), [f"^{one}={dim}" for one, dim in ranks.items()]


def _rank(name: str, value: Any) -> int:
    try:
        rank = int(str(value).strip())
    except ValueError:
        rank = -1
    if rank < 0:
        raise ConfigError(f"network_args: {name}={value} is no rank; give a whole number, 0 = not adapted")
    return rank


def _blocks(value: Any) -> list[str]:
    if value in (None, "all"):
        return []
    if value not in LISTS:
        raise ConfigError(f"network_args: train_blocks={value} is none of all, double, single")
    return [rf"{regex}\..*" for kind, regex in LISTS.items() if kind != value]


def left_out(out: dict[str, Any], name: str, regex: str) -> list[str]:
    """`all`, `none` or `0,2-5`: a pattern of what an argument leaves out of the blocks below `regex`."""
    value = out.pop(name, None)
    if value in (None, "all"):
        return []
    if value == "none":
        return [rf"{regex}\..*"]
    chosen: list[int] = []
    for part in str(value).split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ConfigError(f"network_args: {name}={value} is not of the form 0,2-5")
        chosen += range(int(first), int(last or first) + 1)
    kept = "|".join(str(index) for index in sorted(set(chosen)))
    return [rf"{regex}\.(?!(?:{kept})\.).*"]


def join(out: dict[str, Any], name: str, more: list[str], first: bool = False) -> None:
    if more:
        own = [str(out[name]).strip()] if out.get(name) else []
        if name != "network_reg_dims":  # lists are read as Python's, in which a regex may hold a comma
            own = lora.pattern_texts(out.get(name))
            out[name] = repr([*own, *more])
        else:
            out[name] = ",".join([*more, *own] if first else [*own, *more])
