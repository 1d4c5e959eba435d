"""Z-Image, base and Turbo (Tongyi, 2025): a single-stream transformer on Flux latents with a Qwen3-4B encoder.

Facts: x_sigma and velocity as everywhere; the model itself is given 1 - sigma (times 1000 inside) and returns
x0 - noise. Latents are Flux's, [B,16,h,w], 2x2 patches, text and picture each padded to a multiple of 32 tokens
inside the model with learned pad tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from library.components import decoder, few_steps, qwen3, vae_ldm
from library.components.tokenizers import wrapped
from library.families.family import Cond, Family, Part, Text
from library.layout import Shape, block, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Flux's autoencoder, published with FLUX.1 (autoencoder parameters `shift_factor`, `scale_factor`).
SHIFT, SCALE = 0.1159, 0.3611
# The prompt as Qwen3's chat template gives it for one user turn; every token of it is conditioning.
TEMPLATE = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
MAX_TOKENS = 512  # of the whole prompt: musubi-tuner's and diffusers' limit
TOKENIZER = "Qwen/Qwen3-4B"
# Rotary axes (text/frame, row, column) share a head as 32:48:48 of 128; positions up to these.
AXES, AXES_LENGTHS, THETA = (2, 3, 3), (1536, 512, 512), 256.0

BLOCK = [
    row("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    row("attention.out", "attention.to_out.0"),
    row("attention.q_norm", "attention.norm_q"),
    row("attention.k_norm", "attention.norm_k"),
    row("feed_forward"),
    row("attention_norm1"),
    row("attention_norm2"),
    row("ffn_norm1"),
    row("ffn_norm2"),
]
COMFY = [
    row("x_embedder", "all_x_embedder.2-1"),
    row("final_layer", "all_final_layer.2-1"),
    row("t_embedder"),
    row("cap_embedder"),
    row("x_pad_token"),
    row("cap_pad_token"),
    *block("context_refiner.{i}", "context_refiner.{i}", *BLOCK),
    *block("noise_refiner.{i}", "noise_refiner.{i}", *BLOCK, row("adaLN_modulation")),
    *block("layers.{i}", "layers.{i}", *BLOCK, row("adaLN_modulation")),
]


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """Lumina 2 has most of these names too, but no pad tokens and no bias-free modulation of this kind."""
    if "cap_pad_token" not in shapes or "layers.0.attention_norm1.weight" not in shapes:
        return None
    return "comfy" if "layers.0.attention.qkv.weight" in shapes else "diffusers"


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    """diffusers' configuration, and the inner width of the time embedding, which diffusers fixes at 1024."""
    embedder = "x_embedder" if layout == "comfy" else "all_x_embedder.2-1"
    norm = "layers.0.attention.q_norm.weight" if layout == "comfy" else "layers.0.attention.norm_q.weight"
    width, head = shapes[f"{embedder}.weight"][0], shapes[norm][0]

    def count(name: str) -> int:
        return 1 + max((int(key.split(".")[1]) for key in shapes if key.startswith(name + ".")), default=-1)

    return {
        "in_channels": shapes[f"{embedder}.weight"][1] // 4,  # 2x2 patches
        "dim": width,
        "n_layers": count("layers"),
        "n_refiner_layers": count("noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "rope_theta": THETA,
        "axes_dims": [head * part // sum(AXES) for part in AXES],
        "axes_lens": list(AXES_LENGTHS),
        "time_width": shapes["t_embedder.mlp.0.weight"][0],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import ZImageTransformer2DModel
    from diffusers.models.transformers.transformer_z_image import TimestepEmbedder

    rest = {key: value for key, value in configuration.items() if key != "time_width"}
    model = ZImageTransformer2DModel(**rest)
    out = model.t_embedder.mlp[2].out_features
    model.t_embedder = TimestepEmbedder(out, mid_size=configuration.get("time_width", 1024))
    return model


DENOISER = Part(
    name="denoiser",
    title="a Z-Image denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": COMFY, "diffusers": vae_ldm.identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    carried=("norm_final.weight",),
    diffusers_folder="transformer",
    # 2 % of the weights; with them in fp8 the output errs a fifth more (docs/memory.md).
    high_precision=("adaLN_modulation",),
)


def tokenize(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """Ids of the prompt, at most MAX_TOKENS, and the end of the caption that did not fit. The template is never cut."""
    (tokenizer,) = tokenizers
    return wrapped(tokenizer, caption, MAX_TOKENS, TEMPLATE)


def encode(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [T,D]}: the next-to-last layer's states of the whole prompt, unpadded."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption)
    return {"text": decoder.states(encoders[0], torch.tensor([ids], device=device), -2)[0]}


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. The time stays float32 until its embedding; the text may be ragged."""
    import torch

    dtype = denoiser.all_x_embedder["2-1"].weight.dtype
    pictures = list(noisy.to(dtype).unsqueeze(2).unbind(0))  # each [C,1,h,w]
    texts = [cond["text"].to(dtype) for cond in conds]
    out = denoiser(pictures, 1.0 - sigma.float(), texts, return_dict=False)[0]
    return -torch.stack(out).squeeze(2).float()


def encode_image(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    return vae_ldm.encode(vae, pixels, SHIFT, SCALE)


def decode_latents(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return vae_ldm.decode(vae, latents, SHIFT, SCALE)


def variant_of(options: Any) -> Family:
    """Turbo has the shapes of the base; the name of its file says which it is."""
    from library.checkpoints import path_of

    if not few_steps.word_in(path_of(DENOISER, options), DENOISER, "turbo"):
        return Z_IMAGE
    # Tongyi's example for Turbo: eight steps that end at the data, no guidance; the shift of its scheduler.
    few = {"sample_steps": 8, "scale": 1.0, "flow_shift": 3.0}
    return replace(Z_IMAGE, title="Z-Image Turbo", sampling=few, advice=few_steps.by_name(DENOISER, "turbo"))


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    denoiser=DENOISER,
    vae=vae_ldm.part("a Flux-type VAE", channels=16),
    text_encoders=(qwen3.part("a Qwen3 text encoder", TOKENIZER),),
    tokenize=tokenize,
    encode=encode,
    encode_image=encode_image,
    decode_latents=decode_latents,
    predict=predict,
    blocks=("layers", "noise_refiner", "context_refiner"),
    # All of JointTransformerBlock, refiners and modulation included, as diffusion-pipe trains it (the seed's system).
    adapted=("layers.", "noise_refiner.", "context_refiner."),
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    # musubi-tuner's advice for Z-Image: sigmoid sampling with shift 2.0.
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 2.0},
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="z-image",
    base_model_version="z_image",
    resolution=1024,
    variant_of=variant_of,
    text_widths=lambda denoiser: (denoiser["cap_feat_dim"],),
    released={"denoiser": "z_image", "vae": "vae_flux", "text_encoder": "te_qwen3_4b"},
)
