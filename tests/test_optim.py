"""Optimizers: every name takes a step and resumes to the bit; schedules against transformers and diffusers."""

from __future__ import annotations

import importlib.util
import io
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import library.families
from library import optim, options
from library.errors import ConfigError
from library.objective import FLOW

ROOT = Path(__file__).parents[1]
TOY = SimpleNamespace(
    name="toy",
    title="Toy",
    defaults={},
    options=(),
    save_formats=("comfy",),
    objective=FLOW,
    text_prefixes=(),
    tokenizers=(),
    parts=(),
)
NAMES = {
    "AdamW": "torch",
    "adamw": "torch",
    "SGDNesterov": "torch",
    "AdamW8bit": "bitsandbytes",
    "PagedAdamW": "bitsandbytes",
    "PagedAdamW8bit": "bitsandbytes",
    "PagedAdamW32bit": "bitsandbytes",
    "Lion8bit": "bitsandbytes",
    "PagedLion8bit": "bitsandbytes",
    "SGDNesterov8bit": "bitsandbytes",
    "Lion": "lion_pytorch",
    "Prodigy": "prodigyopt",
    "Adafactor": "transformers",
    "AdamWScheduleFree": "schedulefree",
    "RAdamScheduleFree": "schedulefree",
    "SGDScheduleFree": "schedulefree",
    "DAdaptation": "dadaptation",
    "DAdaptAdamPreprint": "dadaptation",
    "DAdaptAdaGrad": "dadaptation",
    "DAdaptAdam": "dadaptation",
    "DAdaptAdan": "dadaptation",
    "DAdaptAdanIP": "dadaptation",
    "DAdaptLion": "dadaptation",
    "DAdaptSGD": "dadaptation",
    "RMSprop": "torch",
    "torch.optim.Adagrad": "torch",
}


@pytest.fixture(autouse=True)
def toy_family(monkeypatch):
    monkeypatch.setitem(library.families.FAMILIES, "toy", "unused:UNUSED")
    monkeypatch.setattr(library.families, "get_family", lambda name: TOY)
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)  # dadaptation logs every step


