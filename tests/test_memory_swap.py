"""Swapped blocks: the same numbers to the bit, and never more on the device than promised."""

import importlib
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from memory_support import FAMILY, deep_weights, inputs, load, predict, toy_file
from oracles import read_json
from torch import nn

from library.checkpointing import checkpoint_blocks
from library.errors import ConfigError
from library.memory import swap_plan
from library.memory.activations import HostActivations
from library.memory.denoiser import DenoiserMemory
from library.memory.quantised_linear import is_quantised
from library.memory.swap import BlockSwap

DOUBLE = {"double": 20, "single": 40}
PAIRS = {"single": 2}


@pytest.mark.parametrize(
    ("counts", "units", "most"),
    [  # the largest values that sd-scripts, musubi-tuner and diffusion-pipe document for these sizes
        (DOUBLE, PAIRS, 37),  # HunyuanImage-2.1
        ({"double": 19, "single": 38}, PAIRS, 35),  # FLUX.1
        ({"double": 8, "single": 48}, PAIRS, 29),  # FLUX.2 dev
        ({"blocks": 60}, {}, 58),  # Qwen-Image
        ({"blocks": 40}, {}, 38),  # Wan 14B
        ({"layers": 30, "noise_refiner": 2, "context_refiner": 2}, {}, 28),  # Z-Image
    ],
)
def test_the_largest_value_is_the_documented_one_and_more_is_refused(counts, units, most):
    assert swap_plan.largest(counts, units) == most
    chosen = swap_plan.swapped(counts, units, most)
    assert sum(len(indices) / units.get(name, 1) for name, indices in chosen.items()) == most
    assert all(len(indices) <= max(0, counts[name] - 2) for name, indices in chosen.items())
    with pytest.raises(ConfigError, match=f"blocks_to_swap {most + 1}: .* at most {most} can be swapped"):
        swap_plan.swapped(counts, units, most + 1)


@pytest.mark.parametrize("value", [0, 1, 2, 9, 18, 32, 37])
def test_units_are_shared_between_the_lists_and_blocks_lie_evenly(value):
    chosen = swap_plan.swapped(DOUBLE, PAIRS, value)
    assert len(chosen["double"]) + len(chosen["single"]) / 2 == value
    assert abs(len(chosen["double"]) - value * 18 / 37) <= 1
    for name, indices in chosen.items():
        gaps = [b - a for a, b in itertools.pairwise(indices)]
        assert not gaps or max(gaps) - min(gaps) <= 1, name


# Full-size models: what their documents call the most, or our rule where none says a number.
LARGEST = {"hunyuan_image": 37, "flux": 35, "z_image": 28, "qwen_image": 58, "wan": 38, "hidream": 44, "lumina_2": 24,
           "auraflow": 17, "hunyuan_video": 37}  # fmt: skip


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_value_of_full_size_models(name):
    module = importlib.import_module(f"library.families.{name}")
    listed = {"wan": "wan_t2v_14b"}.get(name, name)
    content = read_json(f"layouts/{listed}")
    start = content.get("file_prefix", "")
    shapes = {key.removeprefix(start): tuple(shape) for key, shape in content.get("keys", content).items()}
    part = module.DENOISER
    with torch.device("meta"):
        model = part.build(part.config(shapes, {}, part.recognise(shapes)))
    blocks = module.BLOCKS if name != "z_image" else FAMILY.blocks
    family = SimpleNamespace(blocks=blocks)
    assert swap_plan.largest(swap_plan.counts_of(model, family), swap_plan.units_of(model, family)) == LARGEST[name]


class Stack(nn.Module):
    """Blocks with everything that saves something for the backward pass, and a convolution."""

    def __init__(self, depth: int = 7, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for k in range(depth):
            block = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width + k), nn.GELU(), nn.Linear(2 * width + k, width)
            )
            block.register_buffer("shift", torch.randn(width))
            block.forward = lambda x, block=block, run=block.forward: x + run(x) * block.shift
            self.blocks.append(block)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(depth=7, trained=False):
    torch.manual_seed(0)
    return Stack(depth).requires_grad_(trained)


def in_ring(swap, tensor):
    return any(slot.buffer.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for slot in swap.slots)


def watch(swap, everything):
    """Count, whenever a Linear of any block computes, the blocks that are on the device; and that this one is."""
    counts, total = [], len(everything)
    by_block = {id(block.module): block for block in swap.blocks}
    for module in everything:
        block = by_block.get(id(module))
        for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):

            def before(linear, args, block=block):
                on_device = sum(any(in_ring(swap, held.tensor) for held in b.held) for b in swap.blocks)
                counts.append(total - len(swap.blocks) + on_device)
                assert block is None or all(in_ring(swap, held.tensor) for held in block.held)
                assert sum(b.slot is not None for b in swap.blocks) == on_device

            linear.register_forward_pre_hook(before)
    return counts


