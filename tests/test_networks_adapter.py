import copy
from functools import partial

import pytest
import torch
from networks_support import fill, images, tiny
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from library.errors import ConfigError
from networks import lora
from networks.adapter import AdapterNetwork, update_sizes

EVERYTHING = ("blocks", "img_in", "patch", "mix", "final")


def attached(model, dim=4, alpha=2.0, dropout=None, std=0.3, **args) -> AdapterNetwork:
    network = lora.create_network(1.0, dim, alpha, None, None, model, neuron_dropout=dropout, **args)
    network.apply_to(None, model, False, True)
    return fill(network, std=std)


def merged_by_hand(model, network, multiplier=1.0):
    """The model with the updates added to its ORIGINAL weights, read back through the layout: no adapter code runs."""
    layout, result = model.binding.layout, copy.deepcopy(model)
    theirs = layout.to_theirs(tiny().state_dict())
    for name, adapter in network.adapters.items():
        state = adapter.state_dict()
        down, up = state["lora_down.weight"], state["lora_up.weight"]
        change = torch.einsum("or,ri->oi", up, down.flatten(1)) * float(state["alpha"]) / down.shape[0]
        key = f"{name}.weight"
        theirs[key] = theirs[key] + multiplier * change.reshape(theirs[key].shape)
    result.load_state_dict(layout.to_ours(theirs))
    return result


def test_the_attached_network_computes_what_the_original_weights_plus_the_update_compute():
    model = tiny(EVERYTHING)
    network = attached(model, conv_dim="2", conv_alpha="1")
    assert len(network.adapters) == 4 + 2 * 4
    network.set_multiplier(0.7)
    with_adapters = model(images())
    network.remove()
    expected = merged_by_hand(model, network, 0.7)(images())
    torch.testing.assert_close(with_adapters, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, tiny()(images()), atol=1e-2)


def test_merging_gives_the_same_as_attaching():
    model, other = tiny(EVERYTHING), tiny(EVERYTHING)
    network = attached(model, conv_dim="2")
    network.set_multiplier(-0.5)
    expected = model(images())
    sibling = lora.create_network(-0.5, 4, 2.0, None, None, other, conv_dim="2")
    sibling.load_state_dict(network.state_dict())
    sibling.merge()
    torch.testing.assert_close(other(images()), expected, rtol=1e-5, atol=1e-5)


