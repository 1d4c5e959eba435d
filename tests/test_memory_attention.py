"""--attn_mode, --split_attn, --cpu_offload_checkpointing, --text_encoder_cpu: the same results, less in memory."""

import sys
import types
import weakref
from dataclasses import replace
from types import SimpleNamespace

import dit_cases
import mmdit_cases
import numpy as np
import pytest
import torch
from memory_support import FAMILY, deep_weights, inputs, load, predict, toy_file
from oracles import relative
from PIL import Image
from torch.nn import functional as F
from training_support import arguments, losses, pictures, toy, train  # noqa: F401  (fixtures)

from library import inference, options
from library.checkpointing import checkpoint_blocks
from library.errors import ConfigError
from library.memory.activations import HostActivations
from library.memory.attention import Attention, kernel, torch_attention
from library.memory.denoiser import DenoiserMemory
from library.option_checks import check_read
from library.trained import Trained


def exact(q, k, v, scale=None):
    """Attention by its formula, [B,H,T,D] float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    return scores.softmax(-1) @ v


@pytest.fixture
def packages(monkeypatch):
    """Packages with the published signatures: time before heads for xformers and flash, their names for the scale."""
    import diffusers.models.attention_dispatch  # noqa: F401  (it looks for the real packages when it is imported)
    import transformers.modeling_utils  # noqa: F401

    calls = []

    def swapped(name, q, k, v, scale):
        calls.append((name, q.dtype, tuple(q.shape), tuple(k.shape)))
        return exact(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2).to(q.dtype)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert attn_bias is None and p == 0
        return swapped("xformers", query, key, value, scale)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **rest):
        assert q.dtype in (torch.float16, torch.bfloat16) and dropout_p == 0 and not causal
        return swapped("flash", q, k, v, softmax_scale)

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **rest):
        assert tensor_layout == "HND" and not is_causal
        calls.append(("sageattn", q.dtype, tuple(q.shape), tuple(k.shape)))
        return exact(q, k, v, sm_scale).to(q.dtype)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    modules = {"xformers": types.ModuleType("xformers"), "xformers.ops": ops}
    for name, function in (("flash_attn", flash_attn_func), ("sageattention", sageattn)):
        modules[name] = types.ModuleType(name)
        setattr(modules[name], function.__name__, function)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


MODES = ["xformers", "flash", "sageattn"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_libraries_get_what_they_want_and_give_what_torch_gives(packages, mode, scale):
    q, k, v = random(2, 4, 9, 16), random(2, 2, 7, 16, seed=1), random(2, 2, 7, 16, seed=2)
    attend = Attention(mode)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, scale=scale, enable_gqa=True)
        expected = torch_attention(q, k, v, scale=scale, enable_gqa=True)
    assert out.dtype == expected.dtype == torch.bfloat16 and relative(out, expected) < 1e-2
    name, dtype, of_q, of_k = packages[0]
    shapes = ((2, 4, 9, 16), (2, 4, 7, 16)) if mode == "sageattn" else ((2, 9, 4, 16), (2, 7, 4, 16))
    assert (name, dtype, (of_q, of_k)) == (mode, torch.bfloat16, shapes) and len(packages) == 1


MASKS = {
    "all": lambda: torch.ones(2, 1, 1, 7, dtype=torch.bool),
    "padding": lambda: torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()[:, None, None],
    "in the middle": lambda: torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1]]).bool()[:, None, None],
    "additive": lambda: torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]])[:, None, None] * -1e9,
    "rows": lambda: torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1]]).bool()[:, None, None].expand(2, 1, 9, 7),
    "causal": lambda: torch.ones(9, 7).tril(2).bool()[None, None].expand(2, 1, 9, 7),
    "bias": lambda: random(2, 4, 9, 7, seed=5),
    "one for all": lambda: torch.tensor([1, 1, 1, 1, 1, 0, 0]).bool()[None, None, None],
}  # fmt: skip
OWN_KEYS = ("padding", "in the middle", "additive", "rows", "one for all")  # masks that are not needed item by item


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("mode", "split"), [("torch", True), ("xformers", False), ("xformers", True)])
def test_item_by_item_is_what_the_mask_gives(packages, mask, mode, split):
    q, k, v, given = random(2, 4, 9, 16), random(2, 4, 7, 16, seed=1), random(2, 4, 7, 16, seed=2), MASKS[mask]()
    given = given if given.dtype == torch.bool else given.float()
    expected = torch_attention(q, k, v, given)
    attend, masks = Attention(mode, split), []
    before, attend.kernel = attend.kernel, lambda *a: (masks.append(a[1].shape[2]), before(*a))[1]
    for _ in range(2):
        assert relative(attend(q, k, v, given), expected) < 1e-6
    lengths = {"padding": [7, 4], "additive": [7, 4], "in the middle": [5, 4], "rows": [5, 4], "one for all": [5, 5]}
    if mask in OWN_KEYS:
        assert masks == lengths[mask] * 2
    elif mask == "all":
        assert masks == ([7, 7] * 2 if split else [7, 7])
    else:
        assert not masks  # torch's with the mask


def test_padded_queries_that_see_nothing_do_not_matter():
    """An outer product of valid tokens, as Chroma makes it: rows of padding are empty."""
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()
    mask = valid[:, None, :, None] & valid[:, None, None, :]
    q, k, v = (random(2, 4, 7, 16, seed=s) for s in range(3))
    out, expected = Attention("torch", split=True)(q, k, v, mask), torch_attention(q, k, v, mask)
    assert relative(out[0], expected[0]) < 1e-6 and relative(out[1, :, :4], expected[1, :, :4]) < 1e-6


def test_a_mask_is_looked_at_once_and_never_taken_for_another(monkeypatch):
    from library.memory import attention

    looked, real = [], attention._keys
    monkeypatch.setattr(attention, "_keys", lambda *a: (looked.append(1), real(*a))[1])
    attend, mask = Attention("torch", split=True), MASKS["padding"]()
    q, k, v = random(2, 4, 9, 16), random(2, 4, 7, 16, seed=1), random(2, 4, 7, 16, seed=2)
    for _ in range(5):
        attend(q, k, v, mask[:, 0, 0][:, None, None, :])  # another view of it, as each block of a model makes one
    assert len(looked) == 2
    mask[0, ..., 5:] = False
    assert relative(attend(q, k, v, mask), torch_attention(q, k, v, mask)) < 1e-6 and len(looked) == 4
    for seed in range(20):
        other = random(2, 1, 1, 7, seed=seed) > -0.5
        assert relative(attend(q, k, v, other), torch_attention(q, k, v, other)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_package_that_is_not_there_or_does_not_load_is_one_sentence(mode, monkeypatch):
    module = {"xformers": "xformers.ops", "flash": "flash_attn", "sageattn": "sageattention"}[mode]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"--attn_mode {mode} needs the package .*pip install"):
        kernel(mode)
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))  # of another version
    with pytest.raises(ConfigError, match=f"--attn_mode {mode}: the package .* does not load here"):
        kernel(mode)


# ---------------------------------------------------------------- denoisers


GOLDENS = [*mmdit_cases.GOLDENS, *dit_cases.GOLDENS]


def golden_outcome(case, model):
    if hasattr(case, "run"):
        return case.run(model, case.cases[-1])
    return case.predict(model, *case.inputs(case.cases[-1]))


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: f"{case.file}-{case.cases[-1]}")
def test_every_denoiser_computes_with_the_chosen_attention(case, packages, tmp_path):
    model = case.model(tmp_path)
    family = replace(FAMILY, blocks=getattr(case.module, "BLOCKS", FAMILY.blocks))
    own, calls = F.scaled_dot_product_attention, []
    with torch.no_grad():
        expected = golden_outcome(case, model)
        F.scaled_dot_product_attention = lambda *a, **k: (calls.append(1), own(*a, **k))[1]
        try:
            golden_outcome(case, model)
        finally:
            F.scaled_dot_product_attention = own
        for chosen in ({"attn_mode": "xformers"}, {"split_attn": True}):
            packages.clear()
            fresh = case.model(tmp_path)
            DenoiserMemory(SimpleNamespace(**chosen), family, "cpu").prepare(fresh)
            assert relative(golden_outcome(case, fresh), expected) < 1e-5
            assert F.scaled_dot_product_attention is own
            assert not chosen.get("attn_mode") or len(packages) >= len(calls) > 0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return toy_file(tmp_path_factory.mktemp("model"), deep_weights(3))


@pytest.mark.parametrize("chosen", [{"split_attn": True}, {"attn_mode": "xformers", "split_attn": True}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_the_same_also_when_blocks_run_again_in_the_backward_pass(file, packages, chosen, checkpointed):
    def outcome(options):
        model = load(file).requires_grad_(True)
        DenoiserMemory(options, FAMILY, "cpu").prepare(model, checkpointed=checkpointed)
        predict(model, inputs()).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, other = outcome(SimpleNamespace()), outcome(SimpleNamespace(**chosen))
    assert plain.keys() == other.keys() and len(plain) > 20
    for name, gradient in plain.items():
        assert relative(other[name], gradient) < 1e-4, name


# ---------------------------------------------------------------- activations on the host


@pytest.mark.parametrize("offloaded", [True, False])
def test_block_inputs_wait_on_the_host_and_gradients_are_the_same_to_the_bit(file, offloaded):
    def outcome(around):
        model = load(file).requires_grad_(True)
        seen = []
        for block in model.layers:

            def before(module, args):
                seen.append(weakref.ref(args[0]))

            block.register_forward_pre_hook(before)
        checkpoint_blocks(model, FAMILY.blocks, **around)
        loss = predict(model, inputs()).square().mean()
        alive = sum(ref() is not None for ref in seen)
        loss.backward()
        return alive, [p.grad for p in model.parameters() if p.grad is not None]

    kept, expected = outcome({})
    activations = HostActivations("cpu", least=1000)
    if not offloaded:
        activations.least = 10**9
    alive, found = outcome({"around": activations.around})
    assert kept == 3 and alive == (0 if offloaded else 3)
    assert (activations.moved > 0) == offloaded
    assert len(found) == len(expected) > 20 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_without_a_gradient_stay_where_they_are():
    activations = HostActivations("cpu", least=1)
    table, x = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    assert activations._pack(table) is table
    packed = activations._pack(x * 1)
    assert not isinstance(packed, torch.Tensor) and torch.equal(activations._unpack(packed), x)


# ---------------------------------------------------------------- runs

STEPS = ("--max_train_steps", "3", "--learning_rate", "1e-2")


def test_runs_with_each_of_them_have_the_same_losses(toy, pictures, tmp_path, packages, monkeypatch):  # noqa: F811
    from library.memory import activations

    monkeypatch.setattr(activations, "LEAST", 1)
    extra = (*STEPS, "--gradient_checkpointing")
    train(toy, pictures, tmp_path / "plain", *extra)
    found = {}
    for name, words in {
        "offload": ("--cpu_offload_checkpointing",),
        "split": ("--split_attn",),
        "xformers": ("--attn_mode", "xformers"),
        "text": ("--text_encoder_cpu",),
    }.items():
        trainer = train(toy, pictures, tmp_path / name, *extra, *words)
        found[name] = losses(tmp_path / name)
        if name == "offload":
            assert trainer.runtime.memory.activations.moved > 10
    plain = losses(tmp_path / "plain")
    assert found["offload"] == plain and found["text"] == plain
    assert found["split"] == pytest.approx(plain, rel=1e-5) and found["xformers"] == pytest.approx(plain, rel=1e-5)
    assert any(name == "xformers" for name, *_ in packages)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--cpu_offload_checkpointing"], "has no effect without --gradient_checkpointing"),
        (["--attn_mode", "sageattn"], "sageattn has no backward pass"),
        (["--attn_mode", "flash"], "half precision only; add --mixed_precision bf16"),
        (["--attn_mode", "falsh"], "did you mean 'flash'"),
        (["--xformers"], "use --attn_mode"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(toy, pictures, extra, said):  # noqa: F811
    with pytest.raises(ConfigError, match=said):
        check_read(options.parse("z_image", arguments(toy, pictures, toy.parent / "out", *extra), "test"))


def test_a_missing_package_is_said_before_anything_is_loaded(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    from library import checkpoints

    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(checkpoints, "load_part", None)
    with pytest.raises(ConfigError, match="needs the package xformers"):
        train(toy, pictures, tmp_path, "--attn_mode", "xformers")


def test_text_encoders_are_placed_on_the_cpu_when_asked(toy, pictures, monkeypatch):  # noqa: F811
    from library.runtime import Runtime

    for words, place in (((), "meta"), (("--text_encoder_cpu",), "cpu")):
        chosen = options.parse("z_image", arguments(toy, pictures, toy.parent / "o", *words), "test")
        runtime = Runtime(chosen, SimpleNamespace(family=FAMILY, trained=Trained()))
        runtime.device = torch.device("meta")  # stands for a device that is not the CPU
        encoders, _ = runtime.load_text_encoders()
        assert {p.device.type for p in encoders[0].parameters()} == {place}
        assert {p.dtype for p in encoders[0].parameters()} == {torch.bfloat16}


def test_the_inference_script_takes_the_memory_options(toy, packages, tmp_path, monkeypatch):  # noqa: F811
    path, order = toy_file(tmp_path, deep_weights()), []
    decode, drop = inference.Studio.decode, inference.Studio.drop_denoiser
    monkeypatch.setattr(inference.Studio, "decode", lambda *a: (order.append("decode"), decode(*a))[1])
    monkeypatch.setattr(inference.Studio, "drop_denoiser", lambda *a: (order.append("drop"), drop(*a))[1])

    def picture(name, *extra):
        folder = toy.parent
        inference.main("z_image", [
            "--dit", str(path), "--vae", str(folder / "vae.safetensors"), "--infer_steps", "2", "--device", "cpu",
            "--text_encoder", str(folder / "text_encoder.safetensors"), "--prompt", "a red cat", "--image_size", "64", "64",
            "--save_path", str(tmp_path / name), *extra,
        ])  # fmt: skip
        return np.asarray(Image.open(tmp_path / name)).astype(int)

    plain = picture("plain.png")
    assert order == ["drop", "decode"]
    for name, words in {
        "swap": ("--blocks_to_swap", "6"), "xformers": ("--attn_mode", "xformers"), "sage": ("--attn_mode", "sageattn"),
        "text": ("--text_encoder_cpu",), "high": ("--highvram",),
    }.items():  # fmt: skip
        assert np.abs(picture(f"{name}.png", *words) - plain).max() <= 1, name
    assert {name for name, *_ in packages} == {"xformers", "sageattn"}
    with pytest.raises(ConfigError, match="blocks_to_swap 60"):
        picture("none.png", "--blocks_to_swap", "60")
