"""How long a start takes: `--help`, and process start to first step against the imports that it needs.

    python benchmarks/startup.py CONFIG.toml [--repeats 3]

CONFIG is any complete configuration (a toy model's toy.toml, say); the run is cut after its first step.
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
    """Seconds from process start to the beginning of the first step, as the trainer's own clock has them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "z_image_train_network.py",
            "--config_file",
            config,
            "--output_dir",
            folder,
            "--output_name",
            "start",
            "--max_train_steps",
            "1",
            "--sample_prompts",
            "none",
        ]
        total = seconds(command)
        line = json.loads((Path(folder) / "start.jsonl").read_text(encoding="utf-8").splitlines()[0])
        return total, line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    helps, imports, runs = [], [], []
    for _ in range(arguments.repeats):
        helps.append(seconds([sys.executable, "z_image_train_network.py", "--help"]))
        imports.append(seconds([sys.executable, "-c", IMPORTS]))
        runs.append(first_step(arguments.config)[0])
    median = statistics.median
    print(
        f"--help {median(helps):.2f} s; imports {median(imports):.2f} s; a whole run of one step {median(runs):.2f} s; "
        f"ratio {median(runs) / median(imports):.2f} (target 1.3 for process start to first step)"
    )


if __name__ == "__main__":
    main()
