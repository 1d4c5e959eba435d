"""The inference script as a user runs it."""

import numpy as np
from PIL import Image
from training_support import launch, pictures, toy, train  # noqa: F401  (fixtures)

SCRIPT = "z_image_minimal_inference.py"


def picture(toy, path, *extra):  # noqa: F811
    folder = toy.parent
    done = launch(
        "--dit", str(folder / "denoiser.safetensors"), "--vae", str(folder / "vae.safetensors"),
        "--text_encoder", str(folder / "text_encoder.safetensors"), "--prompt", "a red cat", "--image_size", "64", "96",
        "--infer_steps", "3", "--seed", "4", "--save_path", str(path), *extra, script=SCRIPT,
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
