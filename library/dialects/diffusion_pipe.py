"""diffusion-pipe's main file: top level, [model], [adapter], [optimizer], [monitoring], each a table of rules.

A key means what diffusion-pipe does with it, and without it holds what diffusion-pipe does: no shift, LoRA's alpha
equal to its rank, trained weights in the model's number format, caches on disk, SDXL's text encoders trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library.dialects import Idle, Kind, Refused, Translation
from library.dialects.model_files import FILES, QWEN_NAMES, place
from library.errors import ConfigError, nearest

# [model] type -> what it means; a family's own name is a type, too
TYPES: dict[str, Kind] = {
    "sdxl": Kind("sdxl", trains_text=True),
    "flux": Kind("flux", usual={"save_format": "diffusers"}),
    "lumina_2": Kind("lumina_2", usual={"system_prompt": ""}),  # it is a caption_prefix there
    "ltx-video": Kind("ltx_video"),
    "hunyuan-video": Kind("hunyuan_video"),
    "qwen_image": Kind("qwen_image", versions=QWEN_NAMES),
    "qwen2511": Kind("qwen_image", {"model_version": "edit-2511"}),
    **{
        name: Kind(name)
        for name in "cosmos wan chroma hidream sd3 cosmos_predict2 omnigen2 hunyuan_image auraflow "
        "z_image hunyuan_video_15 flux2 anima".split()
    },
}
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}
SAVED = {"bfloat16": "bf16", "float16": "fp16", "float32": "float"}
HELD = {  # transformer_dtype -> options
    "float8": {"fp8_base": True},
    "float8_e4m3fn": {"fp8_base": True},
    "float8_e5m2": {"fp8_base": True, "fp8_format": "e5m2"},
    "nf4": {"nf4": True},
}
# (distribution, is there a shift by the number of tokens, is there a constant one) -> --timestep_sampling
SAMPLINGS = {
    ("logit_normal", False, False): "sigmoid",
    ("logit_normal", False, True): "shift",
    ("logit_normal", True, False): "flux_shift",
    ("uniform", False, False): "uniform",
    ("uniform", False, True): "sigma",
    ("uniform", True, False): "nextdit_shift",
}
TIMES = ("timestep_sample_method", "shift", "flux_shift", "lumina_shift")  # `_times` reads them together
RATES = ("text_encoder_1_lr", "text_encoder_2_lr")
OPTIMIZERS = {
    "adamw": "AdamW", "adamw8bit": "AdamW8bit", "adamw8bitkahan": "AdamW8bitKahan", "sgd": "SGD", "prodigy": "Prodigy",
    "adamw_optimi": "AdamW",
}  # fmt: skip


def _choice(table: Mapping[str, Any], value: Any, t: Translation, where: str) -> Any:
    if value not in table:
        t.refuse(where, f"{value!r} is none of {', '.join(table)}{nearest(str(value), table)}")
    return table[value]


# ---- [model]


def _dtype(t: Translation, value: Any, where: str) -> None:
    t.set("mixed_precision", _choice(PRECISIONS, value, t, where), where)


def _held(t: Translation, value: Any, where: str) -> None:
    if value == t.config["model"].get("dtype"):
        return
    for option, setting in _choice(HELD, value, t, where).items():
        t.set(option, setting, where)


def _times(t: Translation) -> None:
    """The distribution of sigma, of a flow model."""
    model = t.config["model"]
    keys = [key for key in TIMES if model.get(key)]
    where = f"[model] {', '.join(keys) or 'timestep_sample_method (not given)'}"
    if "timestep_sampling" not in t.family.objective.reads:
        if keys:
            t.refuse(where, f"{t.family.title} draws its noise levels in a way of its own; remove it")
        return
    by_tokens, shift = bool(model.get("flux_shift") or model.get("lumina_shift")), model.get("shift")
    method = model.get("timestep_sample_method", "logit_normal")
    sampling = SAMPLINGS.get((method, by_tokens, bool(shift)))
    if sampling is None:
        t.refuse(where, "logit_normal or uniform, with one shift or none, can be had")
    t.set("timestep_sampling", sampling, where)
    if shift:
        t.set("discrete_flow_shift", shift, "[model] shift")


def _bound(option: str) -> Callable[..., None]:
    def set_bound(t: Translation, value: Any, where: str) -> None:
        if not isinstance(value, int | float) or value * 1000 != round(value * 1000, 6) or not 0 <= value <= 1:
            t.refuse(where, f"{value!r} is no number from 0 to 1")
        if abs(value * 1000 - round(value * 1000)) > 1e-6:
            t.refuse(where, f"{value!r}: three digits after the point can be had (--{option} {round(value * 1000)})")
        t.set(option, round(value * 1000), where)

    return set_bound


def _v_pred(t: Translation, value: Any, where: str) -> None:
    t.set("v_parameterization", value, where)
    t.set("zero_terminal_snr", value, f"{where} (with betas of zero terminal SNR)")


def _cached_text(t: Translation, value: Any, where: str) -> None:
    if value and t.kind.trains_text:
        t.refuse(where, "these encoders are trained; set their learning rates to 0 natively to cache them")
    if not value:
        t.set("cache_text_encoder_outputs_to_disk", False, where)


def _held_text(prefix: str) -> Callable[..., None]:
    def hold(t: Translation, value: Any, where: str) -> None:
        kinds = [part.precision_options for part in t.family.text_encoders if part.precision_options]
        if value and not kinds:
            t.refuse(where, f"{t.family.title} has no text encoder that is held in less")
        if value:
            t.set(f"{prefix}_{'llm' if 'llm' in kinds else kinds[0]}", True, where)

    return hold


def _merged(t: Translation, value: Any, where: str) -> None:
    t.set("base_weights", value if isinstance(value, list) else [value], where)


def _rates(t: Translation) -> None:
    """SDXL's text encoders are trained, at the optimizer's rate unless they have their own; no other model's are."""
    model, family = t.config["model"], t.family
    if t.kind.trains_text:
        rate = t.config.get("optimizer", {}).get("lr")
        said = " and ".join(key for key in RATES if key in model) or "text encoders (trained by default)"
        t.set("text_encoder_lr", [model.get(key, rate) for key in RATES], f"[model] {said}")
    elif family.text_prefixes:
        t.imply("text_encoder_lr", [0.0] * len(family.text_prefixes), "[model] type (trains no text encoder)")


