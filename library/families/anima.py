"""Anima (CircleStone Labs, 2026): Cosmos-Predict2 2B whose text comes from Qwen3-0.6B through an adapter of its own.

Facts: plain flow, sigma in 0..1 is the time, noise - x0 is returned. The adapter lies in the denoiser's file; its
queries are the caption's T5 token ids. Latents are the Wan 2.1 VAE's, one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from library.components import cosmos, decoder, qwen3, vae_wan
from library.components.tokenizers import ended
from library.families.family import Cond, Family, Part, Text, Tokenizer
from library.layout import Shape, count, identity, row
from library.option_kinds import Option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADAPTER = "llm_adapter"
TOKENS = 512  # of each tokenizer: sd-scripts' and diffusers' limit
BLOCKS = (*cosmos.BLOCKS, f"{ADAPTER}.blocks")
# The blocks; the adapter is opt-in, as in sd-scripts (`train_llm_adapter`) and diffusion-pipe (`llm_adapter_lr`).
ADAPTED = ("blocks.",)


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    return cosmos.recognise(shapes) if f"{ADAPTER}.embed.weight" in shapes else None


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    first = f"{ADAPTER}.blocks.0"
    width = shapes[f"{first}.norm_cross_attn.weight"][0]
    vocabulary, target = shapes[f"{ADAPTER}.embed.weight"]
    adapter = {
        "source_dim": shapes[f"{first}.cross_attn.k_proj.weight"][1],
        "target_dim": target,
        "model_dim": width,
        "num_layers": count(shapes, f"{ADAPTER}.blocks"),
        "num_attention_heads": width // shapes[f"{first}.cross_attn.q_norm.weight"][0],
        "mlp_ratio": shapes[f"{first}.mlp.0.weight"][0] / width,
        "target_vocab_size": vocabulary,
        "min_sequence_length": cosmos.TOKENS,
    }
    return cosmos.config(shapes, layout) | {"adapter": adapter}


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    from library.models.anima import Anima

    return Anima(**configuration)


def finish(model: torch.nn.Module, device: Any) -> None:
    """The adapter's rotary frequencies, which no file holds."""
    import torch

    adapter = model.llm_adapter
    with torch.device(device):
        adapter.rotary_emb = type(adapter.rotary_emb)(adapter.config.model_dim // adapter.config.num_attention_heads)


DENOISER = Part(
    name="denoiser",
    title="an Anima denoiser",
    option="pretrained_model_name_or_path",
    layouts={"comfy": [*cosmos.ROWS, row(ADAPTER)], "diffusers": identity},
    recognise=recognise,
    config=config,
    build=build,
    prefixes=cosmos.PREFIXES,
    carried=cosmos.CARRIED,
    diffusers_folder="transformer",
    high_precision=cosmos.MODULATION,
    finish=finish,
    apart=((ADAPTER, "text_conditioner"),),
)


def tokenize(
    tokenizers: list[Any], caption: str, *, lengths: tuple[int, int] = (TOKENS, TOKENS)
) -> tuple[tuple[list[int], list[int]], str]:
    """(Qwen3's ids of the bare caption, T5's with its end token), and the longer end of it that did not fit in one."""
    qwen, t5 = (ended(one, caption, length) for one, length in zip(tokenizers, lengths, strict=True))
    return (qwen[0], t5[0]), max(qwen[1], t5[1], key=len)


def encode(
    encoders: list[torch.nn.Module],
    tokenizers: list[Any],
    text: Text,
    device: Any,
    *,
    lengths: tuple[int, int] = (TOKENS, TOKENS),
) -> Cond:
    """{"text": [T,D], "t5_ids": [M] int64}: Qwen3's last states and what the adapter's queries are.

    Without a word there are no states: one of zeros, to which attention gives nothing.
    """
    import torch

    (qwen, t5), _ = tokenize(tokenizers, text.caption, lengths=lengths)
    weight = encoders[0].embed_tokens.weight
    states = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=device)
    if qwen:
        states = decoder.states(encoders[0], torch.tensor([qwen], device=device))[0]
    return {"text": states, "t5_ids": torch.tensor(t5, device=device)}


