"""Prompt files, pictures against diffusers' pipeline, what sampling leaves untouched, the report."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_support import launch, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import report, sample
from library.errors import ConfigError
from library.pictures import grid
from library.prompts import Prompt, parse_line, parse_prompts


def test_a_line_is_a_text_and_its_options_negative_numbers_included():
    found = parse_line("a fox - in snow --w 512 --h 768 --d -1 --s 12 --l -1.5 --n bad, ugly --fs 2.5", "x:1")
    assert found == Prompt("a fox - in snow", "bad, ugly", 512, 768, -1, 12, -1.5, None, 2.5)


@pytest.mark.parametrize(
    ("line", "said"), [("a --q 1", "--q"), ("a --w big", "width"), ("a --ss ddim", "Euler"), ("a --s 0", "steps")]
)
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


@pytest.fixture(scope="module")
def models(toy):  # noqa: F811
    from library import checkpoints, options
    from library.families import get_family

    family = get_family("z_image")
    chosen = options.parse("z_image", ["--config_file", str(toy), "--output_dir", "x"], "test")
    parts = (family.denoiser, family.vae, family.text_encoders[0])
    loaded = [
        checkpoints.load_part(p, getattr(chosen, p.option), dtype=torch.float32).requires_grad_(False).eval()
        for p in parts
    ]
    return family, *loaded, family.tokenizers(chosen)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_picture_is_the_one_that_diffusers_pipeline_makes(models, scale):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    family, denoiser, vae, text, tokenizers = models
    encode = lambda caption: family.encode([text], tokenizers, caption, "cpu")  # noqa: E731
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

    family = SimpleNamespace(predict=predict)
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
    )
    assert (tmp_path / "run.safetensors").is_file() and "ZeroDivisionError" in capsys.readouterr().out


def test_a_grid_shows_every_picture_in_its_place():
    cells = [[np.full((64, 64, 3), 10 * (3 * y + x), np.uint8) for x in range(3)] for y in range(2)]
    image = np.asarray(grid(cells, ["one", "two"], ["a", "b", "c"], "title"))
    flat = {(10 * k,) * 3 for k in range(6)}
    for colour in flat:
        assert (image == colour).all(axis=2).sum() >= 128 * 128


def test_the_style_distance_of_gaussians_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 3, 300, 300, generator=generator) * torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1)
    b = torch.randn(1, 3, 300, 300, generator=generator) * torch.tensor([2.0, 1.0, 0.5]).view(1, 3, 1, 1) + 1
    assert sample.style_distance([a], [b]) == pytest.approx(3 + 1 + 1, abs=0.05)
    assert sample.style_distance([a], [a]) == pytest.approx(0, abs=1e-9)


def test_the_report_escapes_what_users_wrote_and_the_log_drops_what_will_be_written_again(tmp_path):
    log = report.JsonLog(tmp_path / "x.jsonl")
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0 / step)
    log.file.write('{"step": 4, "lo')
    log.file.flush()
    again = report.JsonLog(tmp_path / "x.jsonl", resume_step=2)
    assert [line["step"] for line in report.read_lines(again.path)] == [1, 2]
    page = report.write(
        tmp_path,
        "x",
        title="<b>t</b>",
        facts={"<script>": "<img>"},
        plan="<i>",
        options="<u>",
        log=again.path,
        files=[],
        grid=None,
    ).read_text(encoding="utf-8")
    assert "<script>" not in page and "<img>" not in page and "&lt;script&gt;" in page and "<i>" not in page


def test_python_and_torch_random_state_survive_sampling(models):
    family, denoiser, vae, text, tokenizers = models
    conds = {c: family.encode([text], tokenizers, c, "cpu") for c in ("a", "")}
    options = SimpleNamespace(seed=1, discrete_flow_shift=2.0)
    import contextlib
    from pathlib import Path

    run = sample.Samples(
        [Prompt("a", width=64, height=64, sample_steps=1)],
        family,
        options,
        conds,
        Path("."),
        "x",
        lambda: vae,
        "cpu",
        contextlib.nullcontext,
        16,
        64,
    )
    states = torch.get_rng_state(), random.getstate()
    denoiser.train()
    run.base(denoiser, None)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate() and denoiser.training
    denoiser.eval()
