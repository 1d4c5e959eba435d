"""LTX-Video as a whole: text, videos and first frames against diffusers' pipelines, its schedule, its one file."""

import json

import numpy as np
import pytest
import torch
from oracles import relative
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, studio_of
from training_support import losses
from video_support import write_video

from library import checkpoints, options, sample
from library.components import frames
from library.families import get_family
from library.families.family import Text
from library.prompts import defaults_of, parse_line

torch.set_num_threads(1)
FAMILY = get_family("ltx_video")
SHAPE = (128, 2, 2, 3)  # of 9 frames of 96 x 64
SIZE = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("ltx_video", tmp_path_factory.mktemp("toys") / "ltx_video")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "first.png"
    coarse = (np.random.default_rng(3).random((4, 5, 3)) * 255).astype(np.uint8)
    Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


class Masked(torch.nn.Module):
    """The text encoder told which tokens are padding, as Lightricks' code and ComfyUI do; diffusers leaves that out."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.pad, self.dtype, self.device = (
            model,
            tokenizer.pad_token_id,
            torch.float32,
            torch.device("cpu"),
        )

    def forward(self, ids):
        return self.model(ids, attention_mask=(ids != self.pad).long())


def pipeline_of(studio, kind="LTXPipeline"):
    import diffusers

    (encoder,), (tokenizer,) = studio.encoders
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    out = getattr(diffusers, kind)(
        scheduler=scheduler, vae=studio.vae, text_encoder=Masked(encoder, tokenizer), tokenizer=tokenizer,
        transformer=studio.denoiser,
    )  # fmt: skip
    out.set_progress_bar_config(disable=True)
    return out


def packed(video):
    """[1,C,F,h,w] -> [1,F*h*w,C], as the pipelines have latents."""
    return video.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("caption", ["a red cat", "", "the picture of a black dog " * 60])
def test_text_is_what_diffusers_pipeline_encodes_with_a_mask(studio, caption):
    with torch.no_grad():
        theirs, mask = pipeline_of(studio)._get_t5_prompt_embeds(caption, max_sequence_length=256, device="cpu")
        ours = FAMILY.encode(*studio.encoders, Text(caption), "cpu")["text"]
    assert relative(ours, theirs[0, : len(ours)]) < 1e-5 and int(mask.sum()) == len(ours) <= 256
    cut = FAMILY.tokenize(studio.encoders[1], caption)[1]
    assert bool(cut) == (len(caption) > 1000) and caption.endswith(cut)


def test_a_video_is_the_one_that_diffusers_pipeline_makes(studio):
    prompt = parse_line("a red cat --n blurry --w 96 --h 64 --f 9", "test", defaults_of(FAMILY))
    cond, uncond = studio.conditions(prompt)
    assert sample.latent_shape(FAMILY, prompt, 128, FAMILY.resolution) == SHAPE
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=4, scale=3.0,
        shift=sample.shift_of(prompt, studio.family, SHAPE, 1.0), device="cpu",
    )  # fmt: skip
    start = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = pipeline_of(studio)(
            "a red cat", "blurry", latents=packed(start), output_type="latent", frame_rate=25, return_dict=False, **SIZE
        )[0]
    assert relative(packed(ours), theirs) < 1e-4


def test_a_video_from_a_first_frame_is_the_one_that_diffusers_pipeline_makes(studio, photo):
    prompt = parse_line(f"a red cat --n blurry --w 96 --h 64 --f 9 --i {photo}", "test", defaults_of(FAMILY))
    cond, uncond = studio.conditions(prompt)
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=SHAPE, seed=5, steps=4, scale=3.0,
        shift=sample.shift_of(prompt, studio.family, SHAPE, 1.0), device="cpu",
    )  # fmt: skip
    start = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(5))
    pipeline = pipeline_of(studio, "LTXImageToVideoPipeline")
    with torch.no_grad():
        pixels = pipeline.video_processor.preprocess(Image.open(photo), height=64, width=96)
        mean, deviation = (v.view(1, -1, 1, 1, 1) for v in (studio.vae.latents_mean, studio.vae.latents_std))
        first = (studio.vae.encode(pixels[:, :, None]).latent_dist.mode() - mean) / deviation
        given = torch.cat([first, start[:, :, 1:]], 2)
        theirs = pipeline(
            Image.open(photo), "a red cat", "blurry", latents=packed(given), output_type="latent", frame_rate=25,
            return_dict=False, **SIZE,
        )[0]  # fmt: skip
    assert relative(packed(ours), theirs) < 1e-4
    assert relative(ours[:, :, :1], first) < 1e-4


@pytest.mark.parametrize("shape", [(128, 1, 16, 24), (128, 16, 16, 24)])
def test_samples_visit_the_sigmas_of_the_published_scheduler(studio, shape):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    scheduler = pipeline_of(studio).scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    mu = calculate_shift(shape[1] * shape[2] * shape[3], 1024, 4096, 0.95, 2.05)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=mu)
    prompt = parse_line("a", "test", defaults_of(FAMILY))
    ours = FAMILY.objective.times(7, sample.shift_of(prompt, FAMILY, shape, 1.0), 0)
    assert torch.allclose(ours, scheduler.sigmas, atol=1e-6)


def test_a_batch_of_captions_of_different_lengths_is_two_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", "the picture of a house and a dog")]
    conds[0] |= {frames.KEY: torch.randn(128, 1, 2, 3)}  # and one of them begins with a given frame
    both, each = batched_and_one_by_one(studio, conds, SHAPE)
    assert relative(both, each) < 1e-5


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for k in range(2):
        write_video(folder / f"{k}.mp4", 9 + k, rate=25)
        (folder / f"{k}.txt").write_text(f"a video of thing {k}", encoding="utf-8")
    text = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\n"
    text += f"video_directory = {json.dumps(str(folder))}\ncaption_extension = '.txt'\ntarget_frames = [9]\n"
    (folder.parent / "clips.toml").write_text(text, encoding="utf-8")
    return folder.parent / "clips.toml"


def trainer_of(toy, data, output, *extra):
    from train_network import NetworkTrainer

    words = ["--config_file", str(toy), "--dataset_config", str(data), "--output_dir", str(output), "--output_name",
             "run", "--max_train_steps", "2", "--cache_latents", "--cache_text_encoder_outputs", *extra]  # fmt: skip
    return NetworkTrainer(options.parse("ltx_video", words, "test"))


def test_a_given_first_frame_has_the_time_zero_and_no_loss(toy, clips, tmp_path, monkeypatch):
    """The tokens of that frame are told the time 0, the others theirs; what is predicted for it does not count."""
    from diffusers import LTXVideoTransformer3DModel

    told, forward = [], LTXVideoTransformer3DModel.forward

    def listening(self, hidden, text, time, *given, **named):
        told.append(time.detach().clone())
        return forward(self, hidden, text, time, *given, **named)

    monkeypatch.setattr(LTXVideoTransformer3DModel, "forward", listening)
    found = {}
    for share in ("1", "0"):
        told.clear()
        trainer_of(
            toy, clips, tmp_path / share, "--first_frame_conditioning_p", share, "--dump_batch_at_step", "1"
        ).run()
        found[share] = load_file(tmp_path / share / "run-batch-step1.safetensors")
        assert all(torch.isfinite(torch.tensor(losses(tmp_path / share))))
        if share == "1":
            assert all(t.shape == (2, 8) and not t[:, :4].any() and (t[:, 4:] == t[:, 4:5]).all() for t in told)
        else:
            assert all(t.shape == (2,) for t in told)
    dumped = found["1"]
    error = (dumped["velocity_pred"] - dumped["target"]).square()
    assert torch.allclose(dumped["loss"], error[:, :, 1:].mean(dim=(1, 2, 3, 4)), rtol=1e-4)
    plain = (found["0"]["velocity_pred"] - found["0"]["target"]).square().mean(dim=(1, 2, 3, 4))
    assert torch.allclose(found["0"]["loss"], plain, rtol=1e-4)


def test_a_full_fine_tune_is_one_file_with_the_header_that_says_its_version(toy, clips, tmp_path):
    """ComfyUI chooses the kind of VAE by `config` in the header."""
    said = {"config": json.dumps({"transformer": {"causal_temporal_positioning": True}, "vae": {"x": 1}})}
    base = tmp_path / "base.safetensors"
    weights = load_file(toy.with_name("denoiser.safetensors"))
    save_file(weights, base, said)
    trainer = trainer_of(toy.with_name("toy_full.toml"), clips, tmp_path / "out", "--max_train_steps", "1",
                         "--pretrained_model_name_or_path", str(base))  # fmt: skip
    trainer.run()
    assert trainer.denoiser.causal
    saved = checkpoints.Checkpoint.open(tmp_path / "out" / "run.safetensors")
    assert saved.metadata["config"] == said["config"] and saved.shapes.keys() == weights.keys()
    after = load_file(tmp_path / "out" / "run.safetensors")
    assert all(torch.equal(after[key], weights[key]) for key in weights if key.startswith("vae."))
    assert not torch.equal(
        after["model.diffusion_model.proj_out.weight"], weights["model.diffusion_model.proj_out.weight"]
    )
