"""A resumed run is the run that never stopped, to the bit: every optimizer, every way to change the surroundings."""

import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_support import arguments, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import optim, provenance, schedules, state
from library.ema import Average
from library.errors import ConfigError

# ---------------------------------------------------------------- every optimizer, on a small problem

PLAIN = ("Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "SGD")
NEED_CUDA = {"pagedadamw", "pagedadamw8bit", "pagedadamw32bit", "pagedlion8bit"}
OPTIMIZERS = [name for name in [*optim.OPTIMIZERS, *PLAIN] if name not in NEED_CUDA]


class Options(SimpleNamespace):
    def given(self, name):
        return False


def problem(kind: str):
    """(trained tensors, optimizer, scheduler, step function) of a small regression whose data depends on the step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    free = optim.is_lr_free(kind)
    options = Options(optimizer_type=kind, optimizer_args=None, learning_rate=1.0 if free else 1e-2, lr_scheduler="cosine",
                      lr_scheduler_type=None, lr_scheduler_args=None, lr_warmup_steps=0 if kind == "dadaptsgd" else 2, lr_decay_steps=0,
                      lr_scheduler_num_cycles=1, lr_scheduler_power=1.0, lr_scheduler_timescale=None,
                      lr_scheduler_min_lr_ratio=None, unet_lr=None)  # fmt: skip
    groups = [{"params": list(model.parameters()), "lr": options.learning_rate, "name": "model"}]
    optimizer = optim.create_optimizer(options, groups)
    scheduler = optim.create_scheduler(options, optimizer, 12)
    average = Average(dict(model.named_parameters()), 0.9)

    def step(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(32, 8, generator=generator), torch.randn(32, 4, generator=generator)
        optim.train_mode(optimizer)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(), scheduler.step(), optimizer.zero_grad(), average.update()
        return float(loss.detach())

    parts = {"optimizer": optimizer, "scheduler": scheduler, "average": average}
    return dict(model.named_parameters()), parts, step


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_to_the_bit(tmp_path, kind):
    whole, whole_parts, step = problem(kind)
    expected = [step(k) for k in range(12)]
    first, parts, step = problem(kind)
    found = [step(k) for k in range(5)]
    optim.eval_mode(parts["optimizer"])  # as for a save or a sample in between
    optim.train_mode(parts["optimizer"])
    folder = state.state_path(tmp_path, "run", 5)
    tensors = {name: p.detach().clone() for name, p in first.items()}
    state.save_state(folder, tensors, parts, state.Position(5), state.Origin({}))
    second, parts, step = problem(kind)
    with torch.no_grad():
        for p in second.values():
            p.add_(1.0)  # nothing of a fresh start may stay
    asked = optim.settings(parts["optimizer"])
    state.load_state(folder, second, parts)
    optim.take_settings(parts["optimizer"], parts["scheduler"], asked)
    found += [step(k) for k in range(5, 12)]
    assert found == expected and all(torch.equal(whole[name], second[name]) for name in whole)
    averages = whole_parts["average"].values, parts["average"].values
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in whole)


@pytest.mark.parametrize(("of_class", "expected"), [(False, 0.5 * (1 + math.cos(math.pi * 5 / 24))), (True, 0.9**5)])
def test_a_resumed_run_takes_the_rates_arguments_and_length_that_it_is_given(of_class, expected):
    def made(rate, decay, total):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay)
        if of_class:
            return weight, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return weight, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedules.cosine(warmup=0, total=total))

    weight, optimizer, scheduler = made(1e-2, 0.1, 5)
    for _ in range(5):
        weight.grad = torch.ones(2)
        optimizer.step(), scheduler.step()
    assert of_class or optimizer.param_groups[0]["lr"] == 0  # the end of the first run
    weight, again, later = made(3e-2, 0.2, 24)
    asked = optim.settings(again)
    again.load_state_dict(optimizer.state_dict()), later.load_state_dict(scheduler.state_dict())
    optim.take_settings(again, later, asked)
    (group,) = again.param_groups
    assert group["weight_decay"] == 0.2 and group["lr"] == pytest.approx(3e-2 * expected)
    weight.grad = torch.ones(2)
    again.step(), later.step()
    following = 0.9**6 if of_class else 0.5 * (1 + math.cos(math.pi * 6 / 24))
    assert group["lr"] == pytest.approx(3e-2 * following) and again.state[weight]["step"] == 6


def test_a_state_of_another_optimizer_or_damaged_by_hand_is_one_sentence(tmp_path):
    trained, parts, step = problem("AdamW")
    step(0)
    folder = state.state_path(tmp_path, "run", 1)
    state.save_state(folder, {k: v.detach() for k, v in trained.items()}, parts, state.Position(1), state.Origin({}))
    _, other, _ = problem("SGD")
    (folder / "optimizer.pt").write_bytes(b"\x80\x02cos\nsystem\n(S'echo hacked'\ntR.")
    with pytest.raises(ConfigError, match="its optimizer does not fit"):
        state.load_state(folder, trained, other)
    (folder / "average.pt").unlink()
    with pytest.raises(ConfigError, match="it holds no average"):
        state.load_state(folder, trained, {"average": parts["average"]})


def test_a_warm_up_that_begins_at_0_is_refused_for_the_optimizer_that_divides_by_it():
    from library import options
    from library.option_checks import check_read

    given = [
        "--optimizer_type",
        "DAdaptSGD",
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        "3",
        "--learning_rate",
        "1",
    ]
    with pytest.raises(ConfigError, match="DAdaptSGD cannot begin with a learning rate of 0"):
        check_read(options.parse("z_image", given, "test"))


# ---------------------------------------------------------------- the program

RUN = ("--max_train_steps", "7", "--learning_rate", "1e-2")
CHANGES = {
    "more_workers": ((), ("--max_data_loader_n_workers", "3")),
    "average": (("--ema_decay", "0.8"), ("--ema_decay", "0.8")),
    "schedule_free": (("--optimizer_type", "AdamWScheduleFree"),) * 2,
    "flips_and_dropout": (("--flip_aug", "--caption_dropout_rate", "0.4"),) * 2,
    "full_accumulation_average": (("--gradient_accumulation_steps", "2", "--ema_decay", "0.8"),) * 2,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_resumed_run_is_the_run_that_never_stopped(toy, pictures, tmp_path, kind):  # noqa: F811
    before, after = CHANGES[kind]
    config = toy.with_name("toy_full.toml") if kind.startswith("full") else toy
    train(config, pictures, tmp_path / "whole", *RUN, *before)
    train(config, pictures, tmp_path / "parts", *RUN, "--save_every_n_steps", "4", "--save_state", *before)
    shutil.rmtree(tmp_path / "parts" / "run-step00000007-state")
    (tmp_path / "parts" / "run.safetensors").unlink()
    train(config, pictures, tmp_path / "parts", *RUN, "--resume", "auto", *after)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name in ("run.safetensors", *(["run-ema.safetensors"] if "average" in kind else [])):
        one, two = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name


HALF = ("--mixed_precision", "bf16", "--full_bf16")  # its corrections are of weights in half precision
OWN_RATE = ("--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False")
SLOW = {
    name: ("--optimizer_type", name, *{"adamw8bitkahan": HALF, "adafactor": OWN_RATE}.get(name, ()))
    for name in OPTIMIZERS
    if name not in ("adamw", "SGD")
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("what", ["lora", "full"])
def test_every_optimizer_through_the_whole_program(toy, pictures, tmp_path, kind, what):  # noqa: F811
    config = toy if what == "lora" else toy.with_name("toy_full.toml")
    free = optim.is_lr_free(kind)
    rate = ("--learning_rate", "1" if free else "1e-3")
    extra = ("--max_train_steps", "5", "--gradient_accumulation_steps", "2", *rate, *SLOW[kind])
    train(config, pictures, tmp_path / "whole", *extra)
    train(config, pictures, tmp_path / "parts", *extra, "--save_every_n_steps", "3", "--save_state")
    shutil.rmtree(tmp_path / "parts" / "run-step00000005-state")
    train(config, pictures, tmp_path / "parts", *extra, "--resume", "auto")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, two = (load_file(tmp_path / folder / "run.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


# ---------------------------------------------------------------- what changed


@pytest.fixture(scope="module")
def stopped(toy, pictures, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("stopped")
    train(toy, pictures, output, "--max_train_steps", "2", "--save_state_on_train_end")
    return output / "run-step00000002-state"


def resume(toy, pictures, tmp_path, stopped, *extra):  # noqa: F811
    return train(toy, pictures, tmp_path, "--max_train_steps", "3", "--resume", str(stopped), *extra)


def test_what_changes_the_result_is_named_and_needs_resume_anyway(toy, pictures, tmp_path, stopped, capsys):  # noqa: F811
    with pytest.raises(ConfigError, match="learning_rate .* -> 0.5.*--resume_anyway"):
        resume(toy, pictures, tmp_path, stopped, "--learning_rate", "0.5")
    resume(toy, pictures, tmp_path, stopped, "--learning_rate", "0.5", "--resume_anyway", "--save_precision", "bf16")
    said = capsys.readouterr().out
    assert re.search(
        r"step 2 of 3 \(epoch 1, step 2 of 3 in it\), loss average [\d.]+; learning rates: unet 0.5\n", said
    )
    assert "  network: 34 modules, 185,344 parameters, rank 4\n" in said
    assert "changed: learning_rate" in said and "(it changes the result)" in said
    assert "changed: save_precision None -> 'bf16'\n" in said and "changed: max_train_steps 2 -> 3\n" in said


def test_what_makes_a_state_impossible_to_load_is_refused_even_so(toy, pictures, tmp_path, stopped):  # noqa: F811
    for extra in (("--optimizer_type", "SGD"), ("--network_dim", "8")):
        with pytest.raises(ConfigError, match="cannot be loaded with .*--network_weights"):
            resume(toy, pictures, tmp_path, stopped, *extra, "--resume_anyway")


def test_an_edited_caption_and_a_new_picture_are_named(toy, pictures, tmp_path, stopped):  # noqa: F811
    folder = pictures.with_suffix("")
    caption, extra = folder / "2.txt", folder / "9.png"
    before = caption.read_text(encoding="utf-8")
    try:
        caption.write_text("quite another one", encoding="utf-8")
        with pytest.raises(ConfigError, match="the data: captions changed"):
            resume(toy, pictures, tmp_path, stopped)
        caption.write_text(before, encoding="utf-8")
        shutil.copy(folder / "2.png", extra)
        extra.with_suffix(".txt").write_text("one more", encoding="utf-8")
        with pytest.raises(ConfigError, match="the data, 5 pictures -> 6"):
            resume(toy, pictures, tmp_path, stopped)
    finally:
        caption.write_text(before, encoding="utf-8")
        extra.unlink(missing_ok=True), extra.with_suffix(".txt").unlink(missing_ok=True)


def test_files_that_moved_are_no_change_and_another_model_under_the_same_name_is_one(toy, pictures, tmp_path, stopped):  # noqa: F811
    moved = tmp_path / "moved"
    shutil.copytree(toy.parent, moved)
    resume(moved / "toy.toml", pictures, tmp_path / "out", stopped)
    vae = moved / "vae.safetensors"
    data = bytearray(vae.read_bytes())
    data[-1] ^= 1
    vae.write_bytes(data)
    with pytest.raises(ConfigError, match="vae .*vae.safetensors"):
        resume(moved / "toy.toml", pictures, tmp_path / "out", stopped)
    shutil.copy(toy.parent / "vae.safetensors", vae)


def test_a_mark_reads_little_of_a_large_file_and_notices_another_one(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(20 * 1024**2)
    before = provenance.file_mark(path)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert (
        provenance.file_mark(path) != before and provenance.file_mark(tmp_path / "none") == f"hub:{tmp_path / 'none'}"
    )


def test_the_average_is_the_written_formula(toy, pictures, tmp_path):  # noqa: F811
    trainer = train(toy, pictures, tmp_path, "--max_train_steps", "1", "--learning_rate", "1e-2", "--ema_decay", "0.75")
    start = train(toy, pictures, tmp_path / "start", "--max_train_steps", "1", "--unet_lr", "1e-30")
    for name, value in trainer.average.values.items():
        expected = 0.75 * start.trained[name] + 0.25 * trainer.trained[name]
        assert torch.allclose(value, expected.detach(), rtol=1e-5, atol=1e-7), name
    saved, averaged = (load_file(tmp_path / f"run{suffix}.safetensors") for suffix in ("", "-ema"))
    assert saved.keys() == averaged.keys() and any(not torch.equal(saved[k], averaged[k]) for k in saved)
