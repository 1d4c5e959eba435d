"""--torch_compile: the same numbers by a few graphs for all blocks, and no run that ends because a compiler fails."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from memory_support import FAMILY, deep_weights, inputs, load, predict, toy_file
from training_support import losses, pictures, toy, train  # noqa: F401  (fixtures)

from library.errors import ConfigError
from library.memory.compiled import CompiledBlocks, of_the_compiler
from library.memory.denoiser import DenoiserMemory
from networks import lora

BLOCKS = 5 + 3 + 3


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return toy_file(tmp_path_factory.mktemp("deep"), deep_weights(5))


@contextlib.contextmanager
def backend(name, function):
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.register_backend(function, name=name)
    try:
        yield
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop(name)
        torch._dynamo.reset()


@pytest.fixture
def counted():
    """The graphs given to a compiler `counted`, which runs them as they are."""
    graphs = []
    with backend("counted", lambda module, example: graphs.append(module) or module.forward):
        yield graphs


def fails(module, example):
    raise NotImplementedError("no compiler here")


def prepared(file, kind: str, scheme=None, checkpointed=False, **options):
    """(model, a function that gives the prediction and all gradients of a step with dropout)."""
    whole = kind == "full"
    model = load(file, scheme).train().requires_grad_(whole)
    trained = model
    if not whole:
        trained = lora.create_network(1.0, 4, 4, None, [], model, neuron_dropout=0.2)
        trained.apply_to([], model, False, True)
        for k, p in enumerate(trained.parameters()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(k))
        trained.train()
    memory = DenoiserMemory(SimpleNamespace(**options), FAMILY, "cpu")
    memory.prepare(model, trained=whole, checkpointed=checkpointed)

    def step(given=None):
        torch.manual_seed(0)
        trained.zero_grad()
        out = predict(model, given)
        out.square().mean().backward()
        memory.before_update()
        return [out.detach(), *[p.grad.clone() for p in trained.parameters() if p.grad is not None]]

    return model, step


CASES = {
    "full": {"kind": "full"},
    "lora fp8, checkpointing, swap": {
        "kind": "lora",
        "scheme": "fp8_scaled",
        "checkpointed": True,
        "blocks_to_swap": 4,
    },
    "full, split attention": {"kind": "full", "split_attn": True, "checkpointed": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_few_graphs_serve_all_blocks_and_give_the_same_numbers(file, counted, case):
    plain = prepared(file, **CASES[case])[1]()
    model, step = prepared(file, **CASES[case], torch_compile=True, dynamo_backend="counted")
    with torch.no_grad():
        predict(model)
    assert not counted  # what is not trained is not compiled
    found, first = step(), len(counted)
    assert len(plain) == len(found) > 50 and all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    pieces = 2 if CASES[case].get("split_attn") else 1  # what is before and behind attention, which is not compiled
    assert 0 < first < BLOCKS * pieces
    step()
    assert len(counted) == first


def test_other_sizes_soon_share_graphs(file, counted):
    _, step = prepared(file, "full", torch_compile=True, dynamo_backend="counted")
    counts = []
    for side in (8, 12, 20, 24, 32):  # 8 and 12 with padding, which has a mask
        generator = torch.Generator().manual_seed(side)
        step((torch.randn(2, 16, side, 8, generator=generator), *inputs()[1:]))
        counts.append(len(counted))
    assert counts[-1] == counts[-2] == counts[-3] < 3 * counts[0]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_compiler_that_fails_is_told_once_and_the_blocks_run_as_they_are(file, kind, capsys):
    plain = prepared(file, kind, checkpointed=True)[1]()
    with backend("failing", fails):
        _, step = prepared(file, kind, checkpointed=True, torch_compile=True, dynamo_backend="failing")
        found = step()
        step()
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    said = capsys.readouterr().err
    assert said.count("warning: --torch_compile: ") == 1 and "no compiler here" in said and "run as they are" in said


@pytest.mark.parametrize("case", ["lora fp8, checkpointing, swap", "full, split attention"])
def test_a_compiler_that_fails_midway_leaves_recomputed_blocks_what_they_were(file, case):
    """The third graph fails, when blocks of another kind have been compiled and wait for their backward pass."""
    plain, made = prepared(file, **CASES[case])[1](), []

    def third_fails(module, example):
        made.append(module)
        return module.forward if len(made) < 3 else fails(module, example)

    with backend("third_fails", third_fails):
        _, step = prepared(file, **CASES[case], torch_compile=True, dynamo_backend="third_fails")
        found = step()
        assert all(torch.equal(a, b) for a, b in zip(plain, step(), strict=True))
    assert len(made) == 3 and all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_backward_pass_that_does_not_compile_shows_in_the_forward_pass(name, capsys):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def good(module, example):
        return make_boxed_func(module.forward)

    passes = {"fw_compiler": good, "bw_compiler": good} | {f"{name[0]}w_compiler": fails}
    block = torch.nn.Linear(2, 2)
    with backend("one_sided", aot_autograd(**passes)):
        CompiledBlocks([block], "one_sided")
        block(torch.ones(3, 2)).sum().backward()
    assert torch.equal(block.weight.grad, torch.full((2, 2), 3.0))
    assert capsys.readouterr().err.count("warning: --torch_compile: ") == 1


def test_what_is_no_failure_of_the_compiler_is_raised(file):
    block = torch.nn.Linear(2, 2)
    with backend("eager_", lambda module, example: module.forward):
        CompiledBlocks([block], "eager_")
        with pytest.raises(RuntimeError, match="mat1|shapes"):
            block(torch.zeros(3, 5))

    def exhausted(module, example):
        raise torch.OutOfMemoryError("no memory")

    with backend("exhausted", exhausted), pytest.raises(Exception, match="no memory") as raised:
        CompiledBlocks([another := torch.nn.Linear(2, 2)], "exhausted")
        another(torch.zeros(1, 2))
    assert not of_the_compiler(raised.value)


# ---------------------------------------------------------------- the program


def test_a_run_with_it_is_the_run_without_it(toy, pictures, tmp_path):  # noqa: F811
    """torch's backend `aot_eager` traces the block, takes its backward pass apart and runs both."""
    extra = ("--max_train_steps", "2", "--learning_rate", "1e-3", "--gradient_checkpointing")
    train(toy, pictures, tmp_path / "plain", *extra)
    trainer = train(toy, pictures, tmp_path / "aot", *extra, "--compile", "--compile_backend", "aot_eager")
    assert not trainer.runtime.memory.compiled.failed
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "aot"), rel=1e-5)


def test_mistakes_are_one_sentence(toy, pictures, tmp_path):  # noqa: F811
    for message, words in {
        "--dynamo_backend inducter is not known to torch; did you mean 'inductor'": ("--torch_compile", "--dynamo_backend", "inducter"),
        "--dynamo_backend eager .* has no effect without --torch_compile": ("--dynamo_backend", "eager"),
        "cudagraphs wants weights that stay": ("--torch_compile", "--dynamo_backend", "cudagraphs", "--blocks_to_swap", "1"),
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            train(toy, pictures, tmp_path, *words)
