"""A step that is run on a few blocks and extended, against the same step run on all of them: equal to the byte."""

import functools
import json
from pathlib import Path

import pytest
import torch
from memory_support import toy_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library import checkpoints
from library import options as option_machinery
from library.families import get_family
from library.memory import extension, planner, sketch
from library.memory.alike import alike
from tools.make_toy_model import CONFIGS, part_shapes, weights

BLOCKS = {  # family -> its toy with more blocks, latents, what conditions an item, what its file does not tell
    "z_image": ({"n_layers": 17, "n_refiner_layers": 1}, (16, 32, 32), {"text": (40, 64)}, ()),
    "flux": ({"num_layers": 12, "num_single_layers": 13}, (16, 8, 8), {"text": (20, 64), "pooled": (32,)}, ()),
    "qwen_image": ({"num_layers": 13}, (16, 8, 8), {"text": (20, 64)}, ("--model_version", "original")),
    "hidream": (
        {"num_layers": 1, "num_single_layers": 14, "llama_layers": list(range(15))}, (16, 8, 8),
        {"text": (16, 64), "llama": (15, 16, 64), "pooled": (64,)}, (),
    ),
}  # fmt: skip
LORA = ("--network_module", "networks.lora", "--network_dim", "4")
CHECKPOINTING = ("--gradient_checkpointing",)


@functools.cache
def deep_toy(name: str) -> dict[str, torch.Tensor]:
    """The weights of a family's toy with the blocks of `BLOCKS`, in the first layout."""
    part = get_family(name).denoiser
    keys = json.loads(CONFIGS.read_text(encoding="utf-8"))[name]["keys"]
    shapes = {key: tuple(shape) for key, shape in keys.items()}
    toy = checkpoints.configuration(part, Path("toy.safetensors"), shapes, {}, part.layout_in(shapes))
    return weights(part_shapes(part, toy | BLOCKS[name][0]), 0)


def planned(name, folder, *words):
    """(planner, latents' shape, cond as shapes)."""
    file = ("--pretrained_model_name_or_path", str(toy_file(folder, deep_toy(name))))
    _, shape, cond, told = BLOCKS[name]
    options = option_machinery.parse(name, ["--output_dir", "x", *file, *told, *words], "test")
    made = planner.Planner(options, options.family.resolved(options), planner.Work(64, 64))
    return made, shape, {key: (size, torch.float32) for key, size in cond.items()}


def figures(outcome):
    device, host, facts = outcome
    return device.as_dict(), host.as_dict(), facts


def counted(made):
    """Grows with every step of this planner."""
    steps, step = [], made._step
    made._step = lambda *given: steps.append(1) or step(*given)
    return steps


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("z_image", (*LORA, *CHECKPOINTING, "--cpu_offload_checkpointing")),
        ("z_image", ()),
        ("qwen_image", (*LORA, "--mixed_precision", "bf16", "--fp8_base")),  # makes tables once
        (
            "flux",
            (*CHECKPOINTING, "--mixed_precision", "bf16"),
        ),  # two runs; autocast keeps what it casts for all blocks
    ],
)
def test_an_extended_plan_is_that_of_all_blocks(name, words, tmp_path):
    made, shape, cond = planned(name, tmp_path, *words)
    steps = counted(made)
    few = figures(made.training_by(extension.extended, shape, cond))
    assert len(steps) == 2  # short ones; the whole step is one
    assert few == figures(made.training_by(extension.whole, shape, cond))
    assert ("block_inputs_bytes" in few[1]) == ("--cpu_offload_checkpointing" in words)


def test_where_blocks_are_not_given_what_the_last_one_gave_all_are_run(tmp_path):
    """HiDream puts other states of Llama beside the picture's tokens before every block."""
    made, shape, cond = planned("hidream", tmp_path)
    steps = counted(made)
    found = made.training(shape, cond)
    assert len(steps) == 2  # one that was broken off, and the whole one
    assert figures(found) == figures(made.training_by(extension.whole, shape, cond))


def test_a_larger_adapter_parts_a_run_of_equal_blocks(tmp_path):
    larger = ("--network_args", r"network_reg_dims=layers\.4\..*=8")
    found = []
    for words in ((), larger):
        made, *_ = planned("z_image", tmp_path, *LORA, *words)
        with made.phase():
            model = made.load(made.family.denoiser, torch.float32)
            model.binding.adapted = made.family.adapted
            made._network(model)
            found.append(list(alike(model.layers)))
    assert found == [[(0, 17)], [(0, 4), (4, 1), (5, 12)]]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x, other=None):
        return x + self.down(torch.relu(self.up(x if other is None else x * other)))


class Model(nn.Module):
    """Blocks with one way or another in which they are not alike."""

    def __init__(self, kind: str, widths: list[int]) -> None:
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(map(Block, widths))

    def forward(self, x):
        kept, count = [], len(self.blocks)
        scales = [x * 2 for _ in range(count)] if self.kind == "head" else [None] * count
        for number, block in enumerate(self.blocks):
            if self.kind == "skips" and number >= count / 2:
                x = x + kept.pop()
            x = block(x, scales[number])
            if self.kind == "skips":
                kept.append(x)
            if self.kind == "one" and number == 8:
                x = x * 2
            if self.kind == "twice":
                x = block(x)
        return x


def measured(measure, kind, widths=(8,) * 14):
    tracker = sketch.Tracker()
    with FakeTensorMode(), tracker:
        model = Model(kind, list(widths))
        recorder = functools.partial(sketch.Recorder, tracker)
        step = lambda: model(torch.empty(4, 8)).square().mean().backward()  # noqa: E731
        return measure(recorder, step, model, ["blocks"], list(model.parameters()))


@pytest.mark.parametrize("kind", ["skips", "one", "head", "twice"])
def test_what_cannot_be_extended_is_refused(kind):
    with pytest.raises(extension.Unequal):
        measured(extension.extended, kind)


@pytest.mark.parametrize("widths", [(8,) * 13, (8,) * 4 + (16,) + (8,) * 20, (8, 16) * 6, (8,) * 3])
def test_unequal_blocks_are_all_run(widths):
    assert measured(extension.extended, "", widths) == measured(extension.whole, "", widths)
