"""AuraFlow's patch embedding as ComfyUI has it, where LoRAs are used, inside of diffusers' model."""

from __future__ import annotations

from diffusers import AuraFlowTransformer2DModel
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowPatchEmbed
from torch import Tensor, nn


class PatchEmbed(AuraFlowPatchEmbed):
    """The learned grid of positions is cropped at (n - h) // 2, where diffusers crops at n // 2 - h // 2, which is the
    same for even numbers of patches; a picture larger than the grid gets an interpolated one, where diffusers fails."""

    def forward(self, latent: Tensor) -> Tensor:
        p = self.patch_size
        patches = latent.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        rows, columns = patches.shape[1:3]
        side = int(self.pos_embed_max_size**0.5)
        grid = self.pos_embed.unflatten(1, (side, side))
        if max(rows, columns) > side:
            side = max(rows, columns)
            grid = nn.functional.interpolate(grid.movedim(-1, 1), (side, side), mode="bilinear").movedim(1, -1)
        top, left = (side - rows) // 2, (side - columns) // 2
        return (self.proj(patches) + grid[:, top : top + rows, left : left + columns]).flatten(1, 2)


class AuraFlow(AuraFlowTransformer2DModel):
    def __init__(self, **configuration: object) -> None:
        super().__init__(**configuration)
        c, side = self.config, self.config.sample_size
        self.pos_embed = PatchEmbed(side, side, c.patch_size, c.in_channels, self.inner_dim, c.pos_embed_max_size)
