"""Where the parts of a model are, by diffusion-pipe's keys: single files, a diffusers folder, an official folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.dialects import Translation
from library.errors import ConfigError

if TYPE_CHECKING:
    from library.families.family import Part

DENOISERS = ("transformer_path", "diffusion_model", "checkpoint_path", "single_file_path")
VAES = ("vae_path", "vae")
# key of a text encoder -> beginnings of the names of the parts that it can mean; () = the first text encoder
TEXTS: dict[str, tuple[str, ...]] = {
    "text_encoder_path": (),
    "llm_path": ("llm", "llama", "text_encoder", "t5", "umt5"),
    "clip_path": ("clip_l", "clip"),
    "t5_path": ("t5",),
    "byt5_path": ("byt5",),
    "llama3_path": ("llama", "llm"),
}
FILES = (*DENOISERS, *VAES, *TEXTS, "text_encoders", "diffusers_path", "ckpt_path")
# family -> option -> what it is in a diffusers folder of another model, the first of which that exists
BORROWED: dict[str, dict[str, str]] = {"chroma": {"t5xxl": "text_encoder_2", "tokenizer_t5xxl": "tokenizer_2"}}
# family -> option -> names of it in the folder that the model was published in; "?" = only if it is there
PUBLISHED: dict[str, dict[str, tuple[str, ...]]] = {
    "wan": {
        "pretrained_model_name_or_path": (".",),
        "vae": ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth"),
        "t5": ("models_t5_umt5-xxl-enc-bf16.pth",),
        "clip": ("?models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
        "tokenizer": ("?google/umt5-xxl",),
    },
    "hunyuan_video": {
        "pretrained_model_name_or_path": ("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",),
        "vae": ("hunyuan-video-t2v-720p/vae/pytorch_model.pt",),
        "llm_path": ("text_encoder",),
        "clip_path": ("text_encoder_2",),
    },
}
# five models with the same tensors; the last one is what a name without a hint means
QWEN_NAMES = {"2511": "edit-2511", "2509": "edit-2509", "2512": "2512", "edit": "edit", "": "original"}


def place(t: Translation) -> None:
    """Set the options of all parts. A file of its own goes before a folder. Raises ConfigError naming the key."""
    model, family = t.config["model"], t.family
    given = [key for key in DENOISERS if model.get(key)]
    if len(given) > 1:
        t.refuse(f"[model] {given[1]}", f"{given[0]} is the denoiser already; remove one of them")
    for key in given:
        t.set(family.denoiser.option, model[key], f"[model] {key}")
    for key in VAES:
        if model.get(key):
            t.set(family.vae.option, model[key], f"[model] {key}")
    for key in TEXTS:
        if model.get(key):
            t.set(text_part(t, key).option, model[key], f"[model] {key}")
    if model.get("text_encoders"):
        _several(t, model["text_encoders"])
    if model.get("diffusers_path"):
        _diffusers(t, model["diffusers_path"])
    if model.get("ckpt_path"):
        _published(t, model["ckpt_path"])
    if family.denoiser.option not in t.values:
        t.refuse("[model]", f"the denoiser is missing; give one of {', '.join((*DENOISERS, 'diffusers_path'))}")
    _version(t)


def text_part(t: Translation, key: str) -> Part:
    """The text encoder that a key means. Raises ConfigError if this model has none such."""
    parts = t.family.text_encoders
    if not TEXTS[key]:
        return parts[0]
    for start in TEXTS[key]:
        for part in parts:
            if part.name.startswith(start):
                return part
    t.refuse(f"[model] {key}", f"{t.family.title} has no such text encoder (it has {', '.join(p.name for p in parts)})")
    raise AssertionError


def _several(t: Translation, entries: Any) -> None:
    """`text_encoders = [{path = ..} or {paths = [..]}]`: found by their files where these are there, else in order."""
    where = "[model] text_encoders"
    if not isinstance(entries, list) or not all(
        isinstance(e, Mapping) and ("path" in e) != ("paths" in e) for e in entries
    ):
        t.refuse(where, "a list of {path = '...', type = '...'} or {paths = [...], type = '...'} is wanted")
    paths = [path for entry in entries for path in (entry.get("paths") or [entry["path"]])]
    left = list(t.family.text_encoders)
    if len(paths) > len(left):
        t.refuse(where, f"{len(paths)} files for {len(left)} text encoders of {t.family.title}")
    for path in paths:
        part = next((part for part in left if _is(part, path)), left[0])
        left.remove(part)
        t.set(part.option, path, where)


def _is(part: Part, path: str) -> bool:
    from library.checkpoints import find_part

    try:
        find_part(part, path)
    except ConfigError:
        return False
    return True


def _diffusers(t: Translation, folder: str) -> None:
    """The parts that have no file of their own. Alone it is the whole model, in which every part is found by itself."""
    where, family = "[model] diffusers_path", t.family
    if family.denoiser.option not in t.values:
        t.set(family.denoiser.option, folder, where)
        return
    for option, name in BORROWED.get(family.name, {}).items():
        if option not in t.values and (Path(folder) / name).is_dir():
            t.set(option, str(Path(folder) / name), where)
    single = t.config["model"].get("single_file_path")
    for part in (family.vae, *family.text_encoders):
        if part.option not in t.values and not (part is family.vae and single):
            t.set(part.option, folder, where)


def _published(t: Translation, folder: str) -> None:
    """A folder as the model's makers publish it, for what has no file of its own."""
    where, names = "[model] ckpt_path", PUBLISHED.get(t.family.name)
    if names is None:
        t.refuse(where, f"{t.family.title} has no folder of this kind; give its files")
    for key, candidates in names.items():
        option = text_part(t, key).option if key in TEXTS else key
        if option in t.values:
            continue
        paths = {name: Path(folder) / name.lstrip("?") for name in candidates}
        found = next((path for path in paths.values() if path.exists()), None)
        if found or not candidates[0].startswith("?"):
            t.set(option, (found or paths[candidates[0]]).as_posix(), where)


def _version(t: Translation) -> None:
    """--model_version where models have the same tensors: the key, else the folder, else the file's name."""
    if not t.kind.versions or t.values.get("model_version"):
        return
    path = Path(t.values[t.family.denoiser.option])
    if (path / "model_index.json").is_file():
        return  # which says it
    name = path.name.lower().replace("-", "_")
    version = next(version for part, version in t.kind.versions.items() if part in name)
    t.set("model_version", version, f"[model] (the name {path.name})")
