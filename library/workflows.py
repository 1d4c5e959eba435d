"""A ComfyUI workflow beside a sample, in its API format, that makes the same picture with the nodes that ComfyUI has.

Node names and inputs are those of ComfyUI's nodes.py and comfy_extras of October 2025 and later; those of Z-Image,
Flux 2 and HunyuanVideo-1.5 also of its published templates. tests/data/comfyui_nodes.json lists what a test holds the
workflows against. With one seed ComfyUI draws the noise that a sample starts from, too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.family import Family
    from library.prompts import Prompt

Link = list[Any]  # [id of a node, number of its output]
CLOSE = 4e-3  # between our sigmas and those of ComfyUI's schedulers, which take the nearest of a table
TABLES = {"ModelSamplingFlux": 10_000}  # entries of the table under a shift, else 1000
SAMPLERS = {"euler": "euler", "euler_a": "euler_ancestral", "ddim": "ddim", "lcm": "lcm"}  # ours -> ComfyUI's
PICTURE, CLIP = "EmptySD3LatentImage", "EmptyHunyuanLatentVideo"


@dataclass(frozen=True)
class Stock:
    """What ComfyUI has for a family."""

    clip: str  # `type` of the loader of its text encoders
    latents: Mapping[int, str]  # latent channels -> node of an empty latent
    shift: str = ""  # node that sets the shift of the scheduler; "" = none
    frame_rate: str = ""  # node that tells the model the frame rate


STOCK: Mapping[str, Stock] = {
    "auraflow": Stock("stable_diffusion", {4: "EmptyLatentImage"}, "ModelSamplingAuraFlow"),
    "chroma": Stock("chroma", {16: PICTURE}, "ModelSamplingAuraFlow"),
    "flux": Stock("flux", {16: PICTURE}, "ModelSamplingFlux"),
    "flux2": Stock("flux2", {128: "EmptyFlux2LatentImage"}, "ModelSamplingFlux"),
    "hidream": Stock("hidream", {16: PICTURE}, "ModelSamplingSD3"),
    "hunyuan_image": Stock("hunyuan_image", {64: "EmptyHunyuanImageLatent"}, "ModelSamplingSD3"),
    "hunyuan_video": Stock("hunyuan_video", {16: CLIP}, "ModelSamplingSD3"),
    "hunyuan_video_15": Stock("hunyuan_video_15", {32: "EmptyHunyuanVideo15Latent"}, "ModelSamplingSD3"),
    "ltx_video": Stock("ltxv", {128: "EmptyLTXVLatentVideo"}, frame_rate="LTXVConditioning"),
    "lumina_2": Stock("lumina2", {16: PICTURE}, "ModelSamplingAuraFlow"),
    "omnigen2": Stock("omnigen2", {16: PICTURE}, "ModelSamplingAuraFlow"),
    "qwen_image": Stock("qwen_image", {16: PICTURE}, "ModelSamplingAuraFlow"),
    "sd": Stock("stable_diffusion", {4: "EmptyLatentImage"}),
    "sd3": Stock("sd3", {16: PICTURE}, "ModelSamplingSD3"),
    "sdxl": Stock("sdxl", {4: "EmptyLatentImage"}),
    "wan": Stock("wan", {16: CLIP, 48: "Wan22ImageToVideoLatent"}, "ModelSamplingSD3"),
    "z_image": Stock("lumina2", {16: PICTURE}, "ModelSamplingAuraFlow"),
}


@dataclass(frozen=True)
class Lora:
    file: str
    strength: float = 1.0
    with_text: bool = False  # it may have text encoders, too


@dataclass(frozen=True)
class Sampled:
    """One sample as it was made."""

    prompt: Prompt
    size: tuple[int, int]  # width, height
    channels: int
    seed: int
    shift: float
    sampler: str  # of ours
    sigmas: Tensor  # [steps + 1]
    loras: Sequence[Lora] = ()
    model: str = ""  # name of the file that stands for the model's own, after a full fine-tune


@dataclass
class Graph:
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, title: str = "", **inputs: Any) -> str:
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs} | ({"_meta": {"title": title}} if title else {})
        return name

    def one(self, kind: str, title: str = "", **inputs: Any) -> Link:
        """The first output of a new node."""
        return [self.add(kind, title, **inputs), 0]


def workflow(family: Family, options: Any, made: Sampled) -> dict[str, Any] | None:
    """The nodes by number; None where ComfyUI's own nodes do not make this picture: pictures that the model is given
    (controls, first frames), two experts, families and samplers that are not in the tables above."""
    stock, prompt = STOCK.get(family.name), made.prompt
    latent = stock.latents.get(made.channels) if stock else None
    if not latent or prompt.controls or prompt.image_path or family.pair or made.sampler not in SAMPLERS:
        return None
    graph = Graph()
    model, clip, vae = _loaded(graph, stock, family, options, made)
    for lora in made.loras:
        model, clip = _adapted(graph, model, clip, lora)
    positive = graph.one("CLIPTextEncode", "prompt", text=family.caption_text(prompt.prompt), clip=clip)
    negative = graph.one("CLIPTextEncode", "negative prompt", text=prompt.negative_prompt, clip=clip)
    if "guidance_scale" in family.sampling and prompt.guidance_scale is not None:
        positive = graph.one("FluxGuidance", conditioning=positive, guidance=float(prompt.guidance_scale))
    frames = prompt.frame_count or 1
    if stock.frame_rate:
        rate = graph.add(stock.frame_rate, positive=positive, negative=negative, frame_rate=float(family.frames.fps))
        positive, negative = [rate, 0], [rate, 1]
    sides = {"width": made.size[0], "height": made.size[1]} | ({"length": frames} if family.frames else {})
    given = {"vae": vae} if latent == "Wan22ImageToVideoLatent" else {}
    empty = graph.one(latent, **given, **sides, batch_size=1)
    samples = _sampled(graph, stock, family, made, model, (positive, negative, empty))
    images = graph.one("VAEDecode", samples=samples, vae=vae)
    _saved(graph, images, family, frames)
    return graph.nodes


def _loaded(graph: Graph, stock: Stock, family: Family, options: Any, made: Sampled) -> tuple[Link, Link, Link]:
    """Model, text encoders and VAE; from one checkpoint what is in it. Names of files, as ComfyUI lists them."""
    from library.checkpoints import path_of

    base, vae = (path_of(part, options) for part in (family.denoiser, family.vae))
    texts = [path for path in (path_of(part, options) for part in family.text_encoders) if path]
    file = made.model or _name(base)
    if family.container and all(path == base for path in texts):
        whole = graph.add("CheckpointLoaderSimple", ckpt_name=file)
        model, clip = [whole, 0], [whole, 1]
        own_vae = [whole, 2] if vae == base else None
    else:
        model = graph.one("UNETLoader", unet_name=file, weight_dtype="default")
        clip, own_vae = _text(graph, stock, texts), None
    return model, clip, own_vae or graph.one("VAELoader", vae_name=_name(vae))


def _text(graph: Graph, stock: Stock, files: Sequence[str]) -> Link:
    kind = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}[len(files)]
    names = [_name(file) for file in files]
    numbered = {"clip_name": names[0]} if len(names) == 1 else {f"clip_name{k}": n for k, n in enumerate(names, 1)}
    return graph.one(kind, **numbered, **({"type": stock.clip} if len(names) < 3 else {}))


def _name(path: Any) -> str:
    """Of a file in ComfyUI's folders; a diffusers folder has none, so that one has to be chosen there."""
    path = Path(path)
    return path.name if path.suffix else f"{path.name}.safetensors"


