"""HunyuanVideo and HunyuanVideo-1.5: diffusers' modules with forward passes that never wait for the device.

diffusers makes an attention mask even where nothing is masked; its 1.5 sorts valid tokens to the front, which reads
masks back to the host, and masks every pair of tokens, which is a gigabyte for a short video. Texts have no positions
here, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

from library.components import ragged


def picture_of(model: torch.nn.Module, hidden: Tensor, temb: Tensor, video: Tensor) -> Tensor:
    """Tokens -> [B,C,F,h,w]."""
    config = model.config
    p, t = config.patch_size, config.patch_size_t
    grid = (video.shape[2] // t, video.shape[3] // p, video.shape[4] // p)
    out = model.proj_out(model.norm_out(hidden, temb)).unflatten(2, (-1, t, p, p)).unflatten(1, grid)
    return out.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def run(blocks: Sequence[torch.nn.Module], hidden: Tensor, text: Tensor, *rest: object) -> Tensor:
    for block in blocks:
        hidden, text = block(hidden, text, *rest)
    return hidden


def over_video(text_mask: Tensor | None, tokens: int) -> Tensor | None:
    """bool [B,1,1,tokens of the video and the text], None where every token counts."""
    return None if text_mask is None else F.pad(text_mask, (tokens, 0), value=True)[:, None, None]


class HunyuanVideo(HunyuanVideoTransformer3DModel):
    def forward(
        self, video: Tensor, timestep: Tensor, texts: Sequence[Tensor], pooled: Tensor, guidance: Tensor | None
    ) -> Tensor:
        """Velocity [B,C,F,h,w]. timestep and guidance are [B] float32, times 1000; texts [T_i,D]; pooled [B,D].

        A model that says `token_replace` takes the first frame as clean, at time 0 and without a guidance, and what it
        returns there means nothing.
        """
        mask = ragged.mask(texts)
        rotary = self.rope(video)
        temb, clean = self.time_text_embed(timestep, pooled, guidance)
        area = video.shape[3] * video.shape[4] // self.config.patch_size**2  # tokens of a frame
        text = self.context_embedder(ragged.pad(texts), timestep, mask)
        hidden = self.x_embedder(video)
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        first = () if clean is None else (clean, area)
        hidden = run(blocks, hidden, text, temb, over_video(mask, hidden.shape[1]), rotary, *first)
        return picture_of(self, hidden, temb, video)


class HunyuanVideo15(HunyuanVideo15Transformer3DModel):
    def __init__(self, **configuration: object) -> None:
        super().__init__(**configuration)
        for block in self.transformer_blocks:  # its own processor makes a mask of every pair
            block.attn.set_processor(HunyuanVideoAttnProcessor2_0())

    def forward(
        self,
        video: Tensor,
        timestep: Tensor,
        texts: Sequence[Tensor],
        glyphs: Sequence[Tensor],
        images: Sequence[Tensor],
        timestep_r: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B,C,F,h,w]. timestep and timestep_r are [B] float32, times 1000; texts [T_i,D]; ByT5 states and
        SigLIP features [n_i,D], of no token where an item has none."""
        rotary = self.rope(video)
        temb = self._time(timestep, timestep_r, video.dtype)
        text = self._refined(texts, timestep)
        kinds = [(images, self.image_embedder, 2), (glyphs, self.context_embedder_2, 1)]
        parts = [
            [states[: len(item)] + self.cond_type_embed.weight[0] for states, item in zip(text, texts, strict=True)]
        ]
        for items, embed, kind in kinds:
            if any(len(item) for item in items):
                embedded = embed(ragged.pad(items)) + self.cond_type_embed.weight[kind]
                parts.append([states[: len(item)] for states, item in zip(embedded, items, strict=True)])
        joined = [torch.cat(own) for own in zip(*parts, strict=True)]
        hidden = self.x_embedder(video)
        mask = over_video(ragged.mask(joined), hidden.shape[1])
        hidden = run(self.transformer_blocks, hidden, ragged.pad(joined), temb, mask, rotary)
        return picture_of(self, hidden, temb, video)

    def _refined(self, texts: Sequence[Tensor], timestep: Tensor) -> Tensor:
        """The refiner's forward with a mask of keys only: diffusers' masks the rows of padding whole, and a softmax
        over nothing is not a number on some devices."""
        refiner, text, mask = self.context_embedder, ragged.pad(texts), ragged.mask(texts)
        pooled = torch.stack([own.float().mean(0) for own in texts]).to(text.dtype)
        temb, states = refiner.time_text_embed(timestep, pooled), refiner.proj_in(text)
        for block in refiner.token_refiner.refiner_blocks:
            states = block(states, temb, None if mask is None else mask[:, None, None])
        return states

    def _time(self, timestep: Tensor, timestep_r: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embeddings in `dtype`, the times themselves as they are: bfloat16 has none between 996 and 1000."""
        embed = self.time_embed
        out = embed.timestep_embedder(embed.time_proj(timestep).to(dtype))
        if timestep_r is not None:
            out = out + embed.timestep_embedder_r(embed.time_proj_r(timestep_r).to(dtype))
        return out
