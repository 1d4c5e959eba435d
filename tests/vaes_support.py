"""Which golden file belongs to which autoencoder, and how its latents are normalised."""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from oracles import golden, golden_metadata, load, weights_of

from library.components import (
    vae_cosmos,
    vae_flux2,
    vae_hunyuan_image,
    vae_hunyuan_video,
    vae_hunyuan_video15,
    vae_ldm,
    vae_ltx,
    vae_wan,
)
from library.components.vaes import VAES

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
    "hunyuan_video": Case(
        ("hunyuan_video", ""),
        ("vae_hunyuan_video",),
        vae_hunyuan_video.encode,
        vae_hunyuan_video.decode,
        affine(0, 0.476986),
        GROUPS,
    ),
    "hunyuan_video15": Case(
        ("hunyuan_video_15", ""),
        ("vae_hunyuan_video15",),
        vae_hunyuan_video15.encode,
        vae_hunyuan_video15.decode,
        affine(0, 1.03682),
    ),
    "ltx_091": Case(("ltx_video", "0.9.1"), ("vae_ltx_091", "vae_ltx_091_decoder"), vae_ltx.encode, vae_ltx.decode),
    "ltx_095": Case(("ltx_video", "0.9.5"), ("vae_ltx_095", "vae_ltx_095_decoder"), vae_ltx.encode, vae_ltx.decode),
    "cosmos": Case(("cosmos", ""), ("vae_cosmos1",), vae_cosmos.encode, vae_cosmos.decode),
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
