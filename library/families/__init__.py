"""The families, as an explicit lazy table: importing this imports no torch and no diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from library.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from library.families.family import Family

FAMILIES: dict[str, str] = {
    "anima": "library.families.anima:ANIMA",
    "auraflow": "library.families.auraflow:AURAFLOW",
    "chroma": "library.families.chroma:CHROMA",
    "cosmos": "library.families.cosmos:COSMOS",
    "cosmos_predict2": "library.families.cosmos_predict2:COSMOS_PREDICT2",
    "flux": "library.families.flux:FLUX",
    "flux2": "library.families.flux2:FLUX2",
    "hidream": "library.families.hidream:HIDREAM",
    "hunyuan_image": "library.families.hunyuan_image:HUNYUAN_IMAGE",
    "hunyuan_video": "library.families.hunyuan_video:HUNYUAN_VIDEO",
    "hunyuan_video_15": "library.families.hunyuan_video_15:HUNYUAN_VIDEO_15",
    "lumina_2": "library.families.lumina_2:LUMINA_2",
    "omnigen2": "library.families.omnigen2:OMNIGEN2",
    "ltx_video": "library.families.ltx_video:LTX_VIDEO",
    "qwen_image": "library.families.qwen_image:QWEN_IMAGE",
    "sd": "library.families.sd:SD",
    "sd3": "library.families.sd3:SD3",
    "sdxl": "library.families.sdxl:SDXL",
    "wan": "library.families.wan:WAN",
    "z_image": "library.families.z_image:Z_IMAGE",
}
# Families whose scripts, <this>_train_network.py and <this>_minimal_inference.py, have the names that users know.
SCRIPTS: dict[str, str] = {"lumina_2": "lumina"}


def script_of(name: str) -> str:
    """What the file names of a family's scripts begin with."""
    return SCRIPTS.get(name, name)


def get_family(name: str) -> Family:
    """The family's record. Raises ConfigError for an unknown name."""
    if name not in FAMILIES:
        raise ConfigError(f"model_type '{name}' is not known{nearest(name, FAMILIES)} (known: {', '.join(FAMILIES)})")
    module, record = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), record)


def families_of(path: Path | str) -> list[str]:
    """The families whose denoiser a file or a diffusers folder can be; only headers are read. Raises ConfigError for
    what cannot be opened."""
    from library.checkpoints import Checkpoint

    opened: dict[str, dict[str, dict]] = {}  # sub-folder -> prefix -> shapes: many families have the same ones
    found = []
    for name in FAMILIES:
        part = get_family(name).denoiser
        shapes = opened.setdefault(part.diffusers_folder, {})
        for prefix in part.prefixes:
            if prefix not in shapes:
                whole = Checkpoint.open(path, part.diffusers_folder)
                shapes[prefix] = (whole.with_prefix(prefix) if prefix else whole).shapes
            if shapes[prefix] and part.recognise(shapes[prefix]):
                found.append(name)
                break
    return found
