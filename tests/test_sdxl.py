"""Stable Diffusion XL against outside oracles: an independent implementation's outputs, real key lists, diffusers."""

import pytest
import torch
from oracles import golden, read_json, relative, weights_of

from library.components import unet
from library.layout import Layout, shapes_of

SIZES = {"norm_num_groups": "8", "num_head_channels": "8", "addition_time_embed_dim": "8"}  # of the golden UNet


def shapes_in(name, prefix=""):
    keys = read_json(f"layouts/{name}")["keys"]
    return {key.removeprefix(prefix): tuple(shape) for key, shape in keys.items() if key.startswith(prefix)}


def bound(shapes, metadata=None):
    """The layout of a UNet of these (LDM) shapes."""
    with torch.device("meta"):
        ours = shapes_of(unet.build(unet.config(shapes, metadata or {}, "ldm")))
    return Layout("ldm", unet.ldm_rows(ours), ours)


@pytest.fixture(scope="module")
def model():
    weights = weights_of(golden("sdxl"), "ckpt.")
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    model = unet.build(unet.config(shapes, SIZES, "ldm"))
    model.load_state_dict(bound(shapes, SIZES).to_ours(weights))
    return model.requires_grad_(False).eval()


def conds_of(case):
    names = {"text": "context", "pooled": "pooled", "size": "time_ids"}
    return [{ours: golden("sdxl")[f"case.{case}.in.{theirs}"][i] for ours, theirs in names.items()} for i in range(2)]


def test_the_prediction_is_that_of_an_independent_implementation(model):
    g = golden("sdxl")
    out = unet.call(model, g["case.plain.in.x"], g["case.plain.in.timestep"], conds_of("plain"))
    assert out.dtype == torch.float32 and relative(out, g["case.plain.out"]) < 1e-5


def test_captions_of_several_lengths_give_what_each_gives_alone(model):
    g, conds = golden("sdxl"), conds_of("plain")
    conds[1]["text"] = torch.cat([conds[1]["text"], 0.5 * conds[0]["text"]])  # two chunks of 77 tokens beside one
    x, t = g["case.plain.in.x"], g["case.plain.in.timestep"]
    out = unet.call(model, x, t, conds)
    for i in range(2):
        assert relative(out[i : i + 1], unet.call(model, x[i : i + 1], t[i : i + 1], conds[i : i + 1])) < 1e-5
    assert relative(out[1], g["case.plain.out"][1]) > 1e-3


def test_times_and_sizes_reach_their_embedding_in_float32_under_bf16(model):
    from copy import deepcopy

    half, seen = deepcopy(model).bfloat16(), []
    for module in (half.time_proj, half.add_time_proj):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    conds = [cond | {"size": torch.tensor([1537.0, 1023.0, 3.0, 5.0, 1216.0, 833.0])} for cond in conds_of("plain")]
    t = torch.tensor([713, 357])
    unet.call(half, golden("sdxl")["case.plain.in.x"], t, conds)
    assert torch.equal(seen[0], t.float()) and torch.equal(seen[1], torch.stack([c["size"] for c in conds]).flatten())


@pytest.mark.parametrize("name", ["sdxl", "sdxl_full_checkpoint"])
def test_every_key_of_the_full_size_unet_is_claimed_with_its_shape(name):
    shapes = shapes_in(name, "model.diffusion_model." if "full" in name else "")
    assert unet.recognise(shapes, ("sdxl",)) == "ldm" and unet.recognise(shapes, ("sd1", "sd2")) is None
    assert {k: tuple(v) for k, v in bound(shapes).their_shapes.items()} == shapes


STABLE_DIFFUSION = {  # config.json of the published UNets, where it differs from diffusers' defaults
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STABLE_DIFFUSION)
def test_the_layout_is_diffusers_own_converter_and_its_names_lead_to_the_same_model(kind):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint as convert

    with torch.device("meta"):
        model = UNet2DConditionModel(**STABLE_DIFFUSION[kind])
    ours = shapes_of(model)
    theirs = Layout("ldm", unet.ldm_rows(ours), ours)
    assert unet.recognise(ours, (kind,)) == "diffusers" and unet.recognise(theirs.their_shapes, (kind,)) == "ldm"
    config = unet.config(theirs.their_shapes, {}, "ldm")
    assert config == unet.config(ours, {}, "diffusers")
    with torch.device("meta"):
        assert shapes_of(unet.build(config)) == ours
    heads = {name: module.heads for name, module in model.named_modules() if hasattr(module, "heads")}
    with torch.device("meta"):
        assert {n: m.heads for n, m in unet.build(config).named_modules() if hasattr(m, "heads")} == heads
    marks = {key: torch.tensor([float(n)]) for n, key in enumerate(theirs.their_shapes)}
    converted = convert({f"model.diffusion_model.{key}": mark for key, mark in marks.items()}, {**model.config})
    assert converted.keys() == ours.keys()
    for entry in theirs.entries:
        assert float(converted[entry.ours[0]]) == float(marks[entry.theirs]), entry.theirs


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 9},  # inpainting
        {"projection_class_embeddings_input_dim": 2560, "block_out_channels": [384, 768, 1536, 1536]},  # the refiner
    ],
)
def test_unets_for_other_tasks_are_not_taken_for_one(change):
    from diffusers import UNet2DConditionModel

    config = STABLE_DIFFUSION["sdxl"] | change
    if len(config["block_out_channels"]) == 4:
        config |= {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": 4, "attention_head_dim": [6, 12, 24, 24],
        }  # fmt: skip
    with torch.device("meta"):
        ours = shapes_of(UNet2DConditionModel(**config))
    assert unet.recognise(ours, ("sd1", "sd2", "sdxl")) is None
