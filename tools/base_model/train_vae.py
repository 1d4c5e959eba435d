"""Trains the small Flux-type autoencoder of emoji64 (8x smaller, 16 channels) on a CPU in about 20 minutes.

The published normalisation of Flux' latents, (z - 0.1159) * 0.3611, is kept by every reader of the file
format, so the training drives the normalised latents to zero mean and unit deviation per channel and
`export.py` removes the rest of the deviation exactly. Noise on the latents takes the place of the KL term:
a decoder that survives it gives a latent space that a denoiser can learn.
The learning rate follows the clock (`--minutes`), so the run ends in time on any machine; it resumes
from its last checkpoint.
"""

import argparse
import os
import time

import emoji_data as data
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from optimizer import Muon, average_weight, schedule
from PIL import Image

SHIFT, SCALE = 0.1159, 0.3611
CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    norm_num_groups=8,
    block_out_channels=(16, 32, 64, 64),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    use_quant_conv=False,
    use_post_quant_conv=False,
    shift_factor=SHIFT,
    scaling_factor=SCALE,
    sample_size=64,
)


def build():
    """The untrained autoencoder; every residual branch starts at zero."""
    vae = AutoencoderKL(**CONFIG)
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae


def encode(vae, pixels):
    """Normalised latents (the mean, as ComfyUI takes it) of pixels in -1..1."""
    return (vae.encoder(pixels)[:, :16] - SHIFT) * SCALE


def decode(vae, latents):
    """Pixels of normalised latents."""
    return vae.decoder(latents / SCALE + SHIFT)


class Pictures:
    """Augmented batches; placed emoji and line maps are prepared once, colours are mixed per batch."""

    def __init__(self, per_class=10, seed=0):
        rng = np.random.default_rng(seed)
        placed, lines = [], []
        for name in data.CLASSES:
            placed += [np.asarray(data.place(data.bitmap(name), rng)) for _ in range(per_class)]
            lines += [data.line_strength(name, rng) for _ in range(per_class // 2)]
        self.placed = np.stack(placed).astype(np.float32) / 255
        self.lines = np.stack(lines).astype(np.float32)
        self.colors = np.array(list(data.BACKGROUNDS.values()), np.float32) / 255

    def batch(self, size, rng):
        """[size, 3, 64, 64] in -1..1."""
        return torch.from_numpy(np.stack([self._one(rng) for _ in range(size)])).permute(0, 3, 1, 2) * 2 - 1

    def _one(self, rng):
        plain = rng.random() < 0.6
        if rng.random() < 0.7:
            rgba = self.placed[rng.integers(len(self.placed))]
            paper = self.colors[rng.integers(len(self.colors))] if plain else rng.random(3)
            out = rgba[..., :3] * rgba[..., 3:] + paper * (1 - rgba[..., 3:])
        else:
            out = self._drawing(rng)
        if not plain:
            out = out[..., rng.permutation(3)] * rng.uniform(0.7, 1.0) if rng.random() < 0.5 else out
            out = 1 - out if rng.random() < 0.25 else out
            out = out[:, ::-1] if rng.random() < 0.5 else out
        return np.ascontiguousarray(np.clip(out, 0, 1), np.float32)

    def _drawing(self, rng):
        """Dark on white as in the base model's data, or light on blue with a grid as style data sets have it."""
        mix = self.lines[rng.integers(len(self.lines))][..., None]
        if rng.random() < 0.4:
            return np.repeat(0.16 * mix + 1.0 * (1 - mix), 3, -1)
        paper = np.array([0.11, 0.24, 0.55]) + rng.normal(0, 0.06, 3) if rng.random() < 0.7 else rng.random(3)
        paper = np.broadcast_to(paper, (64, 64, 3)).copy()
        if rng.random() < 0.7:
            step, offset, add = rng.choice([8, 16]), rng.integers(8), rng.uniform(0.03, 0.12)
            paper[offset::step] += add
            paper[:, offset::step] += add
        return (1 - 0.08 * rng.random(3)) * mix + paper * (1 - mix)


def reconstruction_loss(out, target):
    """L1 at three scales, L1 of the gradients and some squared error for the large mistakes."""
    loss = F.l1_loss(out, target) + F.mse_loss(out, target)
    for axis in (2, 3):
        loss = loss + 0.7 * F.l1_loss(out.diff(dim=axis), target.diff(dim=axis))
    for factor in (2, 4):
        loss = loss + 0.3 * F.l1_loss(F.avg_pool2d(out, factor), F.avg_pool2d(target, factor))
    return loss


def moment_loss(latents):
    """How far the normalised latents of a batch are from zero mean and unit covariance.

    The covariance, not only the deviations: otherwise the 16 channels soon say the same thing.
    """
    flat = latents.transpose(0, 1).flatten(1)
    mean = flat.mean(1, keepdim=True)
    covariance = (flat - mean) @ (flat - mean).T / flat.shape[1]
    return mean.square().mean() + (covariance - torch.eye(16)).square().sum() / 16


def patch_components(pictures, rng):
    """A function that gives the 16 whitened principal components of 8x8 patches.

    The first part of the training is towards these: encoder and decoder learn them independently and
    fast, and from there on both are trained together without the usual slow start.
    """
    patches = F.pixel_unshuffle(pictures.batch(512, rng), 8).permute(0, 2, 3, 1).reshape(-1, 192)
    mean = patches.mean(0)
    _, deviation, basis = torch.linalg.svd(patches - mean, full_matrices=False)
    basis = basis[:16] / (deviation[:16, None] / len(patches) ** 0.5)
    return lambda x: ((F.pixel_unshuffle(x, 8).permute(0, 2, 3, 1) - mean) @ basis.T).permute(0, 3, 1, 2)


def psnr(out, target):
    """Mean PSNR in dB over a batch of pictures in -1..1."""
    error = (out.clamp(-1, 1) - target).square().mean((1, 2, 3)) / 4
    return (-10 * error.log10()).mean().item()


@torch.no_grad()
def report(vae, pictures, path):
    """Writes originals over reconstructions as a PNG and returns the PSNR."""
    target = pictures.batch(32, np.random.default_rng(99))
    out = decode(vae, encode(vae, target))
    rows = [torch.cat(list(part[i : i + 16]), 2) for i in (0, 16) for part in (target, out)]
    sheet = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2)).save(path)
    return psnr(out, target)


