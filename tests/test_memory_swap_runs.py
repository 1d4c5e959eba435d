"""Block swap in whole runs: losses to the bit, validation, samples, resuming, several processes, refusals."""

import pytest
import torch
from memory_support import deep_weights, toy_file
from safetensors.torch import load_file
from test_processes import run_all
from training_support import losses, pictures, toy, train  # noqa: F401  (fixtures)

from library.errors import ConfigError
from library.memory import activations

STEPS = ("--max_train_steps", "4", "--learning_rate", "1e-2")
CHECKPOINTED = ("--gradient_checkpointing",)
OFFLOAD = "--cpu_offload_checkpointing"
MOST = 7 - 2 + 1 + 1  # blocks of the three lists: 7, 3, 3


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Stored in bfloat16, so that a float32 run has every weight in memory of its own, as on a device."""
    tensors = {key: value.bfloat16() for key, value in deep_weights().items()}
    return "--pretrained_model_name_or_path", str(toy_file(tmp_path_factory.mktemp("deep"), tensors))


KINDS = {
    "lora": (),
    "lora bf16, checkpointing": ("--mixed_precision", "bf16", *CHECKPOINTED),
    "lora fp8, checkpointing, accumulation": ("--fp8_scaled", "--gradient_accumulation_steps", "2", *CHECKPOINTED),
    "lora bf16, offload": ("--mixed_precision", "bf16", *CHECKPOINTED, OFFLOAD),
    "lora, pairs": ("--block_swap_ring_size", "3"),
    "full": (),
    "full, checkpointing, accumulation": ("--gradient_accumulation_steps", "2", *CHECKPOINTED),
    "full, offload": (*CHECKPOINTED, OFFLOAD),
    "full bf16, checkpointing": ("--mixed_precision", "bf16", *CHECKPOINTED),
    "full, all bf16": ("--mixed_precision", "bf16", "--full_bf16", *CHECKPOINTED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_files_are_equal_to_the_bit(toy, pictures, tmp_path, deep, kind, monkeypatch):  # noqa: F811
    """Against a run with neither swap nor offloaded block inputs."""
    monkeypatch.setattr(activations, "LEAST", 1)
    extra, toml = (*STEPS, *deep, *KINDS[kind]), toy.with_name("toy_full.toml") if "full" in kind else toy
    plain = [word for word in extra if word not in ("--block_swap_ring_size", "3", OFFLOAD)]
    train(toml, pictures, tmp_path / "plain", *plain)
    trainer = train(toml, pictures, tmp_path / "swapped", "--blocks_to_swap", str(MOST - 2), *extra)
    swap = trainer.runtime.memory.swap
    assert len(swap.blocks) == MOST - 2 and swap.entered > 4 * len(swap.blocks) and not swap.resident()
    assert OFFLOAD not in extra or trainer.runtime.memory.activations.moved > 4 * len(swap.blocks)
    found = losses(tmp_path / "swapped")
    assert found == losses(tmp_path / "plain") and len(set(found)) == 4
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("plain", "swapped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_validation_samples_and_a_resume_with_another_number(toy, pictures, tmp_path, deep):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a red cat --w 64 --h 64 --s 2\n", encoding="utf-8")
    extra = (
        *STEPS, *deep, *CHECKPOINTED, "--validation_split", "0.4", "--validate_every_n_steps", "2", "--sample_every_n_steps", "2",
        "--sample_prompts", str(tmp_path / "prompts.txt"),
    )  # fmt: skip
    swapped = ("--blocks_to_swap", str(MOST), "--sample_blocks_to_swap", "2")
    plain = train(toy, pictures, tmp_path / "plain", *extra)
    train(toy, pictures, tmp_path / "swapped", *extra, *swapped, "--save_every_n_steps", "2", "--save_state")
    assert losses(tmp_path / "plain") == losses(tmp_path / "swapped")
    state = str(tmp_path / "swapped" / "run-step00000002-state")
    other = train(toy, pictures, tmp_path / "swapped", *extra, "--blocks_to_swap", "3", "--resume", state)
    assert losses(tmp_path / "plain") == losses(tmp_path / "swapped")
    pairs = [(t.outputs.samples.latents, t) for t in (plain, other)]
    assert torch.equal(*(latents[list(latents)[-1]][0] for latents, _ in pairs))
    values = [(tmp_path / name / "run.jsonl").read_text().count('"validation"') for name in ("plain", "swapped")]
    assert values[0] == values[1] == 2


@pytest.mark.parametrize("kind", ["full", "full, checkpointing, accumulation", "lora bf16, checkpointing"])
def test_two_processes_with_swap_are_two_without_to_the_bit(toy, pictures, tmp_path, deep, kind):  # noqa: F811
    toml, extra = toy.with_name("toy_full.toml") if "full" in kind else toy, (*STEPS, *deep, *KINDS[kind])
    for name, more in (("plain", ()), ("swapped", ("--blocks_to_swap", "4"))):
        run_all(
            tmp_path / "log",
            2,
            lambda rank, name=name, more=more: train(toml, pictures, tmp_path / name, *extra, *more),
        )
    assert losses(tmp_path / "plain") == losses(tmp_path / "swapped")
    one, two = (load_file(tmp_path / name / "run.safetensors") for name in ("plain", "swapped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_two_processes_take_the_steps_of_one(toy, pictures, tmp_path, deep):  # noqa: F811
    """One process sums the batches of a step in its backward passes, two in the reduction, which round differently."""
    toml, extra = toy.with_name("toy_full.toml"), (*STEPS, *deep, *CHECKPOINTED)
    train(toml, pictures, tmp_path / "one", *extra, "--gradient_accumulation_steps", "2")
    two = (*extra, "--blocks_to_swap", "4")
    run_all(tmp_path / "log", 2, lambda rank: train(toml, pictures, tmp_path / "two", *two))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_too_many_blocks_are_refused_before_anything_is_loaded(toy, pictures, tmp_path, deep, monkeypatch):  # noqa: F811
    from library import checkpoints

    monkeypatch.setattr(checkpoints, "load_part", None)
    with pytest.raises(ConfigError, match=f"blocks_to_swap {MOST + 1}: .* 7 \\+ 3 \\+ 3 blocks, .* at most {MOST} "):
        train(toy, pictures, tmp_path, *deep, "--blocks_to_swap", str(MOST + 1))
    with pytest.raises(ConfigError, match="has no effect without --blocks_to_swap"):
        train(toy, pictures, tmp_path, *deep, "--use_pinned_memory_for_block_swap")


def test_the_denoiser_is_loaded_when_the_encoders_are_gone_and_makes_room_for_the_vae_of_samples(
    toy, pictures, tmp_path, monkeypatch
):  # noqa: F811
    import contextlib
    import gc
    import weakref

    # Its first import logs an error with a traceback, and pytest keeps the record, the traceback and all its frames.
    from diffusers import AutoencoderKL  # noqa: F401

    from library.memory.denoiser import DenoiserMemory
    from library.runtime import Runtime

    (tmp_path / "prompts.txt").write_text("a red cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    events, load_vae = [], Runtime.load_vae
    load_part, loaded, beside = Runtime._load_part, [], []

    def load_any(self, part, *how):
        if part is self.family.denoiser:
            gc.collect()
            beside.append([name for name, ref in loaded if ref() is not None])
        model = load_part(self, part, *how)
        loaded.append((part.name, weakref.ref(model)))
        return model

    @contextlib.contextmanager
    def away(self):
        events.append("away")
        yield
        events.append("back")

    def load(self):
        if self._vae is None:
            events.append("vae")
        return load_vae(self)

    monkeypatch.setattr(DenoiserMemory, "away", away)
    monkeypatch.setattr(Runtime, "load_vae", load)
    monkeypatch.setattr(Runtime, "_load_part", load_any)
    extra = ("--max_train_steps", "1", "--sample_prompts", str(tmp_path / "prompts.txt"))
    trainer = train(toy, pictures, tmp_path / "a", *extra)
    assert events == ["vae", "away", "vae", "back", "away", "vae", "back"] and trainer.runtime._vae is None
    assert [name for name, _ in loaded][:3] == ["vae", "text_encoder", "denoiser"] and not beside[0]
    events.clear()
    train(toy, pictures, tmp_path / "b", *extra, "--highvram")
    assert events == ["vae", "vae"] and not events.count("away")
