"""Pictures from the command line, for every family: models as for training, LoRAs with strengths, prompts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError, nearest
from library.prompts import Prompt, parse_prompts

if TYPE_CHECKING:
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
    add("--vae", required=True, help="VAE file")
    for part in family.text_encoders:
        add(f"--{part.option}", required=True, help=f"{part.title}: file or folder")
    add("--tokenizer", help="tokenizer folder or hub id; default: a folder 'tokenizer' beside the text encoder")
    add("--lora_weight", nargs="*", default=[], help="LoRA files, in any format")
    add("--lora_multiplier", nargs="*", type=float, default=[], help="their strengths; 1 if not given")
    add("--prompt", help="text of the picture")
    add("--from_file", help="prompt file as for training (txt, toml, json); --save_path is then a folder")
    add("--negative_prompt", default="")
    add("--image_size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), default=[family.resolution] * 2)
    add("--infer_steps", type=int, default=20)
    add("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 = off")
    add("--flow_shift", type=float, default=family.defaults.get("discrete_flow_shift", 1.0))
    add("--seed", type=int, default=0)
    add("--save_path", required=True, help="PNG file, or folder with --from_file")
    add("--device", default=None, help="cuda, cpu, mps; default: the best there is")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: bfloat16, float32 on a CPU")
    return parser


def prompts_of(arguments: argparse.Namespace) -> list[Prompt]:
    if bool(arguments.prompt) == bool(arguments.from_file):
        raise ConfigError("give one of --prompt and --from_file")
    height, width = arguments.image_size
    plain = Prompt(arguments.prompt or "", arguments.negative_prompt, width, height, arguments.seed,
                   arguments.infer_steps, arguments.guidance_scale, None, arguments.flow_shift)  # fmt: skip
    if arguments.prompt:
        return [plain]
    found = parse_prompts(Path(arguments.from_file))
    blank = Prompt("")
    given = {name: getattr(plain, name) for name in ("width", "height", "flow_shift", "negative_prompt")}
    return [replace(p, **{k: v for k, v in given.items() if getattr(p, k) == getattr(blank, k)}) for p in found]


def main(family_name: str, argv: list[str] | None = None) -> None:
    from library.families import get_family

    family = get_family(family_name)
    arguments = parser_of(family).parse_args(sys.argv[1:] if argv is None else argv)
    prompts = prompts_of(arguments)
    from library.checkpoints import check_part

    for part in (family.denoiser, family.vae, *family.text_encoders):
        check_part(part, getattr(arguments, part.option), f"--{part.option}")
    if len(arguments.lora_multiplier) > len(arguments.lora_weight):
        raise ConfigError(
            f"{len(arguments.lora_multiplier)} --lora_multiplier for {len(arguments.lora_weight)} --lora_weight"
        )
    for path, picture in _pictures(family, arguments, prompts):
        from library.pictures import save_png

        save_png(picture[0], path, {"prompt": picture[1]})
        print(f"saved {path}", flush=True)


def _pictures(family: Family, arguments: argparse.Namespace, prompts: list[Prompt]) -> Any:
    """(path, (pixels, text)) of every prompt."""
    import torch

    from library import checkpoints, sample

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    load = lambda part, kind: (  # noqa: E731
        checkpoints.load_part(part, getattr(arguments, part.option), dtype=kind, device=device)
        .requires_grad_(False)
        .eval()
    )
    encoders = [load(part, dtype) for part in family.text_encoders]
    tokenizers = family.tokenizers(SimpleNamespace(**vars(arguments)))
    texts = {text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)}
    conds = {text: family.encode(encoders, tokenizers, text, device) for text in texts}
    del encoders  # never resident together with the denoiser
    denoiser = load(family.denoiser, dtype)
    denoiser.binding.adapted = family.adapted
    _merge(denoiser, arguments)
    vae = load(family.vae, torch.float32)
    folder = Path(arguments.save_path)
    for number, prompt in enumerate(prompts):
        seed = arguments.seed + number if prompt.seed is None else prompt.seed
        latents = sample.generate_latents(
            family, denoiser, conds[prompt.prompt], conds[prompt.negative_prompt],
            shape=sample.latent_shape(family, prompt, int(denoiser.config.in_channels), family.resolution),
            seed=abs(seed), steps=prompt.sample_steps, scale=prompt.scale, shift=prompt.flow_shift, device=device,
        )  # fmt: skip
        path = folder / f"{number:03d}_{seed}.png" if arguments.from_file else folder
        yield path, (sample.decode(family, vae, latents), prompt.prompt)


def _merge(denoiser: Any, arguments: argparse.Namespace) -> None:
    from networks import lora

    strengths = [*arguments.lora_multiplier, *[1.0] * len(arguments.lora_weight)]
    for path, strength in zip(arguments.lora_weight, strengths, strict=False):
        if not Path(path).is_file():
            raise ConfigError(f"--lora_weight {path}: no such file")
        network, weights = lora.create_network_from_weights(strength, path, None, [], denoiser, for_inference=True)
        network.merge_to([], denoiser, weights)
