"""Preparing a dataset without encoding, against a plain loop that does what has to be done anyway.

    python benchmarks/dataset_preparation.py [--pictures 20000] [--repeats 5]

The plain loop lists the folder, reads each size from the picture's header with PIL and each caption. `first` is a
start without an index, `second` one that finds it. All are timed alternately in one run; ratios of medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from library import option_table
from library.data.dataset import prepare


def make_pictures(folder: Path, count: int) -> Path:
    """`count` small pictures of three sizes with captions, and their dataset file."""
    import io

    from PIL import Image

    pictures = folder / f"pictures{count}"
    pictures.mkdir()
    files = []
    for size in ((64, 64), (96, 64), (64, 96)):
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, "PNG")
        files.append(buffer.getvalue())
    for k in range(count):
        (pictures / f"{k:06d}.png").write_bytes(files[k % 3])
        (pictures / f"{k:06d}.txt").write_text(f"a picture of thing {k}, red, plain", encoding="utf-8")
    path = folder / f"{count}.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\n"
        "bucket_reso_steps = 16\n"
        f"[[datasets.subsets]]\nimage_dir = '{pictures.as_posix()}'\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return path


def plain(folder: Path) -> int:
    from PIL import Image

    total = 0
    for name in os.listdir(folder):
        if name.endswith(".png"):
            with Image.open(folder / name) as image:
                total += image.size[0]
            with open(folder / (name[:-4] + ".txt"), encoding="utf-8") as file:
                total += len(file.read())
    return total


def measure(count: int, repeats: int) -> tuple[float, float, float]:
    """Median seconds of the plain loop, a first start and a second start."""
    values = {option.name: option.default for option in option_table.OPTIONS}
    with tempfile.TemporaryDirectory() as folder:
        config = make_pictures(Path(folder), count)
        pictures = Path(folder) / f"pictures{count}"
        options = SimpleNamespace(**{**values, "dataset_config": str(config)})
        times: tuple[list[float], ...] = ([], [], [])
        for _ in range(repeats + 1):  # the first round warms the disk cache and is left out
            shutil.rmtree(pictures / ".lorasmith", ignore_errors=True)
            for k, work in enumerate((lambda: plain(pictures), *[lambda: prepare(options, None, 16)] * 2)):
                start = time.perf_counter()
                work()
                times[k].append(time.perf_counter() - start)
        return tuple(statistics.median(values[1:]) for values in times)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    for count in (arguments.pictures // 2, arguments.pictures):
        loop, first, second = measure(count, arguments.repeats)
        print(
            f"{count} pictures: plain loop {loop:.2f} s, first start {first:.2f} s "
            f"(ratio {first / loop:.2f}, target 1.0), "
            f"second start {second:.2f} s (ratio {second / loop:.2f}, target 0.25)"
        )


if __name__ == "__main__":
    main()
