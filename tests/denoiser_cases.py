"""What every denoiser is held against, as functions over one table row: golden outputs, key lists, diffusers.

A `Golden` says how one golden file's inputs are given to a family's `predict`. Golden files hold `ckpt.KEY`,
`lora.MODULE.lora_A.weight`, and `case.NAME.in.INPUT`, `case.NAME.out`, `case.NAME.out_lora` of each case.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from oracles import golden, golden_metadata, load, read_json, weights_of
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from library.checkpoints import Checkpoint, rows_of
from library.fingerprints import identify
from library.headers import Header, TensorInfo
from library.layout import Layout, shapes_of, swap_halves
from networks import formats
from networks.adapter import targets_of
from networks.lora import is_adapted

# Inputs of golden files -> the keys of one item's conditions.
NAMES = {"context": "text", "y": "pooled", "txt_byt5": "byt5", "guidance": "guidance"}
TOYS = Path(__file__).resolve().parents[1] / "tools" / "toy_configs.json"


def conditions(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict per item: text cut to its length where the case has lengths, references as "control.k" [C,h,w]."""
    items = [{} for _ in inputs["x"]]
    for key, values in inputs.items():
        name = NAMES.get(key) or (key.replace("ref.", "control.") if key.startswith("ref.") else None)
        for item, value in zip(items, values if name else (), strict=bool(name)):
            item[name] = value.squeeze(1) if key.startswith("ref.") and value.ndim == 4 else value
    for item, length in zip(items, inputs.get("lens", ()), strict=False):
        item["text"] = item["text"][: int(length)]
    return items


@dataclass(frozen=True)
class Golden:
    file: str
    family: str  # module in library.families
    cases: tuple[str, ...] = ("plain",)
    per_mille: bool = False  # the file's timestep is sigma * 1000
    extra: Callable[[dict], dict] = lambda inputs: {}  # further conditions of every item
    tolerance: float = 1e-4
    options: dict[str, Any] = field(default_factory=dict)  # of predict
    variant: str = ""  # as library.fingerprints names it
    masks: bool = True  # texts of different lengths are one batch with a mask; else one batch per length

    @property
    def module(self) -> Any:
        return importlib.import_module(f"library.families.{self.family}")

    def inputs(self, case: str) -> tuple[Any, Any, list[dict]]:
        """(noisy [B,C,h,w], sigma [B], conditions of each item)."""
        given = weights_of(golden(self.file), f"case.{case}.in.")
        noisy = given["x"].squeeze(2) if given["x"].ndim == 5 else given["x"]
        sigma = given["timestep"] / 1000 if self.per_mille else given["timestep"]
        return noisy, sigma, [cond | self.extra(given) for cond in conditions(given)]

    @property
    def inputs_of_last(self) -> tuple[Any, Any, list[dict]]:
        return self.inputs(self.cases[-1])

    def output(self, case: str, kind: str = "out") -> Any:
        out = golden(self.file)[f"case.{case}.{kind}"]
        return out.squeeze(2) if out.ndim == 5 else out

    def weights(self, with_lora: bool = False) -> dict[str, Any]:
        """The file's checkpoint, its LoRA merged in the file's own coordinates."""
        tensors = golden(self.file)
        weights, loras = weights_of(tensors, "ckpt."), weights_of(tensors, "lora.")
        for key in [key for key in loras if with_lora and key.endswith(".lora_A.weight")]:
            name = key.removesuffix(".lora_A.weight")
            up, down = loras[f"{name}.lora_B.weight"], loras[key]
            change = (up.flatten(1) @ down.flatten(1)).reshape(weights[f"{name}.weight"].shape)
            scale = float(golden_metadata(self.file)["lora_scale"])
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * change
        return weights

    def model(self, folder: Path, with_lora: bool = False, dtype: Any = torch.float32) -> Any:
        return load(self.module.DENOISER, self.weights(with_lora), folder, dtype).requires_grad_(False)

    def lora(self) -> dict[str, Any]:
        """The file's LoRA as ComfyUI would have it."""
        scale, loras = float(golden_metadata(self.file)["lora_scale"]), weights_of(golden(self.file), "lora.")
        out = {f"diffusion_model.{key}": value for key, value in loras.items()}
        for key in [key for key in out if key.endswith(".lora_A.weight")]:
            out[key.replace(".lora_A.weight", ".alpha")] = torch.tensor(scale * len(out[key]))
        return out

    def predict(self, model: Any, *inputs: Any) -> Any:
        return self.module.predict(model, *inputs, **self.options)


def shortened(conds: list[dict]) -> list[dict]:
    """Two items whose texts differ in length, the first without quoted text."""
    first = {key: value for key, value in conds[0].items() if key != "byt5"}
    return [first, conds[1] | {"text": conds[1]["text"][:-3]}]


