"""--fused_backward_pass: the run without it, to the bit, while no more than one gradient is there at a time."""

import json
import shutil

import pytest
import torch
from memory_support import deep_weights, toy_file
from safetensors.torch import load_file
from test_health import poison, prepared
from test_resume import OPTIMIZERS, problem
from training_support import losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import optim, state
from library.errors import ConfigError
from library.memory import fused

GUIDE = (  # what sd-scripts' guide of HunyuanImage-2.1 recommends
    "--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False",
    "warmup_init=False", "--lr_scheduler", "constant_with_warmup", "--max_grad_norm", "0.0",
)  # fmt: skip
FUSED = "--fused_backward_pass"
RUN = ("--max_train_steps", "5", "--learning_rate", "1e-3", "--max_grad_norm", "0")
ALONE = [kind for kind in OPTIMIZERS if not (optim.is_lr_free(kind) or optim.is_schedule_free(kind))]


@pytest.fixture(scope="module")
def full(toy, tmp_path_factory):  # noqa: F811
    """A full fine-tune of a narrow model; its file is float32, so that slices of one tensor share memory."""
    words = toy.with_name("toy_full.toml").read_text(encoding="utf-8")
    model = toy_file(tmp_path_factory.mktemp("narrow"), deep_weights(2))
    path = toy.with_name("toy_full_narrow.toml")
    path.write_text(words.replace('"denoiser.safetensors"', json.dumps(str(model))), encoding="utf-8")
    assert str(model) in path.read_text(encoding="utf-8")
    return path


def same_files(one, two, name="run.safetensors"):
    one, two = load_file(one / name), load_file(two / name)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ---------------------------------------------------------------- every optimizer, on a small problem


@pytest.mark.parametrize("kind", ALONE)
def test_every_optimizer_takes_the_same_steps_and_resumes_them(kind, tmp_path):
    """Against the same optimizer with all gradients at once; half of the fused run is resumed from a state.

    The problem's own call of `step` finds no gradient left.
    """
    whole, _, step = problem(kind)
    expected = [step(k) for k in range(8)]
    found = []
    for begin, end in ((0, 3), (3, 8)):
        trained, parts, step = problem(kind)
        fuse = fused.FusedBackward(parts["optimizer"], list(trained.values()))
        fuse.begins(torch.zeros(()))
        if begin:
            state.load_state(state.state_path(tmp_path, "run", 3), trained, parts)
        found += [step(k) for k in range(begin, end)]
        if not begin:
            tensors = {name: p.detach().clone() for name, p in trained.items()}
            state.save_state(state.state_path(tmp_path, "run", 3), tensors, parts, state.Position(3), state.Origin({}))
    assert found == expected and all(torch.equal(whole[name], trained[name]) for name in whole)


def test_optimizers_that_look_at_all_weights_are_found_by_trying(monkeypatch):
    """Those that a name gives away, and one of another package that counts its steps for the whole group."""

    class Counting(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3):
            super().__init__(params, {"lr": lr, "step": 0})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                group["step"] += 1
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"] / group["step"])

    class Options:
        optimizer_type, optimizer_args, learning_rate = "torch.optim.Counting", None, 1e-3

    monkeypatch.setattr(torch.optim, "Counting", Counting, raising=False)
    with pytest.raises(ConfigError, match="Counting, whose step looks at all weights at once"):
        optim.check_steps_alone(Options, 1e-3, "fused_backward_pass")
    for kind in ("dadaptadam", "adamwschedulefree"):
        Options.optimizer_type, Options.learning_rate = kind, 1.0
        with pytest.raises(ConfigError, match="whose step looks at all weights at once"):
            optim.check_steps_alone(Options, 1.0, "stochastic_rounding")
    Options.optimizer_type = "torch.optim.LBFGS"
    with pytest.raises(ConfigError, match="could not be tried on the CPU: .*closure"):
        optim.check_steps_alone(Options, 1.0, "stochastic_rounding")


# ---------------------------------------------------------------- the program