CASES = [(n, ring, checkpointed) for n in (1, 3, 5) for ring in (2, 3) for checkpointed in (False, True)]


@pytest.mark.parametrize(("count", "ring", "checkpointed"), CASES)
@pytest.mark.parametrize("trained", [False, True])
def test_outputs_and_gradients_are_equal_to_the_bit_and_few_blocks_are_resident(count, ring, checkpointed, trained):
    plain, model = stack(trained=trained), stack(trained=trained)
    plain.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()})
    chosen = [model.blocks[i] for i in swap_plan.spread(7, count)]
    swap = BlockSwap(chosen, "cpu", ring=ring, collects=trained, checkpointed=checkpointed)
    assert len(swap.slots) == min(ring, count)  # as the plan has it
    counts = watch(swap, list(model.blocks))
    if checkpointed:
        checkpoint_blocks(model, ["blocks"]), checkpoint_blocks(plain, ["blocks"])
    for step in range(3):
        results = []
        for m in (model, plain):
            for part in range(2):  # accumulation
                x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(10 * step + part)).requires_grad_()
                out = m(x)
                out.square().sum().backward()
                results.append((m, out.detach(), x.grad))
        swap.park()
        for (_, a, b), (_, c, d) in zip(results[:2], results[2:], strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
        pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
        for (name, p), q in pairs:
            assert torch.equal(p, q), name
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
            assert not trained or p.grad is not None
        if trained:
            for m in (model, plain):
                torch.optim.AdamW(m.parameters(), lr=1e-2).step()
                m.zero_grad(set_to_none=True)
        with torch.no_grad():  # sampling between steps
            assert torch.equal(model(x.detach()), plain(x.detach()))
    assert max(counts) <= 7 - count + min(ring, count) and len(counts) > 30
    assert not any(in_ring(swap, held.tensor) for block in (swap.park(), swap.blocks)[1] for held in block.held)


@pytest.mark.parametrize("trained", [False, True])
def test_with_block_inputs_on_the_host_too_neither_blocks_nor_inputs_stay(trained):
    """Outputs and gradients are those of either and of neither; after the forward pass no block input is alive."""
    found = []
    for swapped, offloaded in itertools.product((0, 5), (False, True)):
        model, inputs, swap = stack(trained=trained), [], None
        if swapped:
            chosen = [model.blocks[i] for i in swap_plan.spread(7, swapped)]
            swap = BlockSwap(chosen, "cpu", collects=trained, checkpointed=True)
            counts = watch(swap, list(model.blocks))
        for block in model.blocks:
            block.register_forward_pre_hook(lambda block, args, inputs=inputs: inputs.append(weakref.ref(args[0])))
        activations = HostActivations("cpu", least=1)
        checkpoint_blocks(model, ["blocks"], *([activations.around] if offloaded else []))
        for step in range(2):
            inputs.clear()
            x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(step)).requires_grad_()
            out = model(x)
            assert sum(ref() is not None for ref in inputs) == (1 if offloaded else 7)  # `x` is held here
            out.square().sum().backward()
            swap and swap.park()
        found.append([out, x.grad, *(p.grad for p in model.parameters() if trained)])
        assert activations.moved == (2 * 7 if offloaded else 0)
    assert max(counts) <= 7 - 5 + 2 and len(counts) > 30
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], one, strict=True))


def test_without_the_swap_of_saved_tensors_gradients_would_be_wrong():
    """The reason for remembering places: a buffer of the ring holds another block when the backward pass comes."""
    plain, model = stack(), stack()
    swap = BlockSwap([model.blocks[i] for i in range(1, 6)], "cpu")
    swap._pack = lambda tensor: tensor
    grads = []
    for m in (model, plain):
        x = torch.ones(1, 16, requires_grad=True)
        m(x).sum().backward()
        grads.append(x.grad)
    assert not torch.allclose(*grads)


def test_the_next_block_is_fetched_while_one_computes_once_the_order_is_known():
    model = stack(9)
    swap = BlockSwap([model.blocks[i] for i in (1, 3, 5, 7)], "cpu", checkpointed=True)
    checkpoint_blocks(model, ["blocks"])

    def step():
        before = swap.entered, swap.waits
        model(torch.randn(1, 16, requires_grad=True)).sum().backward()
        return swap.entered - before[0], swap.waits - before[1]

    step(), step()
    entered, waits = step()
    assert entered == 7 - 1 and waits == 0  # forward and backward; the first and the last block are there twice
    with torch.no_grad():
        model(torch.randn(1, 16)), model(torch.randn(1, 16))
        before = swap.waits
        model(torch.randn(1, 16))
    assert swap.waits == before
    step(), step()
    assert step()[1] == 0  # and training is not disturbed


