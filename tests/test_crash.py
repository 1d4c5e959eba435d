"""How a run ends when it fails: one sentence, a code, a folder for a report; and what watches it from outside."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import tomllib
import torch
from test_memory_plan import large_pictures, parsed, real_peak  # noqa: F401
from training_support import arguments, launch, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import crash, errors, watch

CODES = {
    errors.ConfigError: 2, errors.DatasetError: 3, errors.OutOfMemoryError: 4, errors.NonFiniteError: 5,
    errors.DiskError: 6, errors.ProcessError: 7, errors.Interrupted: 130,
}  # fmt: skip


def ending(error, capsys):
    """(exit code, lines on stderr) of a program that raises `error`."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize("kind", CODES)
def test_each_kind_of_failure_is_one_line_with_its_code(kind, capsys):
    code, lines = ending(kind("what, which value, what to do"), capsys)
    assert code == CODES[kind] and len(lines) == 1 and "what, which value, what to do" in lines[0]


def test_a_fault_of_the_program_keeps_its_traceback_and_ends_with_a_sentence(capsys):
    code, lines = ending(KeyError("x"), capsys)
    assert code == 1 and lines[0].startswith("Traceback") and lines[-1].startswith("error: a fault of the program")


def failing(toy, pictures, output, error, monkeypatch, *extra):  # noqa: F811
    """Run `main` with a step that raises; returns the exception that leaves it."""
    import train_network

    def step(self, batch):
        if self.position.step == 2:
            raise error
        return real(self, batch)

    real = train_network.NetworkTrainer.step
    monkeypatch.setattr(train_network.NetworkTrainer, "step", step)
    with pytest.raises(Exception) as raised:
        train_network.main("z_image", arguments(toy, pictures, output, "--max_train_steps", "5", *extra))
    return raised.value


