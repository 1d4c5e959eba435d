"""A small picture classifier for the evaluation: it has nothing in common with the generator but the emoji.

It learns from pixels (never from the VAE) with heavy augmentation, on pictures and on line drawings in any
colours, so it can also judge what a LoRA made of a class.
"""

import os

import emoji_data as data
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def build(classes=None):
    """Four strided convolutions and a linear layer; 0.3 million parameters."""
    widths, layers = (3, 32, 64, 128, 160), []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * widths[-1], classes or len(data.CLASSES)),
    )


def pictures(variants, seed):
    """RGBA pictures and line maps of every class: [class, variants, 64, 64, 4 or 1], fp32 0..1."""
    rng = np.random.default_rng(seed)
    placed = [[np.asarray(data.place(data.bitmap(n), rng)) / 255 for _ in range(variants)] for n in data.CLASSES]
    lines = [[data.line_strength(n, rng)[..., None] for _ in range(variants)] for n in data.CLASSES]
    return np.array(placed, np.float32), np.array(lines, np.float32)


def draw(source, size, rng, drawings=0.25):
    """A batch of pictures in 0..1 on random backgrounds with their classes."""
    placed, lines = source
    labels, batch = rng.integers(len(placed), size=size), []
    for label in labels:
        paper, which = rng.random(3), rng.integers(placed.shape[1])
        if rng.random() < 0.6:
            paper = np.array(list(data.BACKGROUNDS.values())[rng.integers(len(data.BACKGROUNDS))]) / 255
        if rng.random() < drawings:
            ink = np.array([0.16] * 3) if rng.random() < 0.5 else np.array([0.95] * 3)
            paper = np.array([1.0] * 3) if ink[0] < 0.5 else np.array([0.11, 0.24, 0.55]) * rng.uniform(0.6, 1.4)
            mix = lines[label, which]
            batch.append(ink * mix + paper * (1 - mix))
        else:
            rgba = placed[label, which]
            batch.append(rgba[..., :3] * rgba[..., 3:] + paper * (1 - rgba[..., 3:]))
    return torch.from_numpy(np.stack(batch).astype(np.float32)).permute(0, 3, 1, 2), torch.from_numpy(labels)


def augment(batch):
    """Blur, noise, brightness and shifts, so that the judge minds shapes rather than exact pixels."""
    if torch.rand(()) < 0.5:
        batch = F.interpolate(F.avg_pool2d(batch, 2), scale_factor=2, mode="bilinear")
    batch = batch + 0.08 * torch.rand(()) * torch.randn_like(batch) + 0.05 * torch.randn(len(batch), 3, 1, 1)
    shift = torch.randint(-4, 5, (2,)).tolist()
    return batch.roll(shift, (2, 3)).clamp(0, 1)


def train(path, steps=900, seed=1):
    """The classifier from `path`, or a new one that is then saved there."""
    net = build()
    if os.path.exists(path):
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    torch.manual_seed(seed)
    source, rng = pictures(6, seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch, labels = draw(source, 64, rng)
        loss = F.cross_entropy(net(augment(batch)), labels, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
        if step % 150 == 149:
            print(f"classifier step {step + 1} loss {loss.item():.3f}", flush=True)
    torch.save(net.state_dict(), path)
    return net.eval()


@torch.no_grad()
def held_out(net, drawings, seed=12345):
    """Accuracy on 1000 pictures with placements and backgrounds that were not trained on."""
    batch, labels = draw(pictures(2, seed), 1000, np.random.default_rng(seed), float(drawings))
    return (net(batch).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def classify(net, pixels):
    """Class names of uint8 pictures [N, 64, 64, 3]."""
    names = list(data.CLASSES)
    return [names[i] for i in net(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).argmax(1)]
