"""HunyuanImage-2.1, base and distilled (Tencent, 2025): a double- and single-stream transformer on 32x latents.

Facts: the model is given sigma * 1000 and returns noise - x0. Latents are [B,64,h,w], one token each. Text is the
third-last layer of Qwen2.5-VL, and the ByT5 states of what a caption puts in quotation marks, if anything; the
distilled model also takes guidance * 1000 and, being a MeanFlow model, the sigma that the step leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import few_steps, glyphs, hunyuan, qwen25_vl, ragged, t5, vae_hunyuan_image
from library.components.tokenizers import wrapped
from library.errors import ConfigError
from library.families.family import Cond, Family, Part, Text
from library.layout import Shape, count, identity, our_view
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Tencent's prompt for Qwen2.5-VL; what stands before the caption (34 tokens) is cut off the states.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>",
)
LAYER, MAX_TOKENS = -3, 1000  # of the hidden states; tokens whose states are kept (Tencent's published pipeline)
# Tencent's adaptive projected guidance: scale, norm threshold, momentum (its published inference code).
APG = {"scale": 10.0, "threshold": 10.0, "momentum": -0.5}
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
    kohya="original",
)


def tokenize(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """Qwen's ids of the prompt with its template, and the end of the caption that did not fit."""
    return wrapped(tokenizers[0], caption, _head(tokenizers) + MAX_TOKENS, TEMPLATE)


def _head(tokenizers: list[Any]) -> int:
    return len(tokenizers[0](TEMPLATE[0], add_special_tokens=False)["input_ids"])


def encode(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [T,D]} without the template's head, and {"byt5": [T2,D2]} where the caption quotes something."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption)
    states = qwen25_vl.states(encoders[0], torch.tensor([ids], device=device), LAYER)
    return {"text": states[0, _head(tokenizers) :]} | glyphs.encode(encoders[1], tokenizers[1], text.caption, device)


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


def guide(settings: Mapping[str, Any], cond: Cond) -> Callable[..., Tensor]:
    """Tencent's mix: classifier-free guidance first, then adaptive projected guidance, later for letters."""
    from library.guidance import adaptive_projected

    start = settings["apg_start_step_ocr" if "byt5" in cond else "apg_start_step_general"]
    rescale, rescale_apg = settings["guidance_rescale"], settings["guidance_rescale_apg"]
    return adaptive_projected(start=start, rescale=rescale, rescale_apg=rescale_apg, **APG)


def variant_of(options: Any) -> Family:
    """The record with the run's VAE chunks, and for a distilled file its guidance and its few steps."""
    from library.checkpoints import find_part, path_of

    chunk = getattr(options, "vae_chunk_size", None) or 0
    family = replace(
        HUNYUAN_IMAGE,
        encode_image=partial(vae_hunyuan_image.encode, chunk=chunk),
        decode_latents=partial(vae_hunyuan_image.decode, chunk=chunk),
    )
    checkpoint, layout = find_part(DENOISER, path_of(DENOISER, options))
    is_distilled = DENOISER.config(checkpoint.shapes, checkpoint.metadata, layout)["guidance_embeds"]
    is_training = hasattr(options, "given")
    if is_training and options.given("guidance_scale") and not is_distilled:
        raise ConfigError(
            f"--guidance_scale {options.guidance_scale:g} has no effect: {checkpoint.path} is not the distilled model"
        )
    if not is_distilled:
        return family
    guidance = options.guidance_scale if is_training else DISTILLED["guidance_scale"]
    return replace(
        family,
        predict=partial(predict, guidance=guidance),
        sampling=DISTILLED,
        advice=partial(few_steps.sentence, f"{checkpoint.path} is the distilled model, which embeds a guidance"),
    )


# Tencent's published inference settings of the distilled model: no classifier-free guidance.
DISTILLED = {"sample_steps": 8, "scale": 1.0, "guidance_scale": 3.25, "flow_shift": 4.0}

HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    title="HunyuanImage-2.1",
    denoiser=DENOISER,
    vae=vae_hunyuan_image.part(),
    text_encoders=(qwen25_vl.part(), t5.byt5()),
    tokenize=tokenize,
    encode=encode,
    encode_image=vae_hunyuan_image.encode,
    decode_latents=vae_hunyuan_image.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=32,
    latent_channels=64,
    latent_downscale=32,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # sd-scripts' guide: sigma sampling with shift 5.0, which is also Tencent's shift at inference.
    defaults={"timestep_sampling": "sigma", "discrete_flow_shift": 5.0},
    options=(
        Option("vae_chunk_size", "int", None, "rows that the VAE convolves at a time; fewer need less memory", low=1),
        Option("guidance_scale", "float", 3.25, "guidance that a distilled model is given", low=0),
    ),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="hunyuan-image-2.1",
    base_model_version="hunyuan-image-2.1",
    resolution=2048,
    variant_of=variant_of,
    # sd-scripts' inference script: 50 steps at 3.5; APG from step 5, where letters are drawn from step 38.
    sampling={"sample_steps": 50, "scale": 3.5},
    inference_options=(
        Option("vae_chunk_size", "int", None, "rows that the VAE convolves at a time; 16 is a good value", low=1),
        Option("apg_start_step_general", "int", 5, "last step of classifier-free guidance, then APG"),
        Option("apg_start_step_ocr", "int", 38, "the same for prompts with quoted text"),
        Option("guidance_rescale", "float", 0.0, "rescale the guidance before APG, 0..1"),
        Option("guidance_rescale_apg", "float", 0.0, "rescale the guidance of APG, 0..1"),
    ),
    guide=guide,
    text_widths=lambda denoiser: (denoiser["text_embed_dim"], denoiser["text_embed_2_dim"]),
    released={
        "denoiser": "hunyuan_image",
        "vae": "vae_hunyuan_image",
        "text_encoder": "te_qwen25_vl_7b",
        "byt5": "te_byt5_glyphxl",
    },
)