def test_the_folder_of_a_crash_has_what_a_report_needs(toy, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    error = failing(toy, pictures, tmp_path, ValueError("boom"), monkeypatch, "--learning_rate", "3e-4")
    assert error.bundle.parent == tmp_path / "crash"
    files = {path.name: path.read_text(encoding="utf-8") for path in error.bundle.iterdir()}
    assert tomllib.loads(files["config.toml"])["learning_rate"] == 3e-4
    assert "pictures: found 5" in files["plan.txt"] and "training 185,344 parameters" in files["terminal.txt"]
    assert "ValueError: boom" in files["error.txt"] and torch.__version__ in files["versions.json"]
    assert len([line for line in files["steps.jsonl"].splitlines() if '"loss"' in line]) >= 1
    assert json.loads(files["memory.json"])["host"]["process"] > 0
    code, lines = ending(error, capsys)
    assert code == 1 and str(error.bundle) in lines[-1]
    assert (tmp_path / "run-heartbeat.json").is_file()  # its age says when the run died


def test_the_configuration_of_a_crash_runs_again(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    error = failing(toy, pictures, tmp_path / "a", ValueError("boom"), monkeypatch)
    monkeypatch.undo()
    import train_network

    path = tmp_path / "again.toml"
    path.write_text((error.bundle / "config.toml").read_text(encoding="utf-8"), encoding="utf-8")
    train_network.main(
        "z_image", ["--config_file", str(path), "--output_dir", str(tmp_path / "b"), "--max_train_steps", "1"]
    )
    assert len(losses(tmp_path / "b")) == 1


OOM = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError(),
       RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")]  # fmt: skip


@pytest.mark.parametrize("error", OOM, ids=["device", "python", "host"])
def test_out_of_memory_names_phase_bucket_files_and_the_cheapest_change(
    toy, pictures, tmp_path, monkeypatch, capsys, error
):  # noqa: F811
    raised = failing(toy, pictures, tmp_path, error, monkeypatch)
    code, lines = ending(raised, capsys)
    assert code == 4 and len(lines) == 1
    assert re.search(
        r"out of memory in the forward and backward pass of a batch of [12] in bucket 64x64 \(\d\.png", lines[0]
    )
    assert "try --gradient_checkpointing or " in lines[0] and str(raised.bundle) in lines[0]


def test_out_of_memory_while_caching_says_so(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    import train_network
    from library.families import get_family

    def fails(*arguments):
        raise torch.OutOfMemoryError("no")

    from dataclasses import replace

    family = get_family("z_image")
    monkeypatch.setattr("library.families.z_image.Z_IMAGE", replace(family, encode_image=fails))
    match = r"in caching latents of a batch of 2 in bucket 64x64 \(\d\.png, .*; try --vae_batch_size 1 or"
    with pytest.raises(errors.OutOfMemoryError, match=match):
        train_network.main("z_image", arguments(toy, pictures, tmp_path, "--vae_batch_size", "2"))


def card(monkeypatch, total):
    """A GPU of which this run has everything."""
    facts = {"name": "card", "free": 0, "total": total, "reserved": total, "allocated": total}
    monkeypatch.setattr(crash, "memory", lambda: {"cuda:0": facts})


def test_on_a_card_the_planner_names_the_cheapest_settings_and_a_run_with_them_fits(
    toy, large_pictures, tmp_path, monkeypatch
):  # noqa: F811
    from library.memory import advice
    from train_network import NetworkTrainer

    options = parsed(toy, large_pictures, tmp_path / "a")
    trainer = NetworkTrainer(options)
    trainer.runtime = SimpleNamespace(now="the forward and backward pass", device=torch.device("cuda", 0))
    needed = real_peak(options, monkeypatch)
    with_it = real_peak(options.replace(gradient_checkpointing=True, output_dir=str(tmp_path / "b")), monkeypatch)
    assert with_it < 0.8 * needed
    card(monkeypatch, (needed + with_it) // 2)
    said = crash.out_of_memory(trainer, torch.OutOfMemoryError("no"))
    assert "the cheapest settings that fit are --gradient_checkpointing, by plan" in said
    told = float(re.search(r"by plan ([\d.]+) GB", said)[1]) * 1e9
    assert told == pytest.approx(with_it, rel=0.1, abs=5e6) and "about a third more time" in said
    card(monkeypatch, 2 * needed)  # it did not fit although the plan says so: never the settings that it has
    assert "that fit are --gradient_checkpointing" in crash.out_of_memory(trainer, torch.OutOfMemoryError("no"))
    card(monkeypatch, 1000)
    assert "it does not fit; closest is --gradient_checkpointing" in crash.out_of_memory(trainer, MemoryError())
    trainer.runtime.now = "caching text"
    said = crash.out_of_memory(trainer, MemoryError())
    assert f"the cheapest change is --text_encoder_cpu ({advice.TEXT_ON_CPU}); else try " in said


def test_a_planner_that_fails_or_takes_too_long_costs_nothing(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    from train_network import NetworkTrainer

    trainer = NetworkTrainer(parsed(toy, pictures, tmp_path))
    trainer.runtime = SimpleNamespace(now="the forward and backward pass", device=torch.device("cuda", 0))
    card(monkeypatch, 10**6)
    monkeypatch.setattr(crash, "_settings", lambda *_: time.sleep(5))
    began = time.monotonic()
    assert crash.by_plan(trainer, "", seconds=0.1) == "" and time.monotonic() - began < 3
    monkeypatch.setattr(crash, "_settings", lambda *_: 1 / 0)
    assert "; try --gradient_checkpointing or " in crash.out_of_memory(trainer, torch.OutOfMemoryError("no"))


def test_mistakes_in_options_leave_no_folder(toy, pictures, tmp_path):  # noqa: F811
    import train_network

    with pytest.raises(errors.ConfigError):
        train_network.main("z_image", arguments(toy, pictures, tmp_path, "--vae", str(tmp_path)))
    assert not (tmp_path / "crash").exists()


def test_only_the_last_folders_are_kept(tmp_path):
    recorder = crash.Recorder()
    plan = SimpleNamespace(output_dir=tmp_path, text="")
    recorder.trainer = SimpleNamespace(plan=plan)
    for k in range(8):
        recorder.options = SimpleNamespace(output_name=f"run{k}", to_toml=lambda: "", report=lambda: "")
        recorder.bundle(ValueError())
    assert sorted(p.name[:4] for p in (tmp_path / "crash").iterdir()) == [f"run{k}" for k in range(3, 8)]


# ---------------------------------------------------------------- watching


def test_a_step_that_hangs_is_told_with_its_stacks(capfd):
    watching = watch.Watch(None, print, beat=0.05, least=0.2)
    for number in range(5):
        watching.step(number)

    def where_it_hangs():
        time.sleep(1.6)

    where_it_hangs()
    watching.close()
    said = capfd.readouterr().err
    assert said.count("has been at step 5 (training)") == 1 and "where_it_hangs" in said


def test_the_heartbeat_says_where_the_run_is_and_goes_when_it_is_done(tmp_path):
    path = tmp_path / "beat.json"
    watching = watch.Watch(path, print, beat=0.05)
    watching.step(7)
    with watching.doing("saving"):
        time.sleep(0.3)
        content = json.loads(path.read_text())
    assert content["step"] == 7 and content["doing"] == "saving" and abs(content["time"] - time.time()) < 5
    watching.close()
    assert path.exists()
    watching.close(done=True)
    assert not path.exists()


def test_memory_that_runs_out_is_told_once(monkeypatch):
    said = []
    monkeypatch.setattr(watch, "memory_used", lambda: 0.95)
    watching = watch.Watch(None, said.append, beat=0.02)
    time.sleep(0.3)
    watching.close()
    assert len(said) == 1 and "95 % of this machine's memory" in said[0]
    assert 0 < (watch.memory_used() or 0.5) <= 1
