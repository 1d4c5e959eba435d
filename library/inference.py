"""Pictures and videos from the command line, for every family: models as for training, LoRAs, prompts."""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError, nearest
from library.option_table import ATTENTIONS
from library.prompts import (
    Prompt,
    check,
    check_for,
    defaults_of,
    notes,
    parse_line,
    parse_prompts,
    read_files,
    seed_of,
    timed,
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from library.families.family import Family, Part


TYPES = {"int": int, "float": float, "str": str, "path": str}


class Parser(argparse.ArgumentParser):
    """Mistakes are ConfigErrors with the nearest name."""

    def error(self, message: str) -> Any:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        known = [name for action in self._actions for name in action.option_strings]
        raise ConfigError(f"{unknown} is not an option{nearest(unknown, known)}" if unknown else message)


def parser_of(family: Family) -> argparse.ArgumentParser:
    parser = Parser(description=f"Make pictures with {family.title} and LoRAs of it.", allow_abbrev=False)
    add, usual = parser.add_argument, defaults_of(family)
    add("--dit", "--pretrained_model_name_or_path", dest=family.denoiser.option, required=True, help="denoiser file")
    add("--vae", "--ae", help="VAE file; default: inside of the denoiser's file")
    for part in family.parts[2:]:
        add(f"--{part.option}", help=f"{part.title}: file or folder; default: inside of the denoiser's file")
    for where, _ in family.tokenizers:
        add(f"--{where.option}", help=f"tokenizer folder or hub id; default: {where.beside[0]} beside the text encoder")
    add("--lora_weight", nargs="*", default=[], help="LoRA files, in any format")
    add("--lora_multiplier", nargs="*", type=float, default=[], help="their strengths; 1 if not given")
    add("--prompt", help="text of the picture")
    add("--from_file", help="prompt file as for training (txt, toml, json); what a prompt does not say is as below")
    add("--interactive", action="store_true", help="read prompts, one a line as in a prompt file, until the end")
    add("--negative_prompt", default=usual.negative_prompt)
    add("--control_image_path", nargs="*", default=[], help="control pictures of an edit model (--ci in a prompt file)")
    sizes = ["--image_size"]
    if family.frames:
        sizes.append("--video_size")
        add("--video_length", type=int, help=f"frames; default {usual.frame_count or 1}; a .png is one")
        add("--fps", type=float, help="frames a second of the file; default: the model's own")
        add("--image_path", help="first frame, for models that take one (--i in a prompt file)")
    add(*sizes, nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="default: the model's usual size")
    add("--infer_steps", type=int, help=f"default {usual.sample_steps}, or what the variant in this file needs")
    add("--guidance_scale", type=float, help=f"classifier-free guidance; 1 = off; default {usual.scale:g}")
    if usual.guidance_scale is not None:
        text = f"guidance that the model itself was trained with; default {usual.guidance_scale:g}"
        add("--embedded_guidance", type=float, help=text)
    shift = usual_shift(family)
    add("--flow_shift", type=float, help=f"default {'by the size of the picture' if shift is None else f'{shift:g}'}")
    for option in family.inference_options:
        kind = {"action": "store_true"} if option.kind == "flag" else {"type": TYPES[option.kind]}
        kind |= {"choices": option.choices} if option.choices else {}
        add(f"--{option.name}", default=option.default, help=option.help, **kind)
    add("--seed", type=int, default=0, help="of the first picture, then counting up; below 0: a new one")
    files = "a .png or .mp4 file" if family.frames else "a .png file"
    add("--save_path", required=True, help=f"{files} for one --prompt, or a folder")
    add("--device", default=None, help="cuda, cpu, mps; default: the best there is")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: bfloat16, float32 on a CPU")
    add(
        "--blocks_to_swap", type=int, default=0, help="blocks that stay on the host and are copied in when they compute"
    )
    add("--attn_mode", choices=ATTENTIONS, default="torch", help="attention")
    add("--text_encoder_cpu", action="store_true", help="text encoders compute on the CPU")
    add("--highvram", action="store_true", help="keep denoiser and VAE on the device: each picture is saved once drawn")
    add("--fp8_scaled", action="store_true", help="hold the denoiser's blocks in fp8 with a scale for every 64 values")
    parser.set_defaults(fp8_format=family.defaults.get("fp8_format", "e4m3"))
    return parser


def usual_shift(family: Family) -> float | None:
    """Of a sampler where nobody says; None = `Family.sampling_shift` says, by the size of the picture."""
    shift = defaults_of(family).flow_shift
    return shift if shift or family.sampling_shift else family.defaults.get("discrete_flow_shift", 1.0)


def settle(arguments: argparse.Namespace, family: Family) -> None:
    """Fill in what the command line leaves open, as the variant in this file is usually sampled."""
    usual = defaults_of(family)
    values = {"infer_steps": usual.sample_steps, "guidance_scale": usual.scale, "flow_shift": usual_shift(family)}
    values["sample_sampler"] = usual.sample_sampler
    if family.frames:
        values["video_length"] = 1 if Path(arguments.save_path).suffix.lower() == ".png" else usual.frame_count
    for name, value in (values | {"embedded_guidance": usual.guidance_scale}).items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)


