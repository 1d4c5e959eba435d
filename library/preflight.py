"""Everything that can be known before a weight loads: checked in one place, printed as one plan.

Imports no torch before the plan is printed: most mistakes are answered in a second, not after a minute of loading.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import comfy_names, provenance, state, trackers
from library.checkpoints import check_part, check_writable, configuration_of, path_of
from library.components.sizes import width_of
from library.components.tokenizers import check_tokenizers
from library.data.dataset import Dataset
from library.data.doctor import examine
from library.data.findings import summary
from library.errors import ConfigError
from library.memory import swap_plan
from library.options import check_read
from library.state import of_part
from library.trained import Trained, trained_parts

if TYPE_CHECKING:
    from library.families.family import Family
    from library.options import Options


@dataclass
class Plan:
    family: Family  # resolved for these files and options
    dataset: Dataset
    output_dir: Path
    steps_per_epoch: int
    total_steps: int
    position: state.Position
    origin: state.Origin = field(default_factory=lambda: state.Origin({}))
    resume: Path | None = None
    changed_options: list[str] = field(default_factory=list)
    base_weights: list[tuple[str, float]] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)  # part name -> one line about its file
    warnings: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)  # about the files of the dataset, a line a kind
    text: str = ""  # the printed plan
    trained: Trained = field(default_factory=Trained)
    memory: dict[str, Any] | None = None  # the memory plan of --memory_plan, as tools/plan.py --json writes it

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.steps_per_epoch)

    def where(self) -> str:
        """The position of a resumed run, in words."""
        epoch, batch = divmod(self.position.step, self.steps_per_epoch)
        return (
            f"step {self.position.step} of {self.total_steps} (epoch {epoch + 1}, step {batch} of "
            f"{self.steps_per_epoch} in it), loss average {self.position.loss_average:.4f}"
        )


def check(options: Options, say: Callable[[str], None] = print) -> Plan:
    """All checks, in the order of their cost; prints the plan. Raises a UserError with the first thing wrong."""
    check_read(options)
    trackers.check(options)
    if not options.output_dir:
        raise ConfigError("--output_dir is missing: say where the results are to be written")
    output_dir = Path(options.output_dir)
    family, parts = check_parts(options.family, options)
    swap_plan.check(family, options)
    check_attention(options)
    _check_compiler(options)
    trained = trained_parts(options, family)
    _check_network(options)
    _check_prompts(options, family)
    check_writable(output_dir, bytes_needed=estimate_bytes(options))
    examined = examine(options, family, family.pixel_multiple, rank=_rank(), say=say)
    dataset = examined.dataset
    group = options.gradient_accumulation_steps * _world()
    steps_per_epoch = -(-len(dataset.batches(0)) // group)
    total = options.max_train_epochs * steps_per_epoch if options.max_train_epochs else options.max_train_steps
    plan = Plan(family, dataset, output_dir, steps_per_epoch, total, state.Position(), parts=parts)
    plan.base_weights, plan.trained = _base_weights(options), trained
    plan.warnings += (
        *family.advice(options),
        *precision_advice(family, options.mixed_precision),
        *comfy_names.advice(family, options),
    )
    plan.findings = summary(examined.findings)
    plan.origin = origin(options, family, dataset)
    if options.resume:
        _resume(options, plan)
    plan.text = table(options, plan)
    say(plan.text)
    if options.write_preview:
        _preview(dataset, Path(options.write_preview), say)
    _check_optimizer(options, total)
    _tell_noise_levels(options, plan, say)
    return plan


def _tell_noise_levels(options: Options, plan: Plan, say: Callable[[str], None]) -> None:
    """Computed by the code that trains, so after the first check that needs torch."""
    from library import noise_levels

    found = noise_levels.levels(plan.family, options, noise_levels.tokens_of(plan.dataset, plan.family))
    text = noise_levels.text(found, options)
    plan.text = f"{plan.text}\n{text}"
    say(text)


def _check_optimizer(options: Options, total_steps: int) -> None:
    """The first check that needs torch, which the run needs anyway."""
    from library import optim

    optim.check(options, total_steps)


def check_parts(family: Family, options: Any) -> tuple[Family, dict[str, str]]:
    """The family for these files and options, and a line about the file of every part; from headers alone."""
    denoiser = check_part(family.denoiser, path_of(family.denoiser, options), f"--{family.denoiser.option}")
    family = family.resolved(options)  # which parts there are can depend on the denoiser
    lines = {part.name: check_part(part, path_of(part, options), f"--{part.option}") for part in family.parts[1:]}
    check_tokenizers(family, options)
    _check_widths(family, options)
    return family, {family.denoiser.name: denoiser} | lines


def _check_widths(family: Family, options: Any) -> None:
    """Raise ConfigError for a text encoder of another size than the denoiser was trained with."""
    if family.text_widths is None:
        return
    path = path_of(family.denoiser, options)
    wanted = family.text_widths(configuration_of(family.denoiser, path))
    for part, width in zip(family.text_encoders, wanted, strict=False):
        file = path_of(part, options)
        given = width_of(configuration_of(part, file))
        if width is not None and given != width:
            raise ConfigError(
                f"--{part.option} {file}: its states are {given} wide and {path} reads {width}; "
                "take the text encoder that was published with this denoiser"
            )


def _preview(dataset: Dataset, folder: Path, say: Callable[[str], None]) -> None:
    """Write what is trained, once for all processes, and end the program."""
    import sys

    from library.data.preview import write_preview

    if _rank() == 0:
        say(f"preview: {write_preview(dataset, folder)} items are written to {folder}; nothing is trained")
    sys.exit(0)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def check_attention(options: Any) -> None:
    """Load the library of --attn_mode, if it is one. Raises ConfigError."""
    if options.attn_mode in ("xformers", "flash", "sageattn"):
        from library.memory.attention import kernel

        kernel(options.attn_mode)


def _check_compiler(options: Options) -> None:
    if options.torch_compile:
        from library.memory import compiled

        compiled.check(options)


def precision_advice(family: Family, precision: str) -> tuple[str, ...]:
    """A warning about a --mixed_precision that this model's activations may not fit into."""
    if precision == "no" or precision in family.half:
        return ()
    return (
        f"--mixed_precision {precision}: {family.title} is known to have activations that are too large for it; "
        f"take {' or '.join(family.half)}, or no",
    )