@contextlib.contextmanager
def masks_seen() -> Iterator[list]:
    """The masks that attention is given inside."""
    attend, seen = F.scaled_dot_product_attention, []

    def watched(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        seen.append(attn_mask)
        return attend(query, key, value, attn_mask, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", watched):
        yield seen


class Transfers(TorchFunctionMode):
    """Records what makes tensors of the meta device from host data: on a real device it waits for the device."""

    MAKE = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            from_host = any(isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.ndim for a in args)
            listed = func is torch.Tensor.__getitem__ and isinstance(args[1], list)
            if func in self.MAKE or from_host or listed:
                self.found.append(func.__name__)
        return out


# ---------------------------------------------------------------- key lists


@dataclass(frozen=True)
class FullSize:
    """A real file's key list and what holds it."""

    name: str
    family: str
    variant: str = ""
    converter: str = ""  # function in diffusers.loaders.single_file_utils
    forms: tuple[str, ...] = ("comfy", "kohya")  # formats of adapters that ComfyUI takes whole

    @property
    def module(self) -> Any:
        return importlib.import_module(f"library.families.{self.family}")

    @property
    def part(self) -> Any:
        return self.module.DENOISER

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys, without the file's container prefix, and shapes."""
        return self._below(read_json(f"layouts/{self.name}")["keys"])

    @property
    def toy(self) -> dict[str, tuple[int, ...]]:
        return self._below(json.loads(TOYS.read_text(encoding="utf-8"))[self.name]["keys"])

    def _below(self, keys: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
        start = next(
            prefix for prefix in sorted(self.part.prefixes, reverse=True) if next(iter(keys)).startswith(prefix)
        )
        return {key.removeprefix(start): tuple(shape) for key, shape in keys.items()}

    def layout(self, name: str | None = None) -> Layout:
        """The file's own layout, or the named one, of a model of its size."""
        return _layout(self, name or self.part.recognise(self.shapes))

    @property
    def _model(self) -> Any:
        return _model(self)

    def unclaimed(self, shapes: dict[str, Any], layout: Layout) -> set:
        """Keys and shapes that the layout does not give exactly, apart from what a file may carry."""
        below = {key: shape for key, shape in shapes.items() if not self.part.may_carry(key, shape)}
        return {*layout.their_shapes.items()} ^ {*below.items()}

    def adapter_stems(self, form: str) -> dict[str, Any]:
        """Names under which adapters of the modules that are trained by default are saved -> what they adapt."""
        layout = self.layout(next(iter(self.part.layouts)))
        chosen = {n: t for n, t in targets_of(self._model, layout).items() if is_adapted(n, self.module.ADAPTED)}
        stems = {}
        for name, target in chosen.items():
            down, up = torch.zeros(1, *target.our_shape[1:]), torch.zeros(target.entry.shape[0], 1)
            written = formats.write({name: {"down": down, "up": up, "alpha": 1.0}}, form, layout)
            weight, start = f"diffusion_model.{name}.weight", 0
            for key in (key for key in written if formats.split_key(key)[1] == "up"):
                length = len(written[key])
                place: Any = {"weight": weight, "slice": {"dim": 0, "start": start, "length": length}}
                if length == target.entry.shape[0]:
                    turned = form == "diffusers" and target.entry.op is swap_halves
                    place = {"weight": weight, "function": "swap_scale_shift"} if turned else weight
                stems[formats.split_key(key)[0]] = place
                start += length
        return stems

    def taken_by_comfyui(self) -> dict[str, Any]:
        styles = read_json(f"lora_keys/{self.name}")["styles"].values()
        return {stem: weight for style in styles for stem, weight in style["keys"].items()}

    def differences_from_converter(self) -> list[str]:
        """Our keys that diffusers' converter gives other values, or does not give."""
        from diffusers.loaders import single_file_utils

        theirs = tagged(self.shapes)
        mine = self.layout().to_ours(theirs)
        other = getattr(single_file_utils, self.converter)(dict(theirs))
        same = {key for key in mine if key in other and torch.equal(mine[key].flatten(), other[key].flatten())}
        return sorted((mine.keys() | other.keys()) - same)


def identity(shapes: dict[str, tuple[int, ...]]) -> Any:
    """What a file with these keys is taken for."""
    tensors = {key: TensorInfo("BF16", shape, 0, 0) for key, shape in shapes.items()}
    return identify(Checkpoint(Path("x"), (Header(Path("x"), tensors, {}, 8),)))


@functools.cache
def _model(real: FullSize) -> Any:
    return meta_model(real.part, real.shapes)


@functools.cache
def _layout(real: FullSize, name: str) -> Layout:
    ours = shapes_of(_model(real))
    return Layout(name, rows_of(real.part, name, ours), ours)


def meta_model(part: Any, shapes: dict[str, Any]) -> Any:
    """A model of this size on the meta device."""
    with torch.device("meta"):
        return part.build(part.config(shapes, {}, part.recognise(shapes)))


def meta_layout(part: Any, shapes: dict[str, Any]) -> Layout:
    """The layout that the keys have, of a model of their size."""
    name, ours = part.recognise(shapes), shapes_of(meta_model(part, shapes))
    return Layout(name, rows_of(part, name, ours), ours)


def tagged(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tensors whose values say where they came from; rows matter, further dimensions are cut to one."""
    start, out = 0, {}
    for key, shape in shapes.items():
        rows = shape[0] if shape else 1
        out[key] = torch.arange(start, start + rows, dtype=torch.float64).reshape(rows, *[1] * (len(shape) - 1))
        start += rows
    return out