def parse(*words: str) -> options.Options:
    return options.parse("toy", [str(word) for word in words])


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """One matrix of 4096 or more values, which bitsandbytes keeps in 8 bits, and a vector, which it does not."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((96, 64), (70,))]


def build(params: list[torch.nn.Parameter], o: options.Options) -> tuple:
    rate = o.learning_rate
    groups = [{"params": [params[0]], "lr": rate, "name": "a"}, {"params": [params[1]], "lr": rate, "name": "b"}]
    optimizer = optim.create_optimizer(o, groups)
    return optimizer, optim.create_scheduler(o, optimizer, 20)


def train(params, optimizer, scheduler, first: int, last: int) -> None:
    for step in range(first, last):
        optim.train_mode(optimizer)
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator) + p.detach()  # a bowl around 0, with noise
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)


def copies(params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def words_for(name: str) -> list[str]:
    free = any(part in name.lower() for part in ("schedulefree", "adafactor", "dadapt", "prodigy"))
    schedule = [] if "ScheduleFree" in name or name == "Adafactor" else ["--lr_scheduler", "cosine"]
    return ["--optimizer_type", name, *schedule, *([] if free and "Free" not in name else ["--learning_rate", "1e-2"])]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_moves_parameters_and_resumes_to_the_bit(name):
    pytest.importorskip(NAMES[name])
    o = parse(*words_for(name))
    params = parameters()
    optimizer, scheduler = build(params, o)
    before = copies(params)
    train(params, optimizer, scheduler, 0, 8)
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    file = io.BytesIO()
    torch.save(
        {"weights": copies(params), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file
    )
    train(params, optimizer, scheduler, 8, 12)

    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(weights) for weights in stored["weights"]]
    optimizer2, scheduler2 = build(resumed, o)
    optimizer2.load_state_dict(stored["optimizer"])
    scheduler2.load_state_dict(stored["scheduler"])
    train(resumed, optimizer2, scheduler2, 8, 12)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_saving_in_between_changes_nothing_of_a_schedule_free_run(name):
    pytest.importorskip("schedulefree")
    o = parse("--optimizer_type", name, "--learning_rate", "1e-2")
    plain, saved = parameters(), parameters()
    first, second = build(plain, o), build(saved, o)
    train(plain, *first, 0, 12)
    train(saved, *second, 0, 7)
    in_training = copies(saved)
    optim.eval_mode(second[0])
    averaged = copies(saved)
    assert not torch.equal(averaged[0], in_training[0])
    optim.eval_mode(second[0])
    assert torch.equal(saved[0], averaged[0]), "a second call changes nothing"
    train(saved, *second, 7, 12)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_modes_do_nothing_to_other_optimizers():
    params = parameters()
    optimizer, _ = build(params, parse())
    before = copies(params)
    optim.eval_mode(optimizer)
    optim.train_mode(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_arguments_reach_the_class():
    words = ("--optimizer_args", "betas=(0.8, 0.9)", "weight_decay=0.3", "--learning_rate", "1e-3")
    optimizer, _ = build(parameters(), parse(*words))
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == ((0.8, 0.9), 0.3)
    assert [(group["lr"], group["name"]) for group in optimizer.param_groups] == [(1e-3, "a"), (1e-3, "b")]
    nesterov, _ = build(parameters(), parse("--optimizer_type", "SGDNesterov", "--optimizer_args", "momentum=0.5"))
    assert (nesterov.defaults["nesterov"], nesterov.defaults["momentum"]) == (True, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer_args", "weight_decy=1"], "AdamW has no such argument; did you mean 'weight_decay'"),
        (["--optimizer_args", "lr=1"], "use --learning_rate"),
        (["--optimizer_args", "betas=(2,3)"], "refuses betas="),
        (["--optimizer_type", "AdamX"], "is not known; did you mean 'adam"),
        (["--optimizer_type", "torch.optim.AdamX"], "module torch.optim has no class AdamX"),
        (["--optimizer_type", "no_such_package.Thing"], "pip install no-such-package"),
        (["--lr_scheduler", "cosine", "--lr_scheduler_args", "cycles=3"], "did you mean 'num_cycles'"),
        (["--lr_scheduler", "cosine_with_min_lr"], "--lr_scheduler_min_lr_ratio"),
        (["--lr_scheduler", "piecewise_constant"], "step_rules"),
        (["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules=1:a"], "not of the form"),
        (["--lr_scheduler", "linear", "--lr_warmup_steps", "30"], "more than the run's 20 steps"),
        (["--lr_scheduler", "warmup_stable_decay", "--lr_warmup_steps", "15", "--lr_decay_steps", "10"], "more than"),
        (["--lr_scheduler", "adafactor:1e-3"], "goes with --optimizer_type Adafactor"),
        (["--lr_scheduler_type", "StepLR"], "refuses its arguments"),
        (["--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "size=3"], "StepLR has no such argument"),
        (["--lr_scheduler_type", "ReduceLROnPlateau"], "measured loss"),
        (["--lr_scheduler_type", "NoLR"], "no class NoLR"),
        (["--optimizer_type", "Adafactor", "--learning_rate", "1e-4"], "relative_step=False"),
        (["--optimizer_type", "Adafactor", "--lr_scheduler", "cosine"], "relative_step"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(words, message):
    with pytest.raises(ConfigError, match="^--") as caught:
        build(parameters(), parse(*words))
    assert message in str(caught.value)


def test_a_package_that_is_not_installed_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ConfigError, match="pip install lion-pytorch"):
        optim.create_optimizer(parse("--optimizer_type", "Lion"), [{"params": parameters(), "lr": 1e-3}])


def test_different_rates_do_not_go_with_an_optimizer_that_finds_one():
    pytest.importorskip("prodigyopt")
    first, second = parameters()
    groups = [{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}]
    with pytest.raises(ConfigError, match="the groups have 0.5, 1;"):
        optim.create_optimizer(parse("--optimizer_type", "Prodigy"), groups)


def test_adafactor_finds_its_rate_or_takes_ours():
    params = parameters()
    optimizer, scheduler = build(params, parse("--optimizer_type", "Adafactor", "--lr_scheduler", "adafactor:1e-3"))
    train(params, optimizer, scheduler, 0, 3)
    assert optimizer.param_groups[0]["lr"] is None and optim.learning_rates(optimizer, [])["a"] > 0
    words = ("--optimizer_args", "relative_step=False", "scale_parameter=False", "--learning_rate", "1e-4")
    optimizer, scheduler = build(parameters(), parse("--optimizer_type", "Adafactor", *words))
    assert optim.learning_rates(optimizer, []) == {"a": 1e-4, "b": 1e-4}


def test_check_finds_mistakes_without_a_model():
    optim.check(parse("--optimizer_type", "AdamW", "--lr_scheduler", "cosine"))
    optim.check(parse("--max_train_epochs", "1000", "--lr_scheduler", "linear", "--lr_warmup_steps", "2000"))
    with pytest.raises(ConfigError, match="no such argument"):
        optim.check(parse("--optimizer_args", "x=1"))
    with pytest.raises(ConfigError, match="more than the run's 100 steps"):
        optim.check(parse("--max_train_steps", "100", "--lr_scheduler", "linear", "--lr_warmup_steps", "2000"))


def test_only_the_package_that_was_asked_for_is_imported():
    program = (
        "import sys, torch; from library import optim\n"
        "optim.optimizer_class('AdamW')\n"
        "names = {'bitsandbytes', 'transformers', 'prodigyopt', 'schedulefree', 'dadaptation', 'lion_pytorch'}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ schedules against their outside definitions

TOTAL = 40
SCHEDULES = {
    "constant": ([], {}),
    "constant_with_warmup": (["--lr_warmup_steps", "6"], {}),
    "linear": (["--lr_warmup_steps", "6"], {}),
    "cosine": (["--lr_warmup_steps", "0.15"], {}),
    "cosine_with_restarts": (["--lr_warmup_steps", "6", "--lr_scheduler_num_cycles", "3"], {"num_cycles": 3}),
    "polynomial": (["--lr_warmup_steps", "6", "--lr_scheduler_power", "2"], {"power": 2.0}),
    "inverse_sqrt": (["--lr_warmup_steps", "6", "--lr_scheduler_timescale", "9"], {"timescale": 9}),
    "cosine_with_min_lr": (
        ["--lr_warmup_steps", "15%", "--lr_scheduler_min_lr_ratio", "0.1", "--lr_scheduler_num_cycles", "3"],
        {"min_lr_rate": 0.1, "num_cycles": 1.5},
    ),
    "cosine_warmup_with_min_lr": (
        ["--lr_warmup_steps", "6", "--lr_scheduler_min_lr_ratio", "0.1", "--lr_scheduler_args", "warmup_lr_rate=0.2"],
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    ),
    "warmup_stable_decay": (
        ["--lr_warmup_steps", "6", "--lr_decay_steps", "0.25", "--lr_scheduler_min_lr_ratio", "0.1",
         "--lr_scheduler_args", "decay_type=1-sqrt"],
        {"num_decay_steps": 10, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"},
    ),
}  # fmt: skip


def ours(words: list[str], total: int = TOTAL, rate: str = "1e-3") -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=float(rate))
    return curve(optim.create_scheduler(parse("--learning_rate", rate, *words), optimizer, total), optimizer, total)


def curve(scheduler, optimizer, total: int = TOTAL) -> list[float]:
    rates = []
    for _ in range(total + 5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers(name):
    from transformers.optimization import get_scheduler

    words, arguments = SCHEDULES[name]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    warmup = 6 if words else 0
    theirs = curve(get_scheduler(name, optimizer, warmup, TOTAL, arguments or None), optimizer)
    assert ours(["--lr_scheduler", name, *words]) == pytest.approx(theirs, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_schedules_are_those_of_diffusers(name):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    theirs = curve(get_scheduler(name, optimizer, num_warmup_steps=6, num_training_steps=TOTAL), optimizer)
    assert ours(["--lr_scheduler", name, "--lr_warmup_steps", "6"]) == pytest.approx(theirs, rel=1e-12, abs=1e-18)


def test_piecewise_constant_is_that_of_diffusers():
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    rules = "1:10,0.1:20,0.01:30,0.005"
    theirs = curve(get_scheduler("piecewise_constant", optimizer, step_rules=rules), optimizer)
    words = ["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", f"step_rules={rules}"]
    assert ours(words) == pytest.approx(theirs)


def test_a_class_of_torch_gets_the_length_of_the_run():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    theirs = curve(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=TOTAL, eta_min=1e-4), optimizer)
    assert ours(["--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "eta_min=1e-4"]) == theirs
    dotted = "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert ours(["--lr_scheduler_type", dotted, "--lr_scheduler_args", "eta_min=1e-4"]) == theirs


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_warm_up_counts_optimizer_steps_whatever_the_processes(monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    rates = ours(["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "10"])
    assert rates[5] == pytest.approx(0.5e-3) and rates[9] < 1e-3 and rates[10] == 1e-3


def test_the_lowest_rate_is_a_part_of_the_largest_rate_of_the_groups():
    a, b = parameters()
    optimizer = torch.optim.AdamW([{"params": [a], "lr": 1e-3}, {"params": [b], "lr": 1e-4}])
    o = parse("--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_args", "min_lr=1e-4")
    scheduler = optim.create_scheduler(o, optimizer, TOTAL)
    for _ in range(TOTAL):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-5])


# ------------------------------------------------------------------ logs


def test_rates_are_reported_by_group_name():
    a, b = parameters()
    groups = [{"params": [a], "lr": 1e-3, "name": "denoiser"}, {"params": [b], "lr": 2e-3, "name": "denoiser"}]
    optimizer = optim.create_optimizer(parse(), groups)
    assert optim.learning_rates(optimizer, groups) == {"denoiser": 1e-3, "denoiser_1": 2e-3}
    unnamed = torch.optim.AdamW([a], lr=1e-3)
    assert optim.learning_rates(unnamed, unnamed.param_groups) == {"lr": 1e-3}


@pytest.mark.skipif(importlib.util.find_spec("prodigyopt") is None, reason="prodigyopt is not installed")
def test_prodigy_reports_the_rate_that_it_found():
    params = parameters()
    optimizer, scheduler = build(params, parse("--optimizer_type", "Prodigy"))
    train(params, optimizer, scheduler, 0, 12)
    rates = optim.learning_rates(optimizer, [])
    assert rates["a"] == 1.0 and rates["d*a"] == optimizer.param_groups[0]["d"] > 1e-6


def test_schedule_free_reports_its_warm_up():
    pytest.importorskip("schedulefree")
    params = parameters()
    o = parse("--optimizer_type", "AdamWScheduleFree", "--learning_rate", "1e-2", "--optimizer_args", "warmup_steps=4")
    optimizer, scheduler = build(params, o)
    train(params, optimizer, scheduler, 0, 2)
    assert optim.learning_rates(optimizer, [])["a"] == pytest.approx(0.5e-2)
