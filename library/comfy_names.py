"""Which names ComfyUI takes in LoRA files of which family, read off comfy/lora.py as of February 2026."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.families.family import Family

# Family -> (prefix, whose names): what ComfyUI takes besides `diffusion_model.` and `lora_unet_` before its own names.
# "ours" are diffusers' names; "processor" those that diffusers' attention had before 0.20; "tencent" the release's.
# "qkv" is the part of Flux's linear1 that is not the MLP. Where it takes a part of the modules only, nothing stands
# here: such a file is not in that model's format.
FLUX = tuple((prefix, "ours") for prefix in ("transformer.", "lycoris_", "lora_transformer_", ""))
FLUX_QKV = ("diffusion_model.", "qkv")
TENCENT = (("transformer.", "tencent"), ("diffusion_model.", "tencent"))
UNET = (("lora_unet_", "ours"), ("lycoris_", "ours"), ("unet.", "processor"), ("", "processor"))
TAKEN: Mapping[str, tuple[tuple[str, str], ...]] = {
    "auraflow": (("transformer.", "ours"),),
    "chroma": (*FLUX, FLUX_QKV),
    "flux": (*FLUX, FLUX_QKV),
    "flux2": (*FLUX, FLUX_QKV),
    "hidream": (("transformer.", "comfy"), ("lycoris_", "comfy")),
    "hunyuan_video": TENCENT,
    "hunyuan_video_15": TENCENT,
    "omnigen2": (("", "comfy"),),
    "qwen_image": (("transformer.", "comfy"), ("lycoris_", "comfy"), ("", "comfy")),
    "sd": UNET,
    "sd3": (*FLUX[:3], ("base_model.model.", "ours")),
    "sdxl": UNET,
    "z_image": (("transformer.", "ours"), ("diffusion_model.", "ours"), ("lycoris_", "ours"), ("", "ours")),
}


def is_taken(family: Family, form: str) -> bool:
    """Whether ComfyUI loads every adapter of the family's blocks from a file of this format (`networks.formats`)."""
    more, part = TAKEN.get(family.name, ()), family.denoiser
    if (
        form == "kohya"
    ):  # sd-scripts' names are ComfyUI's, but for the families that have a layout of their own for them
        return not part.kohya or (part.kohya == "diffusers" and ("lora_unet_", "ours") in more)
    if form == "original":
        return ("transformer.", "tencent") in more
    if form == "diffusers":
        return ("transformer.", "ours") in more or ("transformer.", "comfy") in more
    return form == "comfy"


def advice(family: Family, options: Any) -> tuple[str, ...]:
    """A note for the plan, where the adapters of a run are saved for other programs."""
    form = options.save_format
    if not (options.network_module or "").startswith("networks.") or not form or is_taken(family, form):
        return ()
    return (
        f"--save_format {form}: ComfyUI does not know these names of {family.title}; it loads --save_format comfy, "
        "which tools/convert.py makes of such a file, too",
    )
