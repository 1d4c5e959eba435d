"""Converting a LoRA of 1 GB between sd-scripts' and ComfyUI's names, against `cp` of the same file.

    python benchmarks/convert_lora.py [--gigabytes 1] [--repeats 5]

All alternate in one run, each to a file that does not exist yet; ratios of the medians. A file with sd-scripts' hashes
has them made anew, which takes SHA-256 over every byte: no copy from memory to memory can hide that, a disk does.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)


def write_lora(path: Path, size: int, metadata: dict[str, str]) -> None:
    """A LoRA with sd-scripts' names of about `size` bytes; written piece by piece."""
    from library.headers import TensorInfo
    from library.rename import header_bytes, layout

    count, tensors = 200, {}
    for k in range(count // 2):
        for word in ("lora_down", "lora_up"):
            each = size // count // 2 * 2
            tensors[f"lora_unet_double_blocks_{k}_img_mlp_fc1.{word}.weight"] = TensorInfo(
                "BF16", (each // 2, 1), 0, each
            )
    with open(path, "wb") as file:
        file.write(header_bytes(layout(tensors), {"ss_network_dim": "16"} | metadata))
        block = bytes(range(256)) * 4096
        left = sum(info.end for info in tensors.values())
        while left:
            left -= file.write(block[: min(left, len(block))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    script = str(ROOT / "networks" / "convert_hunyuan_image_lora_to_comfy.py")
    with tempfile.TemporaryDirectory() as folder:
        plain, hashed, target = (Path(folder) / f"{name}.safetensors" for name in ("plain", "hashed", "target"))
        write_lora(plain, int(arguments.gigabytes * 1e9), {})
        write_lora(hashed, int(arguments.gigabytes * 1e9), {"sshs_model_hash": "0" * 64})
        commands = {"cp": [shutil.which("cp"), str(plain), str(target)],
                    "convert": [sys.executable, script, str(plain), str(target)],
                    "convert with hashes": [sys.executable, script, str(hashed), str(target)]}  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(arguments.repeats + 1):
            for name, command in commands.items():
                target.unlink(missing_ok=True)
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name} {value:.2f} s, ratio {value / medians['cp']:.2f}" + (" (target 1.5)" if name != "cp" else ""))


if __name__ == "__main__":
    main()
