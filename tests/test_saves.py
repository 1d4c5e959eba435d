"""Saves that lose nothing: whole or not there, a full disk pauses, older ones go last; kill -9 at random moments."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_support import ROOT, arguments, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import checkpoints, saving, state
from library.errors import ConfigError, DiskError, Interrupted, NonFiniteError

FULL = OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------- one file


def test_a_file_that_reads_back_differently_never_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    checkpoints.save({"a": torch.ones(4)}, path)
    real = checkpoints.flush

    def failing_disk(partial):
        data = bytearray(partial.read_bytes())
        data[-1] ^= 1
        partial.write_bytes(data)
        real(partial)

    monkeypatch.setattr(checkpoints, "flush", failing_disk)
    with pytest.raises(DiskError, match="a was written but reads back differently"):
        checkpoints.save({"a": torch.zeros(4)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(4)) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_number_format_is_compared_byte_by_byte(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "nan": torch.tensor([float("nan")])}
    checkpoints.save(tensors, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("written", [b"", b"\x00" * 40, None])
def test_a_foreign_writer_that_leaves_no_whole_file_is_noticed(tmp_path, written):
    with pytest.raises(DiskError), checkpoints.publishing(tmp_path / "x.safetensors") as partial:
        if written is not None:
            partial.write_bytes(written)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- states


class Fixed:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, content):
        self.value = content["value"]


def write(folder, step=3, value=1.0):
    origin = state.Origin({"seed": 1})
    tensors = {"w": torch.full((4,), value)}
    path = state.state_path(folder, "run", step)
    state.save_state(path, tensors, {"optimizer": Fixed(torch.tensor(value))}, state.Position(step), origin)
    return path


def test_a_state_that_replaces_another_leaves_the_old_one_readable_until_it_has_its_name(tmp_path, monkeypatch):
    path, moves, real = write(tmp_path, value=1.0), [], os.replace

    def dies_after(count):
        def replace(source, target):
            real(source, target)
            if Path(source).parent == tmp_path or Path(target).parent == tmp_path:
                moves.append(target)
                if len(moves) == count:
                    raise KeyboardInterrupt

        return replace

    monkeypatch.setattr(os, "replace", dies_after(1))  # the old one has gone aside, the new one has no name yet
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, value=2.0)
    monkeypatch.setattr(os, "replace", real)
    found, _ = state.find_state("auto", [tmp_path], "run")
    assert found is not None and torch.equal(load_file(found / state.WEIGHTS)["w"], torch.ones(4))
    state.recover(tmp_path, "run")
    assert state.find_state("auto", [tmp_path], "run")[0] == path
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_auto_passes_over_a_damaged_state_by_name_and_a_named_one_is_refused(tmp_path, file, how):
    older, newest = write(tmp_path, 3), write(tmp_path, 5)
    data = bytearray((newest / file).read_bytes())
    data[len(data) // 2] ^= 8
    if how == "gone":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(data if how == "flipped" else data[: len(data) // 2])
    found, notes = state.find_state("auto", [tmp_path], "run")
    assert found == older and len(notes) == 1 and newest.name in notes[0]
    with pytest.raises(ConfigError, match=newest.name):
        state.read_state(newest, state.Origin({"seed": 1}), False)


def test_only_what_this_name_left_behind_is_cleared(tmp_path):
    mine = [
        ".run.safetensors.01234567.partial",
        ".run-step00000003-state.89abcdef.partial",
        ".run-000001.safetensors.aaaaaaaa.partial",
        ".run-best-ema.safetensors.aaaaaaaa.partial",
    ]
    others = [".run2.safetensors.01234567.partial", ".run-b-step00000003-state.01234567.partial", "run.partial"]
    for name in mine + others:  # a link to the best weights is a file
        (tmp_path / name).write_bytes(b"half") if "best" in name else (tmp_path / name).mkdir()
    state.recover(tmp_path, "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)


def test_what_is_pruned_is_of_this_name_and_never_the_newest(tmp_path):
    for step in (2, 4, 6, 8):
        for name in (f"run-step{step:08d}", f"run-step{step:08d}-ema", f"run-b-step{step:08d}", f"run-00000{step}"):
            (tmp_path / f"{name}.safetensors").write_bytes(b"")
        (tmp_path / f"run-step{step:08d}-state").mkdir()
    options = SimpleNamespace(
        output_name="run",
        save_last_n_epochs=2,
        save_last_n_steps=3,
        save_last_n_epochs_state=None,
        save_last_n_steps_state=None,
    )
    gone = {p.name for p in saving.doomed(options, tmp_path, 5, 8)}
    steps = {f"run-step{s:08d}{e}.safetensors" for s in (2, 4) for e in ("", "-ema")}
    assert gone == steps | {
        "run-000002.safetensors",
        "run-000004.safetensors",
        "run-step00000002-state",
        "run-step00000004-state",
    }
    options = SimpleNamespace(**{**vars(options), "save_last_n_epochs": 1, "save_last_n_steps": None})
    assert "run-000008.safetensors" not in {p.name for p in saving.doomed(options, tmp_path, 5, 8, coming=1)}


# ---------------------------------------------------------------- a full disk


def full_for(monkeypatch, where: Path, times: float):
    """`where` has no room for the first `times` attempts."""
    real, left = checkpoints.check_writable, [times]

    def check(folder, needed):
        if Path(folder).resolve().is_relative_to(where.resolve()) and needed and left[0] > 0:
            left[0] -= 1
            raise DiskError(f"{folder}: 1 MB are needed, 0 MB are free; make room")
        real(folder, needed)

    monkeypatch.setattr(checkpoints, "check_writable", check)
    monkeypatch.setattr(saving, "PAUSE", 0.01)


def test_a_full_disk_pauses_the_run_which_goes_on_to_the_same_end(toy, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    extra = ("--max_train_steps", "4", "--learning_rate", "1e-2")
    train(toy, pictures, tmp_path / "a", *extra)
    full_for(monkeypatch, tmp_path / "b", 3)
    train(toy, pictures, tmp_path / "b", *extra, "--save_every_n_steps", "2")
    said = capsys.readouterr().out
    assert said.count("PAUSED at step 2") == 1 and "goes on by itself" in said and "the run goes on\n" in said
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_full_disk_with_a_fallback_folder_saves_there_and_resumes_from_there(
    toy, pictures, tmp_path, monkeypatch, capsys
):  # noqa: F811
    extra = ("--max_train_steps", "6", "--learning_rate", "1e-2", "--fallback_output_dir", str(tmp_path / "other"))
    train(toy, pictures, tmp_path / "whole", *extra[:4])
    full_for(monkeypatch, tmp_path / "a", 10**9)
    train(toy, pictures, tmp_path / "a", *extra, "--save_every_n_steps", "4", "--save_state")
    assert "is in" in capsys.readouterr().out
    assert not list((tmp_path / "a").glob("*.safetensors")) and (tmp_path / "other" / "run.safetensors").exists()
    shutil.rmtree(tmp_path / "other" / "run-step00000006-state")
    monkeypatch.undo()
    train(toy, pictures, tmp_path / "a", *extra, "--resume", "auto")
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("whole", "a"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_stop_while_the_disk_is_full_ends_the_pause(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    full_for(monkeypatch, tmp_path, 10**9)
    timer = threading.Timer(1.5, lambda: (tmp_path / "STOP").write_text(""))
    timer.start()
    with pytest.raises(Interrupted, match="while the disk was full"):
        train(toy, pictures, tmp_path, "--max_train_steps", "2")
    timer.cancel()


def test_what_was_to_go_anyway_goes_early_where_the_disk_is_full_and_the_last_one_never(
    toy, pictures, tmp_path, monkeypatch, capsys
):  # noqa: F811
    real, room = checkpoints.check_writable, 3

    def check(folder, needed):
        real(folder, needed)
        if needed and len(list(tmp_path.glob("run-step*.safetensors"))) >= room:
            raise DiskError(f"{folder}: no room")

    monkeypatch.setattr(checkpoints, "check_writable", check)
    train(toy, pictures, tmp_path, "--max_train_steps", "6", "--save_every_n_steps", "1", "--save_last_n_steps", "2")
    assert "before the new save, because the disk is full" in capsys.readouterr().out
    assert (tmp_path / "run.safetensors").exists()


def test_what_will_be_written_is_told_at_the_start_and_that_it_does_not_fit(
    toy, pictures, tmp_path, monkeypatch, capsys
):  # noqa: F811
    trainer = train(toy, pictures, tmp_path, "--max_train_steps", "2", "--save_every_n_steps", "1", "--save_state")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("disk: "))
    found = re.fullmatch(
        r"disk: 2 files of ([\d.]+) MB and 2 states of about ([\d.]+) MB, (\d+) MB in all; .*are free", line
    )
    file, held, total = map(float, found.groups())
    sizes = [path.stat().st_size / 1e6 for path in tmp_path.glob("*.safetensors")]
    states = [sum(p.stat().st_size for p in path.iterdir()) / 1e6 for path in tmp_path.glob("*-state")]
    assert len(sizes) == len(states) == 2 and max(sizes) == pytest.approx(file, abs=0.1)
    assert max(states) == pytest.approx(held, rel=0.1) and sum(sizes) + sum(states) == pytest.approx(total, abs=1)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    assert trainer.outputs.saves.forecast().endswith("1 MB are free; the run will pause when there is no room")
    first = next(json.loads(text) for text in (tmp_path / "run.jsonl").read_text().splitlines())
    assert first["event"] == "first step begins" and 0 < first["seconds"]["start to first step"] < 600


def test_an_old_save_is_removed_only_after_the_new_one_is_whole(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    seen, real = [], saving.remove

    def remove(path):
        newest = max(tmp_path.glob("run-step*.safetensors"))
        with safe_open(newest, "pt") as file:
            seen.append((path.name, newest.name, len(list(file.keys()))))
        real(path)

    monkeypatch.setattr(saving, "remove", remove)
    train(toy, pictures, tmp_path, "--max_train_steps", "5", "--save_every_n_steps", "1", "--save_last_n_steps", "1")
    assert seen and all(old < new and count for old, new, count in seen)


def test_a_save_that_fails_for_another_reason_does_not_end_the_training(toy, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    from networks.adapter import AdapterNetwork

    real, calls = AdapterNetwork.save_weights, []

    def fails_once(self, *arguments):
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("boom")
        return real(self, *arguments)

    monkeypatch.setattr(AdapterNetwork, "save_weights", fails_once)
    train(toy, pictures, tmp_path, "--max_train_steps", "2", "--save_every_n_steps", "1")
    assert "saving run-step00000001.safetensors failed (ValueError: boom)" in capsys.readouterr().out
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["run.safetensors"]


def test_weights_that_are_no_numbers_never_replace_a_file(toy, pictures, tmp_path):  # noqa: F811
    trainer = train(toy, pictures, tmp_path, "--max_train_steps", "1")
    before = (tmp_path / "run.safetensors").read_bytes()
    parameter = next(iter(trainer.trained.values()))
    with torch.no_grad():
        parameter.flatten()[0] = float("nan")
    with pytest.raises(NonFiniteError, match="was not saved"):
        trainer.outputs.saves.weights("run.safetensors", {}, must=True)
    with torch.no_grad():
        parameter.flatten()[0] = 1e6
    trainer.runtime.save_dtype = lambda: torch.float16
    with pytest.raises(NonFiniteError, match="--save_precision"):
        trainer.outputs.saves.weights("run.safetensors", {}, must=True)
    assert (tmp_path / "run.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_disk_that_is_really_too_small(toy, pictures, tmp_path):  # noqa: F811
    """A file system of 80 MB that somebody fills: the run pauses, and goes on when there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting needs root")
    try:
        run = start(toy, pictures, disk, "--max_train_steps", "12", "--save_every_n_steps", "1", "--save_state")
        wait_for(lambda: "saved run-step" in run.text(), 120)
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        wait_for(lambda: "PAUSED" in run.text(), 60)
        assert run.process.poll() is None and "No space left" in run.text() or "are needed" in run.text()
        check_names(disk)
        (disk / "ballast").unlink()
        assert run.process.wait(120) == 0, run.text()[-2000:]
        assert "the run goes on" in run.text() and (disk / "run.safetensors").is_file()
        check_names(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- kill -9


def start(toy, pictures, output, *extra):  # noqa: F811
    """The program in a process of its own, its output in a file."""
    output.mkdir(exist_ok=True)
    log = output.parent / f"{output.name}.log"
    command = [sys.executable, "z_image_train_network.py", *arguments(toy, pictures, output, *extra)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    return SimpleNamespace(process=process, text=lambda: log.read_text(errors="replace"))


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def check_names(output: Path) -> int:
    """Every file with a final name is whole; returns how many were looked at."""
    looked = 0
    for path in output.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            checkpoints.read_header(path)
            load_file(path)
        elif path.name.endswith("-state"):
            assert not state.damage(path), (path, state.damage(path))
        looked += 1
    return looked


SAVING = ("--save_every_n_steps", "1", "--save_state", "--save_last_n_steps", "2", "--learning_rate", "1e-2")


def forked(toy, pictures, output, *extra) -> int:  # noqa: F811
    """A run in a forked child, which needs no imports; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        train(toy, pictures, output, *extra)
        os._exit(0)
    except BaseException:
        os._exit(1)


def kill_and_resume(toy, pictures, output, kills: int, steps: int, seed: int):  # noqa: F811
    """Kill a run that saves all the time, resume it, until it ends; returns the facts."""
    rng, facts = random.Random(seed), {"kills": 0, "looked": 0, "with partials": 0, "resumes": 0}
    extra = (*SAVING, "--max_train_steps", str(steps))
    while True:
        child = forked(toy, pictures, output, *extra, "--resume", "auto")
        facts["resumes"] += 1
        if facts["kills"] < kills:
            log = output / "run.jsonl"
            began, size = time.monotonic(), log.stat().st_size if log.exists() else 0
            while time.monotonic() - began < 60 and (not log.exists() or log.stat().st_size <= size):
                time.sleep(0.002)  # until it trains
                size = min(size, log.stat().st_size) if log.exists() else 0
            time.sleep(rng.uniform(0.0, 0.25))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        facts["looked"] += check_names(output)
        facts["with partials"] += any(p.name.endswith((".partial", ".old")) for p in output.iterdir())
        if os.WIFSIGNALED(status):
            facts["kills"] += 1
            continue
        assert os.WEXITSTATUS(status) == 0, "a resume failed"
        return facts


def kills_lose_nothing(toy, pictures, tmp_path, kills, steps, seed):  # noqa: F811
    train(toy, pictures, tmp_path / "whole", "--max_train_steps", str(steps), "--learning_rate", "1e-2")
    facts = kill_and_resume(toy, pictures, tmp_path / "killed", kills, steps, seed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not [p for p in (tmp_path / "killed").iterdir() if p.name.startswith(".")]
    return facts


def test_kill_9_while_saving_loses_nothing(toy, pictures, tmp_path):  # noqa: F811
    facts = kills_lose_nothing(toy, pictures, tmp_path, kills=4, steps=16, seed=0)
    assert facts["kills"] >= 1


@pytest.mark.slow
def test_kill_9_at_200_random_moments_loses_nothing(toy, pictures, tmp_path):  # noqa: F811
    facts = kills_lose_nothing(toy, pictures, tmp_path, kills=200, steps=600, seed=1)
    print(json.dumps(facts))
    assert facts["kills"] == 200
