"""Quantised weights in whole runs: the options, what they refuse, text encoders and their caches, sampling scripts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from memory_support import FAMILY, load, toy_file
from oracles import golden, relative, weights_of
from PIL import Image
from safetensors.torch import load_file
from training_support import arguments, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import checkpoints, inference, options
from library.components import t5
from library.errors import ConfigError
from library.memory.loading import Loading
from library.memory.precision import text_recipe
from library.memory.quantised_linear import is_quantised
from library.option_checks import check_read

STEPS = ("--max_train_steps", "3", "--learning_rate", "1e-2")


def parsed(toy, pictures, *extra):  # noqa: F811
    return options.parse("z_image", arguments(toy, pictures, toy.parent / "out", *extra), "test")


@pytest.mark.parametrize("scheme", ["fp8_scaled", "nf4"])
def test_a_run_trains_on_the_quantised_model(toy, pictures, tmp_path, scheme):  # noqa: F811
    """The losses are those of a run on a file that holds the dequantised weights."""
    trainer = train(toy, pictures, tmp_path / "held", *STEPS, f"--{scheme}")
    model = load(toy.parent / "denoiser.safetensors", scheme)
    tensors = load_file(toy.parent / "denoiser.safetensors")
    for entry in model.binding.layout.entries:
        modules = [model.get_submodule(name.rpartition(".")[0]) for name in entry.ours]
        if all(is_quantised(module) for module in modules) and entry.theirs.endswith(".weight"):
            tensors[entry.theirs] = torch.cat([module.weight for module in modules])
    path = toy_file(tmp_path, tensors)
    train(toy, pictures, tmp_path / "plain", *STEPS, "--pretrained_model_name_or_path", str(path))
    train(toy, pictures, tmp_path / "whole", *STEPS)
    assert sum(is_quantised(m) for m in trainer.denoiser.modules()) > 20
    assert losses(tmp_path / "held") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert losses(tmp_path / "held") != pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_resumed_run_and_base_networks_on_a_quantised_model(toy, pictures, tmp_path, capsys):  # noqa: F811
    train(toy, pictures, tmp_path / "base", *STEPS)
    base = ("--base_weights", str(tmp_path / "base" / "run.safetensors"))
    extra = ("--fp8_scaled", "--gradient_checkpointing", "--mixed_precision", "bf16", "--learning_rate", "1e-2", *base)
    train(toy, pictures, tmp_path / "whole", "--max_train_steps", "4", *extra)
    assert "attached, because quantised weights" in capsys.readouterr().out
    saving = ("--save_every_n_steps", "2", "--save_state")
    train(toy, pictures, tmp_path / "parts", "--max_train_steps", "4", *saving, *extra)
    state = str(tmp_path / "parts" / "run-step00000002-state")
    train(toy, pictures, tmp_path / "parts", "--max_train_steps", "4", "--resume", state, *extra)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    without = [word for word in extra if word not in base]
    train(toy, pictures, tmp_path / "without", "--max_train_steps", "4", *without)
    assert losses(tmp_path / "whole")[0] != losses(tmp_path / "without")[0]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--fp8_format", "e5m2"], "--fp8_format e5m2 .* has no effect without --fp8_scaled"),
        (["--fp8_base", "--fp8_scaled"], "--fp8_base .* has no effect with --fp8_scaled"),
        (["--nf4", "--fp8_scaled"], "two ways to hold the same weights"),
        (["--nf4_llm", "--fp8_llm"], "two ways to hold the same weights"),
        (["--fp8_t5"], "has no T5 text encoder"),
        (["--nf4_vl"], "has no vision-language text encoder"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(toy, pictures, extra, said):  # noqa: F811
    with pytest.raises(ConfigError, match=said):
        check_read(parsed(toy, pictures, *extra))


@pytest.mark.parametrize("scheme", ["fp8_scaled", "fp8_base", "nf4"])
def test_a_full_fine_tune_is_refused_with_the_reason(toy, pictures, scheme):  # noqa: F811
    with pytest.raises(ConfigError, match=f"--{scheme} does not go with a full fine-tune: quantised weights cannot"):
        check_read(parsed(toy.with_name("toy_full.toml"), pictures, f"--{scheme}"))


def text_runtime(toy, pictures, *extra):  # noqa: F811
    from library.runtime import Runtime
    from library.trained import Trained

    plan = SimpleNamespace(family=FAMILY, trained=Trained(), base_weights=[])
    return Runtime(parsed(toy, pictures, *extra), plan)


@pytest.mark.parametrize(("option", "bound"), [("fp8_llm", 0.08), ("nf4_llm", 0.3)])
def test_a_text_encoder_is_held_in_fewer_bits(toy, pictures, option, bound):  # noqa: F811
    from library.families.family import Text

    def states(runtime):
        encoders, tokenizers = runtime.load_text_encoders()
        with torch.no_grad():
            return encoders[0], FAMILY.encode(encoders, tokenizers, Text("a picture of a red cat"), "cpu")["text"]

    plain, expected = states(text_runtime(toy, pictures))
    held, found = states(text_runtime(toy, pictures, f"--{option}"))
    count = sum(is_quantised(m) for m in held.modules())
    assert count == sum(isinstance(m, torch.nn.Linear) for m in plain.modules()) > 10
    assert 1e-4 < relative(found, expected) < bound


def test_a_scaled_t5_file_is_used_as_it_is_and_gives_the_states_of_an_independent_implementation(tmp_path):
    tensors, part = golden("te_fp8_conventions"), t5.xxl()
    recipe = text_recipe(SimpleNamespace(fp8_t5=True), part)
    path = toy_file(tmp_path, {k: v.contiguous() for k, v in weights_of(tensors, "old/").items()})
    loading = Loading(recipe, "cpu", torch.float32)
    model = checkpoints.load_part(part, path, dtype=torch.float32, loading=loading)
    assert loading.as_stored == len(loading.modules) > 5 and is_quantised(model.block[0].layer[1].DenseReluDense.wo)
    with torch.no_grad():
        assert relative(t5.states(model, tensors["input_ids"]), tensors["out_old"]) < 1e-4


def test_caches_of_other_precision_are_not_taken(toy, pictures, tmp_path, capsys):  # noqa: F811
    def cached(*extra):
        train(toy, pictures, tmp_path / "out", "--max_train_steps", "1", "--cache_text_encoder_outputs_to_disk",
              "--cache_dir", str(tmp_path / "cache"), *extra)  # fmt: skip
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("text:"))
        return line.partition(", ")[2].partition(";")[0]

    assert [cached(), cached(), cached("--fp8_llm"), cached("--fp8_llm")] == [
        "0 were cached", "6 were cached", "0 were cached", "6 were cached",
    ]  # fmt: skip


def test_the_inference_script_takes_a_quantised_denoiser_and_a_lora(toy, pictures, tmp_path):  # noqa: F811
    train(toy, pictures, tmp_path, "--max_train_steps", "2", "--learning_rate", "5e-2")

    def picture(name, *extra):
        folder = toy.parent
        inference.main("z_image", [
            "--dit", str(folder / "denoiser.safetensors"), "--vae", str(folder / "vae.safetensors"),
            "--text_encoder", str(folder / "text_encoder.safetensors"), "--prompt", "a red cat", "--image_size", "64", "64",
            "--infer_steps", "2", "--device", "cpu", "--save_path", str(tmp_path / name), *extra,
        ])  # fmt: skip
        return np.asarray(Image.open(tmp_path / name)).astype(int)

    lora = ("--lora_weight", str(tmp_path / "run.safetensors"))
    whole, held = picture("a.png", *lora), picture("b.png", "--fp8_scaled", *lora)
    assert 0 < np.abs(whole - held).mean() < 12
