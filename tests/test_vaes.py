"""All autoencoders against outside oracles: an independent implementation's latents and pixels, the key lists of the
real files, diffusers' own tiling and conversion; and each told from all others."""

import gc
import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from oracles import golden, golden_metadata, load, path_of, read_json, relative, weights_of
from safetensors.torch import save_file

from library import checkpoints
from library.checkpoints import Checkpoint
from library.components import chunks, vae_flux2, vae_hunyuan_image, vae_ldm, vae_wan
from library.components.vaes import VAES
from library.errors import ConfigError
from library.fingerprints import identify, identify_path
from library.layout import Layout, shapes_of

PARTS = {(family, variant): part for family, variant, part in VAES}
SAME = 1e-4  # relative, float32


def affine(shift, scale):
    return lambda z: (z - shift) * scale


def by_channel(name):
    """Normalisation by the statistics that a golden file states for its few channels."""
    stated = json.loads(golden_metadata(name)["diffusers_config"])
    mean, std = (torch.tensor(stated[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    return lambda z: (z - mean) / std


@dataclass
class Case:
    """A golden file (and the one with its decoder): whose part it is, how its latents are normalised, what it states."""

    family: tuple[str, str]
    files: tuple[str, ...]
    encode: Any
    decode: Any
    normalise: Any = lambda z: z
    stated: dict[str, str] = field(default_factory=dict)  # in the header, for what no shape shows


def ldm(pair):
    return partial(vae_ldm.encode, shift=pair[0], scale=pair[1]), partial(vae_ldm.decode, shift=pair[0], scale=pair[1])


GROUPS = {"norm_num_groups": "4"}
WAN = (vae_wan.encode, vae_wan.decode)
CASES = {
    "sdxl": Case(("sdxl", ""), ("vae_sdxl",), *ldm(vae_ldm.SDXL), affine(0, 0.13025), GROUPS),
    "sd": Case(("sdxl", ""), ("vae_sdxl",), *ldm(vae_ldm.SD), affine(0, 0.18215), GROUPS),
    "flux": Case(("flux", ""), ("vae_flux",), *ldm(vae_ldm.FLUX), affine(0.1159, 0.3611), GROUPS),
    "sd3": Case(("flux", ""), ("vae_flux",), *ldm(vae_ldm.SD3), affine(0.0609, 1.5305), GROUPS),
    "flux2": Case(("flux2", ""), ("vae_flux2",), vae_flux2.encode, vae_flux2.decode, stated=GROUPS),
    "hunyuan_image": Case(
        ("hunyuan_image", ""),
        ("vae_hunyuan_image21",),
        vae_hunyuan_image.encode,
        vae_hunyuan_image.decode,
        affine(0, 0.75289),
    ),
    "wan21": Case(("wan", "2.1"), ("vae_wan21", "vae_wan21_decoder"), *WAN, "statistics"),
    "qwen_image": Case(("wan", "2.1"), ("vae_qwen_image", "vae_qwen_image_decoder"), *WAN, "statistics"),
    "wan22": Case(("wan", "2.2"), ("vae_wan22",), *WAN, "statistics"),
}


def tensors_of(case):
    return {key: value for name in case.files for key, value in golden(name).items()}


def model_of(case, tmp_path, weights=None):
    stated = dict(case.stated)
    if case.normalise == "statistics":
        published = json.loads(golden_metadata(case.files[0])["diffusers_config"])
        stated |= {key: json.dumps(published[key]) for key in ("latents_mean", "latents_std")}
    weights = weights_of(tensors_of(case), "weights/") if weights is None else weights
    return load(PARTS[case.family], weights, tmp_path, torch.float32, **stated)


def normalised(case, latents):
    return (by_channel(case.files[0]) if case.normalise == "statistics" else case.normalise)(latents)


@pytest.mark.parametrize("name", CASES)
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
    shapes = full_size(name)
    layout = layout_of(PARTS[family, variant], shapes)
    assert layout.name == layout_name and layout.their_shapes == shapes


OTHER_NAMES = [
    (("sdxl", ""), "vae_sdxl", ("diffusers", "diffusers_old")),
    (("flux", ""), "vae_flux", ("diffusers", "diffusers_old")),
    (("flux2", ""), "vae_flux2", ("bfl", "diffusers")),
    (("hunyuan_image", ""), "vae_hunyuan_image", ("tencent", "diffusers")),
    (("wan", "2.1"), "vae_wan21", ("diffusers",)),
    (("wan", "2.2"), "vae_wan22", ("diffusers",)),
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


def everything():
    """Every VAE that an oracle shows, as (what it is, a function that gives its shapes)."""
    for name, (family, variant, _) in LAYOUTS.items():
        yield name, (family, variant), partial(full_size, name)
    for family, file, layout in spellings():
        yield f"{file} in {layout} names", family, partial(in_other_names, family, file, layout)
    for name, case in CASES.items():
        yield f"golden {name}", case.family, lambda case=case: toy_shapes(case)


def toy_shapes(case):
    return {k: tuple(v.shape) for k, v in weights_of(tensors_of(case), "weights/").items()}


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


def test_published_statistics_are_those_of_diffusers():
    """Of Wan 2.2 there is no copy in diffusers' library; its table is held against the pipelines' by its length."""
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

    for kind in (AutoencoderKLWan, AutoencoderKLQwenImage):
        with torch.device("meta"):
            config = kind().config
        assert (tuple(config.latents_mean), tuple(config.latents_std)) == vae_wan.STATISTICS[16]
    assert [len(values) for values in vae_wan.STATISTICS[48]] == [48, 48]


def test_unknown_channels_need_their_statistics(tmp_path):
    case = CASES["wan21"]
    with pytest.raises(ConfigError, match="4 latent channels, whose mean and deviation are not known"):
        load(PARTS[case.family], weights_of(tensors_of(case), "weights/"), tmp_path, torch.float32)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("rows", [1, 5, 1000])
@torch.no_grad()
def test_convolutions_in_strips_give_the_same(rows, tmp_path):
    case = CASES["hunyuan_image"]
    tensors, model = tensors_of(case), model_of(case, tmp_path)
    pixels, latents = tensors["inputs/pixels"], tensors["inputs/z"]
    whole, picture = case.encode(model, pixels), case.decode(model, latents)
    assert relative(case.encode(model, pixels, chunk=rows), whole) < 1e-5
    assert relative(case.decode(model, latents, chunk=rows), picture) < 1e-5
    assert torch.equal(case.encode(model, pixels), whole)  # and nothing of it stays


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.nn.Conv2d, {"kernel_size": 3, "padding": 1}),
        (torch.nn.Conv2d, {"kernel_size": 3, "stride": 2}),
        (torch.nn.Conv2d, {"kernel_size": (5, 3), "padding": (2, 1), "groups": 2, "bias": False}),
        (torch.nn.Conv2d, {"kernel_size": 3, "padding": 1, "dilation": 2}),
        (torch.nn.Conv3d, {"kernel_size": 3, "padding": (0, 1, 1)}),
    ],
)
def test_strips_never_hold_more_rows_than_asked(kind, options, monkeypatch):
    from torch.nn import functional

    layer = kind(4, 6, **options)
    x = torch.randn(2, 4, *((5,) if kind is torch.nn.Conv3d else ()), 23, 9)
    whole, seen = layer(x), []
    for name in ("conv2d", "conv3d"):
        real = getattr(functional, name)

        def watched(x, *rest, _real=real):
            made = _real(x, *rest)
            seen.append(made.shape[-2])
            return made

        monkeypatch.setattr(functional, name, watched)
    with chunks.convolutions(layer, 4):
        assert relative(layer(x).detach(), whole.detach()) < 1e-6
    assert max(seen) <= 4 and sum(seen) == whole.shape[-2]
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_wan_encodes_four_frames_at_a_time_exactly(tmp_path):
    """The feature cache: memory does not grow with the video, and a longer one begins with the same latents."""
    case = CASES["wan21"]
    tensors, model = tensors_of(case), model_of(case, tmp_path)
    short = tensors["inputs/pixels"]
    long = torch.cat([short, torch.rand(1, 3, 8, *short.shape[-2:]) * 2 - 1], dim=2)
    frames = []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: frames.append(inputs[0].shape[2]))
    latents = case.encode(model, long)
    hook.remove()
    assert frames == [1, 4, 4, 4] and latents.shape[2] == 4
    assert relative(latents[:, :, :2], normalised(case, tensors["outputs/latent"])) < SAME


@torch.no_grad()
def test_a_picture_is_a_video_of_one_frame(tmp_path):
    case = CASES["qwen_image"]
    tensors, model = tensors_of(case), model_of(case, tmp_path)
    pixels = tensors["inputs/pixels"]
    latents = case.encode(model, pixels[:, :, 0])
    assert torch.equal(latents, case.encode(model, pixels)[:, :, 0])
    assert torch.equal(case.decode(model, latents), case.decode(model, latents.unsqueeze(2))[:, :, 0])


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_frames_that_would_be_dropped_are_refused(name, tmp_path):
    case = CASES[name]
    model = model_of(case, tmp_path)
    with pytest.raises(ConfigError, match=r"4k \+ 1 frames, not 7; use 5 or 9"):
        case.encode(model, torch.zeros(1, 3, 7, 32, 32))


def teardown_module():
    golden.cache_clear()
    gc.collect()
