"""Wan 2.1 and 2.2 (Alibaba, 2025): text and image to video with UMT5-XXL, one denoiser or two for the noise levels.

The file says which model it is, except that 2.1 14B and the two experts of 2.2 A14B have the same shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.components import few_steps, frames, t5, vae_wan, vision, wan
from library.components.tokenizers import ended
from library.components.wan import ADAPTED, BLOCKS, DENOISER, TOKENS, predict
from library.errors import ConfigError
from library.families.family import Cond, Family, FrameRule, Pair, Text
from library.option_kinds import Option

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["ADAPTED", "BLOCKS", "DENOISER", "WAN", "predict"]

SMALL = 1536  # width of 1.3B, of which there is only 2.1
# Wan's own negative prompt, `sample_neg_prompt` of its configurations.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


def tokenize(tokenizers: list[Any], caption: str) -> tuple[list[int], str]:
    """Ids with the end token, at most 512, and the end of the caption that did not fit."""
    return ended(tokenizers[0], " ".join(caption.split()), TOKENS)


def encode(encoders: list[torch.nn.Module], tokenizers: list[Any], text: Text, device: Any) -> Cond:
    """{"text": [T,D]} at true length; `predict` fills it up with zeros to 512."""
    import torch

    ids, _ = tokenize(tokenizers, text.caption)
    return {"text": t5.states(encoders[0], torch.tensor([ids], device=device))[0]}


@dataclass(frozen=True)
class Kind:
    """What the files of one published model share."""

    title: str
    sampling: Mapping[str, Any]
    boundary: int | None = None  # of two experts, 1000 * sigma: the high-noise one predicts from here on
    high_scale: float = 0.0  # guidance of the high-noise expert, where `sampling` has the low-noise one's
    first_frame: str = "none"
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the record


def _sampled(steps: int, scale: float, shift: float, frames: int = 81) -> dict[str, Any]:
    """As in Wan's own configurations and generate.py."""
    return {"sample_steps": steps, "scale": scale, "flow_shift": shift, "frame_count": frames,
            "negative_prompt": NEGATIVE}  # fmt: skip


I2V = {"encode_item": wan.continued, "recipe": "i2v"}
KINDS = {
    "2.1 1.3B": Kind("Wan 2.1 1.3B", _sampled(50, 6.0, 8.0)),  # its page advises these two for the small model
    "2.1": Kind("Wan 2.1", _sampled(50, 5.0, 5.0)),
    "2.1 i2v": Kind(  # shift 3 for 480p, 5 above
        "Wan 2.1 I2V", _sampled(40, 5.0, 3.0), None, 0, "needed", I2V | {"image_encoders": (vision.clip_h(),)}
    ),
    "2.2": Kind("Wan 2.2 A14B", _sampled(40, 3.0, 12.0), 875, 4.0),
    "2.2 i2v": Kind("Wan 2.2 I2V A14B", _sampled(40, 3.5, 5.0), 900, 3.5, "needed", I2V),
    "2.2 5B": Kind(
        "Wan 2.2 5B", _sampled(50, 5.0, 5.0, 121), None, 0, "possible",
        {"encode_item": wan.begun, "vary": frames.vary, "vae": vae_wan.part22(), "pixel_multiple": 32,
         "latent_channels": 48, "latent_downscale": 16, "resolution": 960},
    ),
}  # fmt: skip


def noise_of(path: str) -> str | None:
    """ "high" or "low" if the name of a file or folder says that it is an expert of Wan 2.2."""
    here = Path(path)
    if here.name.startswith("transformer") and (here.parent / "transformer_2").is_dir():
        return "low" if here.name == "transformer_2" else "high"  # as diffusers has them
    found = re.findall(r"(high|low)[-_ ]?noise", f"{here.parent.name}/{here.name}".lower())
    return found[-1] if found else None


def kind_of(path: str, config: Mapping[str, Any], version: str | None) -> str:
    """The key in KINDS. Raises ConfigError for Wan models of other kinds, and for a version that the file is not."""
    channels, shown = (config["in_channels"], config["out_channels"]), config["image_dim"]
    if config["pos_embed_seq_len"]:
        raise ConfigError(f"{path} is Wan 2.1 for a first and a last frame, which is not offered; take an I2V file")
    if channels == (48, 48):
        kind = "2.2 5B"
    elif channels == (36, 16):
        kind = "2.1 i2v" if shown else "2.2 i2v"
    elif channels == (16, 16) and not shown:
        is_small = config["num_attention_heads"] * config["attention_head_dim"] <= SMALL
        told = version or ("2.2" if noise_of(path) else "2.1")
        kind = "2.1 1.3B" if told == "2.1" and is_small else told
    else:
        raise ConfigError(
            f"{path} is a Wan denoiser with {channels[0]} channels in and {channels[1]} out, which is no text- or "
            "image-to-video model of Wan 2.1 or 2.2"
        )
    if version and not kind.startswith(version):
        raise ConfigError(f"--model_version {version}: {path} is {KINDS[kind].title}; remove the option")
    return kind


