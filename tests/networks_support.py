"""A small model with everything that an adapter meets: a fused q, k, v, an operation in a row, a convolution."""

from types import SimpleNamespace

import torch
from torch import nn

from library.layout import Layout, block, conv1x1, row, shapes_of, swap_halves

ROWS = [
    row("img_in", "embed"),
    row("patch", "patch"),
    row("mix", "mix", op=conv1x1),
    *block(
        "blocks.{i}",
        "layers.{i}",
        row("attn.qkv", "to_q", "to_k", "to_v"),
        row("attn.proj", "to_out.0"),
        row("mlp.0", "ff_in"),
        row("mlp.2", "ff_out"),
        row("norm", "norm"),
    ),
    row("final.mod", "norm_out.linear", op=swap_halves),
]


class Block(nn.Module):
    def __init__(self, dim: int, kv: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, kv), nn.Linear(dim, kv)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.ff_in, self.ff_out = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)
        groups = q.shape[-1] // k.shape[-1]
        x = x + self.to_out[0](q * torch.tanh(k + v).repeat(1, 1, groups))
        return x + self.ff_out(torch.relu(self.ff_in(x)))


class Tiny(nn.Module):
    """[B, 3, 4, 4] -> [B, 16, dim]; k and v are half as wide as q."""

    def __init__(self, dim: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.patch, self.mix = nn.Conv2d(3, dim, 3, padding=1), nn.Linear(dim, dim)
        self.embed = nn.Linear(dim, dim)
        self.layers = nn.ModuleList([Block(dim, dim // 2) for _ in range(depth)])
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(dim, 2 * dim)})

    def forward(self, x):
        x = self.embed(self.mix(self.patch(x).flatten(2).transpose(1, 2)))
        scale, shift = self.norm_out["linear"](x.mean(1, keepdim=True)).chunk(2, -1)
        for layer in self.layers:
            x = self.run(layer, x)
        return x * (1 + scale) + shift

    run = staticmethod(lambda layer, x: layer(x))


def tiny(adapted: tuple[str, ...] = ("blocks",), seed: int = 0, **sizes) -> Tiny:
    torch.manual_seed(seed)
    model = Tiny(**sizes).requires_grad_(False)
    model.binding = SimpleNamespace(layout=Layout("tiny", ROWS, shapes_of(model)), adapted=adapted)
    return model


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def fill(network: nn.Module, seed: int = 2, std: float = 0.3) -> nn.Module:
    """Give every parameter a random value, so that no test passes because `up` is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, std, generator=generator)
    return network
