"""Stops, saves and samples on demand: what is asked for is done, and nothing is lost by it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from test_saves import start, wait_for
from training_support import ROOT, arguments, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import stops
from library.errors import Interrupted

STEPS = ("--max_train_steps", "16", "--learning_rate", "1e-2")


def command_of(text: str) -> list[str]:
    return shlex.split(re.search(r"continue with:\n  (.*)", text)[1])


def same_weights(one, two):
    a, b = load_file(one / "run.safetensors"), load_file(two / "run.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def steps_of(output) -> int:
    return len(losses(output)) if (output / "run.jsonl").exists() else 0


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_saves_and_prints_the_command_that_goes_on_to_the_same_end(toy, pictures, tmp_path):  # noqa: F811
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    train(toy, pictures, whole, *STEPS)
    run = start(toy, pictures, output, *STEPS)
    wait_for(lambda: steps_of(output) >= 3, 120)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130, run.text()[-2000:]
    said = run.text()
    assert "Traceback" not in said and "stopping after this step" in said
    assert len(list(output.glob("run-step*-state"))) == 1 and len(list(output.glob("run-step*.safetensors"))) == 1
    assert not (output / "run.safetensors").exists()
    done = subprocess.run(command_of(said), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(whole) == losses(output) and same_weights(whole, output)


def send_soon(number: int, output, after: int):
    """A signal to this process once the run has taken some steps."""

    def wait():
        while steps_of(output) < after:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_loses_nothing(toy, pictures, tmp_path):  # noqa: F811
    """The same in this process: stopped, resumed, and at the end the losses and weights of a run that never stopped."""
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    train(toy, pictures, whole, *STEPS)
    send_soon(signal.SIGINT, output, 3)
    with pytest.raises(Interrupted):
        train(toy, pictures, output, *STEPS)
    assert 3 <= len(losses(output)) < 16 and len(list(output.glob("run-step*-state"))) == 1
    train(toy, pictures, output, *STEPS, "--resume", "auto")
    assert losses(whole) == losses(output) and same_weights(whole, output)


def test_sigterm_is_a_stop_and_the_handlers_are_put_back(toy, pictures, tmp_path):  # noqa: F811
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    send_soon(signal.SIGTERM, tmp_path, 2)
    with pytest.raises(Interrupted, match="nothing is lost") as stop:
        train(toy, pictures, tmp_path, *STEPS)
    assert stop.value.exit_code == 130 and "--resume" in str(stop.value)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_sigusr1_and_the_file_save_write_state_and_network_and_the_run_goes_on(toy, pictures, tmp_path):  # noqa: F811
    send_soon(signal.SIGUSR1, tmp_path, 2)
    train(toy, pictures, tmp_path, *STEPS)
    states = list(tmp_path.glob("run-step*-state"))
    assert len(states) == 1 and (tmp_path / f"{states[0].name.removesuffix('-state')}.safetensors").is_file()
    assert len(losses(tmp_path)) == 16


def touch_soon(output, name: str, after: int):
    def wait():
        while steps_of(output) < after:
            time.sleep(0.005)
        (output / name).write_text("")

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("name", ["SAVE", "SAMPLE", "STOP"])
def test_a_file_in_the_output_folder_does_what_it_says_and_goes(toy, pictures, tmp_path, name, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stops, "LOOK", 0.0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a picture --s 1 --w 32 --h 32\n", encoding="utf-8")
    output = tmp_path / "out"
    touch_soon(output, name, 2)
    extra = (*STEPS, *(("--sample_prompts", str(prompts)) if name == "SAMPLE" else ()))
    if name == "STOP":
        with pytest.raises(Interrupted):
            train(toy, pictures, output, *extra)
        assert len(losses(output)) < 16
    else:
        train(toy, pictures, output, *extra)
    assert not (output / name).exists()
    assert bool(list(output.glob("run-step*-state"))) == (name != "SAMPLE")
    pictures_made = {path.name.split("_")[1] for path in (output / "sample").glob("*.png")} if name == "SAMPLE" else {0}
    assert len(pictures_made) == (2 if name == "SAMPLE" else 1)  # on demand, and at the end


def test_a_wish_that_was_left_from_before_is_removed_and_told(toy, pictures, tmp_path, capsys):  # noqa: F811
    (tmp_path / "STOP").write_text("")
    train(toy, pictures, tmp_path, "--max_train_steps", "2")
    assert "removed the file STOP" in capsys.readouterr().out and len(losses(tmp_path)) == 2


PROGRAM = """
import sys, time
from pathlib import Path
from library.errors import run
from library.stops import Stops
def main():
    with Stops(Path(sys.argv[1])) as stops:
        stops.in_loop = sys.argv[2] != "before"
        print("ready", flush=True)
        if sys.argv[2] == "stuck":
            import hashlib
            hashlib.pbkdf2_hmac("sha256", b"x", b"x", 10**9)  # minutes in C, no bytecode
        while True:
            time.sleep(0.01)
run(main)
"""


def program(tmp_path, how: str):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), how], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("how", ["loop", "stuck"])
def test_the_second_signal_ends_at_once_whatever_the_process_is_doing(tmp_path, how):
    process = program(tmp_path, how)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # what a launcher passes on of the same Ctrl-C does not count
    time.sleep(stops.SAME + 0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130 and time.monotonic() - began < 1
    assert "ended at once" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_loop_ends_with_130_and_the_command(tmp_path, number):
    process = program(tmp_path, "before")
    process.send_signal(number)
    assert process.wait(5) == 130
    said = process.stderr.read()
    assert "start again with" in said and "Traceback" not in said


@pytest.mark.parametrize("given", [[], ["--resume", "old"], ["--resume=old"]])
def test_the_resume_command_is_the_line_that_started_the_run(monkeypatch, given, tmp_path):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train_network.py", "--seed", "3", *given, "--output_name", "a b"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    words = ["python", "train_network.py", "--seed", "3", "--output_name", "a b", "--resume", str(tmp_path)]
    assert shlex.split(stops.resume_command(tmp_path)) == words
