"""Weights in bf16 that learn from small steps: stochastic rounding, AdamW8bitKahan; and states that keep their format."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_memory_fused import FUSED, GUIDE, RUN, full, same_files  # noqa: F401  (fixture)
from training_support import losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import optim, state
from library.errors import ConfigError
from library.memory.fused import FusedBackward, step_alone
from library.rounding import round_stochastically


def test_the_mean_is_exact_and_only_the_two_neighbours_come_out():
    """Against torch's own conversion: the neighbours of a value are those that rounding down and up would give."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator) * torch.logspace(-6, 3, 200)
    rounded = torch.empty(4000, 200, dtype=torch.bfloat16)
    round_stochastically(rounded, values.expand(4000, 200).contiguous(), generator)
    nearest = values.bfloat16()
    digit = 2.0 ** (values.abs().log2().floor() - 7)
    assert (rounded.float() - values).abs().le(digit).all()
    assert all(len(set(column.tolist())) <= 2 for column in rounded.T)
    assert ((rounded.double().mean(0) - values.double()).abs() / digit).max() < 5 * 0.5 / 4000**0.5
    assert (rounded == nearest).any(0).all() and (rounded != nearest).any(0).sum() > 190
    exact = torch.empty_like(nearest)
    round_stochastically(exact, nearest.float(), generator)
    assert torch.equal(exact, nearest)


# ---------------------------------------------------------------- optimizers


def options(kind: str, rate: float, stochastic: bool = False, arguments=None):
    return SimpleNamespace(optimizer_type=kind, optimizer_args=arguments, learning_rate=rate, seed=3,
                           stochastic_rounding=stochastic, given=lambda name: False)  # fmt: skip


def moved(kind: str, dtype: torch.dtype, stochastic: bool = False, steps: int = 60, decay: float = 0.0):
    """How far each weight of 80 x 64 ones goes in steps of about 2e-5, a hundredth of bf16's digit there."""
    weight = torch.nn.Parameter(torch.ones(80, 64, dtype=dtype))
    chosen = options(kind, 2e-5, stochastic, [f"weight_decay={decay}"])
    optimizer = optim.create_optimizer(chosen, [{"params": [weight], "lr": 2e-5}])
    for number in range(steps):
        optim.begin_step(optimizer, number)
        generator = torch.Generator().manual_seed(number)
        weight.grad = (1 + 0.5 * torch.randn(80, 64, generator=generator)).to(dtype)
        optimizer.step()
    return weight.detach().float() - 1, optimizer


def test_small_steps_are_lost_in_bf16_kept_by_kahan_and_kept_on_the_average_by_stochastic_rounding():
    """Against the optimizers themselves on float32 weights."""
    pytest.importorskip("bitsandbytes")
    for decay in (0.0, 3.0):
        expected, _ = moved("AdamW8bit", torch.float32, decay=decay)
        assert expected.abs().min() > 0.0005 and not moved("AdamW8bit", torch.bfloat16, decay=decay)[0].any()
        kept, optimizer = moved("AdamW8bitKahan", torch.bfloat16, decay=decay)
        correction = next(iter(optimizer.state.values()))["correction"]
        assert correction.dtype == torch.bfloat16 and (kept + correction - expected).abs().max() < 2e-4
        assert abs((kept + correction - expected).mean() / expected.mean()) < 0.01
        assert (kept - expected).abs().max() <= 2.0**-9 + 2e-4  # half a digit of bf16
    for kind in ("AdamW", "AdamW8bit", "Lion"):
        expected, _ = moved(kind, torch.float32)
        rounded, optimizer = moved(kind, torch.bfloat16, stochastic=True)
        error = (rounded - expected).mean() / expected.mean()
        assert abs(error) < 0.05, kind  # 5120 weights, each rounded 60 times
        assert all(v.dtype != torch.bfloat16 for v in _tensors(optimizer))


def _tensors(optimizer):
    return [v for one in optimizer.state.values() for v in one.values() if isinstance(v, torch.Tensor)]


def test_float32_weights_need_no_correction_and_are_those_of_adamw8bit():
    pytest.importorskip("bitsandbytes")
    (one, _), (two, optimizer) = (moved(kind, torch.float32, steps=3) for kind in ("AdamW8bit", "AdamW8bitKahan"))
    assert torch.equal(one, two) and "correction" not in next(iter(optimizer.state.values()))


