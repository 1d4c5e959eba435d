"""What any weight file is, from its header alone: kind, family, variant, layout, format. No torch.

Families that lorasmith trains, all VAEs and encoders are recognised by their own parts; for the others a table of distinguishing
keys names the file, so that a mistaken path is answered with what the file is.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library.checkpoints import Checkpoint, configuration, facts, rows_of
from library.components.encoders import ENCODERS
from library.components.vaes import VAES
from library.errors import ConfigError
from library.families import FAMILIES, get_family
from library.families.family import Part
from library.layout import Shape

RELEASED = Path(__file__).resolve().parent / "released"  # lists of names and shapes of released models
PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
    "transformer.",
    "first_stage_model.",
    "vae.",
)
LORA_SUFFIXES = (
    ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight",
    ".lora_B.default.weight", ".alpha", ".dora_scale", ".lokr_w1", ".lokr_w2", ".hada_w1_a", ".hada_w1_b",
)  # fmt: skip
LORA_PREFIXES = {"comfy": "diffusion_model.", "kohya": "lora_unet_", "diffusers": "transformer."}

# (kind, family, variant, title, keys that are all there). The first row that fits decides, so narrower rows come first.
# Read off the key lists of the released files.
TABLE: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("checkpoint", "sdxl", "", "an SDXL UNet", ("input_blocks.0.0.weight", "label_emb.0.0.weight", "input_blocks.4.1.proj_in.weight")),
    ("checkpoint", "sd1", "", "an SD 1.x or 2.x UNet", ("input_blocks.0.0.weight", "input_blocks.1.1.proj_in.weight")),
    ("checkpoint", "chroma", "", "a Chroma denoiser", ("distilled_guidance_layer.in_proj.weight",)),
    ("checkpoint", "flux2", "", "a Flux 2 denoiser", ("double_stream_modulation_img.lin.weight",)),
    ("checkpoint", "hunyuan_image", "", "a HunyuanImage-2.1 denoiser", ("byt5_in.fc1.weight", "double_blocks.0.img_attn_qkv.weight", "single_blocks.0.linear1.weight")),
    ("checkpoint", "hunyuan_image", "", "a HunyuanImage-2.1 denoiser", ("byt5_in.fc1.weight", "single_blocks.0.linear1.weight")),
    ("checkpoint", "hunyuan_video_15", "", "a HunyuanVideo-1.5 denoiser", ("byt5_in.fc1.weight", "cond_type_embedding.weight")),
    ("checkpoint", "hunyuan_video", "", "a HunyuanVideo denoiser", ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "vector_in.in_layer.weight")),
    ("checkpoint", "flux", "", "a Flux denoiser", ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight")),
    ("checkpoint", "sd3", "", "an SD3 denoiser", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    ("checkpoint", "qwen_image", "2511", "a Qwen-Image-Edit-2511 denoiser", ("transformer_blocks.0.img_mod.1.weight", "__index_timestep_zero__")),
    ("checkpoint", "qwen_image", "", "a Qwen-Image denoiser", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    ("checkpoint", "z_image", "", "a Z-Image denoiser", ("cap_pad_token", "layers.0.attention_norm1.weight")),
    ("checkpoint", "omnigen2", "", "an OmniGen2 denoiser", ("ref_image_patch_embedder.weight", "image_index_embedding")),
    ("checkpoint", "lumina_2", "", "a Lumina 2 denoiser", ("cap_embedder.1.weight", "layers.0.attention.qkv.weight")),
    ("checkpoint", "auraflow", "", "an AuraFlow denoiser", ("register_tokens", "init_x_linear.weight")),
    ("checkpoint", "hidream", "", "a HiDream denoiser", ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight")),
    ("checkpoint", "ltx_video", "", "an LTX-Video denoiser", ("patchify_proj.weight", "adaln_single.linear.weight")),
    ("checkpoint", "wan", "", "a Wan image-to-video denoiser", ("blocks.0.cross_attn.k_img.weight", "patch_embedding.weight")),
    ("checkpoint", "wan", "", "a Wan denoiser", ("blocks.0.cross_attn.norm_k.weight", "patch_embedding.weight", "time_projection.1.weight")),
    ("checkpoint", "anima", "", "an Anima denoiser", ("llm_adapter.embed.weight", "blocks.0.cross_attn.q_proj.weight")),
    ("checkpoint", "cosmos_predict2", "", "a Cosmos-Predict2 denoiser", ("blocks.0.cross_attn.q_proj.weight", "blocks.0.adaln_modulation_mlp.1.weight")),
    ("checkpoint", "cosmos", "", "a Cosmos 1.0 denoiser", ("blocks.block0.blocks.0.block.attn.to_q.0.weight",)),
    ("vae", "ldm", "", "an LDM VAE", ("encoder.down.0.block.0.conv1.weight",)),
    ("vae", "ldm", "", "an LDM VAE (diffusers names)", ("encoder.down_blocks.0.resnets.0.conv1.weight",)),
    ("text_encoder", "gemma3", "", "a Gemma 3 text encoder", ("model.layers.0.self_attn.q_norm.weight", "model.layers.0.pre_feedforward_layernorm.weight")),
)  # fmt: skip

# (family, variant, a key that tells and its shape, None = any size). The first row that fits decides.
VARIANTS: tuple[tuple[str, str, str, tuple[int | None, ...]], ...] = (
    *(
        ("hunyuan_image", "distilled", key, (None, None))
        for key in (
            "guidance_in.in_layer.weight",
            "guidance_in.mlp.0.weight",
            "time_guidance_embed.guidance_embedder.linear_1.weight",
        )
    ),
    ("flux", "flex.2", "img_in.weight", (None, 196)),
    ("flux", "flex.2", "x_embedder.weight", (None, 196)),
    ("flux", "fill", "img_in.weight", (None, 384)),
    ("flux", "control", "img_in.weight", (None, 128)),
    ("flux", "dev", "guidance_in.in_layer.weight", (None, None)),  # Kontext, Flex.1 and Krea have the same shapes
    ("flux", "dev", "time_text_embed.guidance_embedder.linear_1.weight", (None, None)),
    ("flux", "schnell", "vector_in.in_layer.weight", (None, None)),
    ("flux", "schnell", "time_text_embed.text_embedder.linear_1.weight", (None, None)),
    *(
        ("flux2", name, key, (width, None))
        for name, width in (("dev", 6144), ("klein 4B", 3072), ("klein 9B", 4096))
        for key in ("img_in.weight", "x_embedder.weight")
    ),
    ("cosmos", "7B", "x_embedder.proj.1.weight", (4096, 68)),
    ("cosmos", "14B", "x_embedder.proj.1.weight", (5120, 68)),
    ("cosmos", "video2world", "x_embedder.proj.1.weight", (None, 72)),
    ("cosmos_predict2", "2B", "x_embedder.proj.1.weight", (2048, 68)),
    ("cosmos_predict2", "14B", "x_embedder.proj.1.weight", (5120, 68)),
    ("cosmos_predict2", "video2world", "x_embedder.proj.1.weight", (None, 72)),
    ("ltx_video", "2B", "patchify_proj.weight", (2048, None)),
    ("ltx_video", "13B", "patchify_proj.weight", (4096, None)),
    ("hunyuan_video", "i2v", "img_in.proj.weight", (None, 33, None, None, None)),
    ("hunyuan_video", "i2v", "x_embedder.proj.weight", (None, 33, None, None, None)),
    ("sd3", "3.5 medium", "joint_blocks.0.x_block.attn2.qkv.weight", (None, None)),
    ("sd3", "3.5 medium", "transformer_blocks.0.attn2.to_q.weight", (None, None)),
    ("sd3", "3.5 large", "joint_blocks.0.x_block.attn.ln_q.weight", (None,)),
    ("sd3", "3.5 large", "transformer_blocks.0.attn.norm_q.weight", (None,)),
    ("sd3", "3 medium", "joint_blocks.0.x_block.attn.qkv.weight", (None, None)),
    ("sd3", "3 medium", "transformer_blocks.0.attn.to_q.weight", (None, None)),
    ("qwen_image", "2511", "__index_timestep_zero__", (None,)),
    ("wan", "2.1 first-and-last-frame", "img_emb.emb_pos", (None, None, None)),
    ("wan", "2.1 first-and-last-frame", "condition_embedder.image_embedder.pos_embed", (None, None, None)),
    ("wan", "2.1 i2v", "blocks.0.cross_attn.k_img.weight", (None, None)),
    ("wan", "2.1 i2v", "blocks.0.attn2.add_k_proj.weight", (None, None)),
    ("wan", "2.2 i2v", "patch_embedding.weight", (None, 36, None, None, None)),
    ("wan", "2.2 5B", "patch_embedding.weight", (None, 48, None, None, None)),
    ("wan", "t2v", "patch_embedding.weight", (None, 16, None, None, None)),  # 2.1 and 2.2 A14B have the same shapes
    ("qwen2.5-vl", "7B", "model.embed_tokens.weight", (None, 3584)),
    ("qwen2.5-vl", "3B", "model.embed_tokens.weight", (None, 2048)),
    ("qwen3", "0.6B", "model.embed_tokens.weight", (None, 1024)),
    ("qwen3", "4B", "model.embed_tokens.weight", (None, 2560)),
    ("qwen3", "8B", "model.embed_tokens.weight", (None, 4096)),
    ("mistral", "whole", "model.layers.39.input_layernorm.weight", (None,)),
    ("mistral", "30 layers", "model.layers.29.input_layernorm.weight", (None,)),
)


@dataclass(frozen=True)
class Identity:
    kind: str  # checkpoint, lora, vae, text_encoder, image_encoder, unknown
    family: str
    variant: str
    layout: str
    format: str
    dtypes: dict[str, int]
    parameters: int
    matched: int
    unmatched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    title: str = "a file of unknown content"

    @property
    def sentence(self) -> str:
        return f"{self.title} ({self.kind}, {self.parameters / 1e6:,.1f} M parameters)"

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "title"}


def identify(checkpoint: Checkpoint, exact: bool = False) -> Identity:
    """What the file is. `exact` also compares every key: with the lists of released files, else with the layout of a
    family that is trained here, which builds the model on the meta device and so imports torch and diffusers."""
    shapes = checkpoint.shapes
    common: dict[str, Any] = {"dtypes": _count(checkpoint), "parameters": sum(_numel(s) for s in shapes.values())}
    if any(key.endswith(LORA_SUFFIXES) for key in shapes):
        return _lora(shapes, common)
    # Denoisers first: an all-in-one checkpoint of any family also holds a VAE and text encoders.
    found = _known_part(checkpoint, common, exact, denoiser=True) or _listed(shapes, common, ("checkpoint",))
    found = found or _known_part(checkpoint, common, exact, denoiser=False)
    found = found or _listed(shapes, common, ("vae", "text_encoder"))
    return found or Identity("unknown", "", "", "", "", matched=0, unmatched=sorted(shapes), **common)


def _listed(shapes: Mapping[str, Shape], common: dict[str, Any], kinds: tuple[str, ...]) -> Identity | None:
    """The first row of the table, of these kinds, whose keys are all there under one prefix."""
    for prefix in PREFIXES:
        names = {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
        for kind, family, variant, title, keys in TABLE:
            if kind in kinds and all(key in names for key in keys):
                variant = variant or (variant_of(family, names) if kind == "checkpoint" else "")
                return Identity(kind, family, variant, "original", "", matched=len(names), title=title, **common)
    return None


def variant_of(family: str, shapes: Mapping[str, Shape]) -> str:
    """Which of a family's models these original keys are, "" if it has but one or they do not tell."""
    for name, variant, key, wanted in VARIANTS:
        shape = shapes.get(key, ())
        fits = len(shape) == len(wanted) and all(w is None or n == w for n, w in zip(shape, wanted, strict=True))
        if name == family and fits:
            return variant
    return ""


