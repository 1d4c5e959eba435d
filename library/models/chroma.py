"""What Chroma needs beside diffusers' class: inputs of its modulation made on the device, masks for keys alone."""

from __future__ import annotations

import warnings

import torch
from diffusers import ChromaTransformer2DModel
from diffusers.models.embeddings import Timesteps, get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

# 3 for each of 38 single blocks, 12 for each of 19 double blocks, 2 at the end: a model with fewer blocks, as ComfyUI
# reads it, has the numbers of the released one.
MODULATIONS = 344


class ModulationInputs(nn.Module):
    """[B, MODULATIONS, 4 * channels]: time, guidance (always 0) and number of each modulation, embedded.

    diffusers makes some of it on the host, and the numbers as a buffer that no file holds.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep [B], times 1000; the result has its number format."""
        numbers = torch.arange(MODULATIONS, device=timestep.device) * 1000
        own = torch.cat([self.time_proj(timestep), self._embed(torch.zeros_like(timestep), self.channels)], 1)
        every = self._embed(numbers, 2 * self.channels)
        both = own[:, None].expand(-1, MODULATIONS, -1), every.expand(len(own), -1, -1)
        return torch.cat(both, 2).to(timestep.dtype)

    @staticmethod
    def _embed(values: Tensor, width: int) -> Tensor:
        return get_timestep_embedding(values, width, flip_sin_to_cos=True, downscale_freq_shift=0)


class KeyMask(FluxAttnProcessor):
    """Takes `keys`, bool [B,1,1,S]: which tokens count. diffusers' own mask leaves padding nothing to attend to."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return super().__call__(attn, hidden_states, encoder_hidden_states, keys, image_rotary_emb)


def build(**configuration: object) -> ChromaTransformer2DModel:
    with warnings.catch_warnings():  # diffusers warns of where it has its own positions from
        warnings.filterwarnings("ignore", message=".*FluxPosEmbed.*", category=FutureWarning)
        model = ChromaTransformer2DModel(**configuration)
    model.time_text_embed = ModulationInputs(model.config.approximator_num_channels // 4)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(KeyMask())
    return model
