"""HunyuanImage-2.1, base and distilled (Tencent, 2025): a double- and single-stream transformer on 32x latents.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,64,h,w], one token each. Text is the
third-last layer of Qwen2.5-VL, and the ByT5 states of what a caption puts in quotation marks, if anything; the
distilled model also takes guidance * 1000 and, being a MeanFlow model, the sigma that the step leads to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import ragged
from library.families.family import Cond, Part
from library.layout import Row, Shape, block, count, identity, our_view, row, swap_halves

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROPE_THETA = 256.0  # of Tencent's configuration; the two axes share a head evenly


# (ComfyUI's name, Tencent's, ours ...): the tensors are the same.
TIMES, REFINE = "time_guidance_embed", "context_embedder"
OUTSIDE = [
    ("img_in.proj", "img_in.proj", "x_embedder.proj"),
    ("time_in.in_layer", "time_in.mlp.0", f"{TIMES}.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_in.mlp.2", f"{TIMES}.timestep_embedder.linear_2"),
    ("time_r_in.in_layer", "time_r_in.mlp.0", f"{TIMES}.timestep_embedder_r.linear_1"),
    ("time_r_in.out_layer", "time_r_in.mlp.2", f"{TIMES}.timestep_embedder_r.linear_2"),
    ("guidance_in.in_layer", "guidance_in.mlp.0", f"{TIMES}.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "guidance_in.mlp.2", f"{TIMES}.guidance_embedder.linear_2"),
    ("byt5_in.layernorm", "byt5_in.layernorm", "context_embedder_2.norm"),
    ("byt5_in.fc1", "byt5_in.fc1", "context_embedder_2.linear_1"),
    ("byt5_in.fc2", "byt5_in.fc2", "context_embedder_2.linear_2"),
    ("byt5_in.fc3", "byt5_in.fc3", "context_embedder_2.linear_3"),
    ("final_layer.linear", "final_layer.linear", "proj_out"),
]
REFINER = [
    ("input_embedder", "input_embedder", "proj_in"),
    ("t_embedder.in_layer", "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.out_layer", "t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("c_embedder.in_layer", "c_embedder.linear_1", "time_text_embed.text_embedder.linear_1"),
    ("c_embedder.out_layer", "c_embedder.linear_2", "time_text_embed.text_embedder.linear_2"),
]
REFINER_BLOCK = [
    ("norm1", "norm1", "norm1"),
    ("norm2", "norm2", "norm2"),
    ("adaLN_modulation.1", "adaLN_modulation.1", "norm_out.linear"),
    ("self_attn.qkv", "self_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("self_attn.proj", "self_attn_proj", "attn.to_out.0"),
    ("mlp.0", "mlp.fc1", "ff.net.0.proj"),
    ("mlp.2", "mlp.fc2", "ff.net.2"),
]
DOUBLE = [
    ("img_mod.lin", "img_mod.linear", "norm1.linear"),
    ("txt_mod.lin", "txt_mod.linear", "norm1_context.linear"),
    ("img_attn.qkv", "img_attn_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("txt_attn.qkv", "txt_attn_qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("img_attn.norm.query_norm.scale", "img_attn_q_norm.weight", "attn.norm_q.weight"),
    ("img_attn.norm.key_norm.scale", "img_attn_k_norm.weight", "attn.norm_k.weight"),
    ("txt_attn.norm.query_norm.scale", "txt_attn_q_norm.weight", "attn.norm_added_q.weight"),
    ("txt_attn.norm.key_norm.scale", "txt_attn_k_norm.weight", "attn.norm_added_k.weight"),
    ("img_attn.proj", "img_attn_proj", "attn.to_out.0"),
    ("txt_attn.proj", "txt_attn_proj", "attn.to_add_out"),
    ("img_mlp.0", "img_mlp.fc1", "ff.net.0.proj"),
    ("img_mlp.2", "img_mlp.fc2", "ff.net.2"),
    ("txt_mlp.0", "txt_mlp.fc1", "ff_context.net.0.proj"),
    ("txt_mlp.2", "txt_mlp.fc2", "ff_context.net.2"),
]
SINGLE = [
    ("modulation.lin", "modulation.linear", "norm.linear"),
    ("linear1", "linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("linear2", "linear2", "proj_out"),
    ("norm.query_norm.scale", "q_norm.weight", "attn.norm_q.weight"),
    ("norm.key_norm.scale", "k_norm.weight", "attn.norm_k.weight"),
]


def table(column: int) -> list[Row]:
    def rows(names: list[tuple[str, ...]]) -> list[Row]:
        return [row(name[column], *name[2:]) for name in names]

    refiner = "txt_in.individual_token_refiner.blocks.{i}"
    return [
        *rows(OUTSIDE),
        *block("txt_in", REFINE, *rows(REFINER)),
        *block(refiner, REFINE + ".token_refiner.refiner_blocks.{i}", *rows(REFINER_BLOCK)),
        *block("double_blocks.{i}", "transformer_blocks.{i}", *rows(DOUBLE)),
        *block("single_blocks.{i}", "single_transformer_blocks.{i}", *rows(SINGLE)),
        row("final_layer.adaLN_modulation.1", "norm_out.linear", op=swap_halves),
    ]


TABLES = {"comfy": table(0), "original": table(1)}
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """The video models have most of these names too, but embed patches of three dimensions."""
    embed = shapes.get("img_in.proj.weight") or shapes.get("x_embedder.proj.weight") or ()
    if len(embed) != 4:
        return None
    first = {
        "comfy": "double_blocks.0.img_attn.qkv.weight",
        "original": "double_blocks.0.img_attn_qkv.weight",
        "diffusers": "context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",
    }
    return next((layout for layout, key in first.items() if key in shapes), None)


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
        "num_refiner_layers": count(ours, f"{REFINE}.token_refiner.refiner_blocks"),
        "mlp_ratio": ours["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "guidance_embeds": f"{TIMES}.guidance_embedder.linear_1.weight" in ours,
        "use_meanflow": f"{TIMES}.timestep_embedder_r.linear_1.weight" in ours,
        "text_embed_dim": ours[f"{REFINE}.proj_in.weight"][1],
        "text_embed_2_dim": ours["context_embedder_2.linear_1.weight"][1],
        "rope_theta": ROPE_THETA,
        "rope_axes_dim": [head // 2, head // 2],
        "glyph_width": ours["context_embedder_2.linear_1.weight"][0],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageByT5TextProjection

    from library.models.hunyuan_image import HunyuanImage

    model = HunyuanImage(**{key: value for key, value in configuration.items() if key != "glyph_width"})
    glyphs, width = model.config.text_embed_2_dim, configuration.get("glyph_width", 2048)
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    model.context_embedder_2 = HunyuanImageByT5TextProjection(glyphs, width, inner)
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
