"""Prompt files, pictures against diffusers' pipeline, what sampling leaves untouched."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_support import launch, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import sample
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text
from library.objective import FLOW
from library.pictures import grid
from library.prompts import Prompt, notes, parse_line, parse_prompts


def test_a_line_is_a_text_and_its_options_negative_numbers_included():
    found = parse_line("a fox - in snow --w 512 --h 768 --d -1 --s 12 --l -1.5 --n bad, ugly --fs 2.5", "x:1")
    assert found == Prompt("a fox - in snow", "bad, ugly", 512, 768, -1, 12, -1.5, None, 2.5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --q 1", "--q"), ("a --w big", "width"), ("a --s 0", "steps"), ("a --w", "width"),
        ("a --d=5", "--d=5"), ("a --fs 0", "above 0"), ("a --fs -2", "above 0"), ("a --l nan", "finite"),
        ("a --d 99999999999999999999999", "2^64"), ("a --h -64", "height"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, line, said):
    (tmp_path / "p.txt").write_text(f"# comment\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="p.txt:3") as caught:
        parse_prompts(tmp_path / "p.txt")
    assert said in str(caught.value)


def test_toml_and_json_prompts(tmp_path):
    (tmp_path / "p.toml").write_text(
        "[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = 'a'\nseed = 3\n", encoding="utf-8"
    )
    (tmp_path / "p.json").write_text(json.dumps(["b --d 4", {"prompt": "c", "scale": 2}]), encoding="utf-8")
    assert parse_prompts(tmp_path / "p.toml") == [Prompt("a", width=64, seed=3)]
    assert parse_prompts(tmp_path / "p.json") == [Prompt("b", seed=4), Prompt("c", scale=2.0)]


def test_options_of_a_line_may_be_capitals_as_in_sd_scripts():
    assert parse_line("a --W 64 --L 2", "x:1") == Prompt("a", width=64, scale=2.0)


def test_what_a_prompt_does_not_say_comes_from_the_defaults(tmp_path):
    (tmp_path / "p.txt").write_text("a --s 20\nb --l 1\n", encoding="utf-8")
    defaults = Prompt("", "ugly", sample_steps=30, scale=4.0)
    found = parse_prompts(tmp_path / "p.txt", defaults)
    assert found == [Prompt("a", "ugly", sample_steps=20, scale=4.0), Prompt("b", "ugly", sample_steps=30, scale=1.0)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.json", '{"prompt": "a", "seed": 3}', "a list"), ("p.json", '"a"', "a list"), ("p.json", "[", "valid JSON"),
        ("p.json", '[{"prompt": 5}]', "not a text"), ("p.json", '[{"promt": "a"}]', "did you mean 'prompt'"),
        ("p.toml", 'prompt = "a"', "[[prompt.subset]]"), ("p.toml", '[[prompt]]\nprompt = "a"', "[[prompt.subset]]"),
        ("p.yaml", "a: 1", ".txt, .toml or .json"), ("p.txt", "# nothing\n", "no prompt"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_one_sentence(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        parse_prompts(tmp_path / name)
    assert said in str(caught.value) and name in str(caught.value)


def test_what_a_prompt_asks_for_and_does_not_get_is_said():
    said = notes(
        [Prompt("a", "ugly", width=100, guidance_scale=3.5), Prompt("b", "ugly", 96, 64, scale=2.0)],
        get_family("z_image"),
    )
    assert len(said) == 3 and all("prompt 1" in one for one in said)
    assert "100 becomes 96" in said[0] and "negative" in said[1] and "--g" in said[2]


@pytest.fixture(scope="module")
def models(toy):  # noqa: F811
    from library import checkpoints, options
    from library.components.tokenizers import load_tokenizers

    family = get_family("z_image")
    chosen = options.parse("z_image", ["--config_file", str(toy), "--output_dir", "x"], "test")
    parts = (family.denoiser, family.vae, family.text_encoders[0])
    loaded = [
        checkpoints.load_part(p, getattr(chosen, p.option), dtype=torch.float32).requires_grad_(False).eval()
        for p in parts
    ]
    return family, *loaded, load_tokenizers(family, chosen)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_picture_is_the_one_that_diffusers_pipeline_makes(models, scale):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    family, denoiser, vae, text, tokenizers = models
    encode = lambda caption: family.encode([text], tokenizers, Text(caption), "cpu")  # noqa: E731
    conds = encode("a red cat"), encode("")
    steps, shift = 6, 3.0
    latents = sample.generate_latents(
        family, denoiser, *conds, shape=(16, 8, 8), seed=5, steps=steps, scale=scale, shift=shift, device="cpu"
    )
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline = ZImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=tokenizers[0], transformer=denoiser
    )
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        prompt_embeds=[conds[0]["text"]],
        negative_prompt_embeds=[conds[1]["text"]],
        height=64,
        width=64,
        latents=start,
        sigmas=list(np.linspace(1, 0, steps + 1)[:-1]),
        guidance_scale=0.0 if scale == 1 else scale - 1,
        output_type="latent",
    ).images  # its guidance is v + g (v - u), so g = scale - 1
    assert float((latents - theirs).norm() / theirs.norm()) < 1e-4
    picture = sample.decode(family, vae, latents)
    pixels = vae.decode(theirs / 0.3611 + 0.1159).sample[0].clamp(-1, 1)
    assert np.abs(picture.astype(float) - ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1


def test_euler_integrates_a_gaussian_to_its_known_solution():
    """Data N(0, s^2): v = x (sigma - (1 - sigma) s^2) / ((1 - sigma)^2 s^2 + sigma^2), so x_0 = s x_1."""
    s2 = 0.25

    def predict(denoiser, x, sigma, conds):
        t = sigma.view(-1, 1, 1, 1)
        return x * (t - (1 - t) * s2) / ((1 - t) ** 2 * s2 + t**2)

    family = SimpleNamespace(
        predict=predict,
        objective=FLOW,
        pixel_multiple=8,
        latent_downscale=8,
        guide=None,
        scale_at=None,
        inference_options=(),
    )
    out = sample.generate_latents(
        family, None, {}, None, shape=(4, 8, 8), seed=0, steps=2000, scale=1, shift=1.0, device="cpu"
    )
    start = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert float((out - 0.5 * start).norm() / start.norm()) < 2e-3


def test_sampling_during_training_changes_no_loss_and_makes_a_grid_with_the_base_in_front(toy, pictures, tmp_path):  # noqa: F811
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --l 3\n", encoding="utf-8")
    common = ("--max_train_steps", "4", "--learning_rate", "1e-2", "--network_dropout", "0.3")
    train(toy, pictures, tmp_path / "a", *common)
    trainer = train(
        toy,
        pictures,
        tmp_path / "b",
        *common,
        "--sample_prompts",
        str(prompts),
        "--sample_every_n_steps",
        "2",
        "--sample_at_first",
    )
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [label for label, _ in trainer.outputs.samples.columns] == ["base", "step 0", "step 2", "step 4"]
    base, zero, _, last = (column for _, column in trainer.outputs.samples.columns)
    assert all(np.array_equal(x, y) for x, y in zip(base, zero, strict=True))  # an untrained LoRA is the base
    assert not np.array_equal(base[0], last[0])
    assert len(list((tmp_path / "b" / "sample").glob("run_000004_*.png"))) == 2
    assert "style distance" in (tmp_path / "b" / "run-report.html").read_text(encoding="utf-8")


def test_a_failing_sample_does_not_stop_training(toy, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "p.txt").write_text("a --w 64 --h 64 --s 1\n", encoding="utf-8")
    monkeypatch.setattr(sample, "decode", lambda *a: 1 / 0)
    train(
        toy,
        pictures,
        tmp_path,
        "--max_train_steps",
        "2",
        "--sample_prompts",
        str(tmp_path / "p.txt"),
        "--sample_every_n_steps",
        "1",
        "--save_every_n_steps",
        "1",
    )
    said = capsys.readouterr().out
    assert (tmp_path / "run.safetensors").is_file() and said.count("ZeroDivisionError") == 3  # the base's, too
    places = [said.index("saved run-step00000001"), said.index("sampling failed"), said.index("saved run.safetensors")]
    assert places == sorted(places)


def test_a_grid_shows_every_picture_in_its_place():
    cells = [[np.full((64, 64, 3), 10 * (3 * y + x), np.uint8) for x in range(3)] for y in range(2)]
    image = np.asarray(grid(cells, ["one", "two"], ["a", "b", "c"], "title"))
    flat = {(10 * k,) * 3 for k in range(6)}
    for colour in flat:
        assert (image == colour).all(axis=2).sum() >= 128 * 128


def test_a_grid_shrinks_large_pictures_and_keeps_their_shape():
    red, blue = (200, 10, 10), (10, 10, 200)
    large, narrow = (np.full((1024, w, 3), colour, np.uint8) for w, colour in ((768, red), (512, blue)))
    image = np.asarray(grid([[large], [narrow]], ["one", "a long label " * 40], ["a"]))
    for colour, shape in ((red, (512, 384)), (blue, (512, 256))):
        rows, columns = np.nonzero((image == colour).all(axis=2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == shape


def test_the_style_distance_of_gaussians_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 3, 300, 300, generator=generator) * torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1)
    b = torch.randn(1, 3, 300, 300, generator=generator) * torch.tensor([2.0, 1.0, 0.5]).view(1, 3, 1, 1) + 1
    assert sample.style_distance([a[0]], [b[0]]) == pytest.approx(3 + 1 + 1, abs=0.05)
    assert sample.style_distance([a[0]], [a[0]]) == pytest.approx(0, abs=1e-9)


def sample_run(models, folder, *prompts):
    import contextlib

    family, _, vae, text, tokenizers = models
    pair = tuple(family.encode([text], tokenizers, Text(c), "cpu") for c in ("a", ""))
    conds = [pair for _ in prompts]
    files = {part.option: "x.safetensors" for part in family.parts}
    options = SimpleNamespace(seed=1, discrete_flow_shift=2.0, network_module="networks.lora", **files)
    return sample.Samples(
        list(prompts),
        family,
        options,
        lambda: conds,
        folder,
        "x",
        lambda: contextlib.nullcontext(vae),
        "cpu",
        contextlib.nullcontext,
        16,
        64,
    )


TINY = {"width": 64, "height": 64, "sample_steps": 1}


def test_random_state_and_modes_survive_sampling(models, tmp_path):
    denoiser = models[1]
    run = sample_run(models, tmp_path, Prompt("a", **TINY))
    states = torch.get_rng_state(), random.getstate()
    network = torch.nn.Dropout()
    network.set_multiplier = lambda value: None
    network.train(), denoiser.eval()
    run.base(denoiser, network)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert network.training and not denoiser.training
    denoiser.train()
    run.base(denoiser, None)
    assert denoiser.training
    denoiser.eval()


def test_a_random_seed_is_the_same_in_every_column_and_in_the_file_name(models, tmp_path):
    from PIL import Image

    denoiser = models[1]
    run = sample_run(models, tmp_path, Prompt("a", seed=-1, **TINY))
    run.base(denoiser, None)
    run.render(denoiser, None, step=5, epoch=None)
    (_, (base,)), (_, (later,)) = run.columns
    assert np.array_equal(base, later)
    (path,) = (tmp_path / "sample").glob("x_000005_00_*.png")
    seed = int(path.stem.rpartition("_")[2])
    again = sample_run(models, tmp_path / "again", Prompt("a", seed=seed, **TINY))
    again.base(denoiser, None)
    assert np.array_equal(again.columns[0][1][0], np.asarray(Image.open(path)))
    assert sample_run(models, tmp_path, Prompt("a", seed=-1, **TINY)).seeds != run.seeds


def test_a_long_run_keeps_the_base_and_the_latest_column_and_not_all(models, tmp_path, monkeypatch):
    denoiser = models[1]
    run = sample_run(models, tmp_path, Prompt("a", **TINY))
    monkeypatch.setattr(sample.Samples, "_latents", lambda self, *a: torch.zeros(1, 16, 8, 8))
    monkeypatch.setattr(sample, "decode", lambda *a: np.zeros((8, 8, 3), np.uint8))
    run.base(denoiser, None)
    for step in range(1, 60):
        run.render(denoiser, None, step=step, epoch=None)
        labels = [label for label, _ in run.columns]
        assert labels[0] == "base" and labels[-1] == f"step {step}" and len(labels) <= sample.MOST_COLUMNS
        steps = [int(label.split()[1]) for label in labels[1:]]
        assert steps == sorted(set(steps))
    assert list(run.latents) == ["base", "step 59"]


def test_a_column_that_failed_leaves_the_others_as_they_were(models, tmp_path, monkeypatch):
    denoiser = models[1]
    run = sample_run(models, tmp_path, Prompt("a", **TINY))
    run.base(denoiser, None)
    run.render(denoiser, None, step=1, epoch=None)
    monkeypatch.setattr(sample, "decode", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.render(denoiser, None, step=2, epoch=None)
    assert [label for label, _ in run.columns] == list(run.latents) == ["base", "step 1"]
    assert sample.style_distance(run.latents["step 1"], run.latents["base"]) == pytest.approx(0, abs=1e-6)