def save(path, **state):
    """Replaces the checkpoint in one step, so that a kill never leaves half a file."""
    torch.save(state, path + ".part")
    os.replace(path + ".part", path)


def step_loss(vae, target, components, noise, warm):
    """The loss of one batch, its pictures and its latents."""
    latents = encode(vae, target)
    source = components(target) if warm else latents
    out = decode(vae, source + noise * torch.randn_like(source))
    extra = (latents - source).abs().mean() if warm else 0.1 * moment_loss(latents)
    return reconstruction_loss(out, target) + extra, out, latents


def make_optimizer(vae, args):
    """Muon for the inner convolutions; the first and the last one and all vectors go to Adam."""
    edge = ("encoder.conv_in.weight", "decoder.conv_out.weight")
    named = [(name, p) for name, p in vae.named_parameters() if p.requires_grad]
    return Muon(
        [p for n, p in named if p.ndim > 1 and n not in edge],
        [p for n, p in named if p.ndim < 2 or n in edge],
        lr=args.lr,
    )


def train(args):
    """The loop; `--decoder-only` polishes a finished model's decoder under frozen latents."""
    vae, average = build(), build().requires_grad_(False)
    step, spent, state = 0, 0.0, None
    if os.path.exists(args.checkpoint):
        state = torch.load(args.checkpoint, weights_only=True)
        vae.load_state_dict(state["average" if state["done"] else "model"])
    average.load_state_dict(state["average"] if state else vae.state_dict())
    vae.encoder.requires_grad_(not args.decoder_only)
    optimizer = make_optimizer(vae, args)
    if state and not state["done"]:
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    pictures, rng = Pictures(), np.random.default_rng(step)
    components = patch_components(pictures, np.random.default_rng(0))
    begin, saved = time.time() - spent, time.time()
    while (fraction := (time.time() - begin) / 60 / args.minutes) < 1:
        target = pictures.batch(args.batch, rng)
        warm = fraction < args.warm and not args.decoder_only
        loss, out, latents = step_loss(vae, target, components, args.noise, warm)
        loss.backward()
        optimizer.step(schedule(fraction))
        step += 1
        torch._foreach_lerp_(
            list(average.parameters()), [p.data for p in vae.parameters()], 1 - average_weight(step, 0.998)
        )
        if step % 50 == 0:
            print(
                f"step {step} loss {loss.item():.4f} moments {moment_loss(latents).item():.4f} "
                f"psnr {psnr(out, target):.2f} fraction {fraction:.3f}",
                flush=True,
            )
        if time.time() - saved > 90:
            saved = time.time()
            save(
                args.checkpoint,
                model=vae.state_dict(),
                average=average.state_dict(),
                step=step,
                done=False,
                optimizer=optimizer.state_dict(),
                spent=time.time() - begin,
            )
            print("psnr of the average", report(average, pictures, args.checkpoint + ".png"), flush=True)
    save(args.checkpoint, model=vae.state_dict(), average=average.state_dict(), step=step, done=True)
    print("done; psnr of the average", report(average, pictures, args.checkpoint + ".png"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="vae.pt")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--warm", type=float, default=0.12, help="part of the time for the start on patch components")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--decoder-only", action="store_true")
    torch.set_num_threads(2)
    train(parser.parse_args())
