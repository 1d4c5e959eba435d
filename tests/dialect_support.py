"""A toy's files as a configuration of diffusion-pipe names them."""

import json
from pathlib import Path

import tomllib

from library.families import get_family

OWN = ("model_version", "i_know_what_i_am_doing")  # what a file cannot tell


def toy_config(family: str, toy: Path, data: Path | str, output: Path, model: str = "") -> Path:
    """A toy's files under diffusion-pipe's keys."""
    given, record = tomllib.loads(toy.read_text()), get_family(family)
    keys = {"z_image": ("diffusion_model", "vae"), "sdxl": ("checkpoint_path", "")}.get(
        family, ("transformer_path", "vae_path")
    )
    lines = [f"type = '{family}'", "dtype = 'float32'", f"{keys[0]} = '{toy.parent / 'denoiser.safetensors'}'"]
    if "vae" in given:
        lines.append(f"{keys[1]} = '{toy.parent / given['vae']}'")
    lines += [f"{name} = {json.dumps(value)}" for name, value in given.items() if name in OWN]
    texts = [f"{{path = '{toy.parent / given[p.option]}'}}" for p in record.text_encoders if p.option in given]
    lines += [f"text_encoders = [{', '.join(reversed(texts))}]"] if texts else []  # found by their files
    for where, _ in record.tokenizers:
        if where.option in given:
            lines.append(f"{where.option} = '{toy.parent / given[where.option]}'")
    path = output / "run.toml"
    path.write_text(
        f"output_dir = '{output / 'out'}'\noutput_name = 'run'\ndataset = '{data}'\nepochs = 1\nsave_every_n_epochs = 1\n"
        f"eval_every_n_epochs = 1\n[model]\n" + "\n".join(lines) + f"\n{model}\n"
        "[adapter]\ntype = 'lora'\nrank = 4\n[optimizer]\ntype = 'adamw_optimi'\nlr = 1e-3\nbetas = [0.9, 0.99]\n"
        "weight_decay = 0.01\neps = 1e-8\n",
        encoding="utf-8",
    )  # fmt: skip
    return path
