import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks_support import fill, tiny
from safetensors import safe_open
from safetensors.torch import save, save_file

from library.checkpoints import load_part
from library.errors import ConfigError
from library.families.z_image import Z_IMAGE
from library.layout import Layout, shapes_of
from networks import formats, kinds, lora, names
from networks.adapter import targets_of

DATA = Path(__file__).parent / "data"
EVERYTHING = ("blocks", "img_in", "patch", "mix", "final")


def update(content) -> torch.Tensor:
    """The change of the original weight that a module of a canonical form means."""
    return content["alpha"] / content["down"].shape[0] * content["up"] @ content["down"].flatten(1)


def same_updates(one, other, tolerance=1e-5) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(update(one[n]), update(other[n]), rtol=tolerance, atol=tolerance) for n in one)


@pytest.fixture
def modules():
    return fill(lora.create_network(1.0, 4, 3.0, None, None, tiny(EVERYTHING), conv_dim="2")).canonical()


@pytest.fixture
def layout():
    return tiny().binding.layout


# ---- ComfyUI's own list of keys, full-size model


@pytest.fixture(scope="module")
def full_size():
    """Layout and adaptable modules of the full-size model, on the meta device."""
    with torch.device("meta"):
        model = Z_IMAGE.denoiser.build({})
    layout = Layout("comfy", Z_IMAGE.denoiser.layouts["comfy"], shapes_of(model))
    return layout, targets_of(model, layout)


@pytest.mark.parametrize("form", ["comfy", "kohya", "diffusers"])  # those that Z-Image has
def test_every_key_of_every_format_names_for_comfyui_the_very_rows_that_were_trained(full_size, form):
    layout, targets = full_size
    styles = json.loads((DATA / "lora_keys" / "z_image.json").read_text(encoding="utf-8"))["styles"]
    accepted = {name: weight for style in styles.values() for name, weight in style["keys"].items()}
    tags, modules, start = {}, {}, 0
    for name, target in targets.items():
        rows = torch.arange(start, start + target.entry.shape[0], dtype=torch.float32)
        tags[f"diffusion_model.{name}.weight"], start = rows, start + len(rows)
        modules[name] = {"up": rows[:, None] + 1, "down": torch.zeros(1, target.our_shape[1]), "alpha": 1.0}
    tensors = formats.write(modules, form, layout)
    assert len(targets) == 30 * 6 + 2 * 6 + 2 * 5 + 6, "5 matrices a block, modulation where there is one, 6 outside"
    reached = 0
    for key, value in tensors.items():
        stem, role = formats.split_key(key)
        assert stem in accepted, key
        if role != "up":
            continue
        weight = accepted[stem]
        if isinstance(weight, dict):
            first = weight["slice"]["start"]
            expected = tags[weight["weight"]][first : first + weight["slice"]["length"]]
        else:
            expected = tags[weight]
        assert torch.equal(value[:, 0] - 1, expected), key
        reached += len(expected)
    assert reached == start, "every trained row is in the file"


