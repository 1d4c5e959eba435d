"""Losses and gradients that are no numbers: skipped exactly, named, dumped, and three in a row end the run."""

import json
from types import SimpleNamespace

import pytest
import torch
from memory_support import deep_weights, toy_file
from safetensors.torch import load_file
from training_support import arguments, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import health, options, preflight, runtime, updates
from library.errors import ConfigError, NonFiniteError
from library.families import FAMILIES, get_family

STEPS = ("--max_train_steps", "7", "--learning_rate", "1e-2")


def prepared(toy, pictures, output, *extra):  # noqa: F811
    """A trainer whose setup is done, and which is not running yet."""
    from library.stops import Stops
    from train_network import NetworkTrainer

    torch.set_num_threads(1)
    trainer = NetworkTrainer(options.parse("z_image", arguments(toy, pictures, output, *STEPS, *extra), "test"))
    trainer.stops = Stops(output)
    trainer.setup()
    return trainer


def poison(trainer, name: str) -> int:
    """Make the latents of one picture NaN; returns its index."""
    index = next(item.index for item in trainer.dataset.items if item.path.name == name)
    entry = trainer.latents.memory[(index, False)]
    for value in entry.values() if isinstance(entry, dict) else [entry]:
        value.flatten()[0] = float("nan")
    return index


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.trained.items()}


# The classes of ComfyUI's supported_models.py that list no fp16, and those whose blocks add up in float32 there.
NO_FP16 = {
    "ltx_video", "hunyuan_video", "hunyuan_video_15", "hunyuan_image", "lumina_2", "z_image", "hidream", "omnigen2",
    "qwen_image", "anima", "cosmos_predict2",
}  # fmt: skip


def test_the_plan_warns_of_fp16_for_models_that_are_known_to_overflow(toy, pictures, tmp_path):  # noqa: F811
    assert {name for name in FAMILIES if "fp16" not in get_family(name).half} == NO_FP16
    for precision, warned in (("fp16", True), ("bf16", False), ("no", False)):
        words = arguments(toy, pictures, tmp_path, "--mixed_precision", precision, "--max_train_steps", "1")
        plan = preflight.check(options.parse("z_image", words, "test"), say=lambda text: None)
        text = (
            "--mixed_precision fp16: Z-Image is known to have activations that are too large for it; take bf16, or no"
        )
        assert (f"note: {text}" in plan.text) is warned