def _adapted(graph: Graph, model: Link, clip: Link, lora: Lora) -> tuple[Link, Link]:
    file = {"lora_name": _name(lora.file), "strength_model": lora.strength}
    if not lora.with_text:
        return graph.one("LoraLoaderModelOnly", model=model, **file), clip
    both = graph.add("LoraLoader", model=model, clip=clip, **file, strength_clip=lora.strength)
    return [both, 0], [both, 1]


def _sampled(
    graph: Graph, stock: Stock, family: Family, made: Sampled, model: Link, inputs: tuple[Link, Link, Link]
) -> Link:
    """With the plain sampler where one of its schedulers has our sigmas, else with these sigmas one by one."""
    prompt, objective = made.prompt, family.objective
    positive, negative, empty = inputs
    both = {"positive": positive, "negative": negative, "latent_image": empty, "cfg": float(prompt.scale)}
    differs = family.guide is not None and prompt.scale != 1
    title = "guidance is joined as usual here, otherwise in the sample" if differs else ""
    if objective.prediction_type == "v":
        zero = objective.zero_terminal_snr
        model = graph.one("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=zero)
    steps = len(made.sigmas) - 1
    if scheduler := _scheduler(stock, family, made):
        if stock.shift:
            model = graph.one(stock.shift, model=model, **_shift(stock.shift, made))
        named = {"sampler_name": SAMPLERS[made.sampler], "scheduler": scheduler, "denoise": 1.0}
        return graph.one("KSampler", title, model=model, seed=made.seed, steps=steps, **named, **both)
    sampler = graph.one("KSamplerSelect", sampler_name=SAMPLERS[made.sampler])
    listed = ", ".join(f"{value:.6f}" for value in _levels(family, made.sigmas).tolist())
    sigmas = graph.one("ManualSigmas", sigmas=listed)
    seeded = {"add_noise": True, "noise_seed": made.seed}
    return graph.one("SamplerCustom", title, model=model, **seeded, sampler=sampler, sigmas=sigmas, **both)


def _shift(node: str, made: Sampled) -> dict[str, Any]:
    """The inputs that give this shift; Flux's is e^(its number), the same for all sizes where both numbers are one."""
    if node != "ModelSamplingFlux":
        return {"shift": made.shift}
    width, height = made.size
    usual = 0.5 + (1.15 - 0.5) * (width * height / 256 - 256) / (4096 - 256)
    mu = math.log(made.shift)
    numbers = (1.15, 0.5) if abs(mu - usual) < 1e-4 else (mu, mu)
    return {"max_shift": numbers[0], "base_shift": numbers[1], "width": width, "height": height}


def _scheduler(stock: Stock, family: Family, made: Sampled) -> str:
    """The one of ComfyUI's schedulers that visits our sigmas, "" if none does: `simple` counts down its table in even
    strides, `ddim_uniform` up from the second entry."""
    import torch

    steps, ours = len(made.sigmas) - 1, made.sigmas.double()
    size = TABLES.get(stock.shift, 1000)
    falling = torch.tensor([1 - int(k * size / steps) / size for k in range(steps)] + [0.0], dtype=torch.float64)
    if stock.shift:
        if stock.shift == "ModelSamplingFlux" and made.shift < 1:
            return ""  # whose numbers are not below 0
        falling = made.shift * falling / (1 + (made.shift - 1) * falling)
        return "simple" if float((falling - ours).abs().max()) < CLOSE else ""
    if family.objective.name != "ddpm":
        return ""
    rising = [2 + k for k in range(0, 999, max(1000 // steps, 1))]
    uniform = torch.tensor([n / 1000 for n in reversed(rising)] + [0.0], dtype=torch.float64)
    for name, theirs in (("simple", falling), ("ddim_uniform", uniform)):
        if len(theirs) == len(ours) and float((theirs - ours).abs().max()) < 1e-6:
            return name
    return ""


def _levels(family: Family, sigmas: Tensor) -> Tensor:
    """Our sigmas as ComfyUI counts them: of a DDPM the noise per data."""
    if family.objective.name != "ddpm":
        return sigmas
    from library import diffusion

    ab = diffusion.alpha_bar_at(sigmas, family.objective.zero_terminal_snr).clamp(min=4.8973451890853435e-08)
    return ((1 - ab) / ab).sqrt()


def _saved(graph: Graph, images: Link, family: Family, frames: int) -> None:
    if frames == 1:
        graph.add("SaveImage", images=images, filename_prefix="lorasmith")
        return
    video = graph.one("CreateVideo", images=images, fps=float(family.frames.fps))
    graph.add("SaveVideo", video=video, filename_prefix="video/lorasmith", format="auto", codec="auto")


def write(picture: Path, family: Family, options: Any, made: Sampled) -> None:
    """Beside a picture, if there is a workflow for it; the final name appears with the whole file."""
    nodes, path = workflow(family, options, made), picture.with_suffix(".workflow.json")
    if nodes is None:
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(nodes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