def variant_of(options: Any) -> Family:
    """The record of the model that the file is. Raises ConfigError for options that it does not read."""
    from library.checkpoints import configuration_of, path_of

    path = path_of(DENOISER, options)
    _refuse_pair(path)
    version = options.model_version or ("2.2" if options.dit_high_noise else None)
    kind = KINDS[kind_of(path, configuration_of(DENOISER, path), version)]
    is_training = hasattr(options, "given")
    pair = pair_of(path, kind, options, is_training)
    chunk = options.vae_chunk_size or 0
    changes = dict(kind.changes)
    if options.clip and not changes.get("image_encoders"):
        raise ConfigError(f"--clip {options.clip} has no effect: {path} is {kind.title}, which sees no CLIP features")
    if is_training and options.given("first_frame_conditioning_p") and "vary" not in changes:
        raise ConfigError(
            f"--first_frame_conditioning_p has no effect: {path} is {kind.title}, and only 5B has that choice"
        )
    if "encode_item" in changes:
        changes["encode_item"] = partial(changes["encode_item"], chunk=chunk)
    least = 5 if kind.first_frame == "needed" else 1  # of one frame there is nothing to continue
    if pair:
        changes |= {"pair": pair, "predict": wan.predict_by_two, "scale_at": partial(_scale_at, kind, pair.boundary)}
    frames = FrameRule(4, 1, 24.0 if kind.first_frame == "possible" else 16.0, least, kind.first_frame)
    return replace(
        WAN,
        title=kind.title + (", both experts" if pair else ""),
        encode_image=partial(vae_wan.encode, chunk=chunk),
        decode_latents=partial(vae_wan.decode, chunk=chunk),
        frames=frames,
        sampling=kind.sampling,
        advice=few_steps.joined(WAN.advice, partial(advice_of_two if pair else advice, path, kind)),
        **changes,
    )


def _refuse_pair(path: str) -> None:
    if (Path(path) / "transformer_2").is_dir():
        raise ConfigError(
            f"{path} holds two denoisers; name the one to train: {Path(path) / 'transformer_2'} (low noise) or "
            f"{Path(path) / 'transformer'} (high noise), or both, the second with --dit_high_noise"
        )


def pair_of(path: str, kind: Kind, options: Any, is_training: bool) -> Pair | None:
    """Both experts, if a file of the second one is given. Raises ConfigError for what does not go with it."""
    from library.checkpoints import configuration_of

    second = options.dit_high_noise
    if not second:
        training = ("timestep_boundary", "network_per_expert", "switch_experts_every")
        given = [n for n in training if options.given(n)] if is_training else []
        given += [n for n in ("timestep_boundary", "guidance_scale_high_noise") if getattr(options, n, None)]
        if given:
            raise ConfigError(f"--{given[0]} has no effect with one expert; add --dit_high_noise, or remove it")
        return None
    start, own = f"--dit_high_noise {second}", configuration_of(DENOISER, path)
    if kind.boundary is None:
        raise ConfigError(f"{start}: {path} is {kind.title}, which has one denoiser for all noise levels")
    if noise_of(path) == "high" or noise_of(second) == "low":
        raise ConfigError(f"{start} and --{DENOISER.option} {path}: by their names they are the other way round")
    if configuration_of(DENOISER, second) != own:
        raise ConfigError(f"{start} is another model than {path}; take the two experts of one model")
    edge = options.timestep_boundary or kind.boundary
    edge = edge / 1000 if edge > 1 else edge
    if is_training and not options.network_module:
        raise ConfigError(f"{start}: both experts are trained as LoRAs only; add --network_module networks.lora_wan")
    if is_training and options.base_weights:
        raise ConfigError(f"{start} does not go with --base_weights; merge them into the files first")
    return Pair(
        HIGH_NOISE, edge, of_file=lambda file: {"low": 0, "high": 1}.get(noise_of(file)),
        apart=getattr(options, "network_per_expert", False), every=getattr(options, "switch_experts_every", 1),
    )  # fmt: skip