MODEL: dict[str, Any] = {
    "dtype": _dtype,
    "transformer_dtype": _held,
    "diffusion_model_dtype": _held,
    "image_shift": Refused("pictures and clips have one shift here; use shift"),
    "sigmoid_scale": "sigmoid_scale",
    "min_t": _bound("min_timestep"),
    "max_t": _bound("max_timestep"),
    "guidance": "guidance_scale",
    "bypass_guidance_embedding": "bypass_guidance_embedding",
    "v_pred": _v_pred,
    "min_snr_gamma": "min_snr_gamma",
    "debiased_estimation_loss": "debiased_estimation_loss",
    "unet_lr": "unet_lr",
    **dict.fromkeys(RATES, lambda t, value, where: None),  # `_rates` reads them together
    "cache_text_embeddings": _cached_text,
    "text_encoder_fp8": _held_text("fp8"),
    "text_encoder_nf4": _held_text("nf4"),
    "llama3_4bit": _held_text("nf4"),
    "merge_adapters": _merged,
    "llm_adapter_path": Refused("the adapter is read from the denoiser's file"),
    "multiscale_loss_weight": Refused("there is no multi-scale loss"),
    "audio_vae": Refused("no model with sound can be trained"),
    "cfg": Refused("training has no classifier-free guidance; sample prompts have it (--l)"),
}


def _model(t: Translation) -> None:
    """Rules, else an option of the family's own by its name, else an error."""
    from library.option_table import OPTIONS
    from library.options import options_of

    model, title = t.config["model"], t.family.title
    own = {option.name: option.name for option in options_of(t.family)}
    offered = {*own, *(option.name for option in OPTIONS)}
    lacks = Refused(f"{title} has nothing that it could set; remove it")
    rules = own | {k: lacks if isinstance(rule, str) and rule not in offered else rule for k, rule in MODEL.items()}
    if "v_parameterization" not in offered:
        rules["v_pred"] = lacks
    if not t.kind.trains_text:
        rules |= dict.fromkeys(RATES, Refused(f"the text encoders of {title} are not trained; remove it"))
    t.read({key: value for key, value in model.items() if key not in (*FILES, *TIMES, "type")}, rules, "[model]")
    place(t)
    _times(t)
    _rates(t)


# ---- [adapter]