def problem(kind: str, stochastic: bool):
    """(weights by name, parts of a state, step function) of a small regression with all weights in bf16."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 4)).bfloat16()
    arguments = ["relative_step=False", "scale_parameter=False"] if kind == "Adafactor" else None
    groups = [{"params": list(model.parameters()), "lr": 1e-3, "name": "model"}]
    optimizer = optim.create_optimizer(options(kind, 1e-3, stochastic, arguments), groups)

    def step(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(32, 64, generator=generator), torch.randn(32, 4, generator=generator)
        optim.begin_step(optimizer, number)
        loss = (model(x.bfloat16()) - y).square().mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        return float(loss.detach())

    return dict(model.named_parameters()), {"optimizer": optim.Stored(optimizer)}, step


KINDS = [("AdamW", True), ("AdamW8bit", True), ("Adafactor", True), ("Adafactor", False), ("AdamW8bitKahan", False)]


@pytest.mark.parametrize(("kind", "stochastic"), KINDS)
def test_half_precision_weights_resume_to_the_bit_and_fused_is_the_same(kind, stochastic, tmp_path):
    """Adafactor's states are float32 beside bf16 weights, which torch's way to load a state would round."""
    pytest.importorskip("bitsandbytes")
    whole, _, step = problem(kind, stochastic)
    expected, found = [step(k) for k in range(8)], []
    folder = state.state_path(tmp_path, "run", 4)
    for numbers in (range(4), range(4, 8)):
        trained, parts, step = problem(kind, stochastic)
        if numbers[0]:
            FusedBackward(parts["optimizer"].optimizer, list(trained.values())).begins(torch.zeros(()))
            state.load_state(folder, trained, parts)
        found += [step(k) for k in numbers]
        state.save_state(folder, {k: v.detach().clone() for k, v in trained.items()}, parts, state.Position(4), state.Origin({}))  # fmt: skip
    assert found == expected and all(torch.equal(whole[name], trained[name]) for name in whole)


def test_the_rounding_depends_on_the_place_of_a_weight_and_not_on_the_order_or_the_generator():
    results = []
    for order, number in (((0, 1), 5), ((1, 0), 5), ((0, 1), 6)):
        weights = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = optim.create_optimizer(options("SGD", 1e-4, True), [{"params": weights, "lr": 1e-4}])
        optim.begin_step(optimizer, number)
        for k in order:
            torch.manual_seed(k + order[0])
            weights[k].grad = torch.ones_like(weights[k])
            step_alone(optimizer, 0, weights[k])
        results.append([weight.detach() for weight in weights])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(*results[0]) and results[0][0].unique().numel() == 2
    assert not torch.equal(results[0][0], results[2][0])  # another step, other numbers


# ---------------------------------------------------------------- the program

BF16 = ("--mixed_precision", "bf16", "--full_bf16", "--stochastic_rounding")


def test_a_full_fine_tune_with_the_guides_recipe_fused_and_resumed(full, pictures, tmp_path):  # noqa: F811
    extra = (*RUN, *GUIDE, *BF16)
    train(full, pictures, tmp_path / "plain", *extra)
    train(full, pictures, tmp_path / "fused", *extra, FUSED, "--save_every_n_steps", "2", "--save_state")
    assert losses(tmp_path / "fused") == losses(tmp_path / "plain") and same_files(
        tmp_path / "plain", tmp_path / "fused"
    )
    for step in (4, 5):
        shutil.rmtree(tmp_path / "fused" / f"run-step0000000{step}-state")
    train(full, pictures, tmp_path / "fused", *extra, FUSED, "--resume", "auto")
    assert losses(tmp_path / "fused") == losses(tmp_path / "plain") and same_files(
        tmp_path / "plain", tmp_path / "fused"
    )
    nearest = [word for word in extra if word != "--stochastic_rounding"]
    train(full, pictures, tmp_path / "nearest", *nearest)
    assert not same_files(tmp_path / "plain", tmp_path / "nearest")


def test_the_kahan_recipe_of_diffusion_pipe(full, pictures, tmp_path):  # noqa: F811
    """adamw8bitkahan with gradient_release, at a rate so small that bf16 alone would hardly move."""
    pytest.importorskip("bitsandbytes")
    extra = ("--max_train_steps", "3", "--learning_rate", "5e-6", "--max_grad_norm", "0", *BF16[:3], "--optimizer_args",
             "betas=0.9,0.99", "weight_decay=0.01", "eps=1e-8", "--gradient_release")  # fmt: skip
    start = load_file(
        train(full, pictures, tmp_path, *extra, "--optimizer_type", "adamw8bitkahan").denoiser.binding.source
    )
    kahan = load_file(tmp_path / "run.safetensors")
    train(full, pictures, tmp_path / "other", *extra, "--optimizer_type", "AdamW8bit")
    other = load_file(tmp_path / "other" / "run.safetensors")
    still = [sum(int((one[k] == start[k].bfloat16()).sum()) for k in start) for one in (kahan, other)]
    assert still[0] < still[1]


def test_what_it_does_not_go_with_is_one_sentence(full, pictures, tmp_path, capsys):  # noqa: F811
    cases = {
        "--stochastic_rounding .* has no effect without --full_bf16": ("--stochastic_rounding",),
        "has no effect with --optimizer_type AdamW8bitKahan": (*BF16, "--optimizer_type", "AdamW8bitKahan"),
        "--stochastic_rounding does not go with --optimizer_type Prodigy": (*BF16, "--optimizer_type", "Prodigy"),
        "--stochastic_rounding does not go with --optimizer_type LBFGS": (*BF16, "--optimizer_type", "LBFGS"),
    }
    for message, words in cases.items():
        with pytest.raises(ConfigError, match=message):
            train(full, pictures, tmp_path, *RUN, *words)
