"""Relative output errors of the ways to hold a denoiser's weights, on a random model of real proportions.

    python benchmarks/quantisation.py [--width 1024] [--layers 8] [--size 256] [--text 64] [--model FILE]

For each way: |output - output in float32| / |output in float32| of one forward at sigma 0.5, the same for the
gradient at the input, and the bytes of the blocks' weights for each value. Random weights have no outliers: a trained
model's own error can only be measured on it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

WAYS = [
    ("bfloat16", None, ""), ("--fp8_scaled", "fp8_scaled", "e4m3"), ("--fp8_base", "fp8_base", "e4m3"),
    ("--fp8_scaled --fp8_format e5m2", "fp8_scaled", "e5m2"), ("--fp8_base --fp8_format e5m2", "fp8_base", "e5m2"),
    ("--nf4", "nf4", ""),
]  # fmt: skip


def outcome(family, model, noisy, sigma, conds):
    """Velocity, and the gradient of half its square at the noisy latents."""
    x = noisy.clone().requires_grad_()
    out = family.predict(model, x, sigma, conds)
    (out.square().sum() / 2).backward()
    return out.detach(), x.grad


def held_bytes(model) -> float:
    """Bytes for each value of the quantised weights; of all block weights where nothing is quantised."""
    from library.memory.quantised_linear import is_quantised

    modules = [module for module in model.modules() if is_quantised(module)]
    if not modules:
        return 2.0
    count = sum(m.in_features * m.out_features for m in modules)
    return sum(t.numel() * t.element_size() for m in modules for t in m.stored()) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--model", help="a denoiser file of Z-Image's kind instead of a random model")
    arguments = parser.parse_args()
    import torch

    from benchmarks.make_inputs import write_inputs
    from library import checkpoints
    from library.families import get_family
    from library.memory.loading import Loading
    from library.memory.precision import Recipe

    family = get_family("z_image")

    def relative(a, b) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model
        if path is None:
            argv = write_inputs(Path(folder), width=arguments.width, layers=arguments.layers, size=64, pictures=1)
            path = argv[argv.index("--pretrained_model_name_or_path") + 1]
        whole = checkpoints.load_part(family.denoiser, path, dtype=torch.float32).requires_grad_(False)
        torch.manual_seed(0)
        side, config = arguments.size // family.latent_downscale, whole.config
        latents, text = (1, config.in_channels, side, side), (arguments.text, config.cap_feat_dim)
        inputs = torch.randn(latents), torch.tensor([0.5]), [{"text": torch.randn(text)}]
        expected = outcome(family, whole, *inputs)
        print(f"width {config.dim}, {config.n_layers} layers, {side * side // 4} image tokens")
        for label, scheme, fp8_format in WAYS:
            recipe = Recipe(scheme, fp8_format, family.blocks, family.denoiser.high_precision) if scheme else None
            dtype = torch.float32 if scheme else torch.bfloat16
            model = checkpoints.load_part(family.denoiser, path, dtype=dtype, loading=Loading(recipe, "cpu", dtype))
            found = outcome(family, model.requires_grad_(False), *inputs)
            out, gradient = (relative(a, b) for a, b in zip(found, expected, strict=True))
            print(f"{label:32} output {out:.4f}  gradient {gradient:.4f}  bytes a value {held_bytes(model):.3f}")


if __name__ == "__main__":
    main()
