"""Clips through the one loop: a video model made of the toy Z-Image, which sees every latent frame as a picture."""

import json
from dataclasses import replace

import pytest
import torch
from training_support import losses, toy  # noqa: F401  (fixture)
from video_support import write_video

from library import families, options
from library.families.family import FrameRule
from library.families.z_image import Z_IMAGE


def encode_image(vae, pixels):
    """[B,3,F,H,W] -> [B,16,1+(F-1)/4,h,w]: every fourth frame, each through the VAE of pictures."""
    frames = pixels[:, :, ::4].movedim(2, 1)
    return Z_IMAGE.encode_image(vae, frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).movedim(1, 2)


def predict(denoiser, noisy, sigma, conds):
    frames = noisy.movedim(2, 1)
    each = [cond for cond in conds for _ in range(frames.shape[1])]
    flat = Z_IMAGE.predict(denoiser, frames.flatten(0, 1), sigma.repeat_interleave(frames.shape[1]), each)
    return flat.unflatten(0, frames.shape[:2]).movedim(1, 2)


TOY_VIDEO = replace(
    Z_IMAGE, name="toy_video", encode_image=encode_image, predict=predict, frames=FrameRule(4, 1, 16.0),
    variant_of=None,
    encode_item=lambda vae, encoders, given: {"frames": torch.tensor(given.frames)},
)  # fmt: skip


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for k in range(3):
        write_video(folder / f"{k}.mp4", 12 + k)
        (folder / f"{k}.txt").write_text(f"a video of thing {k}", encoding="utf-8")
    text = "[[datasets]]\nresolution = 64\nbatch_size = 2\nvalidation_split = 0.34\n[[datasets.subsets]]\n"
    text += f"video_directory = {json.dumps(str(folder))}\ncaption_extension = '.txt'\ntarget_frames = [1, 5]\n"
    text += "frame_extraction = 'uniform'\nframe_sample = 2\n"
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    return tmp_path / "data.toml"


def train(toy, clips, output, *extra):  # noqa: F811
    from train_network import NetworkTrainer

    torch.set_num_threads(1)
    words = ["--config_file", str(toy), "--dataset_config", str(clips), "--output_dir", str(output), "--seed", "3"]
    words += ["--output_name", "run", "--network_module", "networks.lora", "--max_train_steps", "2", *extra]
    trainer = NetworkTrainer(options.parse("toy_video", words, "test"))
    trainer.run()
    return trainer


def test_clips_train_cached_or_not_with_equal_losses_and_validate(toy, clips, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(families.FAMILIES, "toy_video", f"{__name__}:TOY_VIDEO")
    cached = ["--cache_latents_to_disk", "--cache_text_encoder_outputs", "--validate_every_n_steps", "2"]
    trainer = train(toy, clips, tmp_path / "a", *cached)
    table = capsys.readouterr().out
    assert "videos: found 3 = trained 2 + held out 1 + dropped 0" in table and "bucket 64x64x5" in table
    assert {tuple(trainer.latents.get(i.index).shape) for i in trainer.dataset.items} == {(16, 1, 8, 8), (16, 2, 8, 8)}
    train(toy, clips, tmp_path / "b")
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(first) == 2 and all(abs(a - b) < 2e-3 for a, b in zip(first, second, strict=True))
    assert "held-out" in table or "validation" in table