def check_source(arguments: argparse.Namespace) -> None:
    sources = (arguments.prompt is not None, arguments.from_file is not None, arguments.interactive)
    if sum(sources) != 1:
        raise ConfigError("give one of --prompt, --from_file and --interactive")


def prompts_of(arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts to draw, none yet for --interactive. Raises ConfigError."""
    plain = check(plain_prompt(arguments), "command line")
    if arguments.interactive:
        return []
    return [plain] if arguments.from_file is None else parse_prompts(Path(arguments.from_file), plain)


def plain_prompt(arguments: argparse.Namespace) -> Prompt:
    """The prompt of the command line, which also is what other prompts get that do not say."""
    height, width = arguments.image_size or (None, None)
    image = getattr(arguments, "image_path", None)
    return Prompt(
        arguments.prompt or "", arguments.negative_prompt, width, height, None, arguments.infer_steps,
        arguments.guidance_scale, arguments.embedded_guidance, arguments.flow_shift,
        read_files("controls", arguments.control_image_path, "command line"),
        frame_count=getattr(arguments, "video_length", None),
        image_path=image and read_files("image_path", image, "command line"),
    )  # fmt: skip


def paths_of(arguments: argparse.Namespace, prompts: list[Prompt], seeds: list[int]) -> list[Path]:
    """Where each picture or video goes, named .png. Raises ConfigError for a place that cannot take it."""
    target = Path(arguments.save_path)
    kind = target.suffix.lower()
    if kind in (".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"--save_path {target}: pictures are written as .png")
    if kind in (".png", ".mp4"):
        if arguments.prompt is None:
            raise ConfigError(f"--save_path {target}: with --from_file and --interactive it is a folder")
        wanted = ".mp4" if (prompts[0].frame_count or 1) > 1 else ".png"
        if kind != wanted:
            what = f"{prompts[0].frame_count} frames are" if wanted == ".mp4" else "a picture is"
            raise ConfigError(f"--save_path {target}: {what} written as {wanted}")
        return [target.with_suffix(".png")]
    if target.is_file():
        raise ConfigError(f"--save_path {target}: it is a file; give a folder, or a name that ends in .png")
    return [target / f"{number:03d}_{seed}.png" for number, seed in enumerate(seeds)]


def checked(prompts: list[Prompt], family: Family) -> list[Prompt]:
    """The prompts with the number of frames that each gets. Prints notes; raises ConfigError."""
    check_for(prompts, family)
    for note in notes(prompts, family):
        print(f"note: {note}", file=sys.stderr, flush=True)
    return timed(prompts, family, 1)


def main(family_name: str, argv: list[str] | None = None) -> None:
    """Parse and check everything, then load and draw."""
    from library.checkpoints import check_writable
    from library.families import get_family

    family = get_family(family_name)
    arguments = parser_of(family).parse_args(sys.argv[1:] if argv is None else argv)
    check_source(arguments)
    family = _check_files(family, arguments)
    settle(arguments, family)
    prompts = checked(prompts_of(arguments), family)
    first = seed_of(Prompt("", seed=arguments.seed), 0, 0)
    seeds = [seed_of(prompt, number, first) for number, prompt in enumerate(prompts)]
    paths = paths_of(arguments, prompts, seeds)
    check_writable(paths[0].parent if paths else Path(arguments.save_path), bytes_needed=1024**2)
    studio = Studio(family, arguments)
    if arguments.interactive:
        interact(studio, first)
        return
    conds = [studio.conditions(prompt) for prompt in prompts]
    studio.drop_encoders()  # never resident together with the denoiser
    if arguments.highvram:
        for path, prompt, pair, seed in zip(paths, prompts, conds, seeds, strict=True):
            studio.save(studio.latents(prompt, pair, seed), path, prompt, seed)
        return
    drawn = [studio.latents(prompt, pair, seed) for prompt, pair, seed in zip(prompts, conds, seeds, strict=True)]
    studio.drop_denoiser()
    for path, prompt, latents, seed in zip(paths, prompts, drawn, seeds, strict=True):
        studio.save(latents, path, prompt, seed)


def interact(studio: Studio, first: int) -> None:
    """Draw each line of standard input, as in a prompt file; a mistake is said and the next line is read."""
    arguments, number = studio.arguments, 0
    if sys.stdin.isatty():
        print("a prompt and its options (--w 1024 --h 1024 --d 1 ...) a line; an empty line ends", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        try:
            prompt = parse_line(line.strip(), f"line {number + 1}", plain_prompt(arguments))
            (prompt,) = checked([prompt], studio.family)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        seed = seed_of(prompt, number, first)
        path = Path(arguments.save_path) / f"{number:03d}_{seed}.png"
        studio.save(studio.latents(prompt, studio.conditions(prompt), seed), path, prompt, seed)
        number += 1


def _check_files(family: Family, arguments: argparse.Namespace) -> Family:
    """All files, from their headers; returns the family for them. Raises ConfigError."""
    from library.memory import swap_plan
    from library.preflight import check_attention, check_parts

    family, _ = check_parts(family, arguments)
    swap_plan.check(family, arguments)
    check_attention(arguments)
    if len(arguments.lora_multiplier) > len(arguments.lora_weight):
        raise ConfigError(
            f"{len(arguments.lora_multiplier)} --lora_multiplier for {len(arguments.lora_weight)} --lora_weight"
        )
    for path in arguments.lora_weight:
        if not Path(path).is_file():
            raise ConfigError(f"--lora_weight {path}: no such file")
    return family


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Studio:
    """The models of one run of the script, each loaded when it is first needed."""

    def __init__(self, family: Family, arguments: argparse.Namespace) -> None:
        import torch

        from library.memory.denoiser import DenoiserMemory

        self.family, self.arguments = family, arguments
        self.device = arguments.device or _device()
        self.dtype = getattr(torch, arguments.dtype or ("float32" if self.device == "cpu" else "bfloat16"))
        self.text_device = "cpu" if arguments.text_encoder_cpu else self.device
        self.memory = DenoiserMemory(arguments, family, self.device)
        self.settings = {option.name: getattr(arguments, option.name) for option in family.inference_options}

    def _load(self, part: Part, dtype: torch.dtype | None = None) -> torch.nn.Module:
        from library import checkpoints
        from library.memory.loading import Loading

        dtype, path = dtype or self.dtype, checkpoints.path_of(part, self.arguments)
        denoiser = part is self.family.denoiser or self.family.pair and part is self.family.pair.part
        device = self.text_device if part in self.family.text_encoders else self.device
        loading = self.memory.loading(dtype) if denoiser else Loading(None, device, dtype)
        model = checkpoints.load_part(part, path, dtype=dtype, device=device, loading=loading)
        return model.requires_grad_(False).eval()

    @functools.cached_property
    def encoders(self) -> tuple[list[torch.nn.Module], list[Any]]:
        from library.components.tokenizers import load_tokenizers

        models = [self._load(part) for part in self.family.text_encoders]
        for model, prefix in zip(models, self.family.text_prefixes, strict=False):
            model.binding.lora_key = prefix.removeprefix("lora_")
        _merge_text(models, self.arguments)
        return models, load_tokenizers(self.family, self.arguments)

    @functools.cached_property
    def image_encoders(self) -> list[torch.nn.Module]:
        return [self._load(part) for part in self.family.image_encoders]

    @functools.cached_property
    def vae(self) -> torch.nn.Module:
        import torch

        return self._load(self.family.vae, torch.float32)

    @functools.cached_property
    def denoiser(self) -> torch.nn.Module:
        from library.memory.experts import Experts

        model, pair = self._load(self.family.denoiser), self.family.pair
        model.binding.adapted = self.family.adapted
        if pair:
            model.experts = Experts(model, self._load(pair.part), pair)
        _add_networks(model, self.arguments, self.device, self.dtype)
        self.memory.prepare(model)
        return model

    def drop_encoders(self) -> None:
        for name in ("encoders", "image_encoders", *(() if self.arguments.highvram else ("vae",))):
            self.__dict__.pop(name, None)

    def drop_denoiser(self) -> None:
        self.__dict__.pop("denoiser", None)
        self.memory.forget()

    def conditions(self, prompt: Prompt) -> tuple[dict, dict]:
        """What conditions a picture, on the CPU."""
        from library.sample import conditions_of
        from library.strategies import Encoders

        def encode(request: Any) -> dict:
            return request.encoder(self.family)(*self.encoders, request.text(self.family), self.text_device)

        pictures = Encoders(lambda: self.vae, lambda: self.image_encoders)
        pair = conditions_of(prompt, self.family, encode, pictures, self.family.resolution, self.device)
        cond, uncond = ({name: value.cpu() for name, value in one.items()} for one in pair)
        return cond, uncond

    def latents(self, prompt: Prompt, pair: tuple[dict, dict], seed: int) -> Tensor:
        """[1,C,h,w] or [1,C,F,h,w] float32, on the device."""
        from library import sample

        family, denoiser = self.family, self.denoiser
        shape = sample.latent_shape(family, prompt, family.channels_of(denoiser), family.resolution)
        return sample.generate_latents(
            family, denoiser, *pair, shape=shape, seed=seed, steps=prompt.sample_steps, scale=prompt.scale,
            shift=sample.shift_of(prompt, family, shape, 1.0), device=self.device, settings=self.settings,
            sampler=prompt.sample_sampler or self.settings.get("sample_sampler"),
        )  # fmt: skip

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 [H,W,3], or [F,H,W,3] of a video."""
        from library import sample

        return sample.decode(self.family, self.vae, latents)

    def save(self, latents: Tensor, path: Path, prompt: Prompt, seed: int) -> None:
        """The picture or video, and the ComfyUI workflow that makes it again."""
        from library import sample, videos, workflows

        family, sampler = self.family, prompt.sample_sampler or self.settings.get("sample_sampler")
        fps = family.frames and (self.arguments.fps or family.frames.fps)
        print(f"saved {videos.save(self.decode(latents), path, {'prompt': prompt.prompt}, fps)[0]}", flush=True)
        made = sample.made_of(family, prompt, latents.shape[1], family.resolution, seed, 1.0, sampler)
        loras = [workflows.Lora(file, by, bool(family.text_prefixes)) for file, by in _strengths(self.arguments)]
        workflows.write(path, family, self.arguments, replace(made, loras=loras))


def _strengths(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """(file, strength) of every LoRA."""
    strengths = [*arguments.lora_multiplier, *[1.0] * len(arguments.lora_weight)]
    return list(zip(arguments.lora_weight, strengths, strict=False))


def _merge_text(encoders: list[Any], arguments: argparse.Namespace) -> None:
    from networks import lora

    for path, strength in _strengths(arguments):
        if line := lora.merge_text(encoders, path, strength):
            print(line, flush=True)


def _add_networks(denoiser: Any, arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
    from library.memory.base_networks import add_network
    from networks import lora

    experts = getattr(denoiser, "experts", None)
    for path, strength in _strengths(arguments):
        network, weights = lora.create_network_from_weights(strength, path, None, [], denoiser, for_inference=True)
        attached = add_network(network, path, weights, denoiser, device, dtype, attach=experts is not None)
        if experts:
            which = experts.pair.of_file(path)
            if which is not None:
                experts.own[which].append(attached)
            print(f"{path}: for {'both experts' if which is None else experts.pair.names[which]}", flush=True)
    if experts:
        experts.switch_networks()