def _scale_at(kind: Kind, boundary: float, scale: float, sigma: float, settings: Mapping[str, Any]) -> float:
    """Of the prompt below the boundary; above it the option's, else Wan's own where the prompt has Wan's own, too."""
    if sigma < boundary:
        return scale
    own = kind.high_scale if scale == kind.sampling["scale"] else scale
    return settings.get("guidance_scale_high_noise") or own


def advice(path: str, kind: Kind, options: Any) -> tuple[str, ...]:
    """Which part of the noise levels this file is for, where --min_timestep and --max_timestep say otherwise."""
    low, high = options.min_timestep or 0, 1000 if options.max_timestep is None else options.max_timestep
    expert, edge, own = noise_of(path), kind.boundary, f"timesteps {low} to {high} are trained"
    if edge is None:
        alone = f"{own}, but {kind.title} has one denoiser for all of them"
        return (alone,) if (low, high) != (0, 1000) else ()
    if expert is None:
        if (low, high) in ((edge, 1000), (0, edge)):
            return ()
        text = f"--min_timestep {edge} fits its high-noise expert and --max_timestep {edge} the low-noise one"
        return (f"{own} of {kind.title}; {text}, and {path} does not say which it is",)
    if expert == "high":
        text = f"{own}, and {path} predicts from {edge} on: --min_timestep {edge} fits it"
        return (text,) if low < edge else ()
    text = f"{own}, and {path} predicts below {edge}: --max_timestep {edge} fits it"
    used_alone = "; all of them suit a LoRA that is used with this expert alone" if low == 0 else ""
    return (text + used_alone,) if high > edge else ()


def advice_of_two(path: str, kind: Kind, options: Any) -> tuple[str, ...]:
    edge = options.timestep_boundary or kind.boundary
    edge = edge * 1000 if edge <= 1 else edge
    notes = [] if edge == kind.boundary else [f"the boundary {edge:g} is not {kind.title}'s own, {kind.boundary}"]
    low, high = options.min_timestep or 0, 1000 if options.max_timestep is None else options.max_timestep
    if not low < edge < high:
        notes.append(f"timesteps {low} to {high} are all of one expert; the other one is not trained")
    return tuple(notes)


HIGH_NOISE = replace(
    DENOISER, name="high noise", title="a Wan 2.2 A14B denoiser of high noise", option="dit_high_noise"
)
SECOND = Option(
    "dit_high_noise",
    "path",
    None,
    "the high-noise expert of 2.2 A14B beside the low-noise one: both in one run, one of them on the host",
)
EDGE = Option("timestep_boundary", "float", None, "where the high-noise expert begins, 1000 * sigma; Wan's own if none",
              low=0, high=1000)  # fmt: skip
CLIP = Option("clip", "path", None, "CLIP ViT-H, a file or a folder: only Wan 2.1 image-to-video sees it")
CHUNK = Option("vae_chunk_size", "int", None, "rows that the VAE convolves at a time; fewer need less memory", low=1)
VERSION = Option("model_version", "str", None, "of a 14B text-to-video file whose name says neither high nor low noise",
                 choices=("2.1", "2.2"))  # fmt: skip
WAN = Family(
    name="wan",
    title="Wan",
    denoiser=DENOISER,
    vae=vae_wan.part(),
    text_encoders=(t5.umt5(),),
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
    # musubi-tuner's advice for Wan, sigmoid sampling with a shift of 3 to 5; 5 is Wan's own at inference.
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 5.0},
    options=(
        CLIP, CHUNK, VERSION, SECOND, EDGE,
        Option("network_per_expert", "flag", False, "a LoRA for each expert in a file of its own, not one for both"),
        Option("switch_experts_every", "int", 1, "optimizer steps before the other expert may have its turn", low=1),
        Option("first_frame_conditioning_p", "float", 0.5, "share of steps in which 5B is given a clip's first frame",
               low=0, high=1),
    ),
    save_formats=("comfy", "kohya", "diffusers"),
    architecture="wan",
    base_model_version="wan",
    resolution=640,  # an area about that of 832 x 480
    frames=FrameRule(4, 1, 16.0),
    variant_of=variant_of,
    advice=few_steps.by_name(DENOISER, "lightx2v lightning causvid fastwan distill turbo dmd"),
    channels_of=lambda denoiser: int(denoiser.config.out_channels),
    inference_options=(
        CLIP, CHUNK, VERSION, SECOND, EDGE,
        Option("guidance_scale_high_noise", "float", None,
               "of the high-noise expert; if not set Wan's own with Wan's own scale, else --guidance_scale"),
    ),
    sampling=KINDS["2.1"].sampling,
    text_widths=lambda denoiser: (denoiser["text_dim"],),
)  # fmt: skip