def _adapter(t: Translation) -> None:
    adapter, model = t.config.get("adapter"), t.config["model"]
    dtype = (adapter or {}).get("dtype", model.get("dtype"))
    if dtype not in (None, "bfloat16", "float32"):
        t.refuse("[adapter] dtype", f"{dtype!r}: trained weights are bfloat16 or float32")
    if dtype == "bfloat16" and model.get("dtype") == "bfloat16":
        said = "[adapter] dtype" if "dtype" in (adapter or {}) else "[model] dtype"
        t.set("full_bf16", True, f"{said} (of the trained weights)")
    if adapter is None:
        return
    kind = adapter.get("type")
    if kind not in ("lora", "lokr"):
        t.refuse("[adapter] type", f"{kind!r} is none of lora, lokr")
    if "rank" not in adapter:
        t.refuse("[adapter]", "rank is missing")
    t.read(adapter, ADAPTER if kind == "lora" else LOKR, "[adapter]")
    t.set("network_alpha", adapter["rank"], "[adapter] rank (alpha is the same)")
    if kind == "lokr":
        arguments = ["algo=lokr", f"factor={adapter.get('decompose_factor', -1)}"]
        arguments += [f"rank_dropout={adapter['rank_dropout']}"] if adapter.get("rank_dropout") else []
        t.set("network_args", arguments, "[adapter] type, decompose_factor, rank_dropout")


def _existing(t: Translation, value: Any, where: str) -> None:
    path = Path(value)
    held = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    t.set("network_weights", str(held[0]) if len(held) == 1 else value, where)
    t.set("dim_from_weights", False, where)


def _fused(t: Translation, value: Any, where: str) -> None:
    if not all(isinstance(one, Mapping) and "path" in one for one in value):
        t.refuse(where, "a list of {path = ..., weight = ...} is wanted")
    t.set("base_weights", [one["path"] for one in value], where)
    t.set("base_weights_multiplier", [float(one.get("weight", 1.0)) for one in value], where)


PATTERNS = "module names are those of the file here; use [adapter] type with network_args = ['exclude_patterns=...']"
SHARED: dict[str, Any] = {
    "rank": "network_dim",
    "dtype": lambda t, value, where: t.imply("save_precision", SAVED[value], where),
    "alpha": Refused("alpha is always the rank in these files; remove it"),
    "init_from_existing": _existing,
    "fuse_adapters": _fused,
    "exclude_modules": Refused(PATTERNS),
}
ADAPTER: dict[str, Any] = SHARED | {
    "type": lambda t, value, where: t.set("network_module", "networks.lora", where),
    "dropout": Refused("it drops what the adapter reads; --network_dropout drops behind the down matrix"),
}
LOKR: dict[str, Any] = SHARED | {
    "type": lambda t, value, where: t.set("network_module", "lycoris.kohya", where),
    **dict.fromkeys(("decompose_factor", "rank_dropout"), lambda t, value, where: None),  # `_adapter` reads them
}


# ---- [optimizer]


def _optimizer(t: Translation) -> None:
    table = dict(t.config.get("optimizer", {}))
    kind, where = str(table.pop("type", "adamw")), "[optimizer] type"
    refused = {"offload", "automagic", "genericoptim", "stableadamw"}
    if kind.lower() in refused:
        t.refuse(where, f"{kind} is not offered; choose one of {', '.join(OPTIMIZERS)}, or module.Class")
    from library.optim import OPTIMIZERS as ours

    name = OPTIMIZERS.get(kind.lower(), kind if kind.lower() in ours or "." in kind else f"pytorch_optimizer.{kind}")
    t.set("optimizer_type", name, where)
    if kind.lower() == "adamw_optimi" and t.values.get("full_bf16"):
        t.set("stochastic_rounding", True, f"{where} (instead of its Kahan sums)")
    if "lr" not in table and kind.lower() != "prodigy":
        t.refuse("[optimizer]", "lr is missing")
    for key in ("beta2_half_life", "stabilize"):
        if key in table:
            t.refuse(f"[optimizer] {key}", "no optimizer here has it; remove it")
    if "lr" in table:
        t.set("learning_rate", table.pop("lr"), "[optimizer] lr")
    if table.pop("gradient_release", False):
        t.set("fused_backward_pass", True, "[optimizer] gradient_release")
        t.set("max_grad_norm", 0.0, "[optimizer] gradient_release")
        t.config = {key: value for key, value in t.config.items() if key != "gradient_clipping"}
    if table:
        arguments = [f"{key}={tuple(value) if isinstance(value, list) else value!r}" for key, value in table.items()]
        t.set("optimizer_args", arguments, f"[optimizer] {', '.join(table)}")


