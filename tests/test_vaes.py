"""All autoencoders against outside oracles: an independent implementation's latents and pixels, the key lists of the
real files, diffusers' own tiling and conversion; and each told from all others."""

import json
import math
from functools import partial

import pytest
import torch
from oracles import golden, golden_metadata, load, path_of, read_json, relative, weights_of
from safetensors.torch import save_file
from vaes_support import CASES, GROUPS, PARTS, SAME, model_of, normalised, tensors_of

from library import checkpoints
from library.checkpoints import Checkpoint
from library.components import vae_wan
from library.errors import ConfigError
from library.fingerprints import identify, identify_path
from library.layout import Layout, shapes_of


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("ltx")])
@torch.no_grad()
def test_latents_and_pixels_are_those_of_an_independent_implementation(name, tmp_path):
    case = CASES[name]
    tensors, model = tensors_of(case), model_of(case, tmp_path)
    latents = case.encode(model, tensors["inputs/pixels"])
    assert latents.dtype == torch.float32
    assert relative(latents, normalised(case, tensors["outputs/latent"])) < SAME
    pixels = case.decode(model, normalised(case, tensors["inputs/z"]))
    wanted = tensors["outputs/decoded"]
    if case.family[0] == "wan":  # diffusers cuts to the range of pixels, ComfyUI later
        assert wanted.abs().max() > 1
        wanted = wanted.clamp(-1, 1)
    assert pixels.dtype == torch.float32 and relative(pixels, wanted) < SAME


# ---------------------------------------------------------------- names

LAYOUTS = {  # the key lists of real files -> family, variant and layout
    "vae_sdxl": ("sdxl", "", "ldm"),
    "vae_sd3": ("flux", "", "ldm"),
    "vae_flux": ("flux", "", "ldm"),
    "vae_flux2": ("flux2", "", "ldm"),
    "vae_hunyuan_image": ("hunyuan_image", "", "comfy"),
    "vae_wan21": ("wan", "2.1", "wan"),
    "vae_qwen_image": ("wan", "2.1", "wan"),
    "vae_wan22": ("wan", "2.2", "wan"),
    "vae_hunyuan_video": ("hunyuan_video", "", "diffusers"),
    "vae_hunyuan_video_15": ("hunyuan_video_15", "", "comfy"),
    "vae_ltx": ("ltx_video", "0.9.1", "original"),
    "vae_cosmos": ("cosmos", "", "original"),
}


def full_size(name):
    content = read_json(f"layouts/{name}")
    return {key: tuple(shape) for key, shape in content.get("keys", content).items()}


def layout_of(part, shapes, metadata=None):
    name = part.recognise(shapes)
    with torch.device("meta"):
        ours = shapes_of(part.build(part.config(shapes, metadata or {}, name)))
    return Layout(name, checkpoints.rows_of(part, name, ours), ours)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_key_of_the_full_size_file_is_claimed_with_its_shape(name):
    family, variant, layout_name = LAYOUTS[name]
    part, shapes = PARTS[family, variant], full_size(name)
    layout = layout_of(part, shapes)
    read = {key: shape for key, shape in shapes.items() if key not in part.carried}
    assert layout.name == layout_name and layout.their_shapes == read


OTHER_NAMES = [
    (("sdxl", ""), "vae_sdxl", ("diffusers", "diffusers_old")),
    (("flux", ""), "vae_flux", ("diffusers", "diffusers_old")),
    (("flux2", ""), "vae_flux2", ("bfl", "diffusers")),
    (("hunyuan_image", ""), "vae_hunyuan_image", ("tencent", "diffusers")),
    (("wan", "2.1"), "vae_wan21", ("diffusers",)),
    (("wan", "2.2"), "vae_wan22", ("diffusers",)),
    (("hunyuan_video", ""), "vae_hunyuan_video", ("comfy",)),
    (("hunyuan_video_15", ""), "vae_hunyuan_video_15", ("diffusers",)),
    (("ltx_video", "0.9.1"), "vae_ltx", ("diffusers",)),
]


def spellings():
    return [(family, file, layout) for family, file, layouts in OTHER_NAMES for layout in layouts]


def in_other_names(family, file, layout):
    """Shapes of the full-size file in another spelling."""
    part, ours = PARTS[family], layout_of(PARTS[family], full_size(file)).shapes
    return Layout(layout, checkpoints.rows_of(part, layout, ours), ours).their_shapes


