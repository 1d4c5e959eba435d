"""Write a complete set of random toy files of a family, in exactly the real format.

    python tools/make_toy_model.py --family z_image --output_dir toy [--seed 0]

The denoiser's dimensions are ones that ComfyUI's own model detection accepts (tools/toy_configs.json); VAE, text
encoder and tokenizer are as small as their formats allow. `toy.toml` is a --config_file with every path set for a
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
WORDS = (
    "a an the of on in and with picture photo thing red green blue white black cat dog house tree blurry style".split()
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


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


def make_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer in transformers' files; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.save_pretrained(folder)
    return len(fast)


def part_shapes(part, configuration: dict) -> dict:
    """Names and shapes that a file of this part has, from a configuration of its model class."""
    import torch

    from library.checkpoints import rows_of
    from library.layout import Layout, shapes_of

    with torch.device("meta"):
        ours = shapes_of(part.build(configuration))
    name = next(iter(part.layouts))
    return Layout(name, rows_of(part, name, ours), ours).their_shapes


def vae_config(channels: int) -> dict:
    widths = (8, 16, 16, 16)
    return {
        "in_channels": 3, "out_channels": 3, "block_out_channels": widths, "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": channels, "norm_num_groups": 4, "use_quant_conv": False, "use_post_quant_conv": False,
    }  # fmt: skip


def text_config(width: int, vocabulary: int) -> dict:
    from library.components import qwen3

    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": qwen3.NORM_EPS,
        "rope_parameters": {"rope_theta": qwen3.ROPE_THETA, "rope_type": "default"}, "attention_bias": False,
    }  # fmt: skip


def make(family_name: str, folder: Path, seed: int = 0) -> Path:
    """Write everything; returns toy.toml."""
    from library import checkpoints

    family = get_family(family_name)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = json.loads(CONFIGS.read_text(encoding="utf-8"))[family_name]["keys"]
    checkpoints.save(weights(shapes, seed), folder / "denoiser.safetensors", {"format": "pt"})
    vocabulary = make_tokenizer(folder / "tokenizer")
    configuration = family.denoiser.config(
        {k: tuple(v) for k, v in shapes.items()}, {}, next(iter(family.denoiser.layouts))
    )
    vae = weights(part_shapes(family.vae, vae_config(family.latent_channels)), seed + 1)
    checkpoints.save(vae, folder / "vae.safetensors", {"format": "pt", "norm_num_groups": "4"})
    for k, part in enumerate(family.text_encoders):
        text = weights(part_shapes(part, text_config(configuration["cap_feat_dim"], vocabulary)), seed + 2 + k)
        checkpoints.save(text, folder / f"{part.name}.safetensors", {"format": "pt"})
    lines = [f'{family.denoiser.option} = "denoiser.safetensors"', f'{family.vae.option} = "vae.safetensors"']
    lines += [f'{part.option} = "{part.name}.safetensors"' for part in family.text_encoders]
    lines += ['tokenizer = "tokenizer"', "learning_rate = 1e-3", "max_train_steps = 10", "seed = 1"]
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
