"""Weights in 8 and 4 bits: against written rules and other implementations, and what is in memory at any time."""

import weakref

import pytest
import torch
from memory_support import FAMILY, KEPT, inputs, load, predict, toy_file, toy_weights
from oracles import relative
from torch import nn
from torch.nn import functional as F

from library import checkpoints, quantised
from library.errors import ConfigError
from library.memory.quantised_linear import FP8, Fp8Linear, Nf4Linear, block_size, is_quantised, quantised_like

SCHEMES = [("fp8_scaled", "e4m3"), ("fp8_scaled", "e5m2"), ("fp8_base", "e4m3"), ("fp8_base", "e5m2"), ("nf4", "e4m3")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return toy_file(tmp_path_factory.mktemp("model"))


def made(weight, scheme, fp8_format="e4m3", dtype=torch.float32, bias=None):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    module = quantised_like(linear, scheme, dtype)
    module.quantise(weight, scheme, fp8_format)
    return module


def values_of(fp8_format):
    """All finite values of an fp8 format, from its bits."""
    bits = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}[fp8_format]
    exponent_bits, mantissa_bits, bias = bits
    out = set()
    for code in range(128):
        e, m = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        if (fp8_format == "e4m3" and code == 127) or (fp8_format == "e5m2" and e == 31):
            continue  # not a number, infinity
        size = m / 2**mantissa_bits * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**mantissa_bits) * 2.0 ** (e - bias)
        out |= {size, -size}
    return torch.tensor(sorted(out), dtype=torch.float64)


@pytest.mark.parametrize(("scheme", "fp8_format"), SCHEMES[:4])
def test_fp8_takes_the_nearest_value_of_the_format(scheme, fp8_format):
    torch.manual_seed(0)
    weight = torch.randn(6, 128) * torch.logspace(-4, 0, 6)[:, None]
    weight[2, :64] = 0
    table = values_of(fp8_format)
    found = made(weight, scheme, fp8_format).weight.double()
    for row in range(6):
        for start in range(0, 128, 64):
            block = weight[row, start : start + 64].double()
            scale = 1.0
            if scheme == "fp8_scaled" and block.any():
                scale = float((block.abs().max() / table.max()).to(torch.bfloat16))
            nearest = (block[:, None] / scale - table).abs().amin(-1) * scale
            ours = (found[row, start : start + 64] - block).abs()
            assert torch.all(ours <= nearest * (1 + 1e-5) + 1e-12)


def test_scales_keep_small_blocks_that_a_plain_cast_loses():
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * 1e-3
    assert (
        relative(made(weight, "fp8_scaled").weight, weight)
        < 0.03
        < 0.2
        < relative(made(weight, "fp8_base").weight, weight)
    )


