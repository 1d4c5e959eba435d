"""Studios and trainers for toys of HunyuanVideo, one folder of files per family, for the tests of both families."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from studio_support import make_toy
from training_support import ROOT
from video_support import write_video

from library.families import get_family
from library.inference import Studio, parser_of, settle
from library.preflight import check_parts
from library.prompts import defaults_of, parse_line

torch.set_num_threads(1)


def widened(source, target, channels, key="img_in.proj.weight"):
    """A denoiser's file with so many more channels of input."""
    from safetensors.torch import load_file, save_file

    weights = load_file(source)
    embed = weights[key]
    more = torch.randn(len(embed), channels, *embed.shape[2:], generator=torch.Generator().manual_seed(7)) / 8
    save_file(weights | {key: torch.cat([embed, more], 1)}, target)
    return target


def studio_of(name, words):
    arguments = parser_of(get_family(name)).parse_args(
        [*words, "--device", "cpu", "--save_path", "x.mp4", "--prompt", "x"]
    )
    family, _ = check_parts(get_family(name), arguments)
    settle(arguments, family)
    return Studio(family, arguments)


def conditions(studio, words):
    return studio.conditions(parse_line(words, "test", defaults_of(studio.family)))


class Padded:
    """A toy's tokenizer as the pipelines call it; `cut` is what they take for the length of the template's head."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, max_length=None, padding=None, **_):
        rows = [self.tokenizer(text)["input_ids"][:max_length] for text in texts]
        length = max_length if padding == "max_length" else max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A smooth picture of 64 x 64."""
    path = tmp_path_factory.mktemp("photo") / "first.png"
    coarse = (np.random.default_rng(3).random((4, 5, 3)) * 255).astype(np.uint8)
    Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for k in range(2):
        write_video(folder / f"{k}.mp4", 9 + k, rate=24)
        (folder / f"{k}.txt").write_text(f"a video of thing {k}", encoding="utf-8")
    text = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
    text += f"video_directory = {json.dumps(str(folder))}\ncaption_extension = '.txt'\ntarget_frames = [9]\n"
    (folder.parent / "clips.toml").write_text(text, encoding="utf-8")
    return folder.parent / "clips.toml"


def trainer_of(name, toml, data, output, *extra):
    from library import options
    from train_network import NetworkTrainer

    words = ["--config_file", str(toml), "--dataset_config", str(data), "--output_dir", str(output), "--output_name",
             "run", "--max_train_steps", "2", "--cache_latents", "--cache_text_encoder_outputs", *extra]  # fmt: skip
    return NetworkTrainer(options.parse(name, words, "test"))


__all__ = ["ROOT", "clips", "conditions", "make_toy", "photo", "studio_of", "trainer_of", "widened"]
