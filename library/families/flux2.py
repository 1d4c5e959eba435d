"""FLUX.2 dev and klein (Black Forest Labs, 2025-2026): Flux with one modulation for all blocks, on 16x latents.

Facts: the model is given sigma and multiplies by 1000 itself, in its own number format, and returns noise - x0.
Latents are [B,128,h,w], one token each. Text is three layers of Mistral Small (dev) or Qwen3 (klein) side by side, its
tokens counted on the fourth rotary axis, without a mask. dev also embeds a guidance. Reference pictures are more
tokens, at 10, 20, .. on the first axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import control_pictures, few_steps, flux2_text, mistral, qwen3, ragged, tokens, vae_flux2
from library.errors import ConfigError
from library.families.family import Cond, Family, ItemInput, Part
from library.layout import Shape, block, count, identity, our_view, row, swap_halves
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REFERENCE_STEP = 10  # on the first rotary axis, from one picture to the next: Black Forest Labs' code
ROPE_THETA = 2000  # of their configuration; the four axes share a head evenly
TIMES = "time_guidance_embed"
COMFY = [  # Black Forest Labs' own names
    row("img_in", "x_embedder"),
    row("txt_in", "context_embedder"),
    row("time_in.in_layer", f"{TIMES}.timestep_embedder.linear_1"),
    row("time_in.out_layer", f"{TIMES}.timestep_embedder.linear_2"),
    row("guidance_in.in_layer", f"{TIMES}.guidance_embedder.linear_1"),
    row("guidance_in.out_layer", f"{TIMES}.guidance_embedder.linear_2"),
    row("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    row("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    row("single_stream_modulation.lin", "single_stream_modulation.linear"),
    *block(
        "double_blocks.{i}",
        "transformer_blocks.{i}",
        row("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        row("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        row("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
        row("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
        row("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
        row("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
        row("img_attn.proj", "attn.to_out.0"),
        row("txt_attn.proj", "attn.to_add_out"),
        row("img_mlp.0", "ff.linear_in"),
        row("img_mlp.2", "ff.linear_out"),
        row("txt_mlp.0", "ff_context.linear_in"),
        row("txt_mlp.2", "ff_context.linear_out"),
    ),
    *block(
        "single_blocks.{i}",
        "single_transformer_blocks.{i}",
        row("linear1", "attn.to_qkv_mlp_proj"),
        row("linear2", "attn.to_out"),
        row("norm.query_norm.scale", "attn.norm_q.weight"),
        row("norm.key_norm.scale", "attn.norm_k.weight"),
    ),
    row("final_layer.linear", "proj_out"),
    row("final_layer.adaLN_modulation.1", "norm_out.linear", op=swap_halves),
]
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
# All Linear layers of the blocks, without the modulations, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_blocks.", "single_blocks.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if "double_stream_modulation_img.lin.weight" in shapes:
        return "comfy"
    return "diffusers" if "double_stream_modulation_img.linear.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    ours = our_view(COMFY, shapes) if layout == "comfy" else shapes
    width, channels = ours["x_embedder.weight"]
    head = ours["transformer_blocks.0.attn.norm_q.weight"][0]
    return {
        "in_channels": channels,
        "out_channels": ours["proj_out.weight"][0],
        "num_layers": count(ours, "transformer_blocks"),
        "num_single_layers": count(ours, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": ours["context_embedder.weight"][1],
        "timestep_guidance_channels": ours[f"{TIMES}.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": ours["transformer_blocks.0.ff.linear_out.weight"][1] / width,
        "axes_dims_rope": [head // 4] * 4,
        "rope_theta": ROPE_THETA,
        "guidance_embeds": f"{TIMES}.guidance_embedder.linear_1.weight" in ours,
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Flux 2 denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
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

    Conds: "text" [T,D], of dev with "fill" [D], what stands before it up to 512 tokens; "control.0", .. [C,h,w],
    reference pictures; for dev "guidance" [] where an item's differs from `guidance`.
    """
    return tokens.in_groups(partial(_of_one_size, denoiser, guidance), noisy, sigma, conds)


