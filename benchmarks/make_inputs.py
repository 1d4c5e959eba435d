"""Random models and pictures of a chosen size for the benchmarks."""

from __future__ import annotations

from pathlib import Path


def write_inputs(folder: Path, *, width: int, layers: int, size: int, pictures: int, batch: int = 1) -> list[str]:
    """A Z-Image of that width and depth with toy encoders, and a dataset of one bucket; returns the run's options."""
    import numpy as np
    from PIL import Image

    from library import checkpoints
    from library.families import get_family
    from tools.make_toy_model import make, part_shapes, weights

    toml = make("z_image", folder / "toy")
    part = get_family("z_image").denoiser
    config = {
        "in_channels": 16, "dim": width, "n_layers": layers, "n_refiner_layers": 1, "n_heads": width // 64,
        "n_kv_heads": width // 64, "cap_feat_dim": 64, "axes_dims": [16, 24, 24], "axes_lens": [1536, 512, 512],
        "time_width": 1024,
    }  # fmt: skip
    checkpoints.save(weights(part_shapes(part, config), 0), folder / "denoiser.safetensors", {"format": "pt"})
    data = folder / "pictures"
    data.mkdir()
    generator = np.random.default_rng(0)
    for k in range(pictures):
        Image.fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(data / f"{k}.png")
        (data / f"{k}.txt").write_text("a picture of a thing", encoding="utf-8")
    dataset = folder / "data.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {size}\nbatch_size = {batch}\n"
        f"[[datasets.subsets]]\nimage_dir = '{data.as_posix()}'\ncaption_extension = '.txt'\n",
        encoding="utf-8",
    )
    return [
        "--config_file", str(toml), "--dataset_config", str(dataset), "--output_dir", str(folder / "out"),
        "--pretrained_model_name_or_path", str(folder / "denoiser.safetensors"), "--network_dim", "16",
        "--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps", "100000",
    ]  # fmt: skip