# ---- top level


def _batch(t: Translation, value: Any, where: str) -> None:
    if not isinstance(value, int):
        t.refuse(where, "batch sizes by resolution belong into the dataset: give each of [[datasets]] its batch_size")
    t.set("train_batch_size", value, where)


def _picture_batch(t: Translation, value: Any, where: str) -> None:
    if value != t.config.get("micro_batch_size_per_gpu", 1):
        t.refuse(where, "pictures have the batch size of clips, or a [[datasets]] with a batch_size of their own")


def _scheduler(t: Translation) -> None:
    name, warmup = t.config.get("lr_scheduler", "constant"), t.config.get("warmup_steps", 0)
    if name not in ("constant", "linear", "cosine"):
        t.refuse("lr_scheduler", f"{name!r} is none of constant, linear, cosine")
    if name == "cosine":
        rate = t.values.get("learning_rate")
        t.set("lr_scheduler", "cosine_with_min_lr", "lr_scheduler")
        t.set("lr_scheduler_min_lr_ratio", min(1.0, 1e-6 / rate) if rate else 0.0, "lr_scheduler (down to 1e-6)")
    else:
        t.set("lr_scheduler", "constant_with_warmup" if warmup and name == "constant" else name, "lr_scheduler")
    if warmup:
        t.set("lr_warmup_steps", warmup, "warmup_steps")


def _checkpointing(t: Translation, value: Any, where: str) -> None:
    if value not in (True, False, "unsloth"):
        t.refuse(where, f"{value!r} is none of true, false, 'unsloth'")
    t.set("gradient_checkpointing", bool(value), where)
    if value == "unsloth":
        t.set("cpu_offload_checkpointing", True, where)


def _states(t: Translation, value: Any, where: str) -> None:
    if value != t.config.get("save_every_n_epochs", value):
        t.refuse(where, "a state is saved with every save; give it the number of save_every_n_epochs")
    t.set("save_every_n_epochs", value, where)
    t.set("save_state", True, where)


def _resume(t: Translation, value: Any, where: str) -> None:
    if value:
        t.set("resume", "auto" if value is True else value, where)


def _one(reason: str) -> Callable[..., None]:
    def check(t: Translation, value: Any, where: str) -> None:
        if value not in (1, False, None):
            t.refuse(where, reason)

    return check


def _compiled(t: Translation, value: Any, where: str) -> None:
    if value:
        t.set("torch_compile", True, where)


def _caching_batch(t: Translation, value: Any, where: str) -> None:
    t.set("vae_batch_size", value, where)
    if not t.kind.trains_text:
        t.set("text_encoder_batch_size", value, where)


def _clip_mode(t: Translation, value: Any, where: str) -> None:
    if value != "single_beginning":
        t.refuse(
            where, f"{value!r}: only 'single_beginning'; other clips of a video are frame_extraction in our datasets"
        )