KINDS = {
    "full": RUN,
    "full, guide's recipe": (*RUN, *GUIDE, "--lr_warmup_steps", "3"),
    "full bf16": (*RUN, "--mixed_precision", "bf16", "--full_bf16"),
    "lora, 8 bit": (*RUN, "--optimizer_type", "AdamW8bit"),
    "lora, guide's recipe": (*RUN, *GUIDE, "--ema_decay", "0.9"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_norms_rates_and_files_are_equal_to_the_bit(toy, full, pictures, tmp_path, kind, monkeypatch):  # noqa: F811
    toml, extra = full if "full" in kind else toy, KINDS[kind]
    train(toml, pictures, tmp_path / "plain", *extra)
    there, real = [], fused.FusedBackward._gradient_is_there

    def counting(self, parameter):
        there.append(sum(p.grad is not None for p in self.parameters))
        real(self, parameter)

    monkeypatch.setattr(fused.FusedBackward, "_gradient_is_there", counting)
    trainer = train(toml, pictures, tmp_path / "fused", *extra, FUSED)
    assert (
        set(there) == {1} and len(there) == 5 * len(trainer.fused.norms) and len(set(losses(tmp_path / "fused"))) == 5
    )
    logs = [[json.loads(line) for line in (tmp_path / name / "run.jsonl").open()] for name in ("plain", "fused")]
    for one, two in zip(*logs, strict=True):
        assert (one.get("loss"), one.get("lr")) == (two.get("loss"), two.get("lr"))
        assert one.get("grad_norm", 0) == pytest.approx(two.get("grad_norm", 0), rel=1e-6)
    assert same_files(tmp_path / "plain", tmp_path / "fused")
    if "ema" in str(extra):
        assert same_files(tmp_path / "plain", tmp_path / "fused", "run-ema.safetensors")


def test_swapped_checkpointed_and_resumed_unfused_it_is_the_same_run(full, pictures, tmp_path):  # noqa: F811
    """With block swap the weights are updated on the device and written back when their block leaves."""
    tensors = {key: value.bfloat16() for key, value in deep_weights(5).items()}
    extra = (*RUN, "--pretrained_model_name_or_path", str(toy_file(tmp_path, tensors)), "--gradient_checkpointing")
    train(full, pictures, tmp_path / "plain", *extra)
    swap = (FUSED, "--blocks_to_swap", "4", "--save_every_n_steps", "3", "--save_state")
    trainer = train(full, pictures, tmp_path / "fused", *extra, *swap)
    assert losses(tmp_path / "fused") == losses(tmp_path / "plain")
    assert same_files(tmp_path / "plain", tmp_path / "fused")
    assert trainer.runtime.memory.swap.entered and not any(b.gradients for b in trainer.runtime.memory.swap.blocks)
    shutil.rmtree(tmp_path / "fused" / "run-step00000005-state")
    train(full, pictures, tmp_path / "fused", *extra, "--resume", "auto")
    assert losses(tmp_path / "fused") == losses(tmp_path / "plain")
    assert same_files(tmp_path / "plain", tmp_path / "fused")


@pytest.mark.parametrize("extra", [(), GUIDE], ids=["on the device", "on the host"])
def test_a_loss_that_is_no_number_leaves_no_trace(full, pictures, tmp_path, extra, capsys):  # noqa: F811
    """Against the same run without fusing, whose own test holds it against a loop that leaves the steps out."""
    trainers = []
    for name, more in (("plain", ()), ("fused", (FUSED,))):
        trainer = prepared(full, pictures, tmp_path / name, *RUN, *extra, *more)
        poison(trainer, "3.png")
        trainer.train()
        trainers.append(trainer)
        assert "is skipped: the loss is no finite number" in capsys.readouterr().out
    one, two = (t.trained for t in trainers)
    assert trainers[0].position.skipped == trainers[1].position.skipped > 0
    assert all(torch.equal(one[k], two[k]) and torch.isfinite(one[k]).all() for k in one)


@pytest.mark.parametrize("extra", [(), GUIDE], ids=["on the device", "on the host"])
def test_a_gradient_that_is_no_number_ends_the_step_there(full, pictures, tmp_path, extra, capsys):  # noqa: F811
    trainer = prepared(full, pictures, tmp_path, *RUN, *extra, FUSED)
    order, real = [], trainer.fused._step
    trainer.fused._step = lambda parameter: order.append(parameter) or real(parameter)
    middle, wrong = trainer.denoiser.layers[0].attention.to_out[0].weight, [False]
    middle.register_hook(lambda grad: grad * float("nan") if wrong[0] else grad)
    step = next(iter(trainer.loader(0)))
    trainer.outputs.before_training()

    def take(bad):
        wrong[0] = bad
        before = {id(p): p.detach().clone() for p in trainer.parameters}
        order.clear()
        trainer._update(step, [trainer._micro_step(step.batches[0], 0, 0)])
        assert not any(p.grad is not None for p in trainer.parameters)
        return [p for p in trainer.parameters if not torch.equal(before[id(p)], p)]

    everything = take(False)
    usual = list(order)
    changed = take(True)
    at = next(k for k, p in enumerate(usual) if p is middle)
    earlier = {id(p) for p in usual[:at]}
    assert 0 < len(changed) < len(everything) and {id(p) for p in changed} <= earlier
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
    assert len(take(False)) == len(everything)  # and on it goes
    trainer.guard.settle()
    assert (
        "is skipped from the first such gradient of its backward pass on: the gradient norm" in capsys.readouterr().out
    )


def test_what_it_does_not_go_with_is_one_sentence(full, pictures, tmp_path, monkeypatch):  # noqa: F811
    cases = {
        r"--max_grad_norm 1.0 \(default\): .* set it to 0": ("--max_grad_norm", "1.0"),
        "--gradient_accumulation_steps 2: .* larger batch_size": ("--gradient_accumulation_steps", "2"),
        "--mixed_precision fp16, .* use bf16": ("--mixed_precision", "fp16"),
        "--optimizer_type Prodigy, .* choose AdamW or Adafactor": ("--optimizer_type", "Prodigy"),
        "--optimizer_type AdamWScheduleFree, ": ("--optimizer_type", "AdamWScheduleFree"),
    }
    for message, words in cases.items():
        base = RUN[:4] if "default" in message else RUN
        given = () if "default" in message else words
        with pytest.raises(ConfigError, match=f"--fused_backward_pass does not go with {message}"):
            train(full, pictures, tmp_path, *base, *given, "--gradient_release")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--fused_backward_pass does not go with 2 processes, .* start one"):
        train(full, pictures, tmp_path, *RUN, FUSED)
