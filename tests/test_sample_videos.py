"""Videos from prompts: frames and first frames in prompt files, MP4 and strips, samples of a run, the inference script."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_videos_training import TOY_VIDEO, clips, train  # noqa: F401  (fixture)
from training_support import losses, toy  # noqa: F401  (fixture)
from video_support import number_of, pattern

from library import families, prompts, sample, videos
from library import losses as loss_functions
from library.batches import draw
from library.components import frames
from library.errors import ConfigError
from library.families.family import FrameRule
from library.families.z_image import Z_IMAGE
from library.pictures import strip


def encode_item(vae, encoders, given):
    """The latent of the first frame, where a prompt gives one."""
    first = {} if given.pixels is None else {"first_frame": TOY_VIDEO.encode_image(vae, given.pixels[None, :, :1])[0]}
    return first if given.pixels is None or given.pixels.shape[1] == 1 else {}


def vary(cond, latents, choice, options):
    """Clips of several latent frames continue their first one in half of the steps."""
    count = latents.shape[1]
    if count == 1 or choice < 0.5:
        return cond
    return cond | {"first_frame": latents[:, :1], "loss_mask": frames.loss_mask(count, 1, latents)}


def predict(denoiser, noisy, sigma, conds):
    video, levels = frames.with_first_frames(noisy, sigma, conds)
    if levels.ndim == 1:
        return TOY_VIDEO.predict(denoiser, video, levels, conds)
    each = [cond for cond in conds for _ in range(video.shape[2])]
    flat = Z_IMAGE.predict(denoiser, video.movedim(2, 1).flatten(0, 1), levels.flatten(), each)
    return flat.unflatten(0, (len(video), video.shape[2])).movedim(1, 2)


def decode_latents(vae, latents):
    each = Z_IMAGE.decode_latents(vae, latents.movedim(2, 1).flatten(0, 1))
    return each.unflatten(0, (len(latents), latents.shape[2])).movedim(1, 2)


RULE = FrameRule(4, 1, 16.0, first_frame="possible")
CONTINUES = replace(
    TOY_VIDEO, predict=predict, decode_latents=decode_latents, encode_item=encode_item, vary=vary,
    frames=RULE,
    variant_of=None,
    sampling={"frame_count": 9, "sample_steps": 2},
)  # fmt: skip


@pytest.fixture
def first(tmp_path):
    Image.fromarray(np.tile(np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None], (64, 1, 3))).save(
        tmp_path / "i.png"
    )
    return tmp_path / "i.png"


def test_a_line_names_frames_and_first_frame_as_in_musubi_tuner(first):
    found = prompts.parse_line(f"a wave --f 17 --i {first} --w 64", "x:1")
    assert (found.frame_count, found.image_path, found.width) == (17, str(first), 64)
    for line, said in (("a --f 0", "at least one"), ("a --i none.png", "none.png: no such file"), ("a --ei x", "last frame"),
                       ("a --cv x", "control video"), ("a --f many", "whole number")):  # fmt: skip
        with pytest.raises(ConfigError, match="x:1") as caught:
            prompts.parse_line(line, "x:1")
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "line", "said"),
    [
        (None, "a --f 17", "makes pictures"), (None, "a --i {first}", "makes pictures"),
        ("none", "a --i {first}", "does not take"), ("needed", "a --f 17", "give one with --i"),
        ("needed", "a --f 1 --i {first}", "at least 5"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_make_of_a_prompt_is_said_before_anything_loads(first, rule, line, said):
    least = 5 if rule == "needed" else 1
    family = replace(CONTINUES, title="Toy", frames=rule and FrameRule(4, 1, 16.0, least, rule))
    with pytest.raises(ConfigError) as caught:
        prompts.check_video([prompts.parse_line(line.format(first=first), "x")], family)
    assert said in str(caught.value) and "prompt 1" in str(caught.value)
    prompts.check_video([prompts.Prompt("a", frame_count=1)], replace(CONTINUES, frames=None))


def test_frames_are_rounded_down_and_what_a_prompt_does_not_say_is_as_usual():
    found = [prompts.Prompt("a", frame_count=n) for n in (None, 16, 17)]
    assert [one.frame_count for one in prompts.timed(found, CONTINUES, 9)] == [9, 13, 17]
    assert prompts.timed(found, Z_IMAGE, 9)[0].frame_count is None
    assert prompts.notes(found, CONTINUES) == ["prompt 2: 16 frames become 13, which Z-Image makes"]


def test_a_strip_shows_first_and_last_frame_and_is_no_larger_than_it_has_to_be():
    video = np.stack([pattern(n) for n in range(30)])
    shown = [number_of(frame) for frame in np.split(strip(video), 8, axis=1)]
    assert shown[0] == 0 and shown[-1] == 29 and shown == sorted(shown) and len(set(shown)) == 8
    assert strip(video[:2]).shape == (64, 128, 3)
    assert strip(np.zeros((3, 960, 480, 3), np.uint8)).shape == (480, 720, 3)


def test_a_video_is_written_whole_with_its_prompt_and_rate_beside_its_strip(tmp_path, monkeypatch):
    video = np.stack([pattern(n) for n in range(5)])
    path, still = videos.save(video, tmp_path / "out" / "a.png", {"prompt": "a wave"}, 24.0)
    assert path.name == "a.mp4" and np.array_equal(still, np.asarray(Image.open(tmp_path / "out" / "a.png")))
    with av.open(str(path)) as container:
        assert container.metadata["comment"] == "a wave" and container.streams.video[0].average_rate == 24
        assert [number_of(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)] == list(range(5))
    monkeypatch.setattr("os.replace", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        videos.save_mp4(video, tmp_path / "b.mp4", {}, 24.0)
    assert not list(tmp_path.glob("*.mp4"))


def test_a_run_draws_videos_as_long_as_its_clips(toy, clips, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(families.FAMILIES, "toy_video", f"{__name__}:CONTINUES")
    (tmp_path / "p.txt").write_text("a wave --w 64 --h 64 --s 1\na thing --f 1 --w 64 --h 64 --s 1\n", encoding="utf-8")
    common = ["--cache_latents", "--cache_text_encoder_outputs", "--sample_every_n_steps", "2"]
    trainer = train(toy, clips, tmp_path / "out", *common, "--sample_prompts", str(tmp_path / "p.txt"))
    names = sorted(path.name for path in (tmp_path / "out" / "sample").iterdir())
    assert names == ["run_000002_00_3.mp4", "run_000002_00_3.png", "run_000002_01_4.png"]
    with av.open(str(tmp_path / "out" / "sample" / names[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 2  # two latent frames, each one picture of this toy
    assert [one.shape for one in trainer.outputs.samples.columns[-1][1]] == [(64, 128, 3), (64, 64, 3)]
    assert "style distance" in (tmp_path / "out" / "run-report.html").read_text(encoding="utf-8")


def test_given_frames_are_chosen_anew_in_every_step_and_do_not_count_in_the_loss(toy, clips, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    def watched(cond, latents, choice, options):
        seen.append((latents.shape[1], choice))
        return vary(cond, latents, choice, options)

    monkeypatch.setitem(families.FAMILIES, "toy_video", f"{__name__}:CONTINUES")
    monkeypatch.setitem(globals(), "CONTINUES", replace(CONTINUES, vary=watched))
    common = ["--cache_latents", "--cache_text_encoder_outputs", "--max_train_steps", "4"]
    trainer = train(toy, clips, tmp_path / "a", *common)
    first_run, seen[:] = list(seen), []
    train(toy, clips, tmp_path / "b", *common)
    assert sorted(first_run) == sorted(seen) and losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len({choice for _, choice in seen}) == len(seen) > 4
    assert any(n > 1 and c < 0.5 for n, c in seen) and any(n > 1 and c >= 0.5 for n, c in seen)
    step = next(step for step in trainer.loader() if step.batches[0].pictures.shape[2] > 1)
    trainer.position.step = step.number
    with torch.no_grad():
        monkeypatch.setitem(globals(), "CONTINUES", CONTINUES)
        found = {c: _losses_with(trainer, step.batches[0], c) for c in (0.1, 0.9)}
    assert torch.isfinite(found[0.9]).all() and not torch.allclose(found[0.1], found[0.9])


def _losses_with(trainer, batch, choice):
    trainer.family = replace(CONTINUES, vary=lambda c, x, _, o: vary(c, x, choice, o))
    return trainer.step(batch)


def test_the_loss_of_a_clip_with_given_frames_is_the_mean_over_the_others():
    error = torch.rand(2, 4, 5, 3, 3)
    mask = frames.loss_mask(5, 2, error)
    first, second = loss_functions.selected(error, [None, mask]).mean((1, 2, 3, 4))
    assert torch.allclose(first, error[0].mean()) and torch.allclose(second, error[1, :, 2:].mean())
    assert loss_functions.selected(error, [None, None]) is error


def test_what_is_drawn_for_a_choice_leaves_the_other_numbers_as_they_are():
    keys, shape = [(3, 1, 0), (3, 2, 0)], (4, 2, 3)
    both, one = draw(keys, 5, shape, True), draw(keys[1:], 5, shape, True)
    assert torch.equal(both.choice[1:], one.choice) and torch.equal(both.noise[1:], one.noise)
    generator = torch.Generator().manual_seed(_seed(keys[0]))
    assert both.uniform[0] == torch.rand((), generator=generator)


def _seed(key):
    from library.batches import NOISE
    from library.data.dataset import item_seed

    return item_seed(5 + NOISE, *key)


def words(toy, *extra):  # noqa: F811
    folder = toy.parent
    return [
        "--dit", str(folder / "denoiser.safetensors"), "--vae", str(folder / "vae.safetensors"), "--text_encoder",
        str(folder / "text_encoder.safetensors"), "--prompt", "a wave", "--seed", "3", "--device", "cpu", *extra,
    ]  # fmt: skip


def test_the_script_writes_a_video_that_begins_with_the_given_picture(toy, first, tmp_path, monkeypatch, capsys):  # noqa: F811
    from library import inference

    monkeypatch.setitem(families.FAMILIES, "toy_video", f"{__name__}:CONTINUES")
    kept = []
    decode = sample.decode
    monkeypatch.setattr(
        sample, "decode", lambda f, vae, latents: kept.append((vae, latents)) or decode(f, vae, latents)
    )
    common = ["--guidance_scale", "1", "--infer_steps", "1"]
    inference.main("toy_video", words(
        toy, "--image_path", str(first), "--save_path", str(tmp_path / "v.mp4"), "--video_size", "64", "64", *common,
    ))  # fmt: skip
    (vae, latents), pixels = kept[0], np.asarray(Image.open(first).crop((16, 0, 80, 64)))
    assert latents.shape == (1, 16, 3, 8, 8)  # nine frames, as the family says
    given = torch.tensor(pixels).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        wanted = TOY_VIDEO.encode_image(vae, given)
    assert torch.allclose(latents[:, :, :1], wanted, atol=1e-5)
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
    assert (tmp_path / "v.png").is_file() and "saved" in capsys.readouterr().out
    small = ["--image_path", str(first), "--video_length", "5", "--save_path", str(tmp_path / "small"), *common]
    monkeypatch.setitem(globals(), "CONTINUES", replace(CONTINUES, resolution=80))
    inference.main("toy_video", words(toy, *small))
    assert kept[1][1].shape[1:] == (16, 2, 8, 12)  # the proportions of the picture, 96 x 64
    assert [path.name for path in sorted((tmp_path / "small").iterdir())] == ["000_3.mp4", "000_3.png"]


def test_a_png_is_one_frame_and_the_names_have_to_fit(toy, tmp_path, monkeypatch):  # noqa: F811
    from library import inference

    monkeypatch.setitem(families.FAMILIES, "toy_video", f"{__name__}:CONTINUES")
    tiny = ["--image_size", "64", "64", "--infer_steps", "1", "--guidance_scale", "1"]
    inference.main("toy_video", words(toy, "--save_path", str(tmp_path / "a.png"), *tiny))
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    for extra, said in ((["--video_length", "5", "--save_path", "x.png"], "5 frames are written as .mp4"),
                        (["--video_length", "1", "--save_path", "x.mp4"], "a picture is written as .png")):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            inference.main("toy_video", words(toy, *tiny, *extra))
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="--video_length"):
        inference.main("z_image", words(toy, "--save_path", "x.png", "--video_length", "5"))


def test_prompt_files_with_frames_are_read_as_tables_too(tmp_path, first):
    table = [{"prompt": "a", "frame_count": 5, "image_path": str(first)}]
    (tmp_path / "p.json").write_text(json.dumps(table), encoding="utf-8")
    (found,) = prompts.parse_prompts(tmp_path / "p.json")
    assert (found.frame_count, found.image_path) == (5, str(first))