def _check_network(options: Options) -> None:
    name = options.network_module
    if name:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ConfigError(
                f"--network_module {name}: no such module; built in is networks.lora, others must be installed"
            )
    for option in ("network_weights",):
        path = getattr(options, option)
        if path and not Path(path).is_file():
            raise ConfigError(f"--{option} {path}: no such file")


def _base_weights(options: Options) -> list[tuple[str, float]]:
    paths = options.base_weights or []
    multipliers = list(options.base_weights_multiplier or [])
    if len(multipliers) > len(paths):
        raise ConfigError(f"--base_weights_multiplier has {len(multipliers)} values for {len(paths)} --base_weights")
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"--base_weights {path}: no such file")
    return list(zip(paths, multipliers + [1.0] * (len(paths) - len(multipliers)), strict=True))


def _check_prompts(options: Options, family: Family) -> None:
    if options.sample_prompts:
        from library.prompts import check_for, parse_prompts

        check_for(parse_prompts(Path(options.sample_prompts)), family)


def estimate_bytes(options: Options) -> int:
    """Bytes that the run will write at least: one full model, or a network of generous size, plus a state."""
    if options.network_module:
        return 64 * 1024**2
    path = Path(getattr(options, options.family.denoiser.option))
    size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*.safetensors"))
    return size * (4 if options.save_state or options.save_state_on_train_end else 1)


def origin(options: Options, family: Family, dataset: Dataset) -> state.Origin:
    """What the run is made from, for its training states."""
    names = {part.option for part in family.parts} | {where.option for where, _ in family.tokenizers}
    inputs = provenance.named_inputs((name, getattr(options, name)) for name in sorted(names))
    return state.Origin(options.as_dict(), inputs, provenance.data_mark(dataset), provenance.versions())


def _resume(options: Options, plan: Plan) -> None:
    folders = [plan.output_dir, *([Path(options.fallback_output_dir)] if options.fallback_output_dir else [])]
    folder, notes = state.find_state(options.resume, folders, options.output_name)
    plan.warnings += notes
    if folder is None:
        plan.warnings.append(
            f"--resume auto: no complete state of '{options.output_name}' in {plan.output_dir}; starting anew"
        )
        return
    plan.resume = folder
    plan.position, plan.changed_options = state.read_state(folder, plan.origin, bool(options.resume_anyway))
    if plan.position.step >= plan.total_steps:
        raise ConfigError(
            f"--resume {folder}: it stands at step {plan.position.step} of {plan.total_steps}, "
            "nothing is left to do; raise --max_train_steps or --max_train_epochs"
        )


def table(options: Options, plan: Plan) -> str:
    """The plan as text: what is trained, on what, for how long, written where."""
    what = f"LoRA ({options.network_module}, rank {options.network_dim}, alpha {options.network_alpha})"
    lines = [f"{plan.family.title}: {what if options.network_module else 'full fine-tune'}"]
    if sentence := plan.trained.sentence(plan.family, options.cache_text_encoder_outputs):
        lines.append(f"  {sentence}")
    lines += [f"  {name:<13} {line}" for name, line in plan.parts.items()]
    lines.append(plan.dataset.print_table())
    lines += [f"  {line}" for line in plan.findings]
    lines.append(
        f"steps: {plan.total_steps} optimizer steps of {options.gradient_accumulation_steps} x {_world()} batches, "
        f"{plan.steps_per_epoch} a pass over the data = {plan.total_steps / plan.steps_per_epoch:.1f} epochs"
    )
    parts = plan.family.pair.names if plan.family.pair and plan.family.pair.apart else ("",)
    files = " and ".join(of_part(f"{options.output_name}.safetensors", options.output_name, which) for which in parts)
    lines.append(f"written to: {plan.output_dir} as {files}")
    if plan.resume:
        lines.append(f"resuming {plan.resume}: {plan.where()}")
        lines += [f"  changed: {one}" for one in plan.changed_options]
    return "\n".join(lines + [f"note: {warning}" for warning in plan.warnings])