def test_nf4_is_what_bitsandbytes_own_layer_computes():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight, x = torch.randn(48, 100), torch.randn(3, 100)
    theirs = bnb.nn.Linear4bit(100, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    theirs = theirs.to("cpu")
    expected = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    module = made(weight, "nf4")
    assert torch.equal(module.weight, expected) and 0.05 < relative(module.weight, weight) < 0.13
    assert relative(module(x), F.linear(x, expected)) < 1e-6


@pytest.mark.parametrize("width", [64, 48, 100, 30, 7, 640])
def test_blocks_divide_every_row(width):
    size = block_size(width)
    assert width % size == 0 and (size <= 64 or size == width)
    weight = torch.randn(3, width)
    assert relative(made(weight, "fp8_scaled").weight, weight) < 0.05


@pytest.mark.parametrize(("scheme", "fp8_format"), SCHEMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_computes_and_differentiates_as_the_dequantised_one(scheme, fp8_format, autocast):
    torch.manual_seed(0)
    bias, x = torch.randn(24), torch.randn(2, 5, 96, requires_grad=True)
    module = made(torch.randn(24, 96), scheme, fp8_format, bias=bias)
    plain, y = nn.Linear(96, 24), x.detach().clone().requires_grad_()
    plain.weight, plain.bias = nn.Parameter(module.weight.clone(), requires_grad=False), nn.Parameter(bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, expected = module(x), plain(y)
    assert ours.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.allclose(ours, expected, atol=1e-5 if not autocast else 1e-2)
    goal = torch.randn(2, 5, 24)
    (ours * goal).sum().backward()
    (expected * goal).sum().backward()
    assert relative(x.grad, y.grad) < (1e-6 if not autocast else 5e-3)
    none = torch.randn(0, 96, requires_grad=True)  # an expert to which no token is routed
    module(none).sum().backward()
    assert none.grad.shape == (0, 96)


@pytest.mark.parametrize(("scheme", "fp8_format"), SCHEMES)
def test_the_model_is_the_dequantised_model_in_output_and_gradients(file, scheme, fp8_format):
    from networks import lora

    def outcome(model):
        torch.manual_seed(0)
        network = lora.create_network(1.0, 4, 4, None, [], model)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        network.apply_to([], model, False, True)
        noisy, sigma, conds = inputs()
        noisy.requires_grad_()
        out = predict(model, (noisy, sigma, conds))
        out.square().mean().backward()
        return out.detach(), noisy.grad, [p.grad for p in network.parameters()]

    quantised_model = load(file, scheme, fp8_format)
    plain = load(file)
    for name, module in quantised_model.named_modules():
        if is_quantised(module):
            plain.get_submodule(name).weight = nn.Parameter(module.weight.clone(), requires_grad=False)
    (ours, at_input, at_network), (expected, input_grad, network_grads) = outcome(quantised_model), outcome(plain)
    assert relative(ours, expected) < 1e-5 and relative(at_input, input_grad) < 1e-5
    assert len(at_network) > 20
    for a, b in zip(at_network, network_grads, strict=True):
        assert relative(a, b) < 1e-4


BOUNDS = {  # relative error of the toy's output; docs/memory.md has those of a larger model
    ("fp8_scaled", "e4m3"): 0.08, ("fp8_base", "e4m3"): 0.09, ("fp8_scaled", "e5m2"): 0.15,
    ("fp8_base", "e5m2"): 0.18, ("nf4", "e4m3"): 0.3,
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "fp8_format"), SCHEMES)
def test_the_output_stays_near_that_of_the_whole_model(file, scheme, fp8_format):
    with torch.no_grad():
        error = relative(predict(load(file, scheme, fp8_format)), predict(load(file)))
    assert 1e-3 < error < BOUNDS[scheme, fp8_format]


def test_only_the_blocks_are_quantised_and_what_the_family_keeps_is_kept(file):
    model = load(file, "fp8_scaled")
    held = {name for name, module in model.named_modules() if is_quantised(module)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = linear - held
    assert len(held) > 20 and all(name.split(".")[0] in FAMILY.blocks for name in held)
    assert {"cap_embedder.1", "t_embedder.mlp.0"} <= kept and any("adaLN_modulation" in name for name in kept)
    assert all(name.split(".")[0] not in FAMILY.blocks or "adaLN_modulation" in name for name in kept)
    assert KEPT == ("adaLN_modulation",)


@pytest.mark.parametrize("scheme", ["fp8_scaled", "nf4"])
def test_while_loading_no_more_than_one_whole_weight_is_in_memory(file, scheme, monkeypatch):
    alive, most = [], 0
    read = checkpoints.Reader.tensor

    def watched(self, key, dtype=None):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        value = read(self, key, dtype)
        if value.ndim == 2 and key.startswith(tuple(f"{name}." for name in FAMILY.blocks)) and "adaLN" not in key:
            alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(checkpoints.Reader, "tensor", watched)
    model = load(file, scheme)
    assert len(alive) > 20 and most <= 1 and not any(ref() is not None for ref in alive)
    held = sum(t.numel() * t.element_size() for m in model.modules() if is_quantised(m) for t in m.stored())
    values = sum(m.in_features * m.out_features for m in model.modules() if is_quantised(m))
    assert held / values < {"fp8_scaled": 1.05, "nf4": 0.56}[scheme]


def test_no_whole_weight_is_kept_for_the_backward_pass(file):
    model, kept = load(file, "fp8_scaled"), []
    sizes = {m.in_features * m.out_features for m in model.modules() if is_quantised(m)}
    noisy, sigma, conds = inputs(1)
    noisy.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        predict(model, (noisy, sigma, conds))
    assert any(t.dtype == torch.float8_e4m3fn for t in kept)
    whole = [t for t in kept if t.is_floating_point() and t.element_size() > 1 and t.numel() in sizes and t.ndim == 2]
    assert not whole


def scaled_file(folder, convention):
    """The toy in one of ComfyUI's fp8 conventions, and the codes that it holds."""
    tensors, codes = dict(toy_weights()), {}
    for key, value in list(tensors.items()):
        if value.ndim != 2 or not key.startswith(tuple(f"{name}." for name in FAMILY.blocks)):
            continue
        stem = key.removesuffix(".weight")
        rows = convention == "comfy_quant" and "qkv" in key
        scale = value.abs().amax(1, keepdim=True) / 448 if rows else value.abs().amax() / 448
        if convention == "plain":
            scale = torch.ones(())
        elif convention == "scaled_fp8":
            tensors[f"{stem}.scale_weight"] = scale.reshape(1)
        else:
            tensors[f"{stem}.weight_scale"] = scale
        tensors[key] = codes[key] = (value / scale).to(torch.float8_e4m3fn)
    if convention == "scaled_fp8":
        tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return toy_file(folder, tensors), codes


@pytest.mark.parametrize("convention", ["plain", "scaled_fp8", "comfy_quant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_files_are_used_as_they_are(tmp_path, convention, dtype):
    path, codes = scaled_file(tmp_path, convention)
    model = load(path, "fp8_scaled", dtype=dtype)
    layout, checked = model.binding.layout, 0
    for key, stored in codes.items():
        entry = layout.by_theirs[key]
        for name, piece in zip(entry.ours, stored.split(list(entry.sizes)), strict=True):
            module = model.get_submodule(name.removesuffix(".weight"))
            if is_quantised(module):
                assert torch.equal(module.codes.view(torch.uint8), piece.view(torch.uint8))
                checked += 1
    assert checked > 20
    with torch.no_grad():  # the same numbers as from the file dequantised while reading, to the bit
        given = inputs() if dtype == torch.float32 else inputs(1)
        assert torch.equal(predict(model, given), predict(load(path, dtype=dtype), given))


def test_nvfp4_files_become_fp8(tmp_path, monkeypatch):
    codes = torch.randint(0, 256, (32, 32), dtype=torch.uint8)
    scales, second = torch.ones(128, 4).to(torch.float8_e4m3fn), torch.tensor(0.01)
    expected = quantised.nvfp4(codes, scales, second)
    module = made(expected, "fp8_scaled")
    assert isinstance(module, Fp8Linear) and relative(module.weight, expected) < 0.04


def test_conversions_do_not_touch_the_codes_and_a_merge_is_refused_by_name(file):
    from networks import lora

    model = load(file, "fp8_scaled")
    module = model.layers[0].feed_forward.w1
    before = module.codes.clone()
    model.to(torch.bfloat16)
    assert module.codes.dtype == FP8["e4m3"] and torch.equal(module.codes.view(torch.uint8), before.view(torch.uint8))
    network = lora.create_network(1.0, 4, 4, None, [], model)
    assert not network.is_mergeable()
    with pytest.raises(ConfigError, match="attention.qkv: a quantised weight cannot take a merge"):
        network.merge()
    with pytest.raises(KeyError):
        module.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="cannot be written"):
        module.weight.mul_(2)


def test_the_size_and_dtype_of_a_weight_are_read_without_making_it(monkeypatch):
    module, calls = made(torch.randn(8, 64), "fp8_scaled", dtype=torch.bfloat16), []
    monkeypatch.setattr(Fp8Linear, "dequantise", lambda *a: calls.append(1) or torch.ones(8, 64, dtype=torch.bfloat16))
    assert module.weight.shape == (8, 64) and module.weight.dtype == torch.bfloat16 and not calls
    assert isinstance(module.weight, torch.Tensor) and module.weight.device.type == "cpu" and not calls
    assert float(module.weight.float().sum()) == 512 and calls


def test_a_finished_network_on_a_quantised_base_is_attached_and_acts_as_merged(file, tmp_path):
    from library.memory.base_networks import add_network
    from networks import lora

    plain = load(file)
    network = lora.create_network(1.0, 4, 4, None, [], plain)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    network.save_weights(tmp_path / "lora.safetensors", None, {})
    path = str(tmp_path / "lora.safetensors")

    def added(model, strength):
        base, tensors = lora.create_network_from_weights(strength, path, None, [], model, for_inference=True)
        kept = add_network(base, path, tensors, model, "cpu", torch.float32)
        with torch.no_grad():
            return kept, predict(model)

    quantised_model = load(file, "fp8_scaled")
    dequantised = load(file)
    for name, module in quantised_model.named_modules():
        if is_quantised(module):
            dequantised.get_submodule(name).weight = nn.Parameter(module.weight.clone(), requires_grad=False)
    before = predict(dequantised)
    kept, ours = added(quantised_model, 0.7)
    merged, expected = added(dequantised, 0.7)
    assert kept is not None and merged is None and not any(p.requires_grad for p in kept.parameters())
    assert relative(ours, expected) < 1e-4 < 1e-2 < relative(ours, before)


def test_nf4_without_its_package_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        quantised_like(nn.Linear(4, 4), "nf4", torch.float32)
    assert issubclass(Nf4Linear, nn.Linear)
