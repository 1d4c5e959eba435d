"""Lumina 2 from diffusers with a forward for training, and OmniGen2, which diffusers lacks, composed of its blocks.

diffusers' own forward wants a mask, reads the lengths of the texts back from the device at every step and knows no
text beyond 299 tokens. Here texts come as a list: no mask is made where all are equally long, and positions are
computed, not looked up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock
from torch import Tensor, nn

from library.components import ragged


class Lumina2(Lumina2Transformer2DModel):
    """Same parameters and names as diffusers' class."""

    time_scale = 1.0
    text_axes = 1  # along how many of the three rotary axes the tokens of a text are counted

    def __init__(self, **configuration: object) -> None:
        super().__init__(**configuration)
        del self.rope_embedder

    def forward(
        self, pictures: Tensor, time: Tensor, texts: Sequence[Tensor], references: Sequence[Sequence[Tensor]] = ()
    ) -> Tensor:
        """[B,C,h,w], time [B] float32 (0 = noise), texts [T_i,D], latents [C,h,w] of each item's reference pictures.

        Returns data - noise, [B,C,h,w].
        """
        when, words = self.time_caption_embed(pictures, time * self.time_scale, ragged.pad(texts))
        lengths = [len(text) for text in texts]
        words = self._refine_texts(words, ragged.mask(texts))
        image = self.x_embedder(self._patches(pictures))
        positions = [self._text_positions(n, time.device) for n in lengths]
        sequences, shifts = [w[:n] for w, n in zip(words, lengths, strict=True)], list(lengths)
        for i, own in enumerate(references):
            if not own:
                continue
            here = []
            for picture in own:
                here.append(self._picture_positions(picture, shifts[i]))
                shifts[i] += max(picture.shape[-2:]) // self.config.patch_size
            positions[i] = torch.cat([positions[i], *here])
            sequences[i] = torch.cat([sequences[i], self._refine_references(own, torch.cat(here), when[i : i + 1])])
        places = [self._picture_positions(pictures, shift) for shift in shifts]
        rope = self._rope(torch.stack(places))
        for block in self.noise_refiner:
            image = block(image, None, rope, when)
        joint = [torch.cat(pair) for pair in zip(sequences, image, strict=True)]
        rope = self._rope(ragged.pad([torch.cat(pair) for pair in zip(positions, places, strict=True)]))
        hidden, mask = ragged.pad(joint), ragged.mask(joint)
        for block in self.layers:
            hidden = block(hidden, mask, rope, when)
        count = image.shape[1]
        tokens = torch.stack([row[len(j) - count : len(j)] for row, j in zip(hidden, joint, strict=True)])
        return self._picture(self.norm_out(tokens, when), *pictures.shape[-2:])

    def _refine_texts(self, words: Tensor, mask: Tensor | None) -> Tensor:
        rope = self._rope(self._text_positions(words.shape[1], words.device)[None])
        for block in self.context_refiner:
            words = block(words, mask, rope)
        return words

    def _refine_references(self, pictures: Sequence[Tensor], positions: Tensor, when: Tensor) -> Tensor:
        raise NotImplementedError("Lumina 2 takes no reference pictures")

    def _text_positions(self, length: int, device: torch.device) -> Tensor:
        count = torch.arange(length, device=device)
        still = torch.zeros_like(count)
        return torch.stack([count if axis < self.text_axes else still for axis in range(3)], -1)

    def _picture_positions(self, picture: Tensor, shift: int) -> Tensor:
        """[h/p * w/p, 3]: (shift, row, column)."""
        p, device = self.config.patch_size, picture.device
        rows, columns = (torch.arange(n // p, device=device) for n in picture.shape[-2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
        return torch.cat([torch.full_like(grid[:, :1], shift), grid], -1)

    def _rope(self, positions: Tensor) -> Tensor:
        """complex64 [B, L, head/2] of positions [B, L, 3]; angles in float64 where the device has it."""
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        angles = []
        for axis, width in enumerate(self.config.axes_dim_rope):
            steps = torch.arange(0, width, 2, dtype=exact, device=positions.device) / width
            angles.append(positions[..., axis, None] * 10_000.0**-steps)
        angle = torch.cat(angles, -1)
        return torch.complex(angle.cos().float(), angle.sin().float())

    def _patches(self, pictures: Tensor) -> Tensor:
        """[B, h/p * w/p, p*p*C]"""
        p = self.config.patch_size
        split = pictures.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B, C, h, p, w, p
        return split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _picture(self, tokens: Tensor, height: int, width: int) -> Tensor:
        p = self.config.patch_size
        split = tokens.unflatten(1, (height // p, width // p)).unflatten(3, (p, p, -1))  # B, h, w, p, p, C
        return split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class OmniGen2(Lumina2):
    """Names of parameters are those of the released file."""

    time_scale = 1000.0
    text_axes = 3

    def __init__(self, references: int = 5, **configuration: object) -> None:
        super().__init__(**configuration)
        c = self.config
        width, values = c.hidden_size, c.patch_size**2 * c.in_channels
        self.ref_image_patch_embedder = nn.Linear(values, width)
        self.ref_image_refiner = nn.ModuleList(
            Lumina2TransformerBlock(
                width, c.num_attention_heads, c.num_kv_heads, c.multiple_of, c.ffn_dim_multiplier, c.norm_eps
            )
            for _ in range(c.num_refiner_layers)
        )
        self.image_index_embedding = nn.Parameter(torch.randn(references, width))

    def _refine_references(self, pictures: Sequence[Tensor], positions: Tensor, when: Tensor) -> Tensor:
        """[tokens of all, width]. They see each other, as in ComfyUI, where LoRAs are used; the model's own code
        refines each alone, which is the same for one picture."""
        embedded = [
            self.ref_image_patch_embedder(self._patches(picture[None])) + self.image_index_embedding[j]
            for j, picture in enumerate(pictures)
        ]
        tokens, rope = torch.cat(embedded, 1), self._rope(positions[None])
        for block in self.ref_image_refiner:
            tokens = block(tokens, None, rope, when)
        return tokens[0]