# ---- an independent implementation's weights, inputs and outputs


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    with safe_open(DATA / "golden" / "z_image.safetensors", "pt") as file:
        scale = float(file.metadata()["lora_scale"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {f"diffusion_model.{k[5:]}": v for k, v in tensors.items() if k.startswith("lora.")}
    for key in [k for k in weights if k.endswith("lora_A.weight")]:
        weights[key.replace("lora_A.weight", "alpha")] = torch.tensor(scale * weights[key].shape[0])
    path = tmp_path_factory.mktemp("golden") / "denoiser.safetensors"
    save_file({k[5:]: v for k, v in tensors.items() if k.startswith("ckpt.")}, path)

    def model():
        loaded = load_part(Z_IMAGE.denoiser, path, dtype=torch.float32).requires_grad_(False)
        loaded.binding.adapted = Z_IMAGE.adapted
        return loaded

    return SimpleNamespace(tensors=tensors, weights=weights, model=model, path=path)


def velocity(model, golden, case):
    inputs = {
        k.removeprefix(f"case.{case}.in."): v for k, v in golden.tensors.items() if k.startswith(f"case.{case}.in.")
    }
    texts = list(inputs["context"]) if "context" in inputs else [inputs["context.0"], inputs["context.1"]]
    with torch.no_grad():
        return Z_IMAGE.predict(model, inputs["x"], inputs["timestep"], [{"text": text} for text in texts])


def error(out, golden, name) -> float:
    expected = golden.tensors[name]
    return float((out - expected).abs().max() / expected.abs().max())


def test_a_comfy_file_attached_or_merged_gives_the_output_of_an_independent_implementation(golden):
    attached, merged = golden.model(), golden.model()
    network, weights = lora.create_network_from_weights(1.0, None, None, None, attached, weights_sd=golden.weights)
    assert len(network.adapters) == 40
    network.apply_to(None, attached, False, True)
    network.load_tensors(weights, "golden")
    other, _ = lora.create_network_from_weights(
        1.0, None, None, None, merged, weights_sd=golden.weights, for_inference=True
    )
    other.merge_to(None, merged, weights, torch.float32, "cpu")
    for case in ("plain", "ragged"):
        assert error(velocity(golden.model(), golden, case), golden, f"case.{case}.out_lora") > 0.01
        assert error(velocity(attached, golden, case), golden, f"case.{case}.out_lora") < 1e-4
        assert error(velocity(merged, golden, case), golden, f"case.{case}.out_lora") < 1e-4


def test_a_model_from_a_diffusers_folder_is_adapted_under_the_same_original_names(golden, tmp_path):
    model = golden.model()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    other = load_part(Z_IMAGE.denoiser, tmp_path / "diffusion_pytorch_model.safetensors", dtype=torch.float32)
    assert other.binding.layout.name == "diffusers"
    other.binding.adapted = Z_IMAGE.adapted
    names = [list(lora.create_network(1.0, 4, 4, None, None, m).adapters) for m in (model, other)]
    assert names[0] == names[1] and "layers.0.attention.qkv" in names[0] and len(names[0]) == 6 * 5 + 4


def test_diffusers_loads_the_diffusers_file_and_gives_the_same_output(golden):
    pytest.importorskip("peft")
    model = golden.model()
    modules = formats.read(golden.weights, model.binding.layout)
    model.load_lora_adapter(formats.write(modules, "diffusers", model.binding.layout), prefix="transformer")
    for case in ("plain", "ragged"):
        assert error(velocity(model, golden, case), golden, f"case.{case}.out_lora") < 1e-4


def test_diffusers_pipeline_reader_takes_the_diffusers_file_whole(golden):
    from diffusers import ZImagePipeline

    layout = golden.model().binding.layout
    tensors = formats.write(formats.read(golden.weights, layout), "diffusers", layout)
    taken = ZImagePipeline.lora_state_dict(dict(tensors))
    assert taken.keys() == tensors.keys() and all(torch.equal(taken[k], tensors[k]) for k in tensors)


# ---- reading


@pytest.mark.parametrize("form", list(formats.FORMATS))
def test_what_is_written_is_read_back_with_rank_and_update(modules, layout, form):
    tensors = formats.write(modules, form, layout)
    assert formats.detect_format(tensors, layout) == form and formats.is_lora(tensors)
    back = formats.read(tensors, layout)
    assert same_updates(modules, back)
    assert {n: c["down"].shape for n, c in back.items()} == {n: c["down"].shape for n, c in modules.items()}
    assert not any("blocks" in content for content in back.values()), "equal down matrices fuse at their own rank"


def test_the_diffusers_file_folds_alpha_and_repeats_the_down_matrix(modules, layout):
    tensors = formats.write(modules, "diffusers", layout)
    assert not any("alpha" in key for key in tensors)
    content = modules["blocks.0.attn.qkv"]
    for name, rows in (("to_q", slice(0, 8)), ("to_k", slice(8, 12)), ("to_v", slice(12, 16))):
        assert torch.equal(tensors[f"transformer.layers.0.{name}.lora_A.weight"], content["down"])
        assert torch.allclose(tensors[f"transformer.layers.0.{name}.lora_B.weight"], content["up"][rows] * 3 / 4)
    swapped = tensors["transformer.norm_out.linear.lora_B.weight"]
    assert torch.allclose(swapped, torch.cat([modules["final.mod"]["up"][8:], modules["final.mod"]["up"][:8]]) * 3 / 4)


@pytest.mark.parametrize("pair", kinds.PAIRS)
@pytest.mark.parametrize("prefix", names.PREFIXES)
def test_every_prefix_and_suffix_in_the_wild_is_read(layout, prefix, pair):
    down, up = torch.randn(2, 8), torch.randn(16, 2)
    name = "blocks_0_attn_qkv" if prefix.endswith("_") else "blocks.0.attn.qkv"
    tensors = {f"{prefix}{name}{pair[0]}": down, f"{prefix}{name}{pair[1]}": up}
    content = formats.read(tensors, layout)["blocks.0.attn.qkv"]
    assert torch.equal(content["down"], down) and torch.equal(content["up"], up)
    assert content["alpha"] == 2, "no alpha means a factor of 1"
    content = formats.read(tensors | {f"{prefix}{name}.alpha": torch.tensor(0.5)}, layout)["blocks.0.attn.qkv"]
    assert content["alpha"] == 0.5


def separate(parts, ranks, alphas):
    generator, tensors = torch.Generator().manual_seed(4), {}
    for part, rank, alpha in zip(parts, ranks, alphas, strict=True):
        stem, rows = f"transformer.layers.1.{part}", 8 if part == "to_q" else 4
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def test_separate_q_k_v_adapters_become_one_exact_adapter_of_the_fused_module(layout):
    tensors = separate(("to_q", "to_k", "to_v"), (2, 3, 4), (1, 3, 8))
    content = formats.read(tensors, layout)["blocks.1.attn.qkv"]
    assert content["down"].shape[0] == 9 and content["blocks"] == 3
    expected = []
    for part, scale in (("to_q", 0.5), ("to_k", 1.0), ("to_v", 2.0)):
        stem = f"transformer.layers.1.{part}"
        expected.append(scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"])
    torch.testing.assert_close(update(content), torch.cat(expected), rtol=1e-5, atol=1e-5)
    again = formats.write({"blocks.1.attn.qkv": content}, "diffusers", layout)
    ranks = {key: len(value) for key, value in again.items() if key.endswith("lora_A.weight")}
    assert sorted(ranks.values()) == [2, 3, 4], "and back they are as small as they were"
    with pytest.raises(ConfigError, match=r"rank 9 \(3 separate adapters side by side\), the network's is 4"):
        lora.create_network(1.0, 4, 4, None, None, tiny()).load_tensors(tensors, "split.safetensors")


def test_a_file_that_adapts_only_some_slices_leaves_the_rows_of_the_others_alone(layout):
    content = formats.read(separate(("to_q", "to_v"), (2, 2), (2, 2)), layout)["blocks.1.attn.qkv"]
    changed = update(content).abs().amax(1) > 0
    assert changed.tolist() == [True] * 8 + [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"diffusion_model.blocks.0.attn.qvk.lora_A.weight": (2, 8)}, "did you mean.*blocks.0.attn.qkv"),
        ({"diffusion_model.blocks.0.mlp.0.lora_A.weight": (2, 8)}, "has no up matrix"),
        ({"diffusion_model.blocks.0.mlp.0.dora_scale": (16,)}, "DoRA"),
        ({"lycoris_blocks_0_mlp_0.lokr_w1": (4, 4)}, "LoKr"),
        ({"lora_te_text_model_layers_0_mlp.lora_down.weight": (2, 8)}, "name no module of this model"),
        ({}, "name no module"),
        (
            {
                "diffusion_model.blocks.0.mlp.0.lora_A.weight": (2, 9),
                "diffusion_model.blocks.0.mlp.0.lora_B.weight": (16, 2),
            },
            "takes 8 inputs and gives 16; the LoRA is for a model of another size",
        ),
        (
            {
                "diffusion_model.blocks.0.mlp.0.lora_A.weight": (2, 8),
                "diffusion_model.blocks.0.mlp.0.lora_B.weight": (16, 2),
                "lora_unet_layers_0_ff_in.lora_down.weight": (2, 8),
                "lora_unet_layers_0_ff_in.lora_up.weight": (16, 2),
            },
            "blocks.0.mlp.0 is adapted twice",
        ),
    ],
)
def test_what_cannot_be_read_is_named(layout, tensors, message):
    with pytest.raises(ConfigError, match=message):
        formats.read({key: torch.ones(shape) for key, shape in tensors.items()}, layout)