@pytest.mark.parametrize(("family", "file", "layout"), spellings())
def test_the_same_model_in_other_names_has_the_same_size(family, file, layout):
    part, shapes = PARTS[family], in_other_names(family, file, layout)
    assert part.recognise(shapes) == layout
    found = layout_of(part, shapes)
    assert found.shapes == layout_of(part, full_size(file)).shapes and found.their_shapes == shapes


def test_comfyuis_names_of_hunyuan_video_are_those_of_its_converter():
    content = read_json("layouts/vae_hunyuan_video")
    part = PARTS["hunyuan_video", ""]
    ours = layout_of(part, full_size("vae_hunyuan_video")).shapes
    layout = Layout("comfy", checkpoints.rows_of(part, "comfy", ours), ours)
    assert {entry.ours[0]: entry.theirs for entry in layout.entries} == content["comfy_module_names"]
    assert layout.their_shapes["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1, 1)


def test_bfls_names_of_flux2_are_the_published_ones():
    names, part = read_json("layouts/vae_flux2")["bfl_names"], PARTS["flux2", ""]
    ours = layout_of(part, full_size("vae_flux2")).shapes
    layout = Layout("bfl", checkpoints.rows_of(part, "bfl", ours), ours)
    wanted = {names.get(key, key) for key in full_size("vae_flux2")}
    assert set(layout.their_shapes) == wanted


# Published configurations that no key list shows: the first and the last LTX-Video.
LTX_090 = {"decoder_block_out_channels": (128, 256, 512, 512)}
LTX_095 = {
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (256, 512, 1024),
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "spatio_temporal_scaling": (True,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}


def published_ltx(configuration):
    from diffusers import AutoencoderKLLTXVideo

    with torch.device("meta"):
        return shapes_of(AutoencoderKLLTXVideo(**configuration))


@pytest.mark.parametrize(("found", "published"), [("0.9.0", LTX_090), ("0.9.5", LTX_095)])
def test_an_ltx_version_without_a_key_list_is_read_off_its_names(found, published):
    ours, part = published_ltx(published), PARTS["ltx_video", found]
    assert part.recognise(ours) == "diffusers" and layout_of(part, ours).shapes == ours
    theirs = Layout("original", checkpoints.rows_of(part, "original", ours), ours).their_shapes
    assert part.recognise(theirs) == "original" and layout_of(part, theirs).shapes == ours
    config = part.config(theirs, {}, "original")
    assert {key: config[key] for key in published} == published


def convert_ldm(theirs):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return convert_ldm_vae_checkpoint(theirs, {"down_block_types": [""] * 4, "up_block_types": [""] * 4})


def convert_wan(theirs):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(theirs)


def convert_ltx(theirs):
    from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers

    return convert_ltx_vae_checkpoint_to_diffusers({f"vae.{key}": value for key, value in theirs.items()})


CONVERTERS = [
    (("sdxl", ""), partial(full_size, "vae_sdxl"), convert_ldm),
    (("flux", ""), partial(full_size, "vae_flux"), convert_ldm),
    (("wan", "2.1"), partial(full_size, "vae_wan21"), convert_wan),
    (("ltx_video", "0.9.0"), partial(published_ltx, LTX_090), convert_ltx),
    (("ltx_video", "0.9.1"), partial(full_size, "vae_ltx"), convert_ltx),
    (("ltx_video", "0.9.5"), partial(published_ltx, LTX_095), convert_ltx),
]


def tagged(shapes):
    """Tensors whose values say where they came from; dimensions other than rows, and kernels, are cut to one. diffusers
    asks for the columns of one convolution of LTX, which stay."""
    start, out = 0, {}
    for key, shape in shapes.items():
        small = tuple(
            n if i == 0 or (i == 1 and key == "encoder.conv_out.conv.weight") else 1 for i, n in enumerate(shape)
        )
        out[key] = torch.arange(start, start + math.prod(small), dtype=torch.float64).reshape(small)
        start += math.prod(small)
    return out


@pytest.mark.parametrize(("family", "shapes", "convert"), [pytest.param(*c, id=" ".join(c[0])) for c in CONVERTERS])
def test_the_layout_is_diffusers_own_converter(family, shapes, convert):
    part = PARTS[family]
    layout = layout_of(part, shapes())
    if layout.name == "diffusers":
        layout = Layout("original", checkpoints.rows_of(part, "original", layout.shapes), layout.shapes)
    theirs = tagged(layout.their_shapes)
    wanted = convert(dict(theirs))
    for entry in layout.entries:
        stored = theirs[entry.theirs]
        mine = entry.split(stored, stored.squeeze((-1, -2)).shape if entry.op and stored.ndim == 4 else stored.shape)
        for name, value in zip(entry.ours, mine, strict=True):
            if name not in ("latents_mean", "latents_std"):  # diffusers drops the mean of all; nothing depends on it
                assert torch.equal(value, wanted[name]), name


def everything():
    """Every VAE that an oracle shows, as (what it is, a function that gives its shapes)."""
    for name, (family, variant, _) in LAYOUTS.items():
        yield name, (family, variant), partial(full_size, name)
    for family, file, layout in spellings():
        yield f"{file} in {layout} names", family, partial(in_other_names, family, file, layout)
    for name, case in CASES.items():
        yield f"golden {name}", case.family, lambda case=case: toy_shapes(case)


def toy_shapes(case):
    return {k.removeprefix("vae."): tuple(v.shape) for k, v in weights_of(tensors_of(case), "weights/").items()}


@pytest.mark.parametrize(("family", "shapes"), [pytest.param(f, s, id=name) for name, f, s in everything()])
def test_each_file_is_recognised_by_its_own_part_alone(family, shapes):
    keys = shapes()
    assert [key for key, part in PARTS.items() if part.recognise(keys)] == [family]


@pytest.mark.parametrize(("family", "shapes"), [pytest.param(f, s, id=name) for name, f, s in everything()])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_each_file_is_named_from_its_header(family, shapes, prefix):
    from library.headers import Header, TensorInfo

    tensors = {prefix + key: TensorInfo("F32", shape, 0, 0) for key, shape in shapes().items()}
    path = path_of("golden/vae_flux.safetensors")
    found = identify(Checkpoint(path, (Header(path, tensors, {}, 8),)))
    assert (found.kind, found.family, found.variant) == ("vae", *family) and found.unmatched == []


@pytest.mark.parametrize("name", CASES)
def test_the_inspector_finds_every_key_of_a_file_in_its_place(name, tmp_path):
    """By the whole table of the model that the file's shapes tell, and what is carried along."""
    case = CASES[name]
    model_of(case, tmp_path)  # writes the file
    found = identify_path(str(tmp_path / "part.safetensors"))
    assert (found.kind, found.family, found.variant) == ("vae", *case.family)
    assert found.missing == found.unmatched == []


def test_the_inspector_compares_every_key(tmp_path):
    weights = weights_of(golden("vae_hunyuan_image21"), "weights/")
    weights["surprise"] = weights.pop("encoder.mid.attn_1.q.weight")
    save_file(weights, tmp_path / "x.safetensors")
    found = identify_path(str(tmp_path / "x.safetensors"))
    assert found.missing == ["encoder.mid.attn_1.q.weight"] and found.unmatched == ["surprise"]


def test_a_vae_of_another_family_is_named_in_the_error(tmp_path):
    save_file(weights_of(golden("vae_sdxl"), "weights/"), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="is not a Flux 2 VAE: it is an LDM VAE of 4 channels"):
        checkpoints.load_part(PARTS["flux2", ""], tmp_path / "x.safetensors", dtype=torch.float32)


# ---------------------------------------------------------------- toys


TOYS = {  # toy -> its part, channels and size of the latents of pictures of 64 x 64 pixels
    "flux2": (("flux2", ""), (128, 4, 4)),
    "wan21": (("wan", "2.1"), (16, 8, 8)),
    "wan22": (("wan", "2.2"), (48, 4, 4)),
    "hunyuan_video": (("hunyuan_video", ""), (16, 8, 8)),
    "hunyuan_video_15": (("hunyuan_video_15", ""), (32, 4, 4)),
    "ltx_video": (("ltx_video", "0.9.1"), (128, 2, 2)),
    "cosmos": (("cosmos", ""), (16, 8, 8)),
}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_toy_file_of_each_kind_is_read_encodes_and_decodes(name, dtype, tmp_path):
    if name == "cosmos" and dtype == torch.bfloat16:
        pytest.skip("torch has no average pooling of bfloat16 on the CPU")
    from tools import toy_vaes
    from tools.make_toy_model import part_shapes, weights

    family, shape = TOYS[name]
    part, (configuration, stated) = PARTS[family], getattr(toy_vaes, name)()
    state = weights(part_shapes(part, configuration), 0)
    case = next(case for case in CASES.values() if case.family == family)
    model, pixels = load(part, state, tmp_path, dtype, **stated), torch.rand(1, 3, 64, 64) * 2 - 1
    latents = case.encode(model, pixels)
    assert latents.shape[1:] == shape and latents.dtype == torch.float32 and latents.isfinite().all()
    decoded = case.decode(model, latents)
    assert decoded.shape == pixels.shape and decoded.dtype == torch.float32 and decoded.isfinite().all()
    if dtype == torch.bfloat16:
        assert relative(latents, case.encode(load(part, state, tmp_path, torch.float32, **stated), pixels)) < 0.1


# ---------------------------------------------------------------- spellings, with weights


@torch.no_grad()
def test_tencents_single_frame_convolutions_are_read_and_written_as_they_were(tmp_path):
    """Tencent's HunyuanImage file holds 3-d convolutions under `vae.`; a save keeps prefix and rank."""
    case = CASES["hunyuan_image"]
    tensors = tensors_of(case)
    theirs = {
        f"vae.{key}": (value.unsqueeze(2) if value.ndim == 4 else value)
        for key, value in weights_of(tensors, "weights/").items()
    }
    model = model_of(case, tmp_path, theirs)
    assert model.binding.layout.name == "tencent"
    assert relative(case.encode(model, tensors["inputs/pixels"]), tensors["outputs/latent"] * 0.75289) < SAME
    checkpoints.save_part(model, tmp_path / "saved.safetensors", {})
    with Checkpoint.open(tmp_path / "saved.safetensors").reader() as reader:
        assert all(torch.equal(reader.raw(key), value) for key, value in theirs.items())


def test_what_training_left_in_a_file_of_sd_is_kept(tmp_path):
    case, left = CASES["sd"], {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
    model = model_of(case, tmp_path, weights_of(tensors_of(case), "weights/") | left)
    assert set(model.binding.extras) == set(left)


@torch.no_grad()
def test_a_diffusers_folder_of_before_2023_is_what_diffusers_makes_of_it(tmp_path):
    from diffusers import AutoencoderKL

    case = CASES["sdxl"]
    tensors = tensors_of(case)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in model_of(case, tmp_path).state_dict().items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        state[key] = value
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata=GROUPS)
    config = json.loads(golden_metadata("vae_sdxl")["diffusers_config"]) | {"_class_name": "AutoencoderKL"}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoencoderKL.from_pretrained(folder)
    model = checkpoints.load_part(PARTS[case.family], folder, dtype=torch.float32)
    assert model.binding.layout.name == "diffusers_old"
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in model.state_dict().items())
    assert relative(case.encode(model, tensors["inputs/pixels"]), tensors["outputs/latent"] * 0.13025) < SAME


def test_wan_and_qwen_image_are_one_model_with_one_table_of_statistics():
    """diffusers has a class for each. Of Wan 2.2's table it has no copy: only its lengths can be compared."""
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

    with torch.device("meta"):
        wan, qwen = AutoencoderKLWan(), AutoencoderKLQwenImage()
    assert shapes_of(wan) == shapes_of(qwen)
    for model in (wan, qwen):
        assert (tuple(model.config.latents_mean), tuple(model.config.latents_std)) == vae_wan.STATISTICS[16]
    assert [len(values) for values in vae_wan.STATISTICS[48]] == [48, 48]


def test_a_vae_of_pictures_with_transparency_is_qwen_images():
    shapes, part = full_size("vae_qwen_image"), PARTS["wan", "2.1"]
    for key in ("encoder.conv1.weight", "decoder.head.2.weight", "decoder.head.2.bias"):
        at = 1 if key == "encoder.conv1.weight" else 0
        shapes[key] = (*shapes[key][:at], 4, *shapes[key][at + 1 :])
    assert layout_of(part, shapes).their_shapes == shapes


def test_unknown_channels_need_their_statistics(tmp_path):
    case = CASES["wan21"]
    with pytest.raises(ConfigError, match="4 latent channels, whose mean and deviation are not known"):
        load(PARTS[case.family], weights_of(tensors_of(case), "weights/"), tmp_path, torch.float32)
