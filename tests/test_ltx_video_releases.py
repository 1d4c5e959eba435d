"""LTX-Video 0.9.5 and later, distilled files, folders: times, steps and videos as diffusers' pipeline for them has it."""

import json
import shutil

import numpy as np
import pytest
import torch
from oracles import relative
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import make_toy, studio_of, words_of
from training_support import losses
from video_support import write_video

from library import flow, options, sample
from library.families import get_family
from library.families.ltx_video import is_newer
from library.inference import Studio, parser_of
from library.preflight import check_parts
from library.prompts import defaults_of, parse_line

FAMILY = get_family("ltx_video")
SHAPE = (128, 2, 2, 3)  # of 9 frames of 96 x 64
NEWER = {"config": json.dumps({"transformer": {"causal_temporal_positioning": True}})}
LAYERS = 4


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("ltx_video", tmp_path_factory.mktemp("toys") / "ltx_video")


@pytest.fixture(scope="module")
def newer(toy):
    """The toy's file with the header of 0.9.5."""
    path = toy.with_name("newer.safetensors")
    with_header(toy.with_name("denoiser.safetensors"), path, NEWER)
    return path


def with_header(source, target, said):
    from library.checkpoints import Checkpoint

    save_file(load_file(source), target, Checkpoint.open(source).metadata | said)


@pytest.fixture(scope="module")
def studio(toy, newer):
    return studio_of(toy, dit=newer)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "first.png"
    coarse = (np.random.default_rng(3).random((4, 5, 3)) * 255).astype(np.uint8)
    Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize("begun", [False, True])
def test_a_video_of_0_9_5_is_the_one_that_diffusers_pipeline_for_it_makes(studio, photo, begun, monkeypatch):
    """Without the noise that the pipeline adds to given frames, and with the mean of the VAE's distribution."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline
    from diffusers.pipelines.ltx import pipeline_ltx_condition

    monkeypatch.setattr(pipeline_ltx_condition, "retrieve_latents", lambda out, generator: out.latent_dist.mode())
    (encoder,), (tokenizer,) = studio.encoders
    pipeline = LTXConditionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=studio.vae, text_encoder=encoder,
        tokenizer=tokenizer, transformer=studio.denoiser,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    line = f"a red cat --n blurry --w 96 --h 64 --f 9{f' --i {photo}' if begun else ''}"
    prompt = parse_line(line, "test", defaults_of(FAMILY))
    cond, uncond = studio.conditions(prompt)
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=5, scale=3.0,
        shift=sample.shift_of(prompt, studio.family, SHAPE, 1.0), device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        theirs = pipeline(
            image=Image.open(photo) if begun else None, prompt="a red cat", negative_prompt="blurry", height=64, width=96,
            num_frames=9, frame_rate=25, num_inference_steps=5, guidance_scale=3.0, image_cond_noise_scale=0.0,
            generator=torch.Generator().manual_seed(5), output_type="latent", return_dict=False,
        )[0]  # fmt: skip
    assert relative(ours, theirs) < 1e-4
    assert ("first_frame" in cond) == begun


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 40])
def test_0_9_5_visits_the_sigmas_of_diffusers_pipeline(studio, steps):
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

    prompt = parse_line("a", "test", defaults_of(studio.family))
    ours = studio.family.objective.times(steps, sample.shift_of(prompt, studio.family, SHAPE, 1.0), 0)
    assert torch.allclose(ours, torch.cat([linear_quadratic_schedule(steps), torch.zeros(1)]), atol=1e-6)


def test_eight_steps_are_those_that_distilled_models_are_published_with():
    """`timesteps` of Lightricks' configurations of 0.9.7 and 0.9.8, distilled, both passes."""
    published = [1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219, 0.0]
    assert torch.allclose(flow.linear_quadratic_sigmas(8), torch.tensor(published), atol=1e-4)


def test_the_frames_of_a_file_have_the_times_of_its_release(toy, studio):
    """Predictions of one denoiser as 0.9.1 and as 0.9.5 are different, and each record gives its own."""
    older = studio_of(toy)
    cond = older.conditions(parse_line("a red cat", "test", defaults_of(FAMILY)))[0]
    noisy, sigma = torch.randn(1, 128, 3, 2, 3), torch.tensor([0.5])
    with torch.no_grad():
        first, second = (one.family.predict(one.denoiser, noisy, sigma, [cond]) for one in (older, studio))
        same = FAMILY.predict(older.denoiser, noisy, sigma, [cond], causal=True)
    assert relative(first, second) > 1e-3 and relative(same, second) < 1e-6