def test_checking_counts_wrong_names_and_wrong_shapes(modules, layout):
    shapes = {key: tuple(value.shape) for key, value in formats.write(modules, "kohya", layout).items()}
    assert formats.check_keys(shapes, layout) == (len(shapes), len(shapes), [])
    broken = dict(shapes)
    broken["lora_unet_blocks_0_mlp_1.alpha"] = broken.pop("lora_unet_blocks_0_mlp_0.alpha")
    broken["lora_unet_blocks_1_mlp_2.lora_up.weight"] = (9, 4)
    matched, total, wrong = formats.check_keys(broken, layout)
    assert (matched, total) == (len(shapes) - 4, len(shapes))
    assert wrong[0] == "lora_unet_blocks_0_mlp_1.alpha" and all("blocks_1_mlp_2" in key for key in wrong[1:])


def test_third_party_adapters_are_checked_by_name_and_shape(layout):
    start = "lora_unet_blocks_0_mlp_0"
    shapes = {f"{start}.lokr_w1": (2, 2), f"{start}.lokr_w2": (8, 4), f"{start}.alpha": ()}
    assert formats.check_keys(shapes, layout)[:2] == (3, 3)
    named = shapes | {"lora_unet_layers_0_to_q.lokr_w1": (2, 2)}  # a slice under this prefix: ComfyUI drops it
    assert formats.check_keys(named, layout) == (3, 4, ["lora_unet_layers_0_to_q.lokr_w1"])
    assert formats.check_keys(shapes | {f"{start}.lokr_w2": (8, 8)}, layout)[:2] == (0, 3)


# ---- hashes, by sd-scripts' rule


@pytest.mark.parametrize("rows", [4, 3000])
def test_hashes_are_those_of_the_bytes_that_safetensors_writes_with_only_ss_metadata(rows):
    tensors = {
        "b.lora_A.weight": torch.randn(rows, 64).to(torch.bfloat16),
        "a.lora_B.weight": torch.randn(64, rows),
        "a.alpha": torch.tensor(1.0),
        "c": torch.randn(7, dtype=torch.float16),
    }
    kept = {"ss_output_name": 'a "quoted" näme\n', "ss_tag_frequency": json.dumps({"猫": {"tail\t": 1}})}
    data = save(tensors, kept)
    start = 8 + int.from_bytes(data[:8], "little")
    file = io.BytesIO(data)
    file.seek(0x100000)
    assert formats.model_hashes(tensors, kept | {"modelspec.title": "x"}) == {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(file.read(0x10000)).hexdigest()[:8],
    }
