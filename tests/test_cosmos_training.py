"""Cosmos 1.0 trains where the seed of this trainer gave up: pictures, swapped and quantised blocks, other losses, clips."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import make_toy
from training_support import losses
from video_support import write_video

from library import options
from library.errors import ConfigError
from library.families.cosmos import COMFY, config, recognise
from library.layout import Layout, shapes_of
from library.memory.quantised_linear import Fp8Linear, Nf4Linear

STEPS = ("--max_train_steps", "2", "--learning_rate", "1e-2", "--gradient_checkpointing")
LAYERS = 4


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """With four blocks, stored in bfloat16 so that a float32 run has every weight in memory of its own."""
    toml = make_toy("cosmos", tmp_path_factory.mktemp("toys") / "cosmos")
    path = toml.with_name("denoiser.safetensors")
    weights = {key: value.bfloat16() for key, value in load_file(path).items()}
    for number in range(2, LAYERS):
        first = {key: value for key, value in weights.items() if ".block0." in key}
        weights |= {key.replace(".block0.", f".block{number}."): value.flip(0).clone() for key, value in first.items()}
    save_file(weights, path, {"format": "pt"})
    return toml


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures and clips of nine frames, in one data file."""
    folder = tmp_path_factory.mktemp("data")
    for k in range(2):
        Image.new("RGB", (64, 64), (90 * k, 0, 60)).save(folder / f"{k}.png")
        write_video(folder / f"clip{k}.mp4", 10 + k)
        for name in (f"{k}", f"clip{k}"):
            (folder / f"{name}.txt").write_text(f"a cat, number {k}")
    path = folder / "data.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\n"
        f"caption_extension = '.txt'\n[[datasets.subsets]]\nvideo_directory = {json.dumps(str(folder))}\n"
        "caption_extension = '.txt'\ntarget_frames = [9]\n"
    )
    return path


def train(toml, data, output, *extra):
    from train_network import NetworkTrainer

    torch.set_num_threads(1)
    words = ["--config_file", str(toml), "--dataset_config", str(data), "--output_dir", str(output), "--seed", "3"]
    words += ["--output_name", "run", "--cache_latents", "--cache_text_encoder_outputs", *STEPS, *extra]
    trainer = NetworkTrainer(options.parse("cosmos", words, "test"))
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("toml", "extra", "held"),
    [
        ("toy.toml", ("--fp8_scaled", "--loss_type", "huber"), Fp8Linear),
        ("toy.toml", ("--nf4", "--mixed_precision", "bf16"), Nf4Linear),
        ("toy_full.toml", ("--loss_type", "smooth_l1"), torch.nn.Linear),
    ],
)
def test_pictures_and_clips_train_with_swapped_blocks_to_the_bit(toy, data, tmp_path, toml, extra, held):
    toml = toy.with_name(toml)
    train(toml, data, tmp_path / "plain", *extra)
    trainer = train(toml, data, tmp_path / "swapped", *extra, "--blocks_to_swap", str(LAYERS - 2))
    assert {item.bucket[2:] for item in trainer.dataset.items} == {(1,), (9,)}
    assert len(trainer.runtime.memory.swap.blocks) == LAYERS - 2
    assert type(trainer.denoiser.transformer_blocks[1].attn1.to_q) is held
    found = losses(tmp_path / "swapped")
    assert found == losses(tmp_path / "plain") and len(set(found)) == 2
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("plain", "swapped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_torch_file_is_fine_tuned_and_its_names_and_tables_are_saved_again(toy, data, tmp_path):
    """As NVIDIA publishes it; what is saved is safetensors."""
    weights = load_file(toy.with_name("denoiser.safetensors"))
    tables = {"net.logvar.0.freqs": torch.ones(4), "net.pos_embedder.seq": torch.arange(3.0)}
    torch.save({"model": weights | tables}, tmp_path / "model.pt")
    extra = ("--max_train_steps", "1", "--pretrained_model_name_or_path", str(tmp_path / "model.pt"))
    train(toy.with_name("toy_full.toml"), data, tmp_path, *extra)
    saved = load_file(tmp_path / "run.safetensors")
    assert saved.keys() == weights.keys() | tables.keys()
    assert all(torch.equal(saved[key], value) for key, value in tables.items())
    assert not torch.equal(saved["net.final_layer.linear.weight"], weights["net.final_layer.linear.weight"])


def test_models_that_continue_videos_are_refused(toy, data, tmp_path):
    weights = load_file(toy.with_name("denoiser.safetensors"))
    embedder = "net.x_embedder.proj.1.weight"
    save_file(weights | {embedder: torch.zeros(256, 72)}, tmp_path / "v2w.safetensors")
    with pytest.raises(ConfigError, match="v2w.safetensors is not a Cosmos 1.0 text-to-world denoiser"):
        train(toy, data, tmp_path, "--pretrained_model_name_or_path", str(tmp_path / "v2w.safetensors"))


@pytest.mark.parametrize(
    ("width", "layers", "scale"), [(4096, 28, (2.0, 1.0, 1.0)), (5120, 36, (2.0, 2.0, 2.0))], ids=["7B", "14B"]
)
def test_a_file_of_either_size_gives_the_published_configuration(width, layers, scale):
    """The numbers that diffusers' models of NVIDIA's releases have; the padding's channel is one of ours."""
    from diffusers import CosmosTransformer3DModel

    published = {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": width // 128, "attention_head_dim": 128,
        "num_layers": layers, "mlp_ratio": 4.0, "text_embed_dim": 1024, "adaln_lora_dim": 256, "max_size": (128, 240, 240),
        "patch_size": (1, 2, 2), "rope_scale": scale, "concat_padding_mask": True, "extra_pos_embed_type": "learnable",
    }  # fmt: skip
    with torch.device("meta"):
        model = CosmosTransformer3DModel(**published)
    ours = shapes_of(model)
    theirs = Layout("comfy", COMFY, ours).to_theirs(model.state_dict())
    shapes = {key: tuple(value.shape) for key, value in theirs.items()}
    assert recognise(shapes) == "comfy" and recognise(ours) == "diffusers"
    wanted = published | {"in_channels": 17, "concat_padding_mask": False}
    assert config(shapes, {}, "comfy") == config(ours, {}, "diffusers") == wanted