def folder_of(studio, toy, root, kind):
    """A folder as diffusers and transformers write it, of the toy's models."""
    from transformers import T5Config, T5EncoderModel

    studio.vae.save_pretrained(root / "vae")
    encoder = studio.encoders[0][0]
    whole = T5EncoderModel(T5Config.from_dict(encoder.config.to_dict() | {"use_cache": False}))
    whole.shared.load_state_dict(encoder.embed_tokens.state_dict())
    whole.encoder.load_state_dict(encoder.state_dict())
    whole.save_pretrained(root / "text_encoder")
    shutil.copytree(toy.with_name("tokenizer_t5xxl"), root / "tokenizer")
    studio.denoiser.save_pretrained(root / "transformer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return root


def latents_of(*words):
    arguments = parser_of(FAMILY).parse_args([*words, "--save_path", "x.mp4", "--prompt", "x", "--device", "cpu"])
    family, _ = check_parts(FAMILY, arguments)
    studio = Studio(family, arguments)
    prompt = parse_line("a red cat --w 96 --h 64 --f 9", "test", defaults_of(family))
    cond, uncond = studio.conditions(prompt)
    shift = sample.shift_of(prompt, family, SHAPE, 1.0)
    return sample.generate_latents(
        family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=2, scale=3.0, shift=shift, device="cpu"
    )


@pytest.mark.parametrize("kind", ["LTXPipeline", "LTXConditionPipeline"])
def test_a_diffusers_folder_gives_what_the_released_file_gives(toy, newer, studio, tmp_path, kind):
    folder = folder_of(studio, toy, tmp_path / "folder", kind)
    assert is_newer(str(folder)) == (kind == "LTXConditionPipeline")
    path = newer if is_newer(str(folder)) else toy.with_name("denoiser.safetensors")
    wanted = latents_of(*words_of(toy), "--dit", str(path))
    assert relative(latents_of("--dit", str(folder)), wanted) < 1e-5
    both = latents_of("--dit", str(path), "--t5xxl", str(folder), "--tokenizer_t5xxl", str(folder / "tokenizer"))
    assert relative(both, wanted) < 1e-5


# ---------------------------------------------------------------- training with little memory


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for k in range(2):
        Image.new("RGB", (64, 64), (90 * k, 0, 60)).save(folder / f"{k}.png")
        write_video(folder / f"clip{k}.mp4", 9 + k, rate=25)
        for name in (f"{k}", f"clip{k}"):
            (folder / f"{name}.txt").write_text(f"a cat, number {k}")
    path = folder / "data.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\n"
        f"caption_extension = '.txt'\n[[datasets.subsets]]\nvideo_directory = {json.dumps(str(folder))}\n"
        "caption_extension = '.txt'\ntarget_frames = [9]\n"
    )
    return path


@pytest.fixture(scope="module")
def deep(toy):
    """Four blocks in bfloat16, so that a float32 run has every weight in memory of its own; 0.9.5."""
    from library.checkpoints import Checkpoint

    path = toy.with_name("denoiser.safetensors")
    weights = {key: value.bfloat16() for key, value in load_file(path).items()}
    for number in range(2, LAYERS):
        first = {key: value for key, value in weights.items() if ".transformer_blocks.0." in key}
        weights |= {
            key.replace("blocks.0.", f"blocks.{number}."): value.flip(0).clone() for key, value in first.items()
        }
    save_file(weights, toy.with_name("deep.safetensors"), Checkpoint.open(path).metadata | NEWER)
    return toy.with_name("deep.safetensors")


def train(toy, deep, data, output, *extra):
    from train_network import NetworkTrainer

    torch.set_num_threads(1)
    words = ["--config_file", str(toy), "--dataset_config", str(data), "--output_dir", str(output), "--seed", "3",
             "--pretrained_model_name_or_path", str(deep), "--output_name", "run", "--cache_latents", "--max_train_steps", "2",
             "--cache_text_encoder_outputs", "--gradient_checkpointing", "--learning_rate", "1e-2", *extra]  # fmt: skip
    trainer = NetworkTrainer(options.parse("ltx_video", words, "test"))
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("toml", "extra"),
    [("toy.toml", ("--fp8_scaled", "--mixed_precision", "bf16")), ("toy_full.toml", ("--loss_type", "huber"))],
)
def test_clips_that_begin_with_a_given_frame_train_with_swapped_blocks_to_the_bit(
    toy, deep, clips, tmp_path, toml, extra
):
    extra = ("--first_frame_conditioning_p", "0.5", *extra)
    train(toy.with_name(toml), deep, clips, tmp_path / "plain", *extra)
    swapped = (*extra, "--blocks_to_swap", str(LAYERS - 2))
    trainer = train(toy.with_name(toml), deep, clips, tmp_path / "swapped", *swapped)
    assert {item.bucket[2:] for item in trainer.dataset.items} == {(1,), (9,)}
    assert len(trainer.runtime.memory.swap.blocks) == LAYERS - 2 and trainer.denoiser.causal
    assert losses(tmp_path / "swapped") == losses(tmp_path / "plain")
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("plain", "swapped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