EVALUATION = "there are no eval_datasets"
HUBER = "its function is another one than sd-scripts'; see --loss_type and --huber_c"
TOP: dict[str, Any] = {
    "output_dir": "output_dir",
    "dataset": "dataset_config",
    "epochs": "max_train_epochs",
    "max_steps": "max_train_steps",
    "eval_datasets": Refused("hold a part of the data out with validation_split"),
    "micro_batch_size_per_gpu": _batch,
    "image_micro_batch_size_per_gpu": _picture_batch,
    **dict.fromkeys(
        "eval_micro_batch_size_per_gpu eval_image_micro_batch_size_per_gpu image_eval_micro_batch_size_per_gpu "
        "eval_gradient_accumulation_steps disable_block_swap_for_eval eval_every_n_epochs eval_every_n_steps "
        "eval_every_n_examples eval_before_first_step".split(),
        Idle(EVALUATION),
    ),
    "pipeline_stages": _one("a model is not spread over several cards; use blocks_to_swap"),
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    **dict.fromkeys(("warmup_steps", "lr_scheduler"), lambda t, value, where: None),  # `_scheduler` reads them
    "force_constant_lr": Refused("resuming continues the schedule; use lr_scheduler = 'constant'"),
    "blocks_to_swap": "blocks_to_swap",
    **dict.fromkeys(("huber_delta", "smooth_l1_beta", "pseudo_huber_c"), Refused(HUBER)),
    "uncond_fraction": "caption_dropout_rate",
    "save_every_n_epochs": "save_every_n_epochs",
    "save_every_n_steps": "save_every_n_steps",
    "save_every_n_examples": Refused("count steps: save_every_n_steps"),
    "checkpoint_every_n_epochs": _states,
    "checkpoint_every_n_minutes": "save_every_n_minutes",
    "activation_checkpointing": _checkpointing,
    "reentrant_activation_checkpointing": Refused("torch's newer checkpointing, with the same result, is used"),
    **dict.fromkeys(("partition_method", "partition_split"), Idle("a model is not spread over several cards")),
    "save_dtype": lambda t, value, where: t.set("save_precision", _choice(SAVED, value, t, where), where),
    "caching_batch_size": _caching_batch,
    "map_num_proc": "max_data_loader_n_workers",
    "compile": _compiled,
    "steps_per_print": "log_every_n_steps",
    "logging_steps": Idle("the JSONL log has every step"),
    "x_axis_examples": Refused("logs count optimizer steps"),
    "video_clip_mode": _clip_mode,
    "resume_from_checkpoint": _resume,
    "regenerate_cache": Idle("an entry of the caches is used only for the very content that it was made of"),
}
MONITORING: dict[str, Any] = {
    "enable_wandb": lambda t, value, where: t.set("log_with", "wandb", where) if value else None,
    "wandb_api_key": Refused("set the environment variable WANDB_API_KEY"),
    "wandb_tracker_name": lambda t, value, where: _wandb(t, "log_tracker_name", value, where),
    "wandb_run_name": lambda t, value, where: _wandb(t, "wandb_run_name", value, where),
}


def _wandb(t: Translation, option: str, value: Any, where: str) -> None:
    if t.config["monitoring"].get("enable_wandb") and value:
        t.set(option, value, where)


def _top(t: Translation) -> None:
    from library.option_table import OPTIONS

    table = {key: value for key, value in t.config.items() if not isinstance(value, Mapping)}
    if table.get("max_steps") and table.get("epochs"):
        t.refuse("max_steps", "the run ends after epochs; remove one of them")
    native = {option.name: option.name for option in OPTIONS}  # a native option at the top level is read as such
    t.read(table, native | TOP, "")
    _scheduler(t)


def translate(config: Mapping[str, Any], path: Path) -> Translation:
    """Our options for a file. Raises ConfigError naming the file and the key."""
    from library.families import FAMILIES, get_family

    kind = config["model"]["type"]
    known = {name: Kind(name) for name in FAMILIES} | TYPES
    if kind not in known:
        raise ConfigError(f"{path}: [model] type: {kind!r} is no model{nearest(str(kind), known)}")
    meant = known[kind]
    if meant.family not in FAMILIES:
        raise ConfigError(f"{path}: [model] type: {kind!r} cannot be trained yet (known: {', '.join(FAMILIES)})")
    t = Translation(str(path), dict(config), get_family(meant.family), meant)
    for section in (key for key, value in config.items() if isinstance(value, Mapping)):
        if section not in ("model", "adapter", "optimizer", "monitoring"):
            t.refuse(f"[{section}]", f"there is no such table{nearest(section, ('model', 'adapter', 'optimizer'))}")
    t.set("model_type", meant.family, "[model] type")
    for option, value in meant.implied.items():
        t.set(option, value, "[model] type")
    _model(t)
    _adapter(t)
    for option, value in meant.usual.items():
        if option != "save_format" or "network_module" in t.values:
            t.imply(option, value, f"[model] type ({kind}'s usual one)")
    _optimizer(t)
    _top(t)
    t.read(t.config.get("monitoring", {}), MONITORING, "[monitoring]")
    _caches(t)
    return t


def _caches(t: Translation) -> None:
    from library.dialects.diffusion_pipe_data import facts

    said, (shuffles, masks, empty) = "dataset (kept on disk by default)", facts(t)
    t.imply("cache_latents_to_disk", True, said)
    if not t.kind.trains_text:
        t.imply("cache_text_encoder_outputs_to_disk", not shuffles, said)
    t.imply("skip_bad", True, f"dataset ({'unreadable files' if empty else 'files without a caption'} are left out)")
    if masks:
        t.imply("masked_loss", True, "dataset (mask_path)")
