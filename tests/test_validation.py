"""Validation on held-out pictures: what is averaged, and that the best weights stay."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_support import arguments, pictures, toy, train  # noqa: F401

from library import validation
from library.validation import Best


def validations(output):
    lines = map(json.loads, (output / "run.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["validation"] for line in lines if "validation" in line}


def test_the_best_weights_stay_and_a_resumed_run_knows_them(toy, pictures, tmp_path, capsys):  # noqa: F811
    data = tmp_path / "two.toml"
    first = pictures.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 1\nvalidation_split = 0.4")
    data.write_text(first + first.replace("resolution = 64", "resolution = 32"), encoding="utf-8")
    every = ("--save_every_n_steps", "1", "--validate_every_n_steps", "1", "--save_last_n_steps", "1", "--save_state")
    trainer = train(toy, data, tmp_path, *every, "--max_train_steps", "3", "--learning_rate", "3e-2")
    values = validations(tmp_path)
    assert [item.dataset for item in trainer.dataset.validation] == [0, 0, 1, 1]
    for one in values.values():
        quantiles = [value for name, value in one.items() if name.startswith("sigma_")]
        assert one["average"] == pytest.approx(sum(quantiles) / 4)
        assert one["average"] == pytest.approx((one["dataset_1"] + one["dataset_2"]) / 2)  # two pictures each
    best = min(values, key=lambda step: values[step]["average"])
    kept, last = load_file(tmp_path / "run-best.safetensors"), load_file(tmp_path / "run.safetensors")
    said = capsys.readouterr().out
    lowest = f"validation at step {best}: loss {values[best]['average']:.4f}, the lowest so far, kept as run-best.safetensors"
    assert lowest in said and all(torch.equal(kept[k], last[k]) for k in kept) == (best == 3)
    assert f"{values[best]['average']:.4f} at step {best}" in (tmp_path / "run-report.md").read_text(encoding="utf-8")
    trainer = train(
        toy, data, tmp_path, *every, "--max_train_steps", "4", "--learning_rate", "3e-2", "--resume", "auto"
    )
    values = validations(tmp_path)
    assert list(values) == [1, 2, 3, 4]
    assert trainer.outputs.best.step == min(values, key=lambda step: values[step]["average"])


def test_a_validation_that_fails_does_not_end_the_training(toy, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    data = tmp_path / "one.toml"
    text = pictures.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 2\nvalidation_split = 0.4")
    data.write_text(text, encoding="utf-8")
    modes = []

    def errors(self):
        modes.append(self.trainer.network.training)
        yield 0, 0.2, 1 / 0

    monkeypatch.setattr(validation.Validation, "_errors", errors)
    trainer = train(toy, data, tmp_path, "--max_train_steps", "1")
    said = capsys.readouterr().out
    assert "warning: validation failed and was skipped (ZeroDivisionError: " in said
    assert modes == [False] and trainer.network.training
    assert (tmp_path / "run.safetensors").is_file() and not validations(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_the_lowest_value_keeps_its_files_under_a_name_of_their_own(tmp_path, monkeypatch, links):
    if not links:

        def refused(*paths):
            raise OSError("no links here")

        monkeypatch.setattr(validation.os, "link", refused)
    best = Best(
        [
            {"step": 1, "loss": 1.0},
            {"step": 2, "validation": {"average": 0.5}},
            {"step": 4, "validation": {"average": None}},
        ]
    )
    assert (best.loss, best.step) == (0.5, 2)
    assert best.take(0.6, 5, []) == "loss 0.6000 (lowest: 0.5000 at step 2)"
    assert best.take(float("nan"), 6, []).startswith("loss nan (lowest")
    names = ("run-high_noise-000002", "run-high_noise-000002-ema", "run-step00000007")
    files = [tmp_path / f"{name}.safetensors" for name in names]
    for path in files:
        path.write_text(path.name)
    assert "kept as run-high_noise-best.safetensors, run-high_noise-best-ema.safetensors" in best.take(0.4, 7, files)
    for path in files:
        path.unlink()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {
        "run-high_noise-best.safetensors": files[0].name, "run-high_noise-best-ema.safetensors": files[1].name,
        "run-best.safetensors": files[2].name,
    }  # fmt: skip
