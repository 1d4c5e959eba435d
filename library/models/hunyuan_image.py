"""HunyuanImage-2.1: diffusers' modules with a forward pass that never waits for the device.

diffusers sorts the valid tokens of both texts to the front, which reads masks back to the host at every step, and
attends with a mask even where nothing is masked. Texts have no positions here, so their order does not matter.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F


class HunyuanImage(HunyuanImageTransformer2DModel):
    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        glyphs: Tensor | None = None,
        glyph_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        timestep_r: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B,C,h,w] of latents [B,C,h,w].

        timestep, timestep_r and guidance are [B] float32, all times 1000; text is [B,T,D], glyphs [B,T2,D2]; the
        masks are bool [B,T] and [B,T2], None where every token counts.
        """
        rotary = self.rope(latents)
        temb = self._time(timestep, timestep_r, guidance, latents.dtype)
        text = self.context_embedder(text, timestep, text_mask)
        if glyphs is not None:
            text_mask = _joined(glyph_mask, glyphs, text_mask, text)
            text = torch.cat([self.context_embedder_2(glyphs), text], 1)
        hidden = self.x_embedder(latents)
        mask = None if text_mask is None else F.pad(text_mask, (hidden.shape[1], 0), value=True)[:, None, None]
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            hidden, text = block(hidden, text, temb, attention_mask=mask, image_rotary_emb=rotary)
        out = self.proj_out(self.norm_out(hidden, temb))
        return out.transpose(1, 2).unflatten(2, latents.shape[2:])

    def _time(self, timestep: Tensor, timestep_r: Tensor | None, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embeddings in `dtype`, the times themselves as they are: bfloat16 has none between 996 and 1000."""
        embed = self.time_guidance_embed
        out = embed.timestep_embedder(embed.time_proj(timestep).to(dtype))
        if timestep_r is not None:
            out = (out + embed.timestep_embedder_r(embed.time_proj_r(timestep_r).to(dtype))) / 2
        if guidance is not None:
            out = out + embed.guidance_embedder(embed.time_proj(guidance).to(dtype))
        return out


def _joined(first_mask: Tensor | None, first: Tensor, second_mask: Tensor | None, second: Tensor) -> Tensor | None:
    if first_mask is None and second_mask is None:
        return None
    masks = [
        torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask
        for mask, states in ((first_mask, first), (second_mask, second))
    ]
    return torch.cat(masks, 1)
