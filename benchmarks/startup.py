"""How long a start takes: `--help`, and process start to first step against the imports that it needs.

    python benchmarks/startup.py CONFIG.toml [--repeats 3]

CONFIG is any complete configuration with a dataset; the run is cut after its first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (
    "import torch, accelerate, safetensors, numpy, PIL.Image, cv2;"
    "from diffusers import ZImageTransformer2DModel, AutoencoderKL;"
    "from transformers import Qwen3Model, AutoTokenizer"
)


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(config: str) -> tuple[float, dict]:
    """Seconds from the start of the process to the beginning of its first step, and what the trainer says it did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "z_image_train_network.py", "--config_file", config, "--output_dir", folder]
        command += [
            "--output_name",
            "start",
            "--max_train_steps",
            "1",
            "--cache_latents",
            "--cache_text_encoder_outputs",
        ]
        start = time.time()
        seconds(command)
        lines = (Path(folder) / "start.jsonl").read_text(encoding="utf-8").splitlines()
        line = next(entry for entry in map(json.loads, lines) if entry.get("event") == "first step begins")
        return line["time"] - start, line["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    helps, imports, runs = [], [], []
    for _ in range(arguments.repeats):
        helps.append(seconds([sys.executable, "z_image_train_network.py", "--help"]))
        imports.append(seconds([sys.executable, "-c", IMPORTS]))
        runs.append(first_step(arguments.config))
    median = statistics.median
    start, parts = median([run[0] for run in runs]), runs[-1][1]
    print(
        f"--help {median(helps):.2f} s; imports alone {median(imports):.2f} s; "
        f"process start to first step {start:.2f} s, "
        f"ratio {start / median(imports):.2f} (target 1.3)"
    )
    print("of the last run: " + ", ".join(f"{name} {value:.2f} s" for name, value in parts.items()))


if __name__ == "__main__":
    main()
