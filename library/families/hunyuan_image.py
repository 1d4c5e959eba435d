"""HunyuanImage-2.1, base and distilled (Tencent, 2025): a double- and single-stream transformer on 32x latents.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,64,h,w], one token each. Text is the
third-last layer of Qwen2.5-VL, and the ByT5 states of what a caption puts in quotation marks, if anything; the
distilled model also takes guidance * 1000 and, being a MeanFlow model, the sigma that the step leads to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import hunyuan, ragged
from library.families.family import Cond, Part
from library.layout import Shape, count, identity, our_view

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMES = "time_guidance_embed"
OUTSIDE = [
    *hunyuan.times(TIMES, "time_in", "timestep_embedder"),
    *hunyuan.times(TIMES, "time_r_in", "timestep_embedder_r"),
    *hunyuan.times(TIMES, "guidance_in", "guidance_embedder"),
    *hunyuan.GLYPHS,
]
TABLES = {"comfy": hunyuan.table(0, OUTSIDE), "original": hunyuan.table(1, OUTSIDE)}
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """The video models have most of these names too, but embed patches of three dimensions."""
    return hunyuan.layout_of(shapes, 2, (*TABLES, "diffusers"))


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, and the inner width of the ByT5 mapper, which diffusers fixes at 2048."""
    ours = our_view(TABLES[layout], shapes) if layout in TABLES else shapes
    width, channels = ours["x_embedder.proj.weight"][:2]
    head = ours["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": ours["proj_out.weight"][0],
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count(ours, "transformer_blocks"),
        "num_single_layers": count(ours, "single_transformer_blocks"),
        "num_refiner_layers": count(ours, f"{hunyuan.REFINE}.token_refiner.refiner_blocks"),
        "mlp_ratio": ours["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "guidance_embeds": f"{TIMES}.guidance_embedder.linear_1.weight" in ours,
        "use_meanflow": f"{TIMES}.timestep_embedder_r.linear_1.weight" in ours,
        "text_embed_dim": ours[f"{hunyuan.REFINE}.proj_in.weight"][1],
        "text_embed_2_dim": ours["context_embedder_2.linear_1.weight"][1],
        "rope_theta": hunyuan.ROPE_THETA,
        "rope_axes_dim": [head // 2, head // 2],
        "glyph_width": ours["context_embedder_2.linear_1.weight"][0],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageByT5TextProjection

    from library.models.hunyuan_image import HunyuanImage

    published = {"text_embed_2_dim": 1472} | configuration
    glyph_width = published.pop("glyph_width", 2048)
    model = HunyuanImage(**published)
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    model.context_embedder_2 = HunyuanImageByT5TextProjection(published["text_embed_2_dim"], glyph_width, inner)
    return model


DENOISER = Part(
    name="denoiser",
    title="a HunyuanImage-2.1 denoiser",
    option="pretrained_model_name_or_path",
    layouts={**TABLES, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
)


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, guidance: float = 1.0
) -> Tensor:
    """Velocity [B,C,h,w] float32.

    Conds: "text" [T,D]; "byt5" [T2,D2] where there is quoted text. The distilled model also reads "guidance" [],
    else `guidance`, and "next_sigma" [], the sigma that a sampler's step leads to, else the sigma itself: a MeanFlow
    model gives the mean velocity between the two, and training wants the one at sigma.
    """
    import torch

    dtype, config = denoiser.x_embedder.proj.weight.dtype, denoiser.config
    texts = [cond["text"].to(dtype) for cond in conds]
    absent = texts[0].new_zeros(0, config.text_embed_2_dim)
    glyphs = [cond.get("byt5", absent).to(dtype) for cond in conds]
    any_glyphs = any(len(states) for states in glyphs)
    leads_to = torch.stack([cond.get("next_sigma", level) for cond, level in zip(conds, sigma, strict=True)])
    return denoiser(
        noisy.to(dtype),
        sigma.float() * 1000,
        ragged.pad(texts),
        ragged.mask(texts),
        ragged.pad(glyphs) if any_glyphs else None,
        ragged.mask(glyphs) if any_glyphs else None,
        ragged.scalars(conds, "guidance", guidance, sigma) * 1000 if config.guidance_embeds else None,
        leads_to.float() * 1000 if config.use_meanflow else None,
    ).float()