def _count(checkpoint: Checkpoint) -> dict[str, int]:
    counts: dict[str, int] = {}
    for dtype in checkpoint.dtypes.values():
        counts[dtype] = counts.get(dtype, 0) + 1
    return counts


def _numel(shape: Shape) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _candidates(denoiser: bool) -> Iterator[tuple[str, str, str, Part]]:
    """Kind, family, variant and part of what is known by its own recognition."""
    if not denoiser:
        yield from (("vae", name, variant, part) for name, variant, part in VAES)
        yield from ((kind, name, "", part) for kind, name, part in ENCODERS)
    for family in map(get_family, FAMILIES):
        for part in (family.denoiser,) if denoiser else (*family.text_encoders, *family.image_encoders):
            yield "checkpoint" if denoiser else part.name, family.name, "", part


def _known_part(checkpoint: Checkpoint, common: dict[str, Any], exact: bool, denoiser: bool) -> Identity | None:
    """A part of one of our families: every key is compared with its table's names (without building the model)."""
    for kind, family, variant, part in _candidates(denoiser):
        for prefix in part.prefixes:
            chosen = checkpoint.with_prefix(prefix) if prefix else checkpoint
            shapes = chosen.shapes
            layout = part.layout_in(shapes)
            if not layout:
                continue
            wanted = (_released(shapes) or _names(part, layout, chosen)) if exact else shapes
            unmatched = [k for k in shapes if k not in wanted and not part.may_carry(k, shapes[k])]
            return Identity(
                kind,
                family,
                variant or variant_of(family, shapes),
                layout,
                "",
                matched=len(shapes) - len(unmatched),
                unmatched=unmatched,
                missing=[k for k in wanted if k not in shapes],
                title=part.title,
                **common,
            )
    return None


