"""Several processes: the same run as one, stops that all take together, and a death that ends the others with a reason.

The processes are forked, so that they need no imports; the collectives are gloo's.
"""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from oracles import relative
from safetensors.torch import load_file
from training_support import losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import errors

RUN = ("--max_train_steps", "6", "--learning_rate", "1e-2")


class Forked:
    """`world` processes that run `work(rank)`; their exit codes and what they printed."""

    def __init__(self, folder: Path, world: int, work) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process{rank}.log" for rank in range(world)]
        self.ids = [self._fork(rank, world, work) for rank in range(world)]

    def _fork(self, rank: int, world: int, work) -> int:
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            output = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            self._become(rank, world)
            errors.run(lambda: work(rank))
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)

    def _become(self, rank: int, world: int) -> None:
        """What a launcher sets, and stdout and stderr into the log whatever the test runner did to them."""
        import sys

        from accelerate.state import AcceleratorState, GradientState, PartialState

        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        AcceleratorState._reset_state(True), GradientState._reset_state()
        PartialState._reset_state() if hasattr(PartialState, "_reset_state") else None
        torch.set_num_threads(1)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes; negative for a signal. Fails if one is still there after `seconds`."""
        end, codes = time.monotonic() + seconds, {}
        while len(codes) < len(self.ids):
            for child in set(self.ids) - codes.keys():
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                for child in set(self.ids) - codes.keys():
                    os.kill(child, signal.SIGKILL)
                pytest.fail(f"hung after {seconds} s: {self.text(0)[-1500:]}\n---\n{self.text(-1)[-1500:]}")
            time.sleep(0.02)
        return [codes[child] for child in self.ids]

    def text(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")


def run_all(folder: Path, world: int, work) -> Forked:
    forked = Forked(folder, world, work)
    assert forked.wait() == [0] * world, forked.text(0)[-3000:] + forked.text(-1)[-3000:]
    return forked


def logged(output: Path, key: str) -> list:
    lines = (output / "run.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry[key] for entry in map(json.loads, lines) if "loss" in entry]


def steps_of(output: Path) -> int:
    return len(losses(output)) if (output / "run.jsonl").exists() else 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory, pictures):  # noqa: F811
    """Two captioned pictures, and dataset files with batches of one and of two."""
    folder = tmp_path_factory.mktemp("pair")
    source = pictures.with_suffix("")
    for name in ("0.png", "0.txt", "1.png", "1.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    files = {}
    for size in (1, 2):
        files[size] = folder.parent / f"pair{size}.toml"
        text = pictures.read_text(encoding="utf-8").replace("batch_size = 2", f"batch_size = {size}")
        files[size].write_text(
            re.sub(r"image_dir = .*", f"image_dir = {json.dumps(str(folder))}", text), encoding="utf-8"
        )
    return files


def test_two_processes_are_one_with_twice_the_batch(toy, pair, tmp_path):  # noqa: F811
    extra = (*RUN, "--lr_scheduler", "cosine", "--lr_warmup_steps", "3")
    train(toy, pair[2], tmp_path / "one", *extra)
    disk = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(tmp_path / "cache"))
    run_all(tmp_path / "logs", 2, lambda rank: train(toy, pair[1], tmp_path / "two", *extra, *disk))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 + 3  # latents; captions and the empty one
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert logged(tmp_path / "one", "lr") == logged(tmp_path / "two", "lr")
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("one", "two"))
    flat = [torch.cat([weights[key].flatten() for key in sorted(weights)]) for weights in (one, two)]
    assert relative(flat[1], flat[0]) < 1e-3


def test_two_processes_resume_to_the_bit(toy, pictures, tmp_path):  # noqa: F811
    parts = tmp_path / "parts"
    run_all(tmp_path / "log1", 2, lambda rank: train(toy, pictures, tmp_path / "whole", *RUN))
    first = (*RUN, "--save_every_n_steps", "3", "--save_state")
    run_all(tmp_path / "log2", 2, lambda rank: train(toy, pictures, parts, *first))
    state = str(parts / "run-step00000003-state")
    run_all(tmp_path / "log3", 2, lambda rank: train(toy, pictures, parts, *RUN, "--resume", state))
    assert losses(tmp_path / "whole") == losses(parts)
    one, two = (load_file(folder / "run.safetensors") for folder in (tmp_path / "whole", parts))
    assert all(torch.equal(one[key], two[key]) for key in one)


LONG = ("--max_train_steps", "400", "--learning_rate", "1e-3")


def wait_for_steps(output: Path, count: int) -> None:
    end = time.monotonic() + 90
    while steps_of(output) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stop_that_reaches_one_process_is_taken_by_all_after_the_same_step(toy, pictures, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    forked = Forked(tmp_path / "log", 2, lambda rank: train(toy, pictures, output, *LONG))
    wait_for_steps(output, 3)
    os.kill(forked.ids[1], signal.SIGTERM)
    assert forked.wait(60) == [130, 130], forked.text(0)[-2000:] + forked.text(1)[-2000:]
    after = [re.search(r"stopped after step (\d+)", forked.text(rank))[1] for rank in (0, 1)]
    assert after[0] == after[1] and (output / f"run-step{int(after[0]):08d}-state").is_dir()
    assert "--resume" in forked.text(0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_a_reason(toy, pictures, tmp_path, victim):  # noqa: F811
    output = tmp_path / "out"
    forked = Forked(tmp_path / "log", 2, lambda rank: train(toy, pictures, output, *LONG))
    wait_for_steps(output, 3)
    os.kill(forked.ids[victim], signal.SIGKILL)
    began = time.monotonic()
    codes = forked.wait(60)
    said = forked.text(1 - victim)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == errors.ProcessError.exit_code, said[-2000:]
    assert time.monotonic() - began < 30 and "another process of this run has ended" in said and "Traceback" not in said


def test_a_bad_batch_of_one_process_is_skipped_by_both(toy, pictures, tmp_path):  # noqa: F811
    from test_health import poison, prepared

    def work(rank):
        trainer = prepared(toy, pictures, tmp_path / "out")
        poison(trainer, "3.png")
        trainer.train()
        (tmp_path / f"skipped{rank}").write_text(str(trainer.position.skipped))
        torch.save(dict(trainer.trained), tmp_path / f"weights{rank}.pt")

    run_all(tmp_path / "log", 2, work)
    skipped = [int((tmp_path / f"skipped{rank}").read_text()) for rank in (0, 1)]
    one, two = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    assert skipped[0] == skipped[1] >= 2 and all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.isfinite(value).all() for value in one.values()) and list(
        (tmp_path / "out" / "bad_batch").iterdir()
    )


# ---------------------------------------------------------------- waiting


def rendezvous(rank: int, minutes: float):
    from library.processes import Processes

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    return Processes(rank, 2, minutes)


def test_a_process_waits_for_another_as_long_as_that_one_lives(tmp_path, monkeypatch):
    from library import processes

    monkeypatch.setattr(processes, "BEAT", 0.1)
    monkeypatch.setattr(processes, "TELL", 1.0)

    def work(rank):
        together = rendezvous(rank, 0.5 / 60)  # half a second without a sign of life is a death
        time.sleep(2.5 * rank)  # a long work of process 1, which gives signs of life meanwhile
        together.wait("caching")
        print("through", flush=True)

    forked = run_all(tmp_path, 2, work)
    assert "process 0 waits at 'caching'" in forked.text(0) and "process 1 is at start" in forked.text(0)


def test_a_process_that_hangs_is_named_after_the_stated_time(tmp_path, monkeypatch):
    from library import processes

    monkeypatch.setattr(processes, "BEAT", 0.1)

    def work(rank):
        together = rendezvous(rank, 1 / 60)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        together.wait("caching")

    forked, began = Forked(tmp_path, 2, work), time.monotonic()
    while time.monotonic() - began < 30 and "no sign of life" not in forked.text(0):
        time.sleep(0.05)
    os.kill(forked.ids[1], signal.SIGKILL)
    codes = forked.wait(20)
    assert codes[0] == errors.ProcessError.exit_code
    assert re.search(r"process 1 has shown no sign of life for 1 s while process 0 waited at 'caching", forked.text(0))
