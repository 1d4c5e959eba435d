"""Pictures from the command line, for every family: models as for training, LoRAs with strengths, prompts."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError, nearest
from library.prompts import Prompt, check, notes, parse_prompts, seed_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from library.families.family import Family


class Parser(argparse.ArgumentParser):
    """Mistakes are ConfigErrors with the nearest name."""

    def error(self, message: str) -> Any:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        known = [name for action in self._actions for name in action.option_strings]
        raise ConfigError(f"{unknown} is not an option{nearest(unknown, known)}" if unknown else message)


def parser_of(family: Family) -> argparse.ArgumentParser:
    parser = Parser(description=f"Make pictures with {family.title} and LoRAs of it.", allow_abbrev=False)
    add = parser.add_argument
    add("--dit", "--pretrained_model_name_or_path", dest=family.denoiser.option, required=True, help="denoiser file")
    add("--vae", help="VAE file; default: inside of the denoiser's file")
    for part in family.parts[2:]:
        add(f"--{part.option}", help=f"{part.title}: file or folder; default: inside of the denoiser's file")
        if part.tokenizer:
            text = "tokenizer folder or hub id; default: a folder 'tokenizer' beside the text encoder"
            add(f"--{part.tokenizer.option}", help=text)
    add("--lora_weight", nargs="*", default=[], help="LoRA files, in any format")
    add("--lora_multiplier", nargs="*", type=float, default=[], help="their strengths; 1 if not given")
    add("--prompt", help="text of the picture")
    add("--from_file", help="prompt file as for training (txt, toml, json); what a prompt does not say is as below")
    add("--negative_prompt", default="")
    add("--image_size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), default=[family.resolution] * 2)
    add("--infer_steps", type=int, default=20)
    add("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 = off")
    add("--flow_shift", type=float, default=family.defaults.get("discrete_flow_shift", 1.0))
    add("--seed", type=int, default=0, help="of the first picture, then counting up; below 0: a new one")
    add("--save_path", required=True, help="a .png file for one --prompt, or a folder")
    add("--device", default=None, help="cuda, cpu, mps; default: the best there is")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: bfloat16, float32 on a CPU")
    return parser


def prompts_of(arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts to draw. Raises ConfigError."""
    if (arguments.prompt is None) == (arguments.from_file is None):
        raise ConfigError("give one of --prompt and --from_file")
    height, width = arguments.image_size
    plain = Prompt(arguments.prompt or "", arguments.negative_prompt, width, height, None,
                   arguments.infer_steps, arguments.guidance_scale, None, arguments.flow_shift)  # fmt: skip
    check(plain, "command line")
    return [plain] if arguments.from_file is None else parse_prompts(Path(arguments.from_file), plain)


def paths_of(arguments: argparse.Namespace, seeds: list[int]) -> list[Path]:
    """Where each picture goes. Raises ConfigError for a place that cannot take it."""
    target = Path(arguments.save_path)
    if target.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"--save_path {target}: pictures are written as .png")
    if target.suffix.lower() == ".png":
        if arguments.from_file is not None:
            raise ConfigError(f"--save_path {target}: with --from_file it is a folder")
        return [target]
    if target.is_file():
        raise ConfigError(f"--save_path {target}: it is a file; give a folder, or a name that ends in .png")
    return [target / f"{number:03d}_{seed}.png" for number, seed in enumerate(seeds)]


def main(family_name: str, argv: list[str] | None = None) -> None:
    """Parse and check everything, then load and draw."""
    from library.families import get_family

    family = get_family(family_name)
    arguments = parser_of(family).parse_args(sys.argv[1:] if argv is None else argv)
    prompts = prompts_of(arguments)
    first = seed_of(Prompt("", seed=arguments.seed), 0, 0)
    seeds = [seed_of(prompt, number, first) for number, prompt in enumerate(prompts)]
    paths = paths_of(arguments, seeds)
    family = _check_files(family, arguments, paths)
    for note in notes(prompts, family):
        print(f"note: {note}", file=sys.stderr, flush=True)
    from library.pictures import save_png

    for path, prompt, picture in zip(paths, prompts, _pictures(family, arguments, prompts, seeds), strict=True):
        save_png(picture, path, {"prompt": prompt.prompt})
        print(f"saved {path}", flush=True)


def _check_files(family: Family, arguments: argparse.Namespace, paths: list[Path]) -> Family:
    """All files, from their headers; returns the family for them. Raises ConfigError."""
    from library.checkpoints import check_writable
    from library.preflight import check_parts

    family, _ = check_parts(family, arguments)
    if len(arguments.lora_multiplier) > len(arguments.lora_weight):
        raise ConfigError(
            f"{len(arguments.lora_multiplier)} --lora_multiplier for {len(arguments.lora_weight)} --lora_weight"
        )
    for path in arguments.lora_weight:
        if not Path(path).is_file():
            raise ConfigError(f"--lora_weight {path}: no such file")
    check_writable(paths[0].parent, bytes_needed=1024**2)
    return family


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _pictures(
    family: Family, arguments: argparse.Namespace, prompts: list[Prompt], seeds: list[int]
) -> Iterator[np.ndarray]:
    """uint8 [H,W,3] of every prompt."""
    import torch

    from library import checkpoints, sample

    device = arguments.device or _device()
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))

    def load(part: Any, kind: torch.dtype) -> torch.nn.Module:
        path = checkpoints.path_of(part, arguments)
        model = checkpoints.load_part(part, path, dtype=kind, device=device)
        return model.requires_grad_(False).eval()

    conds = _conditions(family, arguments, prompts, lambda part: load(part, dtype), device)
    denoiser = load(family.denoiser, dtype)
    denoiser.binding.adapted = family.adapted
    _merge(denoiser, arguments)
    vae = load(family.vae, torch.float32)
    for prompt, pair, seed in zip(prompts, conds, seeds, strict=True):
        latents = sample.generate_latents(
            family, denoiser, *pair,
            shape=sample.latent_shape(family, prompt, family.channels_of(denoiser), family.resolution),
            seed=seed, steps=prompt.sample_steps, scale=prompt.scale, shift=prompt.flow_shift, device=device,
        )  # fmt: skip
        yield sample.decode(family, vae, latents)


def _conditions(
    family: Family, arguments: argparse.Namespace, prompts: list[Prompt], load: Callable, device: str
) -> list[tuple[dict, dict]]:
    """What conditions each picture; the encoders are gone when this returns, before the denoiser is loaded."""
    from library.components.tokenizers import load_tokenizers
    from library.sample import conditions_of
    from library.strategies import Encoders

    encoders, tokenizers = [load(part) for part in family.text_encoders], load_tokenizers(family, arguments)
    vae = functools.cache(lambda: load(family.vae).float())
    pictures = Encoders(vae, functools.cache(lambda: [load(part) for part in family.image_encoders]))

    def encode(request: Any) -> dict:
        return family.encode(encoders, tokenizers, request.text(family), device)

    return [conditions_of(prompt, family, encode, pictures, family.resolution, device) for prompt in prompts]


def _merge(denoiser: Any, arguments: argparse.Namespace) -> None:
    from networks import lora

    strengths = [*arguments.lora_multiplier, *[1.0] * len(arguments.lora_weight)]
    for path, strength in zip(arguments.lora_weight, strengths, strict=False):
        network, weights = lora.create_network_from_weights(strength, path, None, [], denoiser, for_inference=True)
        network.merge_to([], denoiser, weights)
