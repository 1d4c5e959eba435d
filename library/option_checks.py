"""Options that were given and that nothing would read, and options that exclude each other. Needs no file.

One table: names, the condition under which they are read, and the reason that the user is told otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from library.errors import ConfigError, nearest
from library.memory.precision import DENOISER, TEXT_KINDS
from library.objective import FLOW
from library.option_kinds import parse_pairs

if TYPE_CHECKING:
    from library.options import Options

# Schedulers by name and which of the options below each one reads (transformers' and diffusers' own arguments).
SCHEDULERS: dict[str, frozenset[str]] = {
    name: frozenset(reads.split())
    for name, reads in {
        "constant": "",
        "constant_with_warmup": "lr_warmup_steps",
        "linear": "lr_warmup_steps",
        "cosine": "lr_warmup_steps",
        "cosine_with_restarts": "lr_warmup_steps lr_scheduler_num_cycles",
        "polynomial": "lr_warmup_steps lr_scheduler_power",
        "inverse_sqrt": "lr_warmup_steps lr_scheduler_timescale",
        "cosine_with_min_lr": "lr_warmup_steps lr_scheduler_num_cycles lr_scheduler_min_lr_ratio",
        "cosine_warmup_with_min_lr": "lr_warmup_steps lr_scheduler_num_cycles lr_scheduler_min_lr_ratio",
        "warmup_stable_decay": "lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_min_lr_ratio",
        "piecewise_constant": "",
        "adafactor": "",
    }.items()
}
SCHEDULER_OPTIONS = frozenset().union(*SCHEDULERS.values())
DENSITIES = ("logit_normal", "mode")  # weighting schemes that are densities of sigma and no loss weights
LR_FREE = ("dadapt", "prodigy")  # beginnings of optimizer names that find the learning rate themselves


def optimizer_name(optimizer_type: str) -> str:
    """Class name in lower case, without its module."""
    return optimizer_type.rpartition(".")[2].lower()


def is_lr_free(optimizer_type: str) -> bool:
    return optimizer_name(optimizer_type).startswith(LR_FREE)


def is_schedule_free(optimizer_type: str) -> bool:
    return optimizer_name(optimizer_type).endswith("schedulefree")


def scheduler_name(lr_scheduler: str) -> str:
    """Name without the value of `adafactor:1e-3`. Raises ConfigError for an unknown one."""
    name = lr_scheduler.partition(":")[0].strip().lower()
    if name in ("reduce_lr_on_plateau", "greedy"):
        raise ConfigError(
            f"--lr_scheduler {lr_scheduler} follows a measured loss, which a step does not have; choose another"
        )
    if name not in SCHEDULERS:
        raise ConfigError(
            f"--lr_scheduler '{lr_scheduler}' is not known{nearest(name, SCHEDULERS)} "
            f"(known: {', '.join(SCHEDULERS)}; a class goes into --lr_scheduler_type)"
        )
    return name


@dataclass(frozen=True)
class Rule:
    names: tuple[str, ...]
    read: Callable[[Options], object]  # true where something reads these options
    why: str  # "--x <value> has no effect {why}"; {option} is that option's value


def _rule(names: str, read: Callable[[Options], object], why: str) -> Rule:
    return Rule(tuple(names.split()), read, why)


def _captions_from_options(o: Options) -> bool:
    return bool(o.dataset_config or o.shuffle_caption or o.token_warmup_step or o.caption_tag_dropout_rate)


def _has_encoder(o: Options, kind: str) -> bool:
    return any(part.precision_options == kind for part in o.family.text_encoders)


RULES: tuple[Rule, ...] = (
    # flow matching
    _rule("sigmoid_scale", lambda o: o.timestep_sampling not in ("sigma", "uniform", "nextdit_shift"),
          "with --timestep_sampling {timestep_sampling}"),
    _rule("discrete_flow_shift", lambda o: o.timestep_sampling in ("sigma", "shift"),
          "with --timestep_sampling {timestep_sampling}"),
    _rule("logit_mean logit_std mode_scale", lambda o: o.timestep_sampling == "sigma",
          "with --timestep_sampling {timestep_sampling}; --timestep_sampling sigma reads it"),
    _rule("logit_mean logit_std", lambda o: o.weighting_scheme == "logit_normal",
          "with --weighting_scheme {weighting_scheme}; logit_normal reads it"),
    _rule("mode_scale", lambda o: o.weighting_scheme == "mode",
          "with --weighting_scheme {weighting_scheme}; mode reads it"),
    _rule("weighting_scheme", lambda o: o.timestep_sampling == "sigma" or o.weighting_scheme not in DENSITIES,
          "with --timestep_sampling {timestep_sampling}: this scheme is a density of --timestep_sampling sigma"),
    # loss
    _rule("huber_schedule huber_c huber_scale", lambda o: o.loss_type in ("huber", "smooth_l1"),
          "with --loss_type {loss_type}"),
    _rule("huber_scale", lambda o: o.huber_schedule != "snr", "with --huber_schedule snr"),
    _rule("ip_noise_gamma_random_strength", lambda o: o.ip_noise_gamma, "without --ip_noise_gamma"),
    _rule("masked_loss", lambda o: o.dataset_config or o.alpha_mask,
          "without masks: give conditioning_data_dir in --dataset_config, or --alpha_mask"),
    # network
    _rule("network_dim network_alpha network_dropout network_args network_weights dim_from_weights "
          "scale_weight_norms base_weights save_format",
          lambda o: o.network_module, "without --network_module, where the model itself is trained"),
    _rule("text_encoder_lr network_train_text_encoder_only", lambda o: o.family.text_prefixes,
          "with --model_type {model_type}, whose text encoders are not trained"),
    _rule("network_train_unet_only unet_lr", lambda o: o.network_module or o.family.text_prefixes,
          "without --network_module, where the model itself is trained"),
    _rule("network_dim network_alpha", lambda o: not o.dim_from_weights, "with --dim_from_weights"),
    _rule("dim_from_weights", lambda o: o.network_weights, "without --network_weights"),
    _rule("base_weights_multiplier", lambda o: o.base_weights, "without --base_weights"),
    # memory
    _rule("stochastic_rounding", lambda o: o.full_bf16, "without --full_bf16, since other weights are not rounded"),
    _rule("stochastic_rounding", lambda o: optimizer_name(o.optimizer_type) != "adamw8bitkahan",
          "with --optimizer_type AdamW8bitKahan, which keeps what rounding takes away"),
    _rule("cpu_offload_checkpointing", lambda o: o.gradient_checkpointing, "without --gradient_checkpointing"),
    _rule("dynamo_backend", lambda o: o.torch_compile, "without --torch_compile"),
    _rule("sample_blocks_to_swap block_swap_ring_size use_pinned_memory_for_block_swap",
          lambda o: o.blocks_to_swap, "without --blocks_to_swap"),
    _rule("sample_blocks_to_swap highvram", lambda o: o.sample_prompts, "without --sample_prompts"),
    _rule("fp8_base", lambda o: not o.fp8_scaled, "with --fp8_scaled"),
    _rule("fp8_format", lambda o: o.fp8_scaled or o.fp8_base, "without --fp8_scaled or --fp8_base"),
    *(_rule(f"fp8_{kind} nf4_{kind}", partial(_has_encoder, kind=kind), f"here: this model has no {title}")
      for kind, title in TEXT_KINDS.items()),
    # learning rate
    _rule("lr_scheduler lr_scheduler_args lr_scheduler_type " + " ".join(sorted(SCHEDULER_OPTIONS)),
          lambda o: not is_schedule_free(o.optimizer_type),
          "with --optimizer_type {optimizer_type}, which has no schedule (warm-up: --optimizer_args warmup_steps=N)"),
    _rule("lr_scheduler " + " ".join(sorted(SCHEDULER_OPTIONS)), lambda o: not o.lr_scheduler_type,
          "with --lr_scheduler_type; give the class its arguments with --lr_scheduler_args"),
    # data
    _rule("train_data_dir reg_data_dir in_json dataset_repeats", lambda o: not o.dataset_config,
          "with --dataset_config"),
    _rule("dataset_repeats", lambda o: o.in_json, "without --in_json"),
    _rule("reg_data_dir", lambda o: not o.in_json, "with --in_json"),
    _rule("caption_extension", lambda o: not o.in_json, "with --in_json"),
    _rule("prior_loss_weight", lambda o: o.dataset_config or o.reg_data_dir, "without --reg_data_dir"),
    _rule("keep_tokens keep_tokens_separator", _captions_from_options,
          "without --shuffle_caption, --token_warmup_step or --caption_tag_dropout_rate"),
    _rule("token_warmup_min", lambda o: o.dataset_config or o.token_warmup_step, "without --token_warmup_step"),
    _rule("min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale",
          lambda o: o.dataset_config or o.enable_bucket, "without --enable_bucket"),
    _rule("validation_seed validate_every_n_steps validate_every_n_epochs max_validation_steps",
          lambda o: o.dataset_config or o.validation_split, "without --validation_split"),
    _rule("text_encoder_batch_size", lambda o: o.cache_text_encoder_outputs, "without --cache_text_encoder_outputs"),
    _rule("cache_dir", lambda o: o.cache_latents_to_disk or o.cache_text_encoder_outputs_to_disk,
          "without --cache_latents_to_disk or --cache_text_encoder_outputs_to_disk"),
    # what is written
    _rule("max_train_steps", lambda o: not o.max_train_epochs, "with --max_train_epochs"),
    _rule("save_every_n_epochs", lambda o: not o.save_n_epoch_ratio, "with --save_n_epoch_ratio"),
    _rule("save_last_n_epochs", lambda o: o.save_every_n_epochs or o.save_n_epoch_ratio,
          "without --save_every_n_epochs or --save_n_epoch_ratio"),
    _rule("save_last_n_steps", lambda o: o.save_every_n_steps, "without --save_every_n_steps"),
    _rule("save_last_n_epochs_state save_last_n_steps_state", lambda o: o.save_state, "without --save_state"),
    _rule("resume_anyway", lambda o: o.resume, "without --resume"),
    _rule("training_comment", lambda o: not o.no_metadata, "with --no_metadata"),
    _rule("sample_every_n_steps sample_every_n_epochs sample_at_first", lambda o: o.sample_prompts,
          "without --sample_prompts"),
    _rule("log_prefix log_tracker_name log_tracker_config logging_dir", lambda o: o.log_with, "without --log_with"),
    _rule("wandb_run_name", lambda o: o.log_with in ("wandb", "all"), "without --log_with wandb or all"),
)  # fmt: skip


def check_read(options: Options) -> None:
    """Raise ConfigError for an option that the user gave and that this family, optimizer, scheduler or mode
    does not read, and for options that contradict each other. Prints warnings on stderr."""
    values = options.as_dict()
    for rule in RULES:
        for name in rule.names:
            if options.given(name) and not options.off(name) and not rule.read(options):
                raise ConfigError(f"{_shown(options, name)} has no effect {rule.why.format(**values)}; remove it")
    _check_objective(options)
    _check_scheduler(options)
    _check_optimizer(options)
    _check_fused(options)
    _check_saving(options)
    _check_run(options)
    _check_memory(options)


def is_read(options: Options, name: str) -> bool:
    """Whether something reads this option of noise levels and loss with the family and the other options."""
    if name in FLOW.reads - options.family.objective.reads:
        return False
    return all(rule.read(options) for rule in RULES if name in rule.names)


def _shown(options: Options, name: str) -> str:
    value = options.as_dict()[name]
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"--{name}{'' if value is True else ' ' + text} ({options.origin(name)})"


def _check_objective(options: Options) -> None:
    family = options.family
    for name in sorted(FLOW.reads - family.objective.reads):
        if options.given(name) and not options.off(name):
            raise ConfigError(
                f"{_shown(options, name)} has no effect: {family.title} is no flow-matching model; remove it"
            )


def _check_scheduler(options: Options) -> None:
    if options.lr_scheduler_type or is_schedule_free(options.optimizer_type):
        return
    name = scheduler_name(options.lr_scheduler)
    for option in sorted(SCHEDULER_OPTIONS - SCHEDULERS[name]):
        if options.given(option) and not options.off(option):
            if option == "lr_warmup_steps" and name == "constant":
                raise ConfigError(
                    f"{_shown(options, option)} has no effect with --lr_scheduler constant; "
                    "use --lr_scheduler constant_with_warmup"
                )
            readers = [other for other, reads in SCHEDULERS.items() if option in reads]
            raise ConfigError(
                f"{_shown(options, option)} has no effect with --lr_scheduler {name}; "
                f"it is read by {', '.join(readers)}"
            )


def _check_optimizer(options: Options) -> None:
    kind = options.optimizer_type
    if optimizer_name(kind) == "adamw8bitkahan" and not (options.full_bf16 or options.full_fp16):
        _warn(f"--optimizer_type {kind} corrects weights in half precision; without --full_bf16 it is AdamW8bit")
    if not is_lr_free(kind):
        return
    if optimizer_name(kind) == "dadaptsgd" and options.lr_warmup_steps:
        raise ConfigError(
            f"--lr_warmup_steps {options.lr_warmup_steps}: DAdaptSGD cannot begin with a learning rate of 0; remove it"
        )
    plus = [name for name in parse_pairs(options.network_args, "network_args") if name.startswith("loraplus_")]
    if plus:
        raise ConfigError(
            f"--network_args {plus[0]} does not go with --optimizer_type {kind}, which finds one "
            "learning rate for all parameters; remove it"
        )
    if options.learning_rate < 0.1:
        _warn(f"--learning_rate {options.learning_rate:g} multiplies the rate that {kind} finds; 1.0 is usual")


def _check_fused(options: Options) -> None:
    """--fused_backward_pass with what has to know all gradients before the step; --stochastic_rounding updates one
    weight after another too."""
    kind, world = options.optimizer_type, int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("fused_backward_pass", "stochastic_rounding"):
        if getattr(options, name) and (is_lr_free(kind) or is_schedule_free(kind)):
            raise ConfigError(f"--{name} does not go with --optimizer_type {kind}, whose step looks at all weights at "
                              "once; choose AdamW or Adafactor")  # fmt: skip
    if not options.fused_backward_pass:
        return
    if options.gradient_accumulation_steps > 1:
        given = f"--gradient_accumulation_steps {options.gradient_accumulation_steps}"
        why = f"{given}: a gradient is used and freed before the next batch could add to it; take a larger batch_size"
    elif options.max_grad_norm:
        why = f"{_shown(options, 'max_grad_norm')}: the norm is known only when all gradients are gone; set it to 0"
    elif options.mixed_precision == "fp16":
        why = "--mixed_precision fp16, which has to look for overflows in all gradients first; use bf16"
    elif world > 1:
        why = f"{world} processes, whose gradients would have to be added up first; start one"
    else:
        return
    raise ConfigError(f"--fused_backward_pass does not go with {why}")


def _check_saving(options: Options) -> None:
    if options.save_model_as != "safetensors":
        raise ConfigError(
            f"--save_model_as {options.save_model_as}: only safetensors is written, because ckpt and pt "
            "files can run code when they are opened (a diffusers LoRA: --save_format diffusers)"
        )
    formats = options.family.save_formats
    if options.network_module and options.save_format not in formats:
        raise ConfigError(
            f"--save_format {options.save_format} is not available for {options.family.name} "
            f"(available: {', '.join(formats)})"
        )
    if any(char in options.output_name for char in '/\\:*?"<>|') or options.output_name in ("", ".", ".."):
        raise ConfigError(f"--output_name '{options.output_name}' is no file name; folders go into --output_dir")


def _check_run(options: Options) -> None:
    if not options.output_dir:
        raise ConfigError("--output_dir is missing: say where the results are to be written")
    if not options.pretrained_model_name_or_path:
        raise ConfigError("--pretrained_model_name_or_path is missing: give the model that is to be trained")
    if not (options.dataset_config or options.train_data_dir or options.in_json):
        raise ConfigError("there is no dataset: give --dataset_config, or --train_data_dir")
    if options.full_fp16 and options.mixed_precision != "fp16":
        raise ConfigError("--full_fp16 needs --mixed_precision fp16")
    if options.full_bf16 and options.mixed_precision != "bf16":
        raise ConfigError("--full_bf16 needs --mixed_precision bf16")
    low, high = options.min_timestep or 0, 1000 if options.max_timestep is None else options.max_timestep
    if low > high:
        raise ConfigError(f"--min_timestep {low} is above --max_timestep {high}")
    if len(options.base_weights_multiplier or ()) > len(options.base_weights or ()):
        raise ConfigError(
            f"--base_weights_multiplier has {len(options.base_weights_multiplier)} values for "
            f"{len(options.base_weights)} --base_weights"
        )


def _check_memory(options: Options) -> None:
    if options.torch_compile and options.dynamo_backend == "cudagraphs" and options.blocks_to_swap:
        raise ConfigError("--dynamo_backend cudagraphs wants weights that stay in their place, which --blocks_to_swap "
                          "moves; choose inductor, or remove one of them")  # fmt: skip
    if options.attn_mode == "sageattn":
        raise ConfigError(
            "--attn_mode sageattn has no backward pass, so it cannot train; use it in the inference script"
        )
    if options.attn_mode == "flash" and options.mixed_precision == "no":
        raise ConfigError("--attn_mode flash computes in half precision only; add --mixed_precision bf16")
    more, swapped = options.sample_blocks_to_swap, options.blocks_to_swap
    if more is not None and more > swapped:
        raise ConfigError(f"--sample_blocks_to_swap {more} is more than --blocks_to_swap {swapped}; take fewer")
    held = [name for name in DENOISER if getattr(options, name)]
    if held and not options.network_module:
        raise ConfigError(
            f"--{held[0]} does not go with a full fine-tune: quantised weights cannot take its small updates; "
            "train a network (--network_module), or remove it"
        )
    if options.nf4 and len(held) > 1:
        raise ConfigError(f"--nf4 and --{held[0]} are two ways to hold the same weights; remove one of them")
    for kind in TEXT_KINDS:
        if getattr(options, f"fp8_{kind}") and getattr(options, f"nf4_{kind}"):
            raise ConfigError(f"--fp8_{kind} and --nf4_{kind} are two ways to hold the same weights; remove one")


def _warn(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)
