"""What the tests of library/memory share: the toy Z-Image as a file, loaded in any way, and one forward of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from library import checkpoints
from library.families import get_family
from library.memory.loading import Loading
from library.memory.precision import Recipe
from tools.make_toy_model import CONFIGS, part_shapes, weights

FAMILY = get_family("z_image")
KEPT = FAMILY.denoiser.high_precision


@functools.cache
def toy_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return weights(json.loads(CONFIGS.read_text(encoding="utf-8"))["z_image"]["keys"], seed)


def deep_weights(layers: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """A narrower Z-Image with more blocks than the toy has; it takes the toy's text and latents."""
    config = {
        "in_channels": 16, "dim": 48, "n_layers": layers, "n_refiner_layers": 3, "n_heads": 3, "n_kv_heads": 3,
        "cap_feat_dim": toy_weights()["cap_embedder.1.weight"].shape[1], "axes_dims": [4, 6, 6],
        "axes_lens": [1536, 512, 512], "time_width": 48,
    }  # fmt: skip
    return weights(part_shapes(FAMILY.denoiser, config), seed)


def toy_file(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    path = folder / "denoiser.safetensors"
    save_file(tensors if tensors is not None else toy_weights(), path)
    return path


def load(path: Path, scheme: str | None = None, fp8_format: str = "e4m3", dtype=torch.float32, **more):
    """The denoiser of a file, frozen, its blocks held as `scheme` says."""
    recipe = Recipe(scheme, fp8_format, FAMILY.blocks, KEPT) if scheme else None
    loading = Loading(recipe, "cpu", dtype, **more)
    model = checkpoints.load_part(FAMILY.denoiser, path, dtype=dtype, loading=loading)
    model.binding.adapted = FAMILY.adapted
    return model.requires_grad_(False)


def inputs(batch: int = 2, texts: tuple[int, ...] = (5, 40)) -> tuple:
    """(noisy, sigma, conds) of a ragged batch."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(batch, 16, 8, 12, generator=generator)
    width = toy_weights()["cap_embedder.1.weight"].shape[1]
    return (
        noisy,
        torch.tensor([0.3, 0.7])[:batch],
        [{"text": torch.randn(n, width, generator=generator)} for n in texts[:batch]],
    )


def predict(model, given=None):
    return FAMILY.predict(model, *(given or inputs()))
