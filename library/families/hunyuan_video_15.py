"""HunyuanVideo-1.5 (Tencent, 2025): double-stream blocks on 16x latents with Qwen2.5-VL, ByT5 and SigLIP states.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,32,F,h,w], one token each; the model
takes 33 channels more, the latents of given frames and a mask, all 0 for text-to-video. Text is the third-last layer
of Qwen2.5-VL without its template and the ByT5 states of what a caption puts in quotation marks, if anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import hunyuan
from library.families.family import Cond, Part
from library.layout import Shape, identity, our_view

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMES = "time_embed"
OUTSIDE = [
    *hunyuan.times(TIMES, "time_in", "timestep_embedder"),
    *hunyuan.times(TIMES, "time_r_in", "timestep_embedder_r"),  # distilled models
    *hunyuan.GLYPHS,
    *((f"vision_in.proj.{n}", f"vision_in.proj.{n}", f"image_embedder.{ours}")
      for n, ours in ((0, "norm_in"), (1, "linear_1"), (3, "linear_2"), (4, "norm_out"))),
    ("cond_type_embedding", "cond_type_embedding", "cond_type_embed"),
]  # fmt: skip
TABLES = {
    "comfy": hunyuan.table(0, OUTSIDE),
    "original": hunyuan.table(1, OUTSIDE),  # Tencent's names, q, k and v in one, as ComfyUI's repack has them
    "split": hunyuan.table(1, OUTSIDE, apart=True),  # as Tencent released them
}
BLOCKS = ("transformer_blocks",)
ADAPTED = ("double_blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if "cond_type_embedding.weight" not in shapes and "cond_type_embed.weight" not in shapes:
        return None
    return hunyuan.layout_of(shapes, 3, (*TABLES, "diffusers"))


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, and the inner width of the ByT5 mapper, which diffusers fixes at 2048."""
    ours = our_view(TABLES[layout], shapes) if layout in TABLES else shapes
    glyph_width, glyphs = ours["context_embedder_2.linear_1.weight"]
    return hunyuan.sizes(ours, patch=1) | {
        "use_meanflow": f"{TIMES}.timestep_embedder_r.linear_1.weight" in ours,
        "text_embed_2_dim": glyphs,
        "image_embed_dim": ours["image_embedder.linear_1.weight"][1],
        "glyph_width": glyph_width,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection

    from library.models.hunyuan_video import HunyuanVideo15

    model = HunyuanVideo15(**{key: value for key, value in configuration.items() if key != "glyph_width"})
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    width = configuration.get("glyph_width", 2048)
    model.context_embedder_2 = HunyuanVideo15ByT5TextProjection(model.config.text_embed_2_dim, width, inner)
    return model


DENOISER = Part(
    name="denoiser",
    title="a HunyuanVideo-1.5 denoiser",
    option="pretrained_model_name_or_path",
    layouts={**TABLES, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model.", "model.model."),
    diffusers_folder="transformer",
    high_precision=hunyuan.MODULATION,
)


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,F,h,w] float32.

    Conds: "text" [T,D], ragged; "byt5" [T2,D2] where there is quoted text; "image_latents" [33,F,h,w] (latents and
    mask) and "clip" [729,1152] (SigLIP) of image-to-video; "next_sigma" [], the sigma that a step of a distilled
    model leads to, else the sigma itself. Items of both kinds can be in one batch.
    """
    import torch

    dtype, config = denoiser.x_embedder.proj.weight.dtype, denoiser.config
    texts = [cond["text"].to(dtype) for cond in conds]

    def optional(key: str, width: int) -> list[Tensor]:
        return [cond[key].to(dtype) if key in cond else texts[0].new_zeros(0, width) for cond in conds]

    nothing = noisy.new_zeros(config.in_channels - noisy.shape[1], *noisy.shape[2:])
    given = torch.stack([cond.get("image_latents", nothing).to(noisy.dtype) for cond in conds])
    leads_to = torch.stack([cond.get("next_sigma", level) for cond, level in zip(conds, sigma, strict=True)])
    return denoiser(
        torch.cat([noisy, given], 1).to(dtype),
        sigma.float() * 1000,
        texts,
        optional("byt5", config.text_embed_2_dim),
        optional("clip", config.image_embed_dim),
        leads_to.float() * 1000 if config.use_meanflow else None,
    ).float()
