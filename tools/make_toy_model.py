"""Write a complete set of random toy files of a family, in exactly the real format.

    python tools/make_toy_model.py --family z_image --output_dir toy [--seed 0]

The denoiser's dimensions are ones that ComfyUI's own model detection accepts (tools/toy_configs.json); VAE, text
encoder and tokenizer are as small as their formats allow. Families whose models come as whole checkpoints get one
file with all parts. `toy.toml` is a --config_file with every path set for a
LoRA, `toy_full.toml` the same for a full fine-tune.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # instead of this folder, whose inspect.py hides the standard one

from library.errors import run
from library.families import FAMILIES, get_family

CONFIGS = Path(__file__).with_name("toy_configs.json")


def weights(shapes: dict, seed: int) -> dict:
    """Random tensors by name: norms one, biases and pad tokens small, matrices scaled by their inputs."""
    import torch

    generator, out = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        value = torch.randn(tuple(shape), generator=generator)
        if key.endswith(("bias", "token")):
            value *= 0.02
        elif len(shape) == 1:
            value = 1 + 0.02 * value
        else:
            value /= math.sqrt(math.prod(shape[1:]))
        out[key] = value
    return out


def part_shapes(part, configuration: dict, name: str = "") -> dict:
    """Names and shapes that a file of this part has, from a configuration of its model class, in the first layout."""
    import torch

    from library.checkpoints import rows_of
    from library.layout import Layout, shapes_of

    with torch.device("meta"):
        ours = shapes_of(part.build(configuration))
    name = name or next(iter(part.layouts))
    return Layout(name, rows_of(part, name, ours), ours).their_shapes


def make(family_name: str, folder: Path, seed: int = 0) -> Path:
    """Write everything; returns toy.toml."""
    from library import checkpoints
    from tools.toy_parts import TOYS, make_tokenizer

    family, toy = get_family(family_name), TOYS[family_name]
    folder.mkdir(parents=True, exist_ok=True)
    lines, whole = [f'{family.denoiser.option} = "denoiser.safetensors"'], {}

    def write(part, made, number: int) -> None:
        configuration, metadata = made
        prefix, layout = family.container.get(part.name, ("", ""))
        tensors = weights(part_shapes(part, configuration, layout), seed + number)
        if part.name in family.container:
            whole.update({prefix + key: value for key, value in tensors.items()})
            return
        checkpoints.save(tensors, folder / f"{part.name}.safetensors", {"format": "pt", **metadata})
        lines.append(f'{part.option} = "{part.name}.safetensors"')

    if toy.denoiser:
        write(family.denoiser, (toy.denoiser, {}), 0)
    else:
        shapes = json.loads(CONFIGS.read_text(encoding="utf-8"))[family_name]["keys"]
        whole.update(weights(shapes, seed))  # with the published file's prefix
    write(family.vae, toy.vae, 1)
    vocabulary = 0
    for number, part in enumerate(family.text_encoders, 2):
        text = toy.text[part.name]
        if part.tokenizer:
            vocabulary = make_tokenizer(folder / part.tokenizer.option, text.tokenizer)
            lines.append(f'{part.tokenizer.option} = "{part.tokenizer.option}"')
        write(part, text.config(text.width, vocabulary), number)
    for where in family.extra_tokenizers:
        make_tokenizer(folder / where.option, toy.tokenizers[where.option])
        lines.append(f'{where.option} = "{where.option}"')
    for number, part in enumerate(family.image_encoders, 10):
        write(part, toy.images[part.name], number)
    checkpoints.save(whole, folder / "denoiser.safetensors", {"format": "pt"})
    values = {"learning_rate": 1e-3, "max_train_steps": 10, "seed": 1, **toy.options}
    lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    network = ['network_module = "networks.lora"', "network_dim = 4", "network_alpha = 4"]
    (folder / "toy.toml").write_text("\n".join(lines + network) + "\n", encoding="utf-8")
    (folder / "toy_full.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "toy.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=sorted(FAMILIES))
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"wrote {make(arguments.family, arguments.output_dir, arguments.seed)} and the files that it names")


if __name__ == "__main__":
    run(main)
