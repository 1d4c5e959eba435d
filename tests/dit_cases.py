"""The golden files of the video and DiT families as one table: how each one's inputs are given to `predict`.

Golden files come in two forms: `ckpt.`, `lora.`, `case.NAME.in.` and `case.NAME.out`, `case.NAME.out_lora`, or
`weights/`, `inputs/` and `outputs/NAME`, where several outputs share the inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from oracles import golden, golden_metadata, load, weights_of
from torch.nn import functional as F


@dataclass(frozen=True)
class Golden:
    file: str
    family: str
    conds: Callable[[str, dict], list[dict]]  # (case, inputs) -> conditions of each item
    noisy: Callable[[str, dict], Any] = lambda case, i: i["x"]
    sigma: Callable[[str, dict], Any] = lambda case, i: i["timestep"]
    cases: tuple[str, ...] = ("plain",)
    metadata: dict[str, str] = field(default_factory=dict)  # what no shape shows, as a toy file says it in its header
    options: dict[str, Any] = field(default_factory=dict)  # of predict
    prefix: str = ""
    times: Callable[[Any], Any] = lambda sigma: sigma * 1000  # what the time embedding embeds
    ragged: tuple[str, ...] = ("text",)  # conditions that have one row per token
    expected: Callable[[str, dict, Any], Any] = lambda case, inputs, out: out  # the velocity that an output means
    dead: tuple[str, ...] = ()  # parameters that have no influence: the text's side after the last block
    guidance: bool = False  # the items' guidance is embedded too, times 1000
    tolerance: float = 1e-4

    @property
    def has_lora(self) -> bool:
        return f"case.{self.cases[0]}.out_lora" in golden(self.file)

    @property
    def module(self) -> Any:
        return importlib.import_module(f"library.families.{self.family}")

    def inputs(self, case: str) -> dict[str, Any]:
        tensors = golden(self.file)
        return weights_of(tensors, f"case.{case}.in.") or weights_of(tensors, "inputs/")

    def output(self, case: str, kind: str = "out") -> Any:
        """The independent implementation's output, None where the file has none of this kind."""
        tensors = golden(self.file)
        found = tensors.get(f"case.{case}.{kind}", tensors.get(f"outputs/{case}"))
        inputs = self.inputs(case)
        return self.expected(case, inputs, found.reshape(self.noisy(case, inputs).shape))

    def weights(self, with_lora: bool = False) -> dict[str, Any]:
        tensors = golden(self.file)
        weights = weights_of(tensors, "ckpt.") or weights_of(tensors, "weights/")
        if with_lora:
            scale, loras = float(golden_metadata(self.file)["lora_scale"]), weights_of(tensors, "lora.")
            for key in [key for key in loras if key.endswith(".lora_A.weight")]:
                name = key.removesuffix(".lora_A.weight")
                change = loras[f"{name}.lora_B.weight"] @ loras[key]
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * change
        return weights

    def model(self, folder: Any, with_lora: bool = False, dtype: Any = torch.float32) -> Any:
        weights = {self.prefix + key: value for key, value in self.weights(with_lora).items()}
        return load(self.module.DENOISER, weights, folder, dtype, **self.metadata).requires_grad_(False)

    def run(self, model: Any, case: str, items: slice = slice(None), change: Callable = lambda conds: conds) -> Any:
        """`predict` of these items of a case, their conditions changed."""
        inputs = self.inputs(case)
        noisy, sigma = self.noisy(case, inputs)[items], self.sigma(case, inputs)[items]
        return self.module.predict(model, noisy, sigma, change(self.conds(case, inputs))[items], **self.options)


def texts(case: str, inputs: dict) -> list[dict]:
    """One text per item, cut to its length where the case has lengths."""
    lengths = inputs.get("lens", torch.full((len(inputs["context"]),), inputs["context"].shape[1]))
    return [{"text": text[:n]} for text, n in zip(inputs["context"], lengths.tolist(), strict=True)]


def per_mille(case: str, inputs: dict) -> Any:
    return inputs["timestep"] / 1000


def with_references(case: str, inputs: dict) -> list[dict]:
    found = [key for key in sorted(inputs) if key.startswith("ref.")]
    controls = [{f"control.{j}": inputs[key][i] for j, key in enumerate(found)} for i in range(len(inputs["x"]))]
    return [text | control for text, control in zip(texts(case, inputs), controls, strict=True)]


def anima(case: str, inputs: dict) -> list[dict]:
    def cut(key: str, lengths: str) -> list:
        n = inputs.get(lengths, torch.full((2,), inputs[key].shape[1])).tolist()
        return [row[:k] for row, k in zip(inputs[key], n, strict=True)]

    pairs = zip(cut("qwen", "qwen_lens"), cut("t5_ids", "t5_lens"), strict=True)
    return [{"text": states, "t5_ids": ids} for states, ids in pairs]


def hidream(case: str, inputs: dict) -> list[dict]:
    names = {"context": "text", "llama": "llama", "y": "pooled"}
    return [{ours: inputs[theirs][k] for theirs, ours in names.items()} for k in range(len(inputs["x"]))]


def hunyuan_video(case: str, inputs: dict) -> list[dict]:
    names = {"context": "text", "y": "pooled", "guidance": "guidance"}
    return [{ours: inputs[theirs][k] for theirs, ours in names.items()} for k in range(len(inputs["x"]))]


