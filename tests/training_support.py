"""Runs of the real program on toy models: what the tests of the loop share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A complete set of random toy files of Z-Image; returns its toy.toml."""
    folder = tmp_path_factory.mktemp("toy")
    command = [sys.executable, "tools/make_toy_model.py", "--family", "z_image", "--output_dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "toy.toml"


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


def losses(output: Path, name: str = "run") -> list[float]:
    lines = (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
