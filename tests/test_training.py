"""The loop: what it leaves behind, that it learns, that a resumed run is the run that never stopped."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_support import ROOT, arguments, called, launch, losses, pictures, toy, train  # noqa: F401  (fixtures)


def full(toy):  # noqa: F811
    return toy.with_name("toy_full.toml")


@pytest.fixture(scope="module")
def lora_run(toy, pictures, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("run")
    trainer = train(
        toy,
        pictures,
        output,
        "--max_train_steps",
        "6",
        "--learning_rate",
        "1e-2",
        "--save_every_n_steps",
        "3",
        "--dump_batch_at_step",
        "2",
    )
    return output, trainer


def test_a_run_leaves_its_files_and_every_key_is_one_that_comfyui_takes(lora_run):
    output, trainer = lora_run
    assert {p.name for p in output.glob("*.safetensors")} == {
        "run.safetensors",
        "run-step00000003.safetensors",
        "run-batch-step2.safetensors",
    }
    assert len(losses(output)) == 6
    assert (output / "run-report.html").is_file()
    modules = trainer.denoiser.binding.layout.their_modules
    with safe_open(output / "run.safetensors", "pt") as file:
        names = {
            key.removeprefix("diffusion_model.").rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in file.keys()
        }
        metadata = file.metadata()
    assert names <= modules.keys() and len(names) > 10
    assert metadata["ss_steps"] == "6" and metadata["ss_network_module"] == "networks.lora"
    assert not any(str(output) in value for value in metadata.values())


def test_the_dumped_batch_agrees_with_the_closed_forms_and_the_family(lora_run, toy, pictures, tmp_path):  # noqa: F811
    output, _ = lora_run
    batch = load_file(output / "run-batch-step2.safetensors")
    sigma = batch["sigma"].view(-1, 1, 1, 1)
    assert torch.allclose(batch["noisy"], (1 - sigma) * batch["latents"] + sigma * batch["noise"], atol=1e-6)
    assert torch.allclose(batch["target"], batch["noise"] - batch["latents"], atol=1e-6)
    error = (batch["velocity_pred"] - batch["target"]).square().mean(dim=(1, 2, 3))
    assert torch.allclose(batch["loss"], error, rtol=1e-5)
    with safe_open(output / "run-batch-step2.safetensors", "pt") as file:
        assert len(json.loads(file.metadata()["captions"])) == len(sigma)


def test_the_lora_starts_as_the_base_model(toy, pictures, tmp_path):  # noqa: F811
    first = train(toy, pictures, tmp_path / "a", "--max_train_steps", "1")
    whole = train(full(toy), pictures, tmp_path / "b", "--max_train_steps", "1")
    assert first.network is not None and whole.network is None
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_overfits(toy, pictures, tmp_path, kind):  # noqa: F811
    config, rate = (toy, "1e-2") if kind == "lora" else (full(toy), "1e-3")
    train(
        config, pictures, tmp_path, "--max_train_steps", "40", "--learning_rate", rate, "--timestep_sampling", "uniform"
    )
    values = losses(tmp_path)
    assert sum(values[-12:]) < 0.8 * sum(values[:12])


RESUMES = {
    "accumulation": ("--gradient_accumulation_steps", "2"),
    "dropout": ("--network_dropout", "0.3", "--network_args", "rank_dropout=0.2"),
    "prodigy": ("--optimizer_type", "Prodigy", "--learning_rate", "1"),
    "adamw8bit": ("--optimizer_type", "AdamW8bit"),
    "schedule": ("--lr_scheduler", "cosine", "--lr_warmup_steps", "3"),
    "checkpointing_bf16": ("--gradient_checkpointing", "--mixed_precision", "bf16"),
}


@pytest.mark.parametrize("kind", RESUMES)
def test_a_resumed_run_is_the_run_that_never_stopped(toy, pictures, tmp_path, kind):  # noqa: F811
    extra = RESUMES[kind]
    extra = ("--learning_rate", "1e-2", *extra) if "--learning_rate" not in extra else extra
    train(toy, pictures, tmp_path / "whole", "--max_train_steps", "7", *extra)
    train(
        toy, pictures, tmp_path / "parts", "--max_train_steps", "7", "--save_every_n_steps", "4", "--save_state", *extra
    )
    (tmp_path / "parts" / "run.safetensors").unlink()
    state = tmp_path / "parts" / "run-step00000004-state"
    train(toy, pictures, tmp_path / "parts", "--max_train_steps", "7", "--resume", str(state), *extra)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_resume_refuses_changed_options_by_name(toy, pictures, tmp_path):  # noqa: F811
    from library.errors import ConfigError

    train(toy, pictures, tmp_path, "--max_train_steps", "2", "--save_state_on_train_end")
    state = str(tmp_path / "run-step00000002-state")
    with pytest.raises(ConfigError, match="learning_rate"):
        train(toy, pictures, tmp_path, "--max_train_steps", "3", "--resume", state, "--learning_rate", "0.5")


BOTH = ("--max_train_steps", "4", "--learning_rate", "1e-2")


def test_two_processes_of_torchs_launcher_take_the_steps_of_one_with_twice_the_accumulation(toy, pictures, tmp_path):  # noqa: F811
    """The launcher itself; tests/test_processes.py forks processes and sets for them what it sets."""
    train(toy, pictures, tmp_path / "one", *BOTH, "--gradient_accumulation_steps", "2")
    words = ["--standalone", "--nproc_per_node", "2", "z_image_train_network.py"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *words,
        *arguments(toy, pictures, tmp_path / "two", *BOTH),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_the_launch_line_works_and_a_mistake_is_one_sentence_with_its_code(toy, pictures, tmp_path):  # noqa: F811
    wrong = launch(*arguments(toy, pictures, tmp_path, "--learning_rat", "1"))
    assert wrong.returncode == 2 and "did you mean 'learning_rate'" in wrong.stderr and "Traceback" not in wrong.stderr
    missing = launch(*arguments(toy, pictures, tmp_path, "--vae", "nowhere.safetensors"))
    assert missing.returncode == 2 and "nowhere.safetensors" in missing.stderr and missing.stderr.count("\n") == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = launch(
        *arguments(
            toy, pictures, tmp_path, "--dataset_config", "none", "--train_data_dir", str(empty), "--resolution", "64"
        )
    )
    assert nothing.returncode == 3 and "Traceback" not in nothing.stderr


def test_captions_that_are_cut_are_named_with_what_is_lost(toy, pictures, tmp_path, capsys):  # noqa: F811
    path = pictures.with_suffix("") / "3.txt"
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text("word " * 600 + "LOST", encoding="utf-8")
        train(toy, pictures, tmp_path, "--max_train_steps", "1")
    finally:
        path.write_text(before, encoding="utf-8")
    said = capsys.readouterr().out
    assert "captions: 1 of 5 are longer" in said and "3.png" in said


def test_an_output_folder_that_cannot_be_written_is_exit_code_6(toy, pictures, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("x")
    done = launch(*arguments(toy, pictures, tmp_path / "file" / "out"))
    assert done.returncode == 6 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


LOSSES = ROOT / "tests" / "losses" / "z_image.txt"


def test_the_losses_of_five_seeded_steps_are_the_recorded_ones(toy, pictures, tmp_path):  # noqa: F811
    """A refactor keeps them; a change of them needs a sentence in docs/log.md. To four digits: BLAS differs by machine."""
    train(toy, pictures, tmp_path, "--max_train_steps", "5", "--learning_rate", "1e-2", "--seed", "3")
    found = losses(tmp_path)
    if not LOSSES.exists():
        LOSSES.parent.mkdir(exist_ok=True)
        LOSSES.write_text("".join(f"{loss:.6f}\n" for loss in found), encoding="utf-8")
        pytest.fail("recorded anew; run again")
    assert found == pytest.approx([float(line) for line in LOSSES.read_text(encoding="utf-8").split()], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(toy, pictures, tmp_path):  # noqa: F811
    extra = ("--max_train_steps", "20", "--learning_rate", "1e30", "--max_grad_norm", "0", "--optimizer_type", "SGD")
    done = called("z_image_train_network.py", *arguments(toy, pictures, tmp_path, *extra))
    assert done.returncode == 5 and "the loss of 3 steps in a row" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run.safetensors").exists()


def test_out_of_memory_is_one_sentence_and_exit_code_4(capsys):
    import torch

    from library.errors import run

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(SystemExit) as stop:
        run(fails)
    assert stop.value.code == 4 and "out of memory" in capsys.readouterr().err