def _released(shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """The list of the released model that this file is, to the last key and shape; none of them: nothing.

    All lists are read in some 20 ms, where building a model to compare takes seconds of imports.
    """
    for path in sorted(RELEASED.glob("*.json.gz")):
        listed = _list(path)
        if listed.keys() == shapes.keys() and all(listed[key] == tuple(shapes[key]) for key in listed):
            return listed
    return {}


def _list(path: Path) -> dict[str, Shape]:
    return {key: tuple(shape) for key, shape in json.loads(gzip.decompress(path.read_bytes())).items()}


def _names(part: Any, layout: str, checkpoint: Checkpoint) -> dict[str, Shape]:
    """Names that the part's own layout gives for a file of this size. Needs the model, on the meta device."""
    import torch

    from library.layout import Layout, shapes_of

    with torch.device("meta"):
        model = part.build(configuration(part, checkpoint.path, checkpoint.shapes, facts(part, checkpoint), layout))
    ours = shapes_of(model)
    return Layout(layout, rows_of(part, layout, ours), ours).their_shapes


def _lora(shapes: Mapping[str, Shape], common: dict[str, Any]) -> Identity:
    """Format by prefix, family by the modules that the file's keys name; none where they are several families'."""
    found = max(LORA_PREFIXES, key=lambda name: sum(key.startswith(LORA_PREFIXES[name]) for key in shapes))
    prefix = LORA_PREFIXES[found]
    modules = {_module(key).removeprefix(prefix) for key in shapes if key.startswith(prefix)}
    unmatched = sorted(key for key in shapes if not key.startswith(prefix) or not key.endswith(LORA_SUFFIXES))
    named = {_any_block(module) for module in modules}
    fitting = [name for name in FAMILIES if modules and named <= _modules_of(name).keys()]
    if len(fitting) > 1:
        fitting = [name for name in fitting if _has_widths(_modules_of(name), shapes, prefix)]
    if not fitting and found != "diffusers":  # names that lists do not have, of a model of another kind
        fitting = [name for name in FAMILIES if _fits(name, modules, found)]
    family = fitting[0] if len(fitting) == 1 else ""
    if found == "diffusers" and family and "original" in get_family(family).save_formats:
        found = "original" if _fits(family, modules, found) else found  # the release's names have the same prefix
    title = f"a LoRA of {get_family(family).title} in {found} names" if family else f"a LoRA in {found} names"
    return Identity(
        "lora",
        family,
        "",
        "original" if found != "diffusers" else "diffusers",
        found,
        matched=len(shapes) - len(unmatched),
        unmatched=unmatched,
        title=title,
        **common,
    )


def _module(key: str) -> str:
    return (
        next(key.removesuffix(suffix) for suffix in LORA_SUFFIXES if key.endswith(suffix))
        if key.endswith(LORA_SUFFIXES)
        else key
    )


def _any_block(module: str) -> str:
    """A module's name in any format, whatever the number of its block."""
    return re.sub(r"(?<=_)\d+(?=_)", "N", module.replace(".", "_"), count=1)


def _has_widths(released: Mapping[str, Shape], shapes: Mapping[str, Shape], prefix: str) -> bool:
    """Whether adapters are as wide as what they adapt in the released model, as far as its list has their names."""
    for key, shape in shapes.items():
        wanted = released.get(_any_block(_module(key).removeprefix(prefix)), ())
        down, up = (
            key.endswith((".lora_down.weight", ".lora_A.weight")),
            key.endswith((".lora_up.weight", ".lora_B.weight")),
        )
        if wanted and ((down and shape[1:2] != wanted[1:2]) or (up and shape[:1] != wanted[:1])):
            return False
    return True


@functools.cache
def _modules_of(name: str) -> Mapping[str, Shape]:
    """Modules of a family's denoiser as `_any_block` writes them: of the released model, with the shapes of their
    weights, and of its tables, without."""
    part = get_family(name).denoiser
    families = json.loads((RELEASED / "index.json").read_text(encoding="utf-8"))["families"]
    path = RELEASED / f"{families.get(name, {}).get('denoiser', name)}.json.gz"
    keys = _list(path) if path.is_file() else {}
    listed = {key.removesuffix(".weight"): keys[key] for key in keys if key.endswith(".weight")}
    for prefix in filter(None, part.prefixes):
        listed |= {module.removeprefix(prefix): shape for module, shape in listed.items()}
    tables = [table for table in part.layouts.values() if not callable(table)]  # a callable needs the model's size
    modules = {one: () for table in tables for row in table for names in (row.ours, (row.theirs,)) for one in names}
    return {_any_block(module.replace("{i}", "0")): shape for module, shape in (modules | listed).items()}


def _fits(name: str, modules: set[str], found: str) -> bool:
    """Most of the module names begin with what this family's adapters begin with."""
    prefixes = get_family(name).adapted
    if found == "kohya":
        prefixes = tuple(prefix.replace(".", "_") for prefix in prefixes)
    return bool(modules) and sum(m.startswith(prefixes) for m in modules) > len(modules) / 2


def identify_path(path: str) -> Identity:
    """Identity of a file or folder. Raises ConfigError if it cannot be read."""
    checkpoint = Checkpoint.open(path)
    if not checkpoint.headers:
        raise ConfigError(f"{path}: nothing to read")
    return identify(checkpoint, exact=True)
