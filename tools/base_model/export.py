"""Writes a trained emoji64 as the files that Z-Image's users know: denoiser, vae, text_encoder, tokenizer/.

Names and layouts are those of the published single files (ComfyUI's); every file is read back through
diffusers' own converters and compared before the script is content.
"""

import argparse
import os
import re
import shutil

import torch
import train_vae
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file

import networks

TITLE, LICENCE = "emoji64", "Apache-2.0"
DENOISER_NAMES = (
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1.", "x_embedder."),
)
VAE_NAMES = (
    (r"(en|de)coder\.conv_norm_out", r"\1coder.norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
)


def denoiser_file(state):
    """diffusers' names -> the published ones, with q, k and v in one matrix."""
    out = {}
    for key, value in state.items():
        if ".attention.to_k." in key or ".attention.to_v." in key:
            continue
        if ".attention.to_q." in key:
            parts = [state[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")]
            out[key.replace("to_q", "qkv")] = torch.cat(parts)
            continue
        for old, new in DENOISER_NAMES:
            key = key.replace(old, new)
        out[key] = value
    return out


def vae_file(state):
    """diffusers' names -> LDM's: decoder levels are counted from the picture's side, attention is 1x1 convolutions."""
    out, last = {}, len(train_vae.CONFIG["block_out_channels"]) - 1
    for key, value in state.items():
        key = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{last - int(m[1])}.", key)
        key = re.sub(r"(up\.\d)\.resnets\.(\d)", r"\1.block.\2", key)
        key = re.sub(r"(up\.\d)\.upsamplers\.0", r"\1.upsample", key)
        for pattern, name in VAE_NAMES:
            key = re.sub(pattern, name, key)
        convolution = ".attn_1." in key and key.endswith("weight") and ".norm." not in key
        out[key] = value[:, :, None, None] if convolution else value
    return out


def load_denoiser(path):
    """The denoiser file as diffusers' model, through diffusers' converter."""
    model = networks.build_denoiser()
    model.load_state_dict(convert_z_image_transformer_checkpoint_to_diffusers(_floats(path)))
    return model.eval().requires_grad_(False)


def load_vae(path):
    """The VAE file as diffusers' model, through diffusers' converter."""
    vae = train_vae.build()
    state = convert_ldm_vae_checkpoint(_floats(path), dict(vae.config))
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)


def load_text_encoder(path):
    """The text encoder file as transformers' Qwen3Model."""
    state = {key.removeprefix("model."): value for key, value in _floats(path).items()}
    encoder = networks.build_text_encoder(state["embed_tokens.weight"].shape[0])
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)


def _floats(path):
    return {key: value.float() for key, value in load_file(path).items()}


def write(path, state, dtype, **metadata):
    """One safetensors file; the header says what it is, as shapes cannot."""
    about = dict(format="pt", title=TITLE, license=LICENCE, **metadata)
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, path, metadata=about)


def compare(name, module, state, tolerance):
    """Fails if a file read back differs from the trained weights by more than its storage type explains."""
    worst = max(
        ((value - state[key]).abs() / (state[key].abs() + 1e-2)).max().item()
        for key, value in module.state_dict().items()
    )
    print(f"{name}: {sum(v.numel() for v in state.values())} parameters, largest relative difference {worst:.4f}")
    if worst > tolerance:
        raise ValueError(
            f"{name} does not survive its own file: relative difference {worst:.4f}, at most {tolerance} expected"
        )


def main(args):
    os.makedirs(args.folder, exist_ok=True)
    names = {part: os.path.join(args.folder, part + ".safetensors") for part in ("denoiser", "vae", "text_encoder")}
    average = torch.load(args.checkpoint, weights_only=True)["average"]
    denoiser = {key[2:]: value for key, value in average.items() if key.startswith("0.")}
    encoder = {key[2:]: value for key, value in average.items() if key.startswith("1.")}
    vae = torch.load(args.latents, weights_only=True)["vae"]
    write(names["denoiser"], denoiser_file(denoiser), torch.bfloat16, architecture="z_image", resolution="64x64")
    write(
        names["vae"],
        vae_file(vae),
        torch.float16,
        architecture="vae_flux",
        norm_num_groups=str(train_vae.CONFIG["norm_num_groups"]),
        scaling_factor=str(train_vae.SCALE),
        shift_factor=str(train_vae.SHIFT),
    )
    write(
        names["text_encoder"],
        {"model." + key: value for key, value in encoder.items()},
        torch.bfloat16,
        architecture="qwen3",
        rope_theta="1000000",
        rms_norm_eps="1e-6",
    )
    shutil.copytree(args.tokenizer, os.path.join(args.folder, "tokenizer"), dirs_exist_ok=True)
    compare("denoiser", load_denoiser(names["denoiser"]), denoiser, 0.01)
    compare("vae", load_vae(names["vae"]), vae, 0.01)
    compare("text_encoder", load_text_encoder(names["text_encoder"]), encoder, 0.01)
    size = sum(os.path.getsize(os.path.join(root, file)) for root, _, files in os.walk(args.folder) for file in files)
    print(f"{args.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="denoiser.pt")
    parser.add_argument(
        "--latents", default="latents.pt", help="the cache of train_denoiser.py: it holds the scaled VAE"
    )
    parser.add_argument("--tokenizer", default="tokenizer")
    parser.add_argument("--folder", default="models/emoji64")
    main(parser.parse_args())
