"""Caching latents to disk, against the bare VAE encode of the same batches already in memory.

    python benchmarks/cache_latents.py [--pictures 64] [--size 256] [--repeats 5]

The VAE is a random Flux-type one of moderate width. Both sides alternate in one run; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

BATCH = 4


def make_vae():
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    from benchmarks.make_inputs import write_inputs
    from library import options, strategies
    from library.data import images
    from library.data.dataset import item_rng, prepare
    from library.strategies import Encoders

    with tempfile.TemporaryDirectory() as folder:
        argv = write_inputs(Path(folder), width=192, layers=1, size=arguments.size, pictures=arguments.pictures)
        chosen = options.parse(
            "z_image", [*argv, "--cache_latents_to_disk", "--vae_batch_size", str(BATCH)], "benchmark"
        )
        data, family, vae = prepare(chosen, chosen.family, 16), chosen.family, make_vae()
        pixels = torch.stack([images.to_tensor(images.load(i, item_rng(0, 0, 0, 0), False).pixels) for i in data.items])
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.repeats + 1):
            shutil.rmtree(Path(folder) / "pictures" / ".lorasmith", ignore_errors=True)
            start = time.perf_counter()
            with torch.no_grad():
                for part in pixels.split(BATCH):
                    family.encode_image(vae, part)
            middle = time.perf_counter()
            strategies.latent_source(data, family, Encoders(lambda: vae, list), chosen, say=lambda text: None)
            times[0].append(middle - start)
            times[1].append(time.perf_counter() - middle)
        bare, ours = (statistics.median(values[1:]) for values in times)
        print(f"bare encode {bare:.2f} s, caching to disk {ours:.2f} s, ratio {ours / bare:.3f} (target 1.10)")


if __name__ == "__main__":
    main()
