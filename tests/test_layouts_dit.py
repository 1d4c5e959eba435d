"""The name tables of the video and DiT families against the real files' key lists, ComfyUI's and diffusers' names."""

import functools
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from oracles import read_json

from library import checkpoints
from library.checkpoints import Checkpoint
from library.fingerprints import identify
from library.headers import Header, TensorInfo
from library.layout import Layout, shapes_of
from networks import formats
from networks.adapter import targets_of
from networks.lora import is_adapted

FILES = {  # key list -> family
    "wan": "wan", "wan_t2v_14b": "wan", "wan_i2v_14b": "wan", "wan22_ti2v_5b": "wan", "wan22_a14b_t2v": "wan",
    "wan22_a14b_i2v": "wan", "lumina_2": "lumina_2",
    "omnigen2": "omnigen2", "cosmos_predict2": "cosmos_predict2", "cosmos_predict2_14b": "cosmos_predict2",
    "anima": "anima", "auraflow": "auraflow", "hidream": "hidream", "ltx_video": "ltx_video", "cosmos": "cosmos", "hunyuan_video": "hunyuan_video",
    "hunyuan_video_15": "hunyuan_video_15", "hunyuan_video_15_i2v": "hunyuan_video_15",
}  # fmt: skip

VARIANTS = {
    "wan": "t2v", "wan_t2v_14b": "t2v", "wan_i2v_14b": "2.1 i2v", "wan22_ti2v_5b": "2.2 5B", "wan22_a14b_t2v": "t2v",
    "wan22_a14b_i2v": "2.2 i2v", "cosmos": "7B", "cosmos_predict2": "2B", "cosmos_predict2_14b": "14B", "ltx_video": "2B",
}  # fmt: skip


def module_of(name):
    return importlib.import_module(f"library.families.{FILES[name]}")


@functools.lru_cache(maxsize=1)
def full_size(name):
    """(key list, layout's name, model on the meta device, its layout of that name)"""
    shapes = {key: tuple(shape) for key, shape in read_json(f"layouts/{name}")["keys"].items()}
    part = module_of(name).DENOISER
    layout_name = part.recognise(shapes)
    with torch.device("meta"):
        model = part.build(part.config(shapes, {}, layout_name))
    ours = shapes_of(model)
    return shapes, layout_name, model, Layout(layout_name, checkpoints.rows_of(part, layout_name, ours), ours)


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_the_full_size_file_is_claimed_with_its_shape(name):
    (shapes, _, _, layout), part = full_size(name), module_of(name).DENOISER
    assert layout.their_shapes == {k: s for k, s in shapes.items() if not part.may_carry(k, s)}
    ours = part.recognise(layout.shapes)
    assert ours == list(part.layouts)[-1]
    with torch.device("meta"):
        again = shapes_of(part.build(part.config(layout.shapes, {}, ours)))
    assert again == layout.shapes, "a diffusers folder gives the same model"


@pytest.mark.parametrize("form", ["comfy", "kohya"])
@pytest.mark.parametrize("name", FILES)
def test_every_adapter_name_that_is_saved_is_one_that_comfyui_takes(name, form):
    _, _, model, _ = full_size(name)
    part, ours = module_of(name).DENOISER, shapes_of(model)
    layout = Layout("comfy", checkpoints.rows_of(part, next(iter(part.layouts)), ours), ours)
    chosen = {n: t for n, t in targets_of(model, layout).items() if is_adapted(n, module_of(name).ADAPTED)}
    modules = {
        n: {"down": torch.zeros(1, *t.our_shape[1:]), "up": torch.zeros(t.entry.shape[0], 1), "alpha": 1.0}
        for n, t in chosen.items()
    }
    styles = read_json(f"lora_keys/{name}")["styles"].values()
    accepted = {stem: weight for style in styles for stem, weight in style["keys"].items()}
    stems = {formats.split_key(key)[0] for key in formats.write(modules, form, layout)}
    assert len(stems) == len(chosen) > 100 and not stems - accepted.keys()
    assert {accepted[stem] for stem in stems} == {f"diffusion_model.{n}.weight" for n in chosen}


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video_15", "hunyuan_video_15_i2v"])
def test_comfyuis_own_names_are_those_that_it_gives_tencents_file(name):
    shapes, layout_name, _, layout = full_size(name)
    renamed = read_json(f"layouts/{name}")["comfy_module_names"]
    comfy = Layout("comfy", checkpoints.rows_of(module_of(name).DENOISER, "comfy", layout.shapes), layout.shapes)
    assert layout_name == "original" and len(renamed) > 100
    assert comfy.their_shapes == {renamed.get(key, key): shape for key, shape in shapes.items()}


def tagged(shapes):
    """Tensors whose values say where they came from; only the rows matter, so other dimensions are cut to one."""
    start, out = 0, {}
    for key, shape in shapes.items():
        small = (shape[0], *[1] * (len(shape) - 1))
        out[key] = torch.arange(start, start + math.prod(small), dtype=torch.float64).reshape(small)
        start += math.prod(small)
    return out


