"""What the tensors of one adapted module have to be, kind by kind: their suffixes, and shapes that fit the weight.

The suffixes are those that ComfyUI reads (comfy/weight_adapter and comfy/lora.py); how each kind's update is computed,
and so which shapes fit, is the same there and in LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Shape = tuple[int, ...]

PAIRS = (  # every spelling of the two matrices that ComfyUI reads
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A", ".lora_B"),
)
ROLES = {**{d: "down" for d, _ in PAIRS}, **{u: "up" for _, u in PAIRS}, ".alpha": "alpha"}
OTHER_KINDS = {  # suffixes of adapters that are not plain LoRA -> what they are
    ".dora_scale": "DoRA",
    ".lora_mid.weight": "LoCon with a middle matrix",
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".lokr_w1_a": "LoKr",
    ".oft_blocks": "OFT",
    ".diff": "full difference",
    ".diff_b": "bias difference",
}
OTHER_ROLES = {
    f".{role}": role
    for role in (
        "dora_scale hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 "
        "lokr_w2_a lokr_w2_b lokr_t2 oft_blocks rescale diff diff_b w_norm b_norm set_weight reshape_weight".split()
    )
} | {".lora_mid.weight": "mid", **{f".{role}.weight": role for role in ("a1", "a2", "b1", "b2")}}  # the last: GLoRA
UNSHAPED = {"alpha", "dora_scale", "rescale", "diff_b", "b_norm"}  # say nothing of an update of the weight


def split(key: str) -> tuple[str, str]:
    """(module with its prefix, role) of an adapter's key of any kind; ("", "") of another key."""
    for suffix, role in {**ROLES, **OTHER_ROLES}.items():
        if key.endswith(suffix) and len(key) > len(suffix):
            return key.removesuffix(suffix), role
    return "", ""


def fault(parts: Mapping[str, Shape], weight: Shape, bias: Shape | None = None) -> str:
    """Why tensors of these roles and shapes cannot change a weight of that shape (and its bias); "" if they can.

    `bias` None: the module has none. What GLoRA's matrices and a padded weight come to is not worked out.
    """
    parts = {role: tuple(shape) for role, shape in parts.items()}
    if not weight:
        return "the model's weight is a single number"
    if math.prod(parts.get("alpha", ())) != 1:
        return f"alpha has the shape {list(parts['alpha'])} and is to be one number"
    if "dora_scale" in parts and math.prod(parts["dora_scale"]) not in (weight[0], *weight[1:2]):
        return f"dora_scale {list(parts['dora_scale'])} is neither for the rows nor the columns of {list(weight)}"
    for role in ("diff_b", "b_norm"):
        if role in parts and parts[role] != bias:
            return f"{role} {list(parts[role])} is for a bias, the model's is {list(bias) if bias else 'not there'}"
    for role in ("diff", "w_norm", "set_weight"):
        if role in parts and parts[role] != tuple(weight):
            return f"{role} {list(parts[role])} is not of the weight's shape {list(weight)}"
    try:
        update = _update(parts)
    except KeyError as error:
        return f"{error.args[0]} is missing beside {', '.join(sorted(parts))}"
    except (ValueError, IndexError):
        return f"its matrices do not fit each other: {_listed(parts)}"
    if update is None or "reshape_weight" in parts:
        return ""
    rows, columns = update
    if rows != weight[0] or columns not in (None, math.prod(weight[1:])):
        return f"{_listed(parts)} is an update of {rows} x {columns or '?'}, the weight is {list(weight)}"
    return ""


def _listed(parts: Mapping[str, Shape]) -> str:
    return ", ".join(f"{role} {list(shape)}" for role, shape in parts.items() if role not in UNSHAPED)


def _update(parts: Mapping[str, Shape]) -> tuple[int, int | None] | None:
    """(rows, columns) of the update, columns None where any fit; None if these tensors tell no size.

    Raises KeyError with the role of a tensor that lacks, ValueError where inner sizes differ.
    """
    roles = parts.keys()
    if roles & {"down", "up", "mid"}:
        return _product(parts["up"], parts["down"], parts.get("mid"))
    if any(role.startswith("hada") for role in roles):
        return _loha(parts)
    if any(role.startswith("lokr") for role in roles):
        return _lokr(parts)
    if "oft_blocks" in roles:  # [blocks, b, b], or BOFT's [factors, blocks, b, b]: they turn the rows
        *_, count, size, other = parts["oft_blocks"]
        _same(size, other)
        return count * size, None
    if roles & {"a1", "a2", "b1", "b2"}:
        _ = [parts[role] for role in ("a1", "a2", "b1", "b2")]
        return None
    if roles <= {"alpha", "rescale", "reshape_weight"}:
        raise KeyError("the adapter's own matrix")
    if roles <= {"alpha", "rescale", "dora_scale", "reshape_weight"}:
        raise KeyError("what dora_scale scales")
    return None


def _same(one: int, other: int) -> None:
    if one != other:
        raise ValueError


def _product(left: Shape, right: Shape, middle: Shape | None = None) -> tuple[int, int]:
    """Of left [rows, rank] and right [rank, ...], with a kernel [rank, rank, ...] between them if there is one."""
    kernel = 1
    if middle is not None:
        _same(middle[0], left[1])
        _same(middle[1], right[0])
        kernel = math.prod(middle[2:])
    else:
        _same(left[1], right[0])
    return left[0], math.prod(right[1:]) * kernel


def _tucker(kernel: Shape, left: Shape, right: Shape) -> tuple[int, int]:
    """Of LyCORIS' kernel [r, s, ...] with left [r, rows] and right [s, columns]."""
    _same(kernel[0], left[0])
    _same(kernel[1], right[0])
    return left[1], right[1] * math.prod(kernel[2:])


def _loha(parts: Mapping[str, Shape]) -> tuple[int, int]:
    sizes = []
    for n in (1, 2):
        left, right = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]
        tucker = "hada_t1" in parts or "hada_t2" in parts
        sizes.append(_tucker(parts[f"hada_t{n}"], left, right) if tucker else _product(left, right))
    if sizes[0] != sizes[1]:
        raise ValueError
    return sizes[0]


def _lokr(parts: Mapping[str, Shape]) -> tuple[int, int]:
    def factor(name: str) -> tuple[int, int]:
        if name in parts:
            return parts[name][0], math.prod(parts[name][1:])
        left, right = parts[f"{name}_a"], parts[f"{name}_b"]
        return (
            _tucker(parts["lokr_t2"], left, right)
            if name == "lokr_w2" and "lokr_t2" in parts
            else _product(left, right)
        )

    (a, b), (c, d) = factor("lokr_w1"), factor("lokr_w2")
    return a * c, b * d
