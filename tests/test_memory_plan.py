"""The memory plan against what real runs allocate, counted the same way on tensors with and without values."""

import contextlib
import json

import pytest
import torch
from oracles import read_json
from training_support import arguments, called, pictures, toy  # noqa: F401  (fixtures)

from library import options as option_machinery
from library.memory import plan_table, planner, released, sketch
from library.memory.planner import Work


@pytest.fixture(scope="module")
def large_pictures(pictures):  # noqa: F811
    """The same pictures at 256 pixels, so that activations weigh as much as weights."""
    path = pictures.with_name("large.toml")
    path.write_text(pictures.read_text().replace("resolution = 64", "resolution = 256"))
    return path


def shapes(name):
    """Key -> shape of a released file, compressed or not."""
    found = read_json(f"layouts/{name}")
    return found.get("keys", found)


def parsed(config, data, output, *extra):
    return option_machinery.parse("z_image", arguments(config, data, output, "--max_train_steps", "2", *extra), "test")


def real_peak(options, monkeypatch) -> int:
    """Bytes of tensor storage that are alive at most from the loading of the denoiser to the end of training."""
    from library.runtime import Runtime
    from train_network import NetworkTrainer

    tracker, load = sketch.Tracker(), Runtime.load_denoiser
    with monkeypatch.context() as patched, contextlib.ExitStack() as tracking:

        def tracked(self):
            tracking.enter_context(tracker)
            model = load(self)
            tracker.restart()  # what was read from the file's memory map is no allocation
            return model

        patched.setattr(Runtime, "load_denoiser", tracked)
        trainer = NetworkTrainer(options)
        trainer.finish = tracking.close  # the report has pictures, not the loop
        trainer.run()
    return tracker.peak


CASES = {
    "lora": (),
    "checkpointing": ("--gradient_checkpointing",),
    "fp8": ("--gradient_checkpointing", "--fp8_scaled"),
    "adamw8bit": ("--optimizer_type", "AdamW8bit"),
    "adafactor": ("--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"),
    "bf16": ("--mixed_precision", "bf16", "--gradient_checkpointing"),
    "full": (),
    "full_checkpointing": ("--gradient_checkpointing",),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_a_tenth_of_the_real_peak(toy, large_pictures, tmp_path, monkeypatch, case):  # noqa: F811
    config = toy.with_name("toy_full.toml") if case.startswith("full") else toy
    options = parsed(config, large_pictures, tmp_path, *CASES[case])
    from library.data.dataset import prepare

    work = plan_table.largest(prepare(options, options.family, options.family.pixel_multiple))
    assert (work.width, work.height, work.batch) == (256, 256, 2)
    plan = planner.make(options, options.family, work, accelerator=False)
    peak = real_peak(options, monkeypatch)
    assert plan["device"]["phases"]["training"]["peak_bytes"] == pytest.approx(peak, rel=0.1)


def test_swapped_blocks_are_on_the_host(toy, large_pictures, tmp_path):  # noqa: F811
    from memory_support import deep_weights, toy_file
    from test_memory_swap_runs import MOST

    deep = ("--pretrained_model_name_or_path", str(toy_file(tmp_path, deep_weights())))
    options = [parsed(toy, large_pictures, tmp_path, *deep, *extra) for extra in ((), ("--blocks_to_swap", "4"))]
    whole, swapped = (planner.make(one, one.family, Work(256, 256, 1)) for one in options)
    assert swapped["most_blocks_to_swap"] == MOST
    here = [plan["device"]["phases"]["training"]["weights_bytes"] for plan in (whole, swapped)]
    # four blocks are gone, a ring of two is there instead
    assert here[0] - here[1] == pytest.approx(swapped["host"]["weights"] / 2, rel=0.01)


def test_full_size_weights_are_those_of_the_released_files():
    """Parameters of the key lists that the files really have, at two bytes each."""
    options = option_machinery.parse("z_image", ["--output_dir", "x", "--mixed_precision", "bf16", "--network_module",
                                                 "networks.lora", "--gradient_checkpointing"], "test")  # fmt: skip
    count = sum(torch.Size(shape).numel() for shape in shapes("z_image").values())
    with released.completed(options) as (options, family, _):
        made = planner.Planner(options, family, Work(512, 512))
        assert made.sketch(family.denoiser)
    with made.phase() as tracker:
        model = made.load(family.denoiser, torch.bfloat16)
        assert tracker.live == pytest.approx(2 * count, rel=0.01)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.001)


def test_the_command_prints_a_table_json_and_advice(toy):  # noqa: F811
    base = ["tools/plan.py", "--model_type", "z_image", "--config_file", str(toy), "--resolution", "64,64",
            "--items", "10"]  # fmt: skip
    shown = called(*base, "--vram", "1").stdout
    assert "on the device (" in shown and "in 1 GB it fits" in shown
    plan = json.loads(called(*base, "--json").stdout)
    assert plan["device"]["peak_bytes"] >= max(p["peak_bytes"] for p in plan["device"]["phases"].values())
    wrong = called(*base, "--resolution", "60,60")
    assert wrong.returncode == 2 and "multiples of 16" in wrong.stderr


def test_an_optimizer_that_finds_its_own_rate_has_a_plan():
    per_value, is_factored = planner.state_bytes("adafactor", (), torch.float32)
    assert is_factored and per_value < 1
