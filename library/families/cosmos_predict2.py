"""Cosmos-Predict2 text-to-image, 2B and 14B (NVIDIA, 2025): cross attention to the old T5-11B's states.

Facts: rectified flow with sigma in 0..1 as the time (the released sampler's sigma s is s / (1 + s) here), noise - x0
is returned. Latents are the Wan 2.1 VAE's, one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import cosmos, ragged, t5, vae_wan
from library.families.family import Cond, Family, Part
from library.layout import Shape, identity
from library.objective import flow_karras

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS = cosmos.BLOCKS
SAMPLED = (0.002, 80.0)  # noise levels between which NVIDIA's sampler works
ADAPTED = ("blocks.",)  # all Linear layers of the blocks, as diffusion-pipe (the seed's system) trains them


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    return None if "llm_adapter.embed.weight" in shapes else cosmos.recognise(shapes)


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    return cosmos.config(shapes, layout)


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a Cosmos-Predict2 text-to-image denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": cosmos.ROWS, "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=cosmos.PREFIXES,
    carried=cosmos.CARRIED,
    diffusers_folder="transformer",
    high_precision=cosmos.MODULATION,
)


def predict(
    denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond], *, tokens: int = cosmos.TOKENS
) -> Tensor:
    """Velocity [B,C,h,w] float32 ([B,C,F,h,w] of videos). Conds: "text" [T,D], zero-padded to `tokens`."""
    dtype = denoiser.proj_out.weight.dtype
    text = ragged.pad([cond["text"].to(dtype) for cond in conds], tokens)
    out = denoiser(cosmos.video_of(noisy).to(dtype), sigma.float(), text, return_dict=False)[0]
    return out.float().reshape(noisy.shape)


def advice(options: Any) -> tuple[str, ...]:
    """The seed's system found that this model loses much in fp8 with three bits of mantissa, and the 2B in any fp8."""
    if (options.fp8_base or options.fp8_scaled) and options.fp8_format == "e4m3":
        return ("--fp8_format e4m3 is known to harm Cosmos-Predict2; e5m2 is what it bears, and the 2B better none",)
    return ()


COSMOS_PREDICT2 = Family(
    name="cosmos_predict2",
    title="Cosmos-Predict2",
    denoiser=DENOISER,
    vae=vae_wan.part(),
    text_encoders=(t5.old(),),
    tokenize=cosmos.tokenize,
    encode=cosmos.encode,
    encode_image=vae_wan.encode,
    decode_latents=vae_wan.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI keeps what its blocks add up in float32 where it computes in fp16
    # diffusion-pipe (the seed's system) draws sigma from a logit-normal distribution without a shift, and its advice
    # for fp8 is e5m2.
    defaults={"timestep_sampling": "sigmoid", "fp8_format": "e5m2"},
    options=cosmos.rate_options(),
    own_rates=cosmos.RATES,
    save_formats=("comfy", "kohya"),
    architecture="cosmos-predict2",
    base_model_version="cosmos_predict2",
    resolution=1024,
    objective=flow_karras(*SAMPLED),
    channels_of=lambda denoiser: denoiser.config.out_channels,
    # NVIDIA's 35 steps, and its guidance of 7, which it adds to the 1 that classifier-free guidance counts from.
    sampling={"sample_steps": 35, "scale": 8.0, "flow_shift": 1.0},
    text_widths=lambda denoiser: (denoiser["text_embed_dim"],),
    advice=advice,
    released={"denoiser": "cosmos_predict2", "vae": "vae_wan21", "t5xxl": "te_t5xxl_old"},
)
