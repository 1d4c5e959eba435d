"""LoRA files in the names of other programs, full-size: every name that ComfyUI takes, diffusers' own converters."""

from functools import cache

import pytest
import torch
from oracles import read_json
from safetensors.torch import load_file, save_file
from studio_support import make_toy

from library.errors import ConfigError
from library.families import get_family
from networks import formats, sizes
from networks.names import Finder
from tools.convert import convert

NOBODY_WRITES = (
    "class_embedding",
    "linear1_qkv",
    "lora_te2_encoder_",
    "lora_te2_shared",
)  # entries of ComfyUI's tables that no trainer's files have


@cache
def names_of(family: str, size: str = ""):
    """Of the denoiser and the text encoders that the family can train."""
    found = sizes.spaces(get_family(family), ["lora_te1_x"], [])
    return next(names for title, names in found if title == (size or family))


def wanted(weight, encoders: dict[str, str]) -> str:
    """Our name of a weight of ComfyUI's."""
    for part, key in encoders.items():
        if weight.startswith(f"{part}.transformer."):
            return f"{key}:{weight.removeprefix(f'{part}.transformer.').removesuffix('.weight')}"
    return weight.removeprefix("diffusion_model.").removesuffix(".weight")


@pytest.mark.parametrize(
    ("family", "size", "count"),
    [("sdxl", "sdxl", 5564), ("flux", "flux", 2700), ("qwen_image", "qwen_image", 4230),
     ("hunyuan_image", "hunyuan_image", 686), ("hunyuan_video_15", "hunyuan_video_15", 2246),
     ("wan", "wan_t2v_14b", 814)],
)  # fmt: skip
def test_every_name_that_comfyui_takes_is_read_as_the_same_rows_of_the_same_weight(family, size, count):
    names, oracle, read = names_of(family, size), read_json(f"lora_keys/{size}"), 0
    finder = Finder(names)
    known = {space.qualified(n) for space in names for n, e in space.layout.their_modules.items() if len(e.shape) > 1}
    record = get_family(family)
    keys = [prefix.removeprefix("lora_") for prefix in record.text_prefixes]
    encoders = dict(zip((part.name for part in record.text_encoders), keys, strict=False))
    for style in (*oracle["styles"].values(), *oracle.get("text_encoder_styles", {}).values()):
        for stem, target in style["keys"].items():
            weight, part = (target["weight"], target.get("slice")) if isinstance(target, dict) else (target, None)
            name = wanted(weight, encoders)
            if name not in known or any(word in stem for word in NOBODY_WRITES):
                continue  # a bias or a norm
            if stem.startswith(("lora_te_", "lora_prior_te_")) and family != "sd":
                continue  # of models with one text encoder
            place = finder.find(stem)
            assert place and place.name == name, (stem, place)
            if part:
                start = sum(place.entry.sizes[: place.index])
                assert (start, place.rows) == (part["start"], part["length"]), stem
            read += 1
    assert read == count


def made_up(names, limit: int, rank: int = 1, alpha: float = 1.0) -> formats.Modules:
    """Random updates of the first `limit` modules of each block list."""
    generator, out = torch.Generator().manual_seed(1), {}
    for space in names:
        for name, entry in space.layout.their_modules.items():
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            if len(entry.shape) != 2 or not numbers or numbers[0] >= limit or space.key:
                continue
            down = torch.randn(rank, *space.layout.our_shape(entry)[1:], generator=generator)
            up = torch.randn(entry.shape[0], rank, generator=generator)
            out[space.qualified(name)] = {"down": down, "up": up, "alpha": alpha}
    return out


@pytest.mark.parametrize(
    ("family", "pipeline", "form"),
    [("flux", "FluxPipeline", "kohya"), ("qwen_image", "QwenImagePipeline", "kohya"),
     ("qwen_image", "QwenImagePipeline", "comfy"), ("wan", "WanPipeline", "comfy")],
)  # fmt: skip
def test_our_diffusers_file_holds_what_diffusers_own_converter_makes_of_the_other(family, pipeline, form, tmp_path):
    import diffusers

    names = names_of(family, "wan_t2v_14b" if family == "wan" else "")[:1]
    modules = {n: m for n, m in made_up(names, 1, 2, 1.0).items() if "block" in n and ".mod" not in n}
    assert len(modules) >= 8
    save_file(formats.write(modules, form, names), tmp_path / "source.safetensors")
    line = convert(tmp_path / "source.safetensors", tmp_path / "ours.safetensors", "diffusers")
    assert line.startswith(f"{tmp_path / 'source.safetensors'} ({form})"), line
    ours = load_file(tmp_path / "ours.safetensors")
    theirs = getattr(diffusers, pipeline).lora_state_dict(load_file(tmp_path / "source.safetensors"))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert {key for key in theirs if "alpha" not in key} == ours.keys()
    both = []
    for tensors in (theirs, ours):
        downs = [key for key in ours if key.endswith("lora_A.weight")]
        ups = [key.replace("lora_A", "lora_B") for key in downs]
        both.append({d: {"down": tensors[d], "up": tensors[u], "alpha": 2.0} for d, u in zip(downs, ups, strict=True)})
    assert max(formats.difference(*both).values()) < 1e-6