def test_for_sampling_fewer_blocks_are_swapped():
    model, plain = stack(), stack()
    chosen = [model.blocks[i] for i in (1, 2, 4, 6)]
    swap = BlockSwap(chosen, "cpu")
    x = torch.randn(1, 16)
    with torch.no_grad():
        model(x)
        with swap.only([model.blocks[2]]):
            assert len(swap.resident()) == 3 and torch.equal(model(x), plain(x))
            assert {b.number for b in swap.resident()} == {0, 1, 2, 3}
        assert torch.equal(model(x), plain(x))
    assert len(swap.resident()) <= 2


def test_what_changes_on_the_device_is_written_back():
    """As an optimizer does that takes its step inside of the backward pass."""
    plain, model = stack(trained=True), stack(trained=True)
    swap = BlockSwap([model.blocks[i] for i in range(1, 6)], "cpu", checkpointed=True)
    checkpoint_blocks(model, ["blocks"]), checkpoint_blocks(plain, ["blocks"])

    def update(parameter):
        with torch.no_grad():
            parameter -= 0.01 * parameter.grad
        parameter.grad = None
        swap.mark_written(parameter)

    for m in (model, plain):
        for parameter in m.parameters():
            parameter.register_post_accumulate_grad_hook(update)
    for step in range(4):
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(step))
        results = []
        for m in (model, plain):
            out = m(x)
            out.square().sum().backward()
            results.append(out.detach())
        assert torch.equal(*results)
    swap.park()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return toy_file(tmp_path_factory.mktemp("model"), deep_weights())


def options(**values):
    return SimpleNamespace(fp8_format="e4m3", **values)


def aligned(model):
    """Every weight in memory of its own, as on a device: in a memory map it lies anywhere, and sums may round so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("scheme", [None, "fp8_scaled", "nf4"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_denoiser_is_swapped_with_adapters_on_it(file, scheme, checkpointed, monkeypatch):
    from networks import lora

    def outcome(value):
        chosen = options(blocks_to_swap=value, **({scheme: True} if scheme else {}))
        memory = DenoiserMemory(chosen, FAMILY, "cpu")
        model = load(file, scheme, elsewhere=memory._names_on_host)
        if not value:
            aligned(model)
        torch.manual_seed(0)
        network = lora.create_network(1.0, 4, 4, None, [], model)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        network.apply_to([], model, False, True)
        memory.prepare(model, checkpointed=checkpointed)
        losses = []
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            loss = predict(model, inputs()).square().mean()
            loss.backward()
            losses.append(float(loss))
            optimizer.step(), optimizer.zero_grad()
        return memory, model, losses

    whole = load(file)
    most = swap_plan.largest(swap_plan.counts_of(whole, FAMILY), swap_plan.units_of(whole, FAMILY))
    assert swap_plan.units_of(load(file, "nf4"), FAMILY) == swap_plan.units_of(whole, FAMILY)
    memory, model, losses = outcome(most)
    assert losses == outcome(0)[2] and len(set(losses)) == 3
    assert len(memory.swap.blocks) == most and memory.swap.entered > 3 * most
    assert (scheme is None) == (not any(is_quantised(m) for m in model.modules()))
    with pytest.raises(ConfigError, match=f"at most {most}"):
        outcome(most + 1)


def test_while_loading_swapped_blocks_stay_on_the_host(file):
    """On a device that counts: the meta device holds no values, so what is on it can be told from what is not."""
    from library import checkpoints

    memory = DenoiserMemory(options(blocks_to_swap=2), FAMILY, "meta")
    model = checkpoints.load_part(FAMILY.denoiser, file, dtype=torch.bfloat16, loading=memory.loading(torch.bfloat16))
    on_host = {name for name, parameter in model.named_parameters() if parameter.device.type == "cpu"}
    blocks = swap_plan.block_names(model, FAMILY, 2)
    assert on_host == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{b}." for b in blocks))}
    assert len(blocks) == 2 and len(on_host) > 10


def test_gradients_are_reduced_in_the_same_parts_wherever_they_are(monkeypatch):
    """The reduction of three processes adds in another order in another place."""
    monkeypatch.setattr("library.memory.denoiser.AT_ONCE", 100)
    sizes = (4, 20, 3, 30, 2, 5, 1)
    homes = [["cpu"] * 7, ["cpu", "meta", "cpu", "meta", "meta", "cpu", "cpu"]]
    memory, cut = DenoiserMemory(options(), FAMILY, "cpu"), []
    for devices in homes:
        gradients = [torch.empty(size, device=device) for size, device in zip(sizes, devices, strict=True)]
        cut.append([[gradient.numel() for gradient in part] for part in memory.together(gradients)])
    assert cut[0] == cut[1] == [[4, 20], [3], [30], [2, 5, 1]]
