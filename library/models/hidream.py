"""HiDream from diffusers, made trainable: pictures of any shape, and gradients through the routed experts.

diffusers' class returns shuffled tokens in training mode, runs its experts without gradients in any other mode, and
pads pictures that are not square with tokens that its attention sees.
"""

from __future__ import annotations

import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Experts(MOEFeedForwardSwiGLU):
    """The same parameters and values, differentiable in every mode.

    Tokens are sorted by expert, so the host has to know how many each gets: the one wait for the device in a block.
    An expert without tokens is called all the same, so that every process has the same set of gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights, _ = self.gate(x)  # [tokens, experts per token]
        flat, many = chosen.flatten(), self.num_activated_experts
        order = flat.argsort(stable=True)
        counts = _on_host((flat[:, None] == torch.arange(len(self.experts), device=x.device)).sum(0), len(flat))
        groups = x.flatten(0, 1).repeat_interleave(many, 0)[order].split(counts)
        out = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])
        out = out[order.argsort()].unflatten(0, (-1, many)) * weights.unsqueeze(-1)
        return out.sum(1).to(x.dtype).view_as(x) + self.shared_experts(x)


def _on_host(counts: Tensor, total: int) -> list[int]:
    """The numbers of tokens; equal shares where the memory plan computes with tensors that have no values."""
    if isinstance(counts, FakeTensor):
        share, rest = divmod(total, len(counts))
        return [share + (k < rest) for k in range(len(counts))]
    return counts.tolist()


class HiDream(HiDreamImageTransformer2DModel):
    """Takes and returns [B,C,h,w]; what it returns is data - noise."""

    def __init__(self, **configuration: object) -> None:
        super().__init__(**configuration)
        for module in self.modules():
            if isinstance(module, MOEFeedForwardSwiGLU):
                module.__class__ = Experts
                module.gate.alpha = 0.0  # no balancing loss, as the peers train it

    def patchify(self, hidden_states: Tensor) -> tuple[Tensor, None, tuple[int, int], Tensor]:
        """(tokens [B, h/p * w/p, p*p*C], no mask, (h/p, w/p), positions): nothing is padded."""
        p, device = self.config.patch_size, hidden_states.device
        split = hidden_states.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B, C, h, p, w, p
        tokens = split.permute(0, 2, 4, 3, 5, 1).flatten(3)
        batch, height, width = tokens.shape[:3]
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (height, width))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        positions = torch.cat([torch.zeros_like(grid[..., :1]), grid], -1).flatten(0, 1)
        return tokens.flatten(1, 2), None, (height, width), positions.expand(batch, -1, -1)

    def unpatchify(self, x: Tensor, img_sizes: tuple[int, int], is_training: bool) -> Tensor:
        p = self.config.patch_size
        split = x.unflatten(1, img_sizes).unflatten(3, (p, p, -1))  # B, h, w, p, p, C
        return split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
