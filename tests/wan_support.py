"""Toys of all Wan models, studios, clips and trainers for the tests of the family."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training_support import ROOT
from video_support import write_video

from library.components import vae_wan
from library.families import get_family
from library.families.wan import KINDS
from library.inference import Studio, parser_of
from library.prompts import defaults_of, parse_line

torch.set_num_threads(1)
FAMILY = get_family("wan")
# What each test calls a model -> (toy dimensions, name of the file).
FILES = {
    "t2v": ("wan", "denoiser"), "2.1 i2v": ("wan_i2v_14b", "wan2.1_i2v"),
    "2.2 i2v": ("wan22_a14b_i2v", "wan2.2_i2v_low_noise"), "5B": ("wan22_ti2v_5b", "wan2.2_ti2v"),
    "2.2 t2v": ("wan", "wan2.2_t2v_high_noise"), "2.2 t2v low": ("wan", "wan2.2_t2v_low_noise"),
    "2.2 i2v high": ("wan22_a14b_i2v", "wan2.2_i2v_high_noise"),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Files of every model; VAEs, text encoder and CLIP are shared."""
    from tools.make_toy_model import make, part_shapes, weights
    from tools.toy_parts import clip_vision
    from tools.toy_vaes import wan22

    folder = tmp_path_factory.mktemp("wan")
    make("wan", folder)
    configs = json.loads((ROOT / "tools" / "toy_configs.json").read_text(encoding="utf-8"))
    for seed, (name, file) in enumerate(FILES.values()):
        if file != "denoiser":
            save_file(weights(configs[name]["keys"], seed), folder / f"{file}.safetensors")
    for part, made, file in ((KINDS["2.1 i2v"].changes["image_encoders"][0], clip_vision(), "clip"),
                             (vae_wan.part22(), wan22(), "vae22")):  # fmt: skip
        configuration, metadata = made
        save_file(weights(part_shapes(part, configuration), 9), folder / f"{file}.safetensors", metadata)
    return folder


def words_of(toy, model):
    vae = "vae22" if model == "5B" else "vae"
    words = ["--dit", str(toy / f"{FILES[model][1]}.safetensors"), "--vae", str(toy / f"{vae}.safetensors")]
    words += ["--t5", str(toy / "t5.safetensors"), "--tokenizer", str(toy / "tokenizer"), "--device", "cpu"]
    return words + (["--clip", str(toy / "clip.safetensors")] if model == "2.1 i2v" else [])


@pytest.fixture(scope="module")
def studios(toy):
    made = {}

    def studio(model):
        if model not in made:
            options = parser_of(FAMILY).parse_args([*words_of(toy, model), "--save_path", "x.mp4"])
            made[model] = Studio(FAMILY.resolved(options), options)
        return made[model]

    return studio


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A smooth picture of 64 x 64."""
    path = tmp_path_factory.mktemp("photo") / "first.png"
    coarse = (np.random.default_rng(3).random((4, 5, 3)) * 255).astype(np.uint8)
    Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return path


def prompt_of(studio, words="", **_):
    return parse_line(f"a red cat --n blurry --w 64 --h 64 --f 9 {words}", "test", defaults_of(studio.family))


def pipeline_of(studio, *, image, high_noise=None):
    """diffusers' pipeline with the toy's weights, visiting the sigmas that ours visits."""
    import diffusers

    class Scheduler(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps, device=None):
            super().set_timesteps(device=device, sigmas=np.linspace(1, 0, steps + 1)[:-1])

    kind = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    is_5b = studio.family.latent_channels == 48
    extra = {"image_encoder": None, "image_processor": None} if image else {}
    pipeline = kind(
        tokenizer=None, text_encoder=None, vae=studio.vae, scheduler=Scheduler(shift=3.0), expand_timesteps=is_5b,
        transformer=studio.denoiser if high_noise is None else high_noise, **extra,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def padded_text(cond):
    return torch.nn.functional.pad(cond["text"], (0, 0, 0, 512 - len(cond["text"])))[None]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for k in range(2):
        write_video(folder / f"{k}.mp4", 9 + k, rate=16)
        (folder / f"{k}.txt").write_text(f"a video of thing {k}", encoding="utf-8")
    text = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
    text += f"video_directory = {json.dumps(str(folder))}\ncaption_extension = '.txt'\ntarget_frames = [9]\n"
    (folder.parent / "clips.toml").write_text(text, encoding="utf-8")
    return folder.parent / "clips.toml"


def trainer_of(toy, model, data, output, *extra):
    from library import options
    from train_network import NetworkTrainer

    words = ["--dataset_config", str(data), "--output_dir", str(output), "--output_name", "run", "--seed", "3",
             "--network_module", "networks.lora_wan", "--network_dim", "4", "--max_train_steps", "2",
             "--learning_rate", "1e-3", *extra]  # fmt: skip
    given = [word.replace("--dit", "--pretrained_model_name_or_path") for word in words_of(toy, model)]
    at = given.index("--device")
    return NetworkTrainer(options.parse("wan", [*given[:at], *given[at + 2 :], *words], "test"))