def test_half_precision_that_a_device_does_not_have_is_refused(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    """On made-up devices, of which only the kind is looked at before."""
    monkeypatch.setattr(runtime, "has_bf16", lambda: False)
    for kind, precision, said in (("cuda", "bf16", "no bf16 arithmetic; use fp16"), ("mps", "fp16", "not reliable")):
        made = SimpleNamespace(device=SimpleNamespace(type=kind), process_index=0, num_processes=1)
        monkeypatch.setattr("accelerate.Accelerator", lambda made=made, **more: made)
        words = arguments(toy, pictures, tmp_path, "--mixed_precision", precision, "--max_train_steps", "1")
        given = options.parse("z_image", words, "test")
        plan = preflight.check(given, say=lambda text: None)
        with pytest.raises(ConfigError, match=f"--mixed_precision {precision}.*{said}"):
            runtime.Runtime(given, plan)


OPTIMIZERS = {
    "fused": (),
    "for_loop": ("--optimizer_args", "foreach=False"),
    "8bit": ("--optimizer_type", "AdamW8bit"),
    "prodigy": ("--optimizer_type", "Prodigy", "--learning_rate", "1"),
    "schedule_free": ("--optimizer_type", "AdamWScheduleFree"),
    "fp16": ("--mixed_precision", "fp16"),
}


KINDS = [
    kind if kind in ("fused", "8bit", "fp16") else pytest.param(kind, marks=pytest.mark.slow) for kind in OPTIMIZERS
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_no_number_leaves_no_trace_in_weights_or_optimizer(
    toy, pictures, tmp_path, kind, monkeypatch, capsys
):  # noqa: F811
    extra = OPTIMIZERS[kind]
    if kind == "fp16":  # CPUs multiply such numbers slowly
        extra += ("--pretrained_model_name_or_path", str(toy_file(tmp_path, deep_weights(2))))
    bad = prepared(toy, pictures, tmp_path / "bad", *extra)
    index = poison(bad, "3.png")
    hit = [step.number for step in bad.loader(0) if any(item.index == index for b in step.batches for item in b.items)]
    bad.train()
    assert len(hit) >= 2 and capsys.readouterr().out.count("is skipped: the loss is no finite number") == len(hit)
    assert bad.position.skipped == len(hit)

    good = prepared(toy, pictures, tmp_path / "good", *extra)
    real = health.Guard.step

    def leaves_out(self, step, loss, norm):
        scaler = self.trainer.scaler
        if not (scaler.is_enabled() and step.number in hit):
            return real(self, step, loss.new_tensor(float("nan")) if step.number in hit else loss, norm)
        self.note(step, loss.new_tensor(float("nan")), norm)  # the scaler looks at the gradients, and these are good
        return scaler.update(scaler.get_scale() * scaler.get_backoff_factor())

    monkeypatch.setattr(health.Guard, "step", leaves_out)
    monkeypatch.setattr(health.Guard, "_dump", lambda self, step: "the latents")
    good.train()
    one, two = weights(bad), weights(good)
    assert all(torch.isfinite(v).all() for v in one.values()) and all(torch.equal(one[k], two[k]) for k in one)
    logged = [json.loads(line) for line in (tmp_path / "bad" / "run.jsonl").read_text().splitlines()]
    assert [e["step"] for e in logged if "loss" in e and e["loss"] is None] == [number + 1 for number in hit]


def test_the_skipped_step_is_the_run_without_that_step(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    """Against a loop of our own: the optimizer is simply not called in the steps that hold the bad picture."""
    bad = prepared(toy, pictures, tmp_path / "bad")
    index = poison(bad, "3.png")
    bad.train()
    plain = prepared(toy, pictures, tmp_path / "plain")
    for step in plain.loader(0):
        if any(item.index == index for batch in step.batches for item in batch.items):
            continue
        for k, batch in enumerate(step.batches):
            plain._micro_step(batch, step.number, k)
        torch.nn.utils.clip_grad_norm_(plain.parameters, 1.0)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    one, two = weights(bad), weights(plain)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_bad_batch_is_dumped_with_its_files_and_the_first_tensor_that_went_wrong(toy, pictures, tmp_path, capsys):  # noqa: F811
    trainer = prepared(toy, pictures, tmp_path)
    poison(trainer, "3.png")
    trainer.train()
    assert "the first tensor that went wrong is the latents of 3.png (1 of" in capsys.readouterr().out
    folders = sorted((tmp_path / "bad_batch").iterdir())
    facts = json.loads((folders[0] / "batch.json").read_text(encoding="utf-8"))
    assert any(name.endswith("3.png") for name in facts["files"]) and len(facts["captions"]) == len(facts["files"])
    dumped = load_file(folders[0] / "batch.safetensors")
    assert torch.isnan(dumped["latents"]).sum() == 1 and torch.isfinite(dumped["noise"]).all()


def test_a_module_that_overflows_is_named(toy, pictures, tmp_path):  # noqa: F811
    trainer = prepared(toy, pictures, tmp_path)
    with torch.no_grad():
        trainer.denoiser.layers[1].feed_forward.w2.weight.fill_(float("inf"))
    batch = next(iter(trainer.loader(0))).batches[0]
    cause, tensors = health.first_bad(trainer, batch, 0, 0)
    assert cause.startswith("the output of layers.1.feed_forward") and tensors is not None


def test_a_text_that_is_no_number_is_named(toy, pictures, tmp_path):  # noqa: F811
    trainer = prepared(toy, pictures, tmp_path)
    for value in trainer.text.memory.values():
        next(iter(value.values())).flatten()[0] = float("inf")
    batch = next(iter(trainer.loader(0))).batches[0]
    cause, _ = health.first_bad(trainer, batch, 0, 0)
    assert cause.startswith("the conditioning '") and ".png (1 of" in cause


def test_a_gradient_that_is_no_number_is_named_and_gradients_in_progress_stay(toy, pictures, tmp_path):  # noqa: F811
    trainer = prepared(toy, pictures, tmp_path)
    name, parameter = list(trainer.trained.items())[5]
    parameter.register_hook(lambda grad: grad * float("nan"))
    batch = next(iter(trainer.loader(0))).batches[0]
    cause, _ = health.first_bad(trainer, batch, 0, 0)
    assert cause.startswith(f"the gradient of {name} ") and all(p.grad is None for p in trainer.parameters)


def test_three_in_a_row_end_the_run_with_code_5_and_the_last_good_state(toy, pictures, tmp_path):  # noqa: F811
    trainer = prepared(toy, pictures, tmp_path)
    seen, real = [], trainer._micro_step

    def step(batch, number, k):
        if number >= 2:
            seen.append(weights(trainer))
            batch.pictures.fill_(float("nan"))
        return real(batch, number, k)

    trainer._micro_step = step
    with pytest.raises(NonFiniteError, match="of 3 steps in a row.*look at these files.*last good state") as stop:
        trainer.train()
    assert stop.value.exit_code == 5 and not (tmp_path / "run.safetensors").exists()
    saved = load_file(tmp_path / "run-step00000005-state" / "trained.safetensors")
    assert all(torch.equal(saved[name], seen[0][name]) for name in saved)
    train(toy, pictures, tmp_path, *STEPS, "--resume", str(tmp_path / "run-step00000005-state"))
    assert (tmp_path / "run.safetensors").exists()


def test_a_state_whose_weights_give_no_numbers_is_passed_over_by_auto(tmp_path):
    from test_saves import write

    from library import state

    sound = write(tmp_path, 3)
    origin = state.Origin({"seed": 1})
    suspect = state.state_path(tmp_path, "run", 9)
    state.save_state(suspect, {"w": torch.ones(2)}, {}, state.Position(9, suspect=True), origin)
    found, notes = state.find_state("auto", [tmp_path], "run")
    assert found == sound and "no number" in notes[0]
    import shutil

    shutil.rmtree(sound)
    assert state.find_state("auto", [tmp_path], "run")[0] == suspect


def test_nothing_in_the_update_waits_for_the_device(monkeypatch):
    """Fake tensors have no values: whatever asks for one, as a synchronisation does, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from library import optim
    from library.processes import Agreement
    from library.stops import Wishes

    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.zeros(4, 4))
        options = SimpleNamespace(optimizer_type="AdamW", optimizer_args=None, learning_rate=1e-3)
        optimizer = optim.create_optimizer(options, [{"params": [parameter], "lr": 1e-3}])
        trainer = SimpleNamespace(optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
        guard = health.Guard(trainer, lambda message: None)
        assert guard.on_device
        monkeypatch.setattr(guard, "settle", lambda: None)  # reads the step before, whose numbers have arrived
        for number in range(2):
            (parameter * 2).sum().backward()
            norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            loss = Agreement(1).sum(parameter.sum().detach(), Wishes())
            guard.step(SimpleNamespace(number=number), loss, norm)


# ---------------------------------------------------------------- does it do anything?


def test_every_save_reports_the_size_of_the_update(toy, pictures, tmp_path, capsys):  # noqa: F811
    """Held against up @ down * alpha / rank of the saved file over the weights of the model's own file."""
    trainer = train(toy, pictures, tmp_path, *STEPS, "--network_alpha", "2", "--network_dim", "4")
    saved = load_file(tmp_path / "run.safetensors")
    base = load_file(trainer.denoiser.binding.source)
    ratios = []
    for key in saved:
        if key.endswith((".lora_down.weight", ".lora_A.weight")):
            stem = key.replace(".lora_down.weight", "").replace(".lora_A.weight", "")
            up = saved[key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")]
            alpha = float(saved.get(f"{stem}.alpha", torch.tensor(2.0)))
            weight = base[stem.removeprefix("diffusion_model.") + ".weight"]
            ratios.append(float((up @ saved[key]).norm() * alpha / 4 / weight.norm()))
    logged = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    found = next(entry["update"] for entry in logged if "update" in entry)
    assert found["mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4) and found["of"] == len(ratios)
    assert found["unchanged"] == 0 and "update: mean ||dW||/||W||" in capsys.readouterr().out


def test_a_full_fine_tune_reports_it_too(toy, pictures, tmp_path, capsys):  # noqa: F811
    train(toy.with_name("toy_full.toml"), pictures, tmp_path, "--max_train_steps", "2", "--learning_rate", "1e-3")
    assert "sampled tensors unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("--learning_rate", "0", "--unet_lr", "1e-30"), "too small"),
        (("--learning_rate", "1e-4", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "7"), None),
    ],
)
def test_an_adapter_that_does_nothing_is_a_warning_with_the_likely_reason(
    toy, pictures, tmp_path, monkeypatch, capsys, extra, reason
):  # noqa: F811
    monkeypatch.setattr(updates, "AFTER", 4)
    train(toy, pictures, tmp_path, "--max_train_steps", "7", *extra)
    said = capsys.readouterr().out
    assert ("unchanged after 4 steps" in said) == (reason is not None)
    assert reason is None or reason in said


def test_a_trained_tensor_without_gradient_is_a_warning_that_names_it():
    used, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.sum().backward()
    trainer = SimpleNamespace(network=None, trained={"used": used, "idle": idle})
    said = updates.Updates(trainer).without_gradient()
    assert "1 of 2 trained tensors" in said and "(idle)" in said
    trainer.trained = {"used": used}
    assert updates.Updates(trainer).without_gradient() == ""
