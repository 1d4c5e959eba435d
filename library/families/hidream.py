"""HiDream I1, full, dev and fast (2025): double and single blocks with routed experts on Flux latents.

Facts: the model is given sigma * 1000 and returns x0 - noise. Text is 128 T5 states and, of a Llama 3.1 8B, the
states of a layer of its own for each block (128 tokens, no mask); pooled is CLIP-L's and CLIP-G's, side by side.
Released files have diffusers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import clip, few_steps, hidream_text, llama3, t5, vae_ldm
from library.families.family import Cond, Family, Part, PartlyLive
from library.layout import Shape, count, identity
from library.objective import FLOW, Sampler
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The width of a head in the published models. No shape shows it, so files of other sizes say in their header
# metadata how many heads they have.
HEAD, HEADS_KEY = 128, "num_attention_heads"
LLAMA_LAYERS = 32  # block k sees the states of layer k, those beyond the last layer see the last
ACTIVE_EXPERTS = 2  # of the routed ones, per token

BLOCKS = ("double_stream_blocks", "single_stream_blocks")
# All Linear layers of the blocks, those of the experts too, as diffusion-pipe (the seed's system) trains them.
ADAPTED = ("double_stream_blocks.", "single_stream_blocks.")


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """The released file's names are diffusers' own, so a folder and a single file look the same."""
    marks = ("double_stream_blocks.0.block.attn1.to_q_t.weight", "caption_projection.0.linear.weight")
    return "comfy" if all(key in shapes for key in marks) else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    width, values = shapes["x_embedder.proj.weight"]
    heads = int(metadata.get(HEADS_KEY) or width // HEAD)
    head, double, single = width // heads, count(shapes, BLOCKS[0]), count(shapes, BLOCKS[1])
    last = count(shapes, "caption_projection") - 1  # the T5 states', after one for each block
    return {
        "patch_size": 2,
        "in_channels": values // 4,
        "out_channels": shapes["final_layer.linear.weight"][0] // 4,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "caption_channels": [shapes[f"caption_projection.{k}.linear.weight"][1] for k in (last, 0)],
        "text_emb_dim": shapes["p_embedder.pooled_embedder.linear_1.weight"][1],
        "num_routed_experts": count(shapes, f"{BLOCKS[0]}.0.block.ff_i.experts"),
        "num_activated_experts": ACTIVE_EXPERTS,
        "axes_dims_rope": (head // 2, head // 4, head // 4),
        "llama_layers": [min(k, LLAMA_LAYERS - 1) for k in range(double + single)],
    }


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.hidream import HiDream

    return HiDream(**configuration)


DENOISER = Part(
    name="denoiser",
    title="a HiDream denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=("", "model.diffusion_model.", "diffusion_model."),
    diffusers_folder="transformer",
    high_precision=("adaLN_modulation",),
)


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32.

    Conds: "text" [T,D], T5's states; "llama" [layers,L,D], the states after each layer; "pooled" [D]. All items have
    the same T and L: there is no mask.
    """
    import torch

    dtype = denoiser.x_embedder.proj.weight.dtype

    def batch(key: str, dim: int = 0) -> Tensor:
        return torch.stack([cond[key] for cond in conds], dim).to(dtype)

    inputs = (sigma.float() * 1000, batch("text"), batch("llama", 1), batch("pooled"))
    return -denoiser(noisy.to(dtype), *inputs, return_dict=False)[0].float()


def fresh_noise(x: Tensor, velocity: Tensor, now: Tensor, then: Tensor, fresh: Any) -> Tensor:
    """The data that is predicted, with new noise: how HiDream's code samples dev and fast, and ComfyUI's `lcm`."""
    return (1 - then) * (x - now * velocity) + then * fresh()


def variant_of(options: Any) -> Family:
    """The record with the run's Llama tokens and cache; steps and sampler of the model that is asked for."""
    length, version = options.max_llama3_sequence_length, options.model_version
    usual = VERSIONS[version]
    stored = hasattr(options, "given") and options.cache_llama3
    own = {"length": length}
    return replace(
        HIDREAM,
        title=f"HiDream I1 {version.capitalize()}",
        architecture=f"hidream-i1-{version}",
        tokenize=partial(hidream_text.tokenize, **own),
        encode=partial(hidream_text.encode, **own),
        partly_live=None if stored else replace(LIVE, encode=partial(hidream_text.encode_cached, **own)),
        recipe=f"llama {length}{' stored' if stored else ''}",
        sampling=usual | {"sample_sampler": options.sample_sampler or usual["sample_sampler"]},
        advice=HIDREAM.advice if version == "full" else partial(few_steps.sentence, f"--model_version {version}"),
    )


# Of HiDream's published inference code.
VERSIONS: dict[str, dict[str, Any]] = {
    "full": {"sample_steps": 50, "scale": 5.0, "flow_shift": 3.0, "sample_sampler": "euler"},
    "dev": {"sample_steps": 28, "flow_shift": 6.0, "sample_sampler": "lcm"},
    "fast": {"sample_steps": 16, "flow_shift": 3.0, "sample_sampler": "lcm"},
}
OPTIONS = (
    Option(
        "model_version", "str", "full", "which model it is: how pictures of it are drawn", choices=tuple(VERSIONS)
    ),
    Option("max_llama3_sequence_length", "int", hidream_text.TOKENS, "Llama's tokens of a caption", low=2),
    Option("sample_sampler", "str", None, "sampler of pictures; euler, of dev and fast lcm", choices=("euler", "lcm")),
)  # fmt: skip
LIVE = PartlyLive(hidream_text.encode_cached, ("llama3",), hidream_text.complete)
HIDREAM = Family(
    name="hidream",
    title="HiDream I1",
    denoiser=DENOISER,
    vae=vae_ldm.part("a Flux-type VAE", channels=16),
    text_encoders=(
        clip.projected(clip.large()), clip.projected(clip.big()), t5.xxl(folder="text_encoder_3"), llama3.llama31(),
    ),  # fmt: skip
    tokenize=hidream_text.tokenize,
    encode=hidream_text.encode,
    encode_image=partial(vae_ldm.encode, shift=vae_ldm.FLUX[0], scale=vae_ldm.FLUX[1]),
    decode_latents=partial(vae_ldm.decode, shift=vae_ldm.FLUX[0], scale=vae_ldm.FLUX[1]),
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI computes it in bf16 or float32
    defaults={"timestep_sampling": "sigmoid"},  # diffusion-pipe's default: logit-normal, no shift
    options=(
        *OPTIONS,
        Option("cache_llama3", "flag", False, "cache Llama's states with the other text outputs, 34 MB a caption, "
               "instead of keeping Llama loaded"),
    ),  # fmt: skip
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="hidream-i1",
    base_model_version="hidream_i1",
    resolution=1024,
    objective=replace(
        FLOW, samplers={"lcm": Sampler(FLOW.times, fresh_noise)}
    ),
    variant_of=variant_of,
    partly_live=LIVE,
    inference_options=OPTIONS,
    sampling=VERSIONS["full"],
    text_widths=lambda denoiser: (None, None, *denoiser["caption_channels"]),
    released={"denoiser": "hidream", "vae": "vae_flux", "clip_l": "te_clip_l", "clip_g": "te_clip_g",
              "t5xxl": "te_t5xxl", "llama3": "te_llama3_8b"},
)  # fmt: skip