CONVERTERS = {
    "wan_i2v_14b": "convert_wan_transformer_to_diffusers",
    "wan22_ti2v_5b": "convert_wan_transformer_to_diffusers",
    "lumina_2": "convert_lumina2_to_diffusers",
    "hidream": "convert_hidream_transformer_to_diffusers",
    "ltx_video": "convert_ltx_transformer_checkpoint_to_diffusers",
    "hunyuan_video": "convert_hunyuan_video_transformer_to_diffusers",
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "cosmos_predict2": "convert_cosmos_transformer_checkpoint_to_diffusers",
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_the_layout_is_diffusers_own_converter(name):
    from diffusers.loaders import single_file_utils

    shapes, _, _, layout = full_size(name)
    theirs = tagged({key: shape for key, shape in shapes.items() if key in layout.by_theirs})
    converted, mine = getattr(single_file_utils, CONVERTERS[name])(dict(theirs)), layout.to_ours(theirs)
    assert converted.keys() == mine.keys()
    assert all(torch.equal(converted[key], mine[key]) for key in mine)


TOYS = json.loads((Path(__file__).parents[1] / "tools" / "toy_configs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in FILES if name in TOYS])
def test_the_toy_file_is_a_whole_small_model(name):
    shapes, part = {k: tuple(v) for k, v in TOYS[name]["keys"].items()}, module_of(name).DENOISER
    found = [{k.removeprefix(prefix): s for k, s in shapes.items()} for prefix in part.prefixes]
    shapes = next(shapes for shapes in found if part.recognise(shapes))
    layout_name = part.recognise(shapes)
    with torch.device("meta"):
        ours = shapes_of(part.build(part.config(shapes, {}, layout_name)))
    layout = Layout(layout_name, checkpoints.rows_of(part, layout_name, ours), ours)
    assert layout.their_shapes == {k: s for k, s in shapes.items() if not part.may_carry(k, s)}


@pytest.mark.parametrize("name", FILES)
def test_files_are_named_by_family_and_variant(name):
    keys = read_json(f"layouts/{name}")["keys"]
    for prefix in module_of(name).DENOISER.prefixes:
        tensors = {prefix + key: TensorInfo("BF16", tuple(shape), 0, 0) for key, shape in keys.items()}
        found = identify(Checkpoint(Path("x"), (Header(Path("x"), tensors, {}, 8),)))
        assert (found.kind, found.family, found.variant) == ("checkpoint", FILES[name], VARIANTS.get(name, ""))


@pytest.mark.parametrize(("family", "key"), [("cosmos", "cosmos"), ("cosmos_predict2", "cosmos_predict2")])
def test_models_that_continue_videos_are_named_and_not_taken_for_others(family, key):
    shapes = {k: tuple(v) for k, v in read_json(f"layouts/{key}")["keys"].items()}
    shapes["x_embedder.proj.1.weight"] = (shapes["x_embedder.proj.1.weight"][0], 72)  # a mask of given frames
    tensors = {k: TensorInfo("BF16", shape, 0, 0) for k, shape in shapes.items()}
    found = identify(Checkpoint(Path("x"), (Header(Path("x"), tensors, {}, 8),)))
    assert module_of(key).DENOISER.recognise(shapes) is None
    assert (found.family, found.variant) == (family, "video2world")


# ComfyUI's name of what no shape shows -> ours, and how its value is ours.
FACTS = {
    "num_heads": ("num_attention_heads", int),
    "n_heads": ("num_attention_heads", int),
    "num_attention_heads": ("num_attention_heads", int),
    "attention_head_dim": ("attention_head_dim", int),
    "n_kv_heads": ("num_kv_heads", int),
    "num_kv_heads": ("num_kv_heads", int),
    "axes_dims": ("axes_dim_rope", tuple),
    "axes_dim_rope": ("axes_dim_rope", tuple),
    "axes_dims_rope": ("axes_dims_rope", tuple),
    "axes_dim": ("rope_axes_dim", tuple),
    "theta": ("rope_theta", float),
    "llama_layers": ("llama_layers", list),
    "num_activated_experts": ("num_activated_experts", int),
    "num_routed_experts": ("num_routed_experts", int),
    "caption_channels": ("caption_channels", list),
}


@pytest.mark.parametrize("name", FILES)
def test_what_no_shape_shows_is_what_comfyui_detects(name):
    content, part = read_json(f"layouts/{name}"), module_of(name).DENOISER
    shapes = {key: tuple(shape) for key, shape in content["keys"].items()}
    mine, theirs = part.config(shapes, {}, part.recognise(shapes)), content["comfy_config"]
    facts = {ours: (mine[ours], kind(theirs[key])) for key, (ours, kind) in FACTS.items() if key in theirs}
    if "rope_t_extrapolation_ratio" in theirs:
        facts["rope_scale"] = (mine["rope_scale"], tuple(theirs[f"rope_{axis}_extrapolation_ratio"] for axis in "thw"))
    assert [key for key, (a, b) in facts.items() if a != b] == []
    assert facts or name == "auraflow"
    if name == "auraflow":  # ComfyUI's defaults, which are the published models'
        assert (mine["num_attention_heads"], mine["attention_head_dim"]) == (12, 256)


@pytest.mark.parametrize("name", FILES)
def test_modulation_keeps_its_precision_whatever_the_names_of_the_file(name):
    _, _, model, layout = full_size(name)
    part, kept = module_of(name).DENOISER, {}
    for other in part.layouts:
        entries = Layout(other, checkpoints.rows_of(part, other, layout.shapes), layout.shapes).entries
        words = [e for e in entries if any(word in e.theirs for word in part.high_precision)]
        in_blocks = tuple(f"{block}." for block in module_of(name).BLOCKS)
        kept[other] = {o for e in words for o in e.ours if o.startswith(in_blocks) and o.endswith(".weight")}
    assert len({frozenset(names) for names in kept.values()}) == 1
    linear = (torch.nn.Linear,)
    assert all(isinstance(model.get_submodule(o.removesuffix(".weight")), linear) for o in kept["comfy"])
    assert bool(kept["comfy"]) == (FILES[name] not in ("wan", "ltx_video")), "these have tables instead"