def predict(denoiser: torch.nn.Module, noisy: Tensor, sigma: Tensor, conds: list[Cond]) -> Tensor:
    """Velocity [B,C,h,w] float32. Conds: "text" [T,D], Qwen3's states; "t5_ids" [M] int64; both ragged."""
    dtype = denoiser.proj_out.weight.dtype
    texts, ids = [cond["text"].to(dtype) for cond in conds], [cond["t5_ids"] for cond in conds]
    out = denoiser(cosmos.video_of(noisy).to(dtype), sigma.float(), texts, ids)
    return out.float().reshape(noisy.shape)


def variant_of(options: Any) -> Family:
    """The record with the run's token limits; an adapter with a learning rate is one more thing that a LoRA trains."""
    lengths = tuple(getattr(options, f"{name}_max_token_length", TOKENS) for name in ("qwen3", "t5"))
    is_trained = bool(getattr(options, "llm_adapter_lr", None))
    return replace(
        ANIMA,
        adapted=(*ADAPTED, f"{ADAPTER}.") if is_trained else ADAPTED,
        tokenize=partial(tokenize, lengths=lengths),
        encode=partial(encode, lengths=lengths),
        recipe="" if lengths == (TOKENS, TOKENS) else f"tokens {lengths[0]} {lengths[1]}",
    )


ADAPTER_RATE = (
    "learning rate of the adapter between Qwen3 and the denoiser, 0 = not trained; if not set, a LoRA leaves it alone "
    "and a full fine-tune trains it as everything else"
)
ANIMA = Family(
    name="anima",
    title="Anima",
    denoiser=DENOISER,
    vae=vae_wan.part(),
    text_encoders=(qwen3.part("a Qwen3-0.6B text encoder", "Qwen/Qwen3-0.6B-Base", "qwen3"),),
    extra_tokenizers=(Tokenizer("t5_tokenizer_path", "google-t5/t5-11b", beside=("t5_tokenizer", "t5_old")),),
    tokenize=tokenize,
    encode=encode,
    encode_image=vae_wan.encode,
    decode_latents=vae_wan.decode,
    predict=predict,
    blocks=BLOCKS,
    adapted=ADAPTED,
    pixel_multiple=16,
    latent_channels=16,
    latent_downscale=8,
    half=("bf16",),  # ComfyUI keeps what its blocks add up in float32 where it computes in fp16
    # sd-scripts and diffusion-pipe (the seed's system): a logit-normal distribution without a shift.
    defaults={"timestep_sampling": "sigmoid"},
    options=(
        *cosmos.rate_options(),
        Option("llm_adapter_lr", "float", None, ADAPTER_RATE, low=0),
        Option("qwen3_max_token_length", "int", TOKENS, "tokens that Qwen3 reads", low=1, high=TOKENS),
        Option("t5_max_token_length", "int", TOKENS, "T5 tokens that the adapter reads", low=2, high=TOKENS),
    ),
    own_rates=(("llm_adapter_lr", f"{ADAPTER}."), *cosmos.RATES),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="anima",
    base_model_version="anima",
    resolution=1024,
    channels_of=lambda denoiser: denoiser.config.out_channels,
    # Shift 3 is that of ComfyUI and of sd-scripts' samples; guidance 4 diffusers' pipeline's.
    sampling={"sample_steps": 30, "scale": 4.0, "flow_shift": 3.0},
    variant_of=variant_of,
    released={"denoiser": "anima", "vae": "vae_qwen_image", "text_encoder": "te_qwen3_0.6b"},
    text_widths=lambda denoiser: (denoiser["adapter"]["source_dim"],),
)