def _of_one_size(denoiser: torch.nn.Module, guidance: float, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    import torch

    from library.checkpointing import exact_times

    dtype, device, pictures = denoiser.x_embedder.weight.dtype, noisy.device, [noisy, *tokens.references(conds)]
    texts = [flux2_text.filled(cond).to(dtype) for cond in conds]
    text, hidden = ragged.pad(texts), torch.cat([tokens.pack(one, patch=1) for one in pictures], 1).to(dtype)
    keys = tokens.key_mask(ragged.mask(texts), hidden)
    words = torch.zeros(text.shape[1], 4, device=device)
    words[:, 3] = torch.arange(text.shape[1], device=device)
    guided = denoiser.config.guidance_embeds
    scale = ragged.scalars(conds, "guidance", guidance, sigma) if guided else None
    times = [sigma.float() * 1000, scale * 1000] if guided else [sigma.float() * 1000]
    with exact_times(denoiser.time_guidance_embed.time_proj, times):
        out = denoiser(
            hidden,
            text,
            sigma,
            torch.cat(
                [
                    tokens.grid(*one.shape[-2:], device, index=REFERENCE_STEP * k, axes=4)
                    for k, one in enumerate(pictures)
                ]
            ),
            words,
            scale,
            None if keys is None else {"attention_mask": keys},
            return_dict=False,
        )[0]
    return tokens.unpack(out, *noisy.shape[-2:], patch=1).float()


def encode_item(vae: torch.nn.Module, image_encoders: list[torch.nn.Module], item: ItemInput) -> Cond:
    """{"control.k": [C,h,w]}, the reference pictures."""
    return {f"control.{k}": vae_flux2.encode(vae, picture[None])[0] for k, picture in enumerate(item.controls)}


def sampling_shift(tokens: int, steps: int) -> float:
    """Black Forest Labs' e^mu: mu is linear in the tokens, for 10 and for 200 steps, and between these in the steps."""
    import math

    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(many)
    few = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(many + (few - many) * (200 - steps) / 190)


def variant_of(options: Any) -> Family:
    """The record of the model in the file, from its guidance and width. Raises ConfigError where the options differ."""
    from library.checkpoints import configuration_of, path_of, pipeline_facts

    path, asked, is_training = path_of(DENOISER, options), options.model_version, hasattr(options, "given")
    found = configuration_of(DENOISER, path)
    is_dev = found["guidance_embeds"]
    size = WIDTHS.get(found["num_attention_heads"] * found["attention_head_dim"], "")
    if asked and (is_dev != (asked == "dev") or not is_dev and not asked.endswith(size)):
        told = "dev" if is_dev else f"a klein{size and f' of {size.upper()}'}"
        raise ConfigError(f"--model_version {asked}: {path} is {told}; remove the option, or name another file")
    if is_dev:
        return replace(FLUX2, predict=partial(predict, guidance=options.guidance_scale)) if is_training else FLUX2
    if is_training and options.given("guidance_scale"):
        raise ConfigError(f"--guidance_scale {options.guidance_scale:g} has no effect: {path} embeds no guidance")
    family = replace(KLEIN, released=KLEIN.released | KLEIN_9B) if size == "9b" else KLEIN
    is_distilled = asked in ("klein-4b", "klein-9b") or pipeline_facts(path).get("is_distilled", False)
    is_named = few_steps.word_in(path, DENOISER, "klein-4b klein-9b klein_4b klein_9b")  # the other is klein-base-4b
    if not is_distilled and (asked or not is_named):
        return family
    why = f"--model_version {asked}" if asked else f"{path} is the distilled klein (the other one is klein-base)"
    advice = partial(few_steps.sentence, why)
    return replace(family, title="Flux 2 klein (distilled)", sampling={"sample_steps": 4}, advice=advice)


WIDTHS = {3072: "4b", 4096: "9b"}  # of the published klein models
KLEIN_9B = {"denoiser": "flux2_klein_9b", "text_encoder": "te_qwen3_8b"}
MODEL_VERSION = Option(
    "model_version", "str", None, "dev and klein are told apart by the file, klein and klein-base by its name",
    choices=("dev", "klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b"),
)  # fmt: skip
FLUX2 = Family(
    name="flux2",
    title="Flux 2 dev",
    denoiser=DENOISER,
    vae=vae_flux2.part(),
    text_encoders=(mistral.part(),),
    tokenize=flux2_text.tokenize_mistral,
    encode=flux2_text.encode_mistral,
    encode_image=vae_flux2.encode,
    decode_latents=vae_flux2.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=128,
    latent_downscale=16,
    # The seed's advice for diffusion-pipe: logit-normal with shift 3, because the latents have many channels.
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 3.0},
    options=(
        Option("guidance_scale", "float", 1.0, "guidance that dev is given in training", low=0),  # as diffusion-pipe
        MODEL_VERSION,
    ),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="flux-2-dev",
    base_model_version="flux2",
    resolution=1024,
    encode_item=encode_item,
    max_controls=10,  # Black Forest Labs' documentation of dev
    control_size=partial(control_pictures.capped, area=1024 * 1024, unit=16),
    variant_of=variant_of,
    inference_options=(MODEL_VERSION,),
    sampling={"sample_steps": 50, "guidance_scale": 4.0},  # Black Forest Labs' example
    sampling_shift=sampling_shift,
    released={"denoiser": "flux2", "vae": "vae_flux2", "text_encoder": "te_mistral_small_flux2"},
    text_widths=lambda denoiser: (denoiser["joint_attention_dim"] // 3,),
)
KLEIN = replace(
    FLUX2,
    title="Flux 2 klein",
    text_encoders=(qwen3.part("a Qwen3 text encoder", "Qwen/Qwen3-4B"),),
    tokenize=flux2_text.tokenize_qwen3,
    encode=flux2_text.encode_qwen3,
    architecture="flux-2-klein",
    base_model_version="flux2_klein",
    sampling={"sample_steps": 50, "scale": 4.0},  # of the base models, Black Forest Labs' example
    released={"denoiser": "flux2_klein_4b", "vae": "vae_flux2", "text_encoder": "te_qwen3_4b"},
    recipe="qwen3",
)
