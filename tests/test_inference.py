"""The inference script as a user runs it."""

import numpy as np
import pytest
from PIL import Image
from training_support import called, launch, pictures, toy, train  # noqa: F401  (fixtures)

SCRIPT = "z_image_minimal_inference.py"


def picture(toy, path, *extra):  # noqa: F811
    folder = toy.parent
    done = called(
        SCRIPT, "--dit", str(folder / "denoiser.safetensors"), "--vae", str(folder / "vae.safetensors"),
        "--text_encoder", str(folder / "text_encoder.safetensors"), "--prompt", "a red cat", "--image_size", "64", "96",
        "--infer_steps", "3", "--seed", "4", "--save_path", str(path), *extra,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(path)).astype(int)


def test_a_lora_changes_the_picture_and_at_strength_zero_it_does_not(toy, pictures, tmp_path):  # noqa: F811
    train(toy, pictures, tmp_path, "--max_train_steps", "4", "--learning_rate", "5e-2")
    lora = str(tmp_path / "run.safetensors")
    base = picture(toy, tmp_path / "base.png")
    assert base.shape == (64, 96, 3)
    zero = picture(toy, tmp_path / "zero.png", "--lora_weight", lora, "--lora_multiplier", "0")
    assert np.abs(zero - base).max() <= 1  # merged weights lie elsewhere in memory, so sums may round differently
    assert (picture(toy, tmp_path / "one.png", "--lora_weight", lora) != base).mean() > 0.1


def test_mistakes_are_one_sentence(toy, tmp_path):  # noqa: F811
    done = launch("--dit", "x", "--vae", "y", "--text_encoder", "z", "--save_path", "p", "--promt", "a", script=SCRIPT)
    assert done.returncode == 2 and "did you mean '--prompt'" in done.stderr and "Traceback" not in done.stderr
    done = launch("--dit", "x", "--vae", "y", "--text_encoder", "z", "--save_path", "p", "--prompt", "a", script=SCRIPT)
    assert done.returncode == 2 and "x: no such file" in done.stderr and done.stderr.count("\n") == 1


def words(toy, *extra):  # noqa: F811
    folder = toy.parent
    return [
        "--dit", str(folder / "denoiser.safetensors"), "--vae", str(folder / "vae.safetensors"),
        "--text_encoder", str(folder / "text_encoder.safetensors"), *extra,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--prompt", "a", "--lora_weight", "none.safetensors"], "none.safetensors: no such file"),
        (["--prompt", "a", "--lora_multiplier", "1"], "--lora_multiplier"),
        (["--prompt", "a", "--infer_steps", "0"], "0 steps"),
        (["--prompt", "a", "--image_size", "0", "64"], "not a size"),
        (["--prompt", "a", "--flow_shift", "0"], "flow shift"),
        (["--prompt", "a", "--tokenizer", "./none"], "--tokenizer"),
        (["--prompt", "a", "--save_path", "x.jpg"], ".png"),
        (["--from_file", "x.txt", "--prompt", "a"], "one of"),
        (["--from_file", "x.txt"], "x.txt"),
    ],
)
def test_mistakes_are_found_before_anything_loads(toy, tmp_path, monkeypatch, extra, said):  # noqa: F811
    from library import checkpoints, inference
    from library.errors import ConfigError

    monkeypatch.setattr(checkpoints, "load_part", lambda *a, **k: pytest.fail("something was loaded"))
    path = [] if "--save_path" in extra else ["--save_path", str(tmp_path / "x.png")]
    with pytest.raises(ConfigError) as caught:
        inference.main("z_image", words(toy, *path, *extra))
    assert said in str(caught.value)


def test_a_prompt_file_fills_a_folder_with_the_options_for_what_it_does_not_say(toy, tmp_path, monkeypatch, capsys):  # noqa: F811
    from library import inference, sample

    (tmp_path / "p.txt").write_text("a cat --s 2\na dog --d -1 --l 1 --w 64\na cat --s 2 --d 9\n", encoding="utf-8")
    seen = []
    original = sample.generate_latents
    monkeypatch.setattr(sample, "generate_latents", lambda *a, **k: seen.append(k) or original(*a, **k))
    inference.main("z_image", words(
        toy, "--from_file", str(tmp_path / "p.txt"), "--save_path", str(tmp_path / "out"), "--image_size", "64", "100",
        "--infer_steps", "3", "--guidance_scale", "2", "--seed", "9", "--device", "cpu",
    ))  # fmt: skip
    assert [(k["steps"], k["scale"], k["shape"]) for k in seen] == [
        (2, 2.0, (16, 8, 12)), (3, 1.0, (16, 8, 8)), (2, 2.0, (16, 8, 12))
    ]  # fmt: skip
    files = sorted((tmp_path / "out").glob("*.png"))
    assert len(list((tmp_path / "out").glob("*.workflow.json"))) == len(files)
    assert [p.name for p in files] == [f"{n:03d}_{k['seed']}.png" for n, k in enumerate(seen)]
    assert seen[0]["seed"] == 9 and seen[1]["seed"] >= 0
    first, _, last = (np.asarray(Image.open(path)) for path in files)
    assert first.shape == (64, 96, 3) and np.array_equal(first, last)  # same text, same seed
    assert "100 becomes 96" in capsys.readouterr().err


def test_half_precision_gives_nearly_the_same_picture(toy, tmp_path):  # noqa: F811
    from library import inference

    made = {}
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.png"
        common = ("--prompt", "a red cat", "--image_size", "64", "64", "--infer_steps", "3", "--device", "cpu")
        inference.main("z_image", words(toy, "--save_path", str(path), "--dtype", dtype, *common))
        made[dtype] = np.asarray(Image.open(path)).astype(int)
    assert 0 < np.abs(made["float32"] - made["bfloat16"]).mean() < 8