def test_multiplier_zero_disabled_and_removed_give_exactly_the_base():
    model = tiny()
    base = model(images())
    network = attached(model)
    assert not torch.equal(model(images()), base)
    network.set_multiplier(0.0)
    assert torch.equal(model(images()), base)
    network.set_multiplier(1.0)
    network.set_enabled(False)
    assert torch.equal(model(images()), base)
    network.set_enabled(True)
    network.remove()
    assert torch.equal(model(images()), base)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_the_network_holds_no_base_weight_and_the_base_no_adapter():
    model = tiny()
    keys = set(model.state_dict())
    network = attached(model)
    assert set(model.state_dict()) == keys
    leaves = {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {key.split(".", 1)[1] for key in network.state_dict()} == leaves
    assert "lora_unet_blocks_1_attn_qkv.lora_up.weight" in network.state_dict()
    assert network.state_dict()["lora_unet_blocks_1_attn_qkv.lora_up.weight"].shape == (16, 4)


def sliced(**dropouts):
    """A network whose q, k and v rows of `up` are alike on a base of zeros, and its attention input."""
    model = tiny(depth=1)
    network = attached(model, **dropouts)
    adapter = network.adapters["blocks.0.attn.qkv"]
    rows = torch.randn(4, 4)
    with torch.no_grad():
        adapter.lora_up.weight.copy_(torch.cat([rows, rows, rows, rows]))  # q is 8 rows, k and v are 4 each
    for module in adapter.bases:
        module.weight.zero_()
        module.bias.zero_()
    return network, adapter, model.layers[0], torch.randn(3, 5, 8)


@pytest.mark.parametrize("dropouts", [{"dropout": 0.5}, {"rank_dropout": "0.5"}, {"module_dropout": "0.5"}])
def test_the_slices_of_one_forward_share_one_dropout_mask_and_forwards_differ(dropouts):
    network, adapter, block, x = sliced(**dropouts)
    network.train()
    results = []
    for _ in range(12):
        q, k, v = block.to_q(x), block.to_k(x), block.to_v(x)
        assert torch.equal(q[..., :4], k) and torch.equal(k, v)
        assert adapter._shared is None, "nothing outlives a forward"
        results.append(q)
    assert len({tuple(r.flatten().tolist()) for r in results}) > 1, "each forward draws a mask of its own"
    network.eval()
    expected = adapter.scale * F.linear(F.linear(x, adapter.lora_down.weight), adapter.rows()[1])
    torch.testing.assert_close(block.to_k(x), expected)


def test_rank_dropout_drops_whole_ranks_per_item_and_rescales_the_rest():
    network, adapter, block, x = sliced(rank_dropout="0.25")
    network.train()
    seen = []
    adapter.rows = lambda: (torch.eye(4),) * 3
    for _ in range(200):
        out = block.to_k(x)
        ratio = out.detach() / (adapter.scale * F.linear(x, adapter.lora_down.weight.detach()))
        assert ratio.std(dim=1).max() < 1e-4, "one decision for all tokens of an item"
        seen.append(ratio[:, 0])
    ratios = torch.cat(seen)
    kept = (ratios - 1 / 0.75).abs() < 1e-3
    assert bool((kept | (ratios.abs() < 1e-6)).all())
    assert abs(float(kept.float().mean()) - 0.75) < 0.04
    assert any(not torch.equal(item[0], item[1]) for item in kept.reshape(-1, 3, 4)), "items differ"


def test_the_down_product_is_computed_once_per_forward_and_never_for_another_input():
    network, adapter, block, x = sliced()
    calls = []
    project = adapter.project
    adapter.project = lambda value: calls.append(1) or project(value)
    block.to_q(x), block.to_k(x), block.to_v(x)
    assert len(calls) == 1
    block.to_q(x)
    x.add_(1)
    expected = adapter.scale * F.linear(F.linear(x, adapter.lora_down.weight), adapter.rows()[1])
    torch.testing.assert_close(block.to_k(x), expected)
    other = x + 1
    expected = adapter.scale * F.linear(F.linear(other, adapter.lora_down.weight), adapter.rows()[2])
    torch.testing.assert_close(block.to_v(other), expected)
    with torch.no_grad():
        block.to_q(x)
    block.to_k(x).sum().backward()
    assert adapter.lora_down.weight.grad is not None, (
        "a product made without gradients is not used where they are needed"
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_draws_the_same_masks_when_it_runs_again(reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny()
        network = attached(model, dropout=0.3, rank_dropout="0.3", module_dropout="0.3").train()
        if is_checkpointed:
            model.run = partial(checkpoint, use_reentrant=reentrant)
        torch.manual_seed(5)
        x = images(4).requires_grad_()
        for _ in range(3):
            model(x).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
        assert all(a._shared is None for a in network.adapters.values())
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.equal(plain, checkpointed)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_half_precision_model(dtype, autocast):
    exact = tiny()
    attached(exact)
    expected = exact(images())
    model = tiny().to(dtype)
    network = attached(model)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = model(images().to(dtype))
    assert out.dtype == dtype
    error = (out.detach().float() - expected.detach()).norm() / expected.detach().norm()
    assert float(error) < (0.05 if dtype == torch.bfloat16 else 0.01)
    out.float().square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in network.parameters())


def test_two_networks_on_one_model_add_up_and_come_off_in_reverse_order():
    model = tiny(EVERYTHING)
    base = model(images())
    first = attached(model)
    second = fill(lora.create_network(1.0, 2, 2.0, None, None, model), seed=7)
    second.apply_to(None, model, False, True)
    both = model(images())
    second.remove()
    assert not torch.equal(model(images()), both)
    first.remove()
    assert torch.equal(model(images()), base)
    first.merge(1.0)
    second.merge(1.0)
    torch.testing.assert_close(model(images()), both, rtol=1e-5, atol=1e-5)


def test_initial_weights_depend_on_seed_and_name_only():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    network = lora.create_network(1.0, 4, 4, None, None, tiny(seed=3))
    assert all(not a.lora_up.weight.any() for a in network.adapters.values())
    torch.manual_seed(3)
    part = lora.create_network(1.0, 4, 4, None, None, tiny(("blocks.1",), seed=3))
    again = tiny(seed=3)
    state = torch.get_rng_state()
    lora.create_network(1.0, 4, 4, None, None, again)
    assert torch.equal(torch.get_rng_state(), state), "creating a network draws nothing from torch's generator"
    name = "blocks.1.mlp.2"
    assert torch.equal(part.adapters[name].lora_down.weight, network.adapters[name].lora_down.weight)
    assert not torch.equal(network.adapters["blocks.0.mlp.2"].lora_down.weight, network.adapters[name].lora_down.weight)
    other = lora.create_network(1.0, 4, 4, None, None, tiny(seed=4))
    assert not torch.equal(other.adapters[name].lora_down.weight, network.adapters[name].lora_down.weight)
    bound = 1 / 16**0.5  # kaiming_uniform(a = sqrt 5) is uniform in +-1/sqrt(inputs)
    values = network.adapters[name].lora_down.weight
    assert 0.8 * bound < values.abs().max().item() <= bound


def test_scale_weight_norms_shrinks_exactly_the_updates_above_the_limit():
    network = attached(tiny(EVERYTHING), conv_dim="2")

    def norms():
        return torch.stack([torch.linalg.matrix_norm(a.delta()) for a in network.adapters.values()])

    before = norms()
    limit = 0.9
    count, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    after = norms()
    assert count == int((before > limit).sum()) > 0
    torch.testing.assert_close(after, before.clamp(max=limit), rtol=1e-4, atol=1e-6)
    assert abs(mean - after.mean().item()) < 1e-4 and abs(largest - limit) < 1e-4


def test_update_sizes_are_the_ratio_of_the_frobenius_norms_of_the_original_weights():
    model = tiny()
    network = attached(model)
    network.set_multiplier(0.5)
    theirs = model.binding.layout.to_theirs(model.state_dict())
    for name, size in update_sizes(network).items():
        ratio = 0.5 * network.adapters[name].delta().norm() / theirs[f"{name}.weight"].norm()
        assert abs(size - float(ratio)) < 1e-5 * float(ratio)


def test_a_quantised_weight_refuses_a_merge_and_text_encoders_refuse_training():
    model = tiny()
    network = attached(model)
    model.layers[0].to_q.weight.data = model.layers[0].to_q.weight.to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match="blocks.0.attn.qkv.*float8"):
        network.merge()
    with pytest.raises(ConfigError, match="text encoders"):
        network.apply_to(None, model, True, True)
    with pytest.raises(ConfigError, match="attached already"):
        network.apply_to(None, model, False, True)


def test_an_input_that_only_some_slices_get_does_not_outlive_the_forward():
    """HunyuanImage's linear1: q, k and v are given one tensor, the mlp another."""
    import gc
    import weakref

    model = tiny()
    network = attached(model)
    adapter = next(a for a in network.adapters.values() if len(a.bases) > 1)
    x = torch.randn(2, 3, adapter.our_shape[1])
    seen = weakref.ref(x)
    with torch.no_grad():  # as in the first pass of a checkpointed block
        adapter.bases[0](x)
    assert adapter._shared is not None
    del x
    gc.collect()
    assert seen() is None and adapter._shared is None
