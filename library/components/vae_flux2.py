"""Flux 2's autoencoder: an LDM encoder with 32 channels whose latents are 2x2 patches with batch-norm statistics.

The statistics are in the file (bn.running_mean, bn.running_var of 4 x 32 channels). ComfyUI and BFL spell the same
model in two ways: BFL keeps the quantising convolutions inside encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.components import vae_ldm
from library.families.family import Part
from library.layout import Row, Shape, row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPSILON = 1e-4  # of the batch norm: `bn_eps` of BFL's autoencoder, `batch_norm_eps` in diffusers' configuration
PATCH = 2


def comfy_rows(ours: Mapping[str, Shape]) -> list[Row]:
    return [*vae_ldm.ldm_rows(ours), row("bn")]


def bfl_rows(ours: Mapping[str, Shape]) -> list[Row]:
    inside = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    return [row(inside.get(r.theirs, r.theirs), *r.ours, op=r.op) for r in comfy_rows(ours)]


def recognise(shapes: Mapping[str, Shape]) -> str | None:
    """The batch norm's statistics are this model's alone among LDM autoencoders."""
    names = vae_ldm.names(shapes) if "bn.running_mean" in shapes else None
    return "bfl" if names == "ldm" and "encoder.quant_conv.weight" in shapes else names


def config(shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str) -> dict[str, Any]:
    sizes = vae_ldm.config(shapes, metadata, layout)
    for name, inside in (("quant_conv", "encoder.quant_conv"), ("post_quant_conv", "decoder.post_quant_conv")):
        sizes[f"use_{name}"] |= f"{inside}.weight" in shapes
    return sizes | {"batch_norm_eps": EPSILON, "patch_size": (PATCH, PATCH)}


def build(configuration: dict[str, Any]) -> torch.nn.Module:
    return vae_ldm.class_of("AutoencoderKLFlux2")(**configuration)


def part(title: str = "a Flux 2 VAE") -> Part:
    return Part(
        name="vae",
        title=title,
        option="vae",
        layouts={"ldm": comfy_rows, "bfl": bfl_rows, "diffusers": vae_ldm.identity, "diffusers_old": vae_ldm.old_rows},
        recognise=recognise,
        config=config,
        build=build,
        prefixes=("", "first_stage_model.", "vae."),
        diffusers_folder="vae",
        stated=(vae_ldm.GROUPS_KEY,),
    )


def _statistics(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each of the 4 C channels, float32 [1,4C,1,1]."""
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    return mean[None, :, None, None], (variance + EPSILON).sqrt()[None, :, None, None]


def encode(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """[B,3,H,W] in -1..1 -> normalised latents [B,4C,H/16,W/16] float32, of the posterior's mean.

    A latent's channels run (c, row, column) over its 2x2 patch. H and W are multiples of 16.
    """
    import torch

    mean, deviation = _statistics(vae)
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mean.float()
    return (torch.nn.functional.pixel_unshuffle(latents, PATCH) - mean) / deviation


def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Normalised latents [B,4C,h,w] -> [B,3,16h,16w] in about -1..1, float32."""
    import torch

    mean, deviation = _statistics(vae)
    patches = torch.nn.functional.pixel_shuffle(latents.float() * deviation + mean, PATCH)
    return vae.decode(patches.to(vae.dtype)).sample.float()