def hunyuan_video_15(case: str, inputs: dict) -> list[dict]:
    """What the case's name says: with or without byt5 and image features."""
    names = {"context": "text"}
    if case in ("out_t2v", "out_i2v"):
        names["byt5"] = "byt5"
    if case.startswith("out_i2v"):
        names["vision"] = "clip"
    conds = [{ours: inputs[theirs][k] for theirs, ours in names.items()} for k in range(len(inputs["x"]))]
    return [cond | {"image_latents": x[32:]} for cond, x in zip(conds, inputs["x"], strict=True)]


def ltx_video(case: str, inputs: dict) -> list[dict]:
    lengths = inputs["attention_mask"].sum(1).tolist()
    conds = [{"text": text[:n]} for text, n in zip(inputs["context"], lengths, strict=True)]
    if case == "out":
        return conds
    return [cond | {"first_frame": x[:, :1]} for cond, x in zip(conds, inputs["x"], strict=True)]


def edm_sigma(inputs: dict) -> Any:
    """The file has ln(sigma) / 4."""
    return (inputs["timestep"] * 4).exp()


def cosmos_noisy(case: str, inputs: dict) -> Any:
    """The file has (x0 + sigma * noise) / sqrt(sigma ** 2 + 0.25)."""
    sigma = edm_sigma(inputs).view(-1, 1, 1, 1, 1)
    return inputs["x"] * (sigma**2 + 0.25).sqrt() / (1 + sigma)


def cosmos_velocity(case: str, inputs: dict, out: Any) -> Any:
    """Of EDM's D = c_skip * x + c_out * F, in double precision."""
    sigma, out = edm_sigma(inputs).double().view(-1, 1, 1, 1, 1), out.double()
    x = inputs["x"].double() * (sigma**2 + 0.25).sqrt()
    data = x * 0.25 / (sigma**2 + 0.25) + out * sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    return (x - data) / sigma - data  # noise - x0


def picture(case: str, inputs: dict) -> Any:
    """One frame: a batch of pictures, as the families of pictures get it."""
    return inputs["x"][:, :, 0]


def wan_i2v(case: str, inputs: dict) -> list[dict]:
    context = inputs.get("context", inputs.get("context_first20"))
    conds = [{"text": text, "image_latents": x[16:]} for text, x in zip(context, inputs["x"], strict=True)]
    return (
        [cond | {"clip": clip} for cond, clip in zip(conds, inputs["clip_fea"], strict=True)]
        if "clip_fea" in inputs
        else conds
    )


def wan_5b(case: str, inputs: dict) -> list[dict]:
    return [{"text": t, "first_frame": x[:, :1]} for t, x in zip(inputs["context"], inputs["x"], strict=True)]


HEADS2 = {"num_attention_heads": "2"}
GOLDENS = (
    Golden(
        "ltx_091", "ltx_video", ltx_video, cases=("out", "out_per_token_t0_first_frame"), metadata=HEADS2,
    ),
    Golden(
        "cosmos1_t2w", "cosmos", texts, cosmos_noisy, lambda c, i: edm_sigma(i) / (1 + edm_sigma(i)), ("out",),
        options={"tokens": 9, "frame_rate": 30.0}, times=lambda sigma: (sigma / (1 - sigma)).log() / 4,
        expected=cosmos_velocity,
    ),
    Golden(
        "hunyuan_video_t2v", "hunyuan_video", hunyuan_video, sigma=per_mille, cases=("out",), guidance=True,
    ),
    Golden(
        "hunyuan_video15", "hunyuan_video_15", hunyuan_video_15, lambda c, i: i["x"][:, :32], per_mille,
        ("out_t2v_textonly", "out_t2v", "out_i2v_nobyt5", "out_i2v"),
        dead=("transformer_blocks.1.attn.to_add_out.", "transformer_blocks.1.ff_context."),
    ),
    Golden(
        "hidream", "hidream", hidream, sigma=per_mille, cases=("square", "tokens", "nonsquare_4d"), metadata=HEADS2,
        ragged=(),
    ),
    Golden(
        "auraflow", "auraflow", texts, cases=("plain", "odd"), metadata=HEADS2, options={"tokens": 9},
    ),
    Golden("wan21_t2v", "wan", texts, sigma=per_mille, cases=("out",), metadata=HEADS2, options={"tokens": 20}),
    Golden("wan21_i2v", "wan", wan_i2v, lambda c, i: i["x"][:, :16], per_mille, ("out",), HEADS2),
    Golden("wan22_i2v_a14b", "wan", wan_i2v, lambda c, i: i["x"][:, :16], per_mille, ("out",), HEADS2, {"tokens": 20}),
    Golden(
        "wan22_ti2v", "wan", wan_5b, lambda c, i: F.pad(i["x"][:, :, 1:], (0, 0, 0, 0, 1, 0)),
        lambda c, i: i["timestep_frames"][:, -1] / 1000, ("out",), HEADS2, {"tokens": 20},
    ),
    Golden("lumina_2", "lumina_2", texts, cases=("plain", "ragged"), times=lambda sigma: 1 - sigma),
    Golden(
        "omnigen2", "omnigen2", with_references, cases=("plain", "edit", "ragged_edit"),
        times=lambda sigma: (1 - sigma) * 1000,
    ),
    Golden("cosmos_predict2", "cosmos_predict2", texts, picture, options={"tokens": 9}, times=lambda sigma: sigma),
    Golden(
        "anima", "anima", anima, picture, cases=("plain", "ragged"), times=lambda sigma: sigma, ragged=("text", "t5_ids"),
    ),
)  # fmt: skip
