"""All autoencoders in one table, so that any VAE file can be named: (family, variant, part)."""

from __future__ import annotations

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
from library.families.family import Part

# `family` names a VAE after the model that it was published with, whoever else uses it.
VAES: tuple[tuple[str, str, Part], ...] = (
    ("sdxl", "", vae_ldm.part("an LDM VAE of 4 channels (SD or SDXL)", channels=4)),
    ("flux", "", vae_ldm.part("a Flux-type VAE (16 channels, also SD3's)", channels=16)),
    ("flux2", "", vae_flux2.part()),
    ("hunyuan_image", "", vae_hunyuan_image.part()),
    ("wan", "2.1", vae_wan.part()),
    ("wan", "2.2", vae_wan.part22()),
    ("hunyuan_video", "", vae_hunyuan_video.part()),
    ("hunyuan_video_15", "", vae_hunyuan_video15.part()),
    ("ltx_video", "0.9.0", vae_ltx.part("an LTX-Video 0.9.0 VAE", ("0.9.0",))),
    ("ltx_video", "0.9.1", vae_ltx.part("an LTX-Video 0.9.1 VAE", ("0.9.1",))),
    ("ltx_video", "0.9.5", vae_ltx.part("an LTX-Video VAE of 0.9.5 or later", ("0.9.5",))),
    ("cosmos", "", vae_cosmos.part()),
)
