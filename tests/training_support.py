"""Runs of the real program on toy models: what the tests of the loop share."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from studio_support import make_toy

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A complete set of random toy files of Z-Image; returns its toy.toml."""
    return make_toy("z_image", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Five captioned 64-pixel pictures and a dataset file; returns the dataset file."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for k in range(5):
        coarse = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a picture of thing {k}", encoding="utf-8")
    path = folder.parent / f"{folder.name}.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return path


def arguments(toy: Path, pictures: Path, output: Path, *extra: str) -> list[str]:
    return [
        "--config_file",
        str(toy),
        "--dataset_config",
        str(pictures),
        "--output_dir",
        str(output),
        "--output_name",
        "run",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        *extra,
    ]


def train(toy: Path, pictures: Path, output: Path, *extra: str):
    """Train in this process; returns the trainer."""
    from library import options
    from train_network import NetworkTrainer

    torch.set_num_threads(1)
    trainer = NetworkTrainer(options.parse("z_image", arguments(toy, pictures, output, *extra), "test"))
    trainer.run()
    return trainer


def launch(*argv: str, script: str = "z_image_train_network.py", **environment: str) -> subprocess.CompletedProcess:
    """Run the script in a process of its own."""
    import os

    return subprocess.run(
        [sys.executable, script, *argv], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def called(script: str, *argv: str) -> subprocess.CompletedProcess:
    """Run the script as a program in this process, which has imported already what a new one takes seconds for."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patched.chdir(ROOT)
        patched.setattr(sys, "argv", [script, *argv])
        patched.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess([script, *argv], code, out.getvalue(), err.getvalue())


def losses(output: Path, name: str = "run") -> list[float]:
    lines = (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