def test_the_family_and_its_size_are_found_by_the_names_and_widths(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(
        formats.write(made_up(names_of("wan", "wan22_ti2v_5b"), 1), "kohya", names_of("wan", "wan22_ti2v_5b")), path
    )
    line = convert(path, tmp_path / "out.safetensors", "comfy")
    assert "modules" in line and "the same update in every module" in line
    with pytest.raises(ConfigError, match="no program is known that reads Cosmos-Predict2 LoRAs in it; choose one of"):
        names = names_of("cosmos_predict2")
        save_file(formats.write(made_up(names, 1), "comfy", names), path)
        convert(path, tmp_path / "out.safetensors", "diffusers", "cosmos_predict2")


# ---- toys: text encoders, rounding


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A toy checkpoint and, in kohya's names, a float16 LoRA of the UNet and both encoders with alpha 3 at rank 4."""
    folder = tmp_path_factory.mktemp("sdxl")
    base = make_toy("sdxl", folder).with_name("denoiser.safetensors")
    ((_, names),) = sizes.spaces(get_family("sdxl"), ["lora_te1_x"], [base])
    generator, modules = torch.Generator().manual_seed(0), {}
    for space in names:
        for name, entry in space.layout.their_modules.items():
            shape = space.layout.our_shape(entry)
            if len(shape) > 1 and ("attn" in name or "in_layers" in name):
                down = torch.randn(4, *shape[1:], generator=generator).half().float()
                up = torch.randn(shape[0], 4, generator=generator).half().float()
                modules[space.qualified(name)] = {"down": down, "up": up, "alpha": 3.0}
    assert {name.split(":")[0] for name in modules if ":" in name} == {"te1", "te2"}
    save_file(formats.write(modules, "kohya", names, torch.float16), folder / "kohya.safetensors", {"ss_x": "1"})
    return folder, base, modules, names


def test_a_conversion_that_would_round_is_refused_and_can_be_had_exactly_or_rounded(sdxl):
    folder, base, modules, names = sdxl
    source, target = folder / "kohya.safetensors", folder / "out.safetensors"
    with pytest.raises(ConfigError, match="diffusers files in float16 would round .* --dtype float32, or .* --rounded"):
        convert(source, target, "diffusers", base=base)
    assert not target.exists()
    assert "rounded: " in convert(source, target, "diffusers", base=base, rounded=True)
    assert max(formats.difference(modules, formats.read(load_file(target), names)).values()) > 1e-5
    lines = convert(source, target, "diffusers", base=base, dtype="float32")
    assert "the same update in every module" in lines
    tensors = load_file(target)
    assert {key.split(".")[0] for key in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    assert max(formats.difference(modules, formats.read(tensors, names)).values()) < 1e-7


def test_formats_with_an_alpha_of_their_own_keep_every_bit(sdxl):
    folder, base, _, _ = sdxl
    source, comfy, back = folder / "kohya.safetensors", folder / "comfy.safetensors", folder / "back.safetensors"
    convert(source, comfy, "comfy", base=base)
    convert(comfy, back, "kohya", base=base)
    old, new = load_file(source), load_file(back)
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    assert any(key.startswith("text_encoders.clip_g.transformer.text_model") for key in load_file(comfy))


def test_sdxl_files_in_the_old_spelling_of_diffusers_are_read(sdxl):
    folder, base, modules, names = sdxl
    tensors = {}
    for key, value in formats.write(modules, "diffusers", names).items():
        key = key.replace(".lora_A.weight", "_lora.down.weight").replace(".lora_B.weight", "_lora.up.weight")
        tensors[key.replace(".to_out.0_", ".to_out_").replace(".to_", ".processor.to_")] = value
    assert sum(".processor.to_out_lora." in key for key in tensors) > 4
    assert max(formats.difference(modules, formats.read(tensors, names)).values()) < 1e-6


def test_separate_adapters_of_one_scale_are_joined_without_rounding():
    names = names_of("flux")
    stem, ours = "transformer.transformer_blocks.0.attn.{}", {}
    for name in ("to_q", "to_k", "to_v"):
        ours[f"{stem.format(name)}.lora_A.weight"] = torch.randn(3, 3072).bfloat16()
        ours[f"{stem.format(name)}.lora_B.weight"] = torch.randn(3072, 3).bfloat16()
        ours[f"{stem.format(name)}.alpha"] = torch.tensor(1.0)  # 1 / 3: no bfloat16 number times it is one
    modules = formats.read(ours, names)
    written = formats.write(modules, "comfy", names, torch.bfloat16)
    assert formats.difference(modules, formats.read(written, names))["double_blocks.0.img_attn.qkv"] < 1e-7
    whole = written["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"]
    assert whole.shape == (9216, 9) and torch.equal(whole[3072:6144, 3:6], ours[f"{stem.format('to_k')}.lora_B.weight"])
