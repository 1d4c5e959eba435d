"""AuraFlow 0.1 to 0.3 and Pony V7 (fal, 2024; PurpleSmartAI, 2025): double and single blocks on SDXL latents.

Facts: sigma in 0..1 is the time (times 1000 inside), noise - x0 is returned. Text is Pile-T5-XL's states, zero-padded
to 256 tokens (Pony V7: 768) without a mask; the model puts 8 tokens of its own before them. Positions of patches are
a learned grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import ragged, t5, vae_ldm
from library.components.tokenizers import ended
from library.families.family import Cond, Family, Part, Text
from library.layout import Row, Shape, block, count, identity, row, swap_halves
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The width of a head in the published models. No shape shows it, so files of other sizes say in their header
# metadata how many heads they have.
HEAD, HEADS_KEY = 256, "num_attention_heads"
TOKENS = 256  # of the published pipeline; Pony V7 reads 768


def feed_forward(theirs: str, ours: str) -> list[Row]:
    pairs = (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
    return [row(f"{theirs}.{a}", f"{ours}.{b}") for a, b in pairs]


def attention(stream: int, *ours: str) -> list[Row]:
    """Stream 1 is the text of a double block or all of a single one, stream 2 the picture."""
    return [row(f"attn.w{stream}{a}", f"attn.{b}") for a, b in zip("qkvo", ours, strict=True)]


PICTURE, TEXT = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
DOUBLE = [
    *attention(2, *PICTURE),
    *attention(1, *TEXT),
    *feed_forward("mlpX", "ff"),
    *feed_forward("mlpC", "ff_context"),
    row("modX.1", "norm1.linear"),
    row("modC.1", "norm1_context.linear"),
]
SINGLE = [*attention(1, *PICTURE), *feed_forward("mlp", "ff"), row("modCX.1", "norm1.linear")]
COMFY = [
    row("positional_encoding", "pos_embed.pos_embed"),
    row("init_x_linear", "pos_embed.proj"),
    row("register_tokens"),
    row("t_embedder.mlp.0", "time_step_proj.linear_1"),
    row("t_embedder.mlp.2", "time_step_proj.linear_2"),
    row("cond_seq_linear", "context_embedder"),
    row("modF.1", "norm_out.linear", op=swap_halves),
    row("final_linear", "proj_out"),
    *block("double_layers.{i}", "joint_transformer_blocks.{i}", *DOUBLE),
    *block("single_layers.{i}", "single_transformer_blocks.{i}", *SINGLE),
]
BLOCKS = ("joint_transformer_blocks", "single_transformer_blocks")
ADAPTED = ("double_layers.", "single_layers.")  # all Linear layers of the blocks, as diffusion-pipe trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    if "register_tokens" not in shapes:
        return None
    if "double_layers.0.modX.1.weight" in shapes:
        return "comfy"
    return "diffusers" if "joint_transformer_blocks.0.norm1.linear.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    def size(comfy: str, ours: str) -> Shape:
        return shapes[comfy if layout == "comfy" else ours]

    doubles, singles = ("double_layers", "single_layers") if layout == "comfy" else BLOCKS
    width, values = size("init_x_linear.weight", "pos_embed.proj.weight")
    heads = int(metadata.get(HEADS_KEY) or max(1, width // HEAD))
    return {
        "patch_size": 2,
        "in_channels": values // 4,
        "out_channels": size("final_linear.weight", "proj_out.weight")[0] // 4,
        "num_mmdit_layers": count(shapes, doubles),
        "num_single_dit_layers": count(shapes, singles),
        "attention_head_dim": width // heads,
        "num_attention_heads": heads,
        "joint_attention_dim": size("cond_seq_linear.weight", "context_embedder.weight")[1],
        "caption_projection_dim": width,
        "pos_embed_max_size": size("positional_encoding", "pos_embed.pos_embed")[1],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.auraflow import AuraFlow

    return AuraFlow(**configuration)


DENOISER = Part(
    name="denoiser",
    title="an AuraFlow denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("model.", "", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
    high_precision=("modX.", "modC.", "modCX.", "norm1.linear", "norm1_context.linear"),
)


def tokenize(tokenizers: list[Any], caption: str, *, length: int = TOKENS) -> tuple[list[int], str]:
    """Pile-T5's ids with its end token, at most `length`, and the end of the caption that did not fit."""
    return ended(tokenizers[0], caption, length)


def encode(
    encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any, *, length: int = TOKENS
) -> Cond:
    """{"text": [T,D]}: the last states of the caption's own tokens; T5's mask hides padding from them."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption, length=length)
    return {"text": t5.states(encoders[0], torch.tensor([ids], device=device))[0]}


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, tokens: int = TOKENS
) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], zero-padded to `tokens`."""
    dtype = denoiser.proj_out.weight.dtype
    text = ragged.pad([cond["text"].to(dtype) for cond in conds], tokens)
    return denoiser(noisy.to(dtype), text, sigma.float(), return_dict=False)[0].float()


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, *vae_ldm.SDXL)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, *vae_ldm.SDXL)


def variant_of(options: Any) -> Family:
    """The record with the text length that the model was trained with."""
    length = options.max_sequence_length
    if length == TOKENS:
        return AURAFLOW
    return replace(
        AURAFLOW,
        tokenize=partial(tokenize, length=length),
        encode=partial(encode, length=length),
        predict=partial(predict, tokens=length),
        recipe=f"t5 {length}",
    )


LENGTH = Option(
    "max_sequence_length", "int", TOKENS, "T5 tokens that the model reads, padded: AuraFlow 256, Pony V7 768", low=1
)

AURAFLOW = Family(
    name="auraflow",
    title="AuraFlow",
    denoiser=DENOISER,
    vae=vae_ldm.part("an SDXL VAE", channels=4),
    text_encoders=(t5.pile(),),
    tokenize=tokenize,
    encode=encode,
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=32,  # the model's positions are off by one for odd numbers of patches
    latent_channels=4,
    latent_downscale=8,
    # diffusion-pipe's example for Pony V7 (the seed's system): sigma from a logit-normal distribution without a shift.
    defaults={"timestep_sampling": "sigmoid"},
    options=(LENGTH,),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="auraflow",
    base_model_version="auraflow",
    resolution=1024,
    variant_of=variant_of,
    inference_options=(LENGTH,),
    # diffusers' AuraFlowPipeline; the shift of the published scheduler.
    sampling={"sample_steps": 50, "scale": 3.5, "flow_shift": 1.73},
    text_widths=lambda denoiser: (denoiser["joint_attention_dim"],),
    released={"denoiser": "auraflow", "vae": "vae_sdxl", "text_encoder": "te_umt5_auraflow"},
)
