"""Qwen-Image: diffusers' modules with a forward pass that never waits for the device.

diffusers rounds the time to the model's number format and, for models whose references are clean, makes a list of
all tokens on the host at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor


class QwenImage(QwenImageTransformer2DModel):
    def forward(
        self,
        tokens: Tensor,
        sigma: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        sizes: Sequence[tuple[int, int, int]],
    ) -> Tensor:
        """Velocity [B,N,C] of tokens [B,N,C]: those of the noisy picture, then those of its references.

        sigma is [B] float32, text [B,T,D], text_mask bool [B,T] or None where every token counts; `sizes` are frames,
        rows and columns of each picture.
        """
        hidden = self.img_in(tokens)
        text = self.txt_in(self.txt_norm(text))
        times, clean = sigma, None
        if self.zero_cond_t:  # references are modulated with time 0
            times = torch.cat([sigma, torch.zeros_like(sigma)])
            rows, columns = sizes[0][1:]
            clean = (torch.arange(tokens.shape[1], device=tokens.device) >= rows * columns).int()[None]
        embed = self.time_text_embed
        temb = embed.timestep_embedder(embed.time_proj(times).to(hidden.dtype))
        rotary = self.pos_embed([list(sizes)], max_txt_seq_len=text.shape[1], device=tokens.device)
        for block in self.transformer_blocks:
            text, hidden = block(hidden, text, text_mask, temb, rotary, modulate_index=clean)
        return self.proj_out(self.norm_out(hidden, temb[: len(sigma)]))
