"""Optimizers and learning-rate schedules by sd-scripts' names, or any class.

Only the package of the optimizer that is asked for is imported. Schedules count optimizer steps on any number of
processes (sd-scripts steps them once per process and scales only some of its numbers; wrap nothing by accelerate).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError, nearest
from library.option_checks import is_lr_free, is_schedule_free, scheduler_name
from library.option_kinds import parse_pairs
from library.schedules import OURS, SCHEDULES

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.options import Options

_BNB = "bitsandbytes.optim"
# name in lower case -> (package for pip, module, class, arguments that the name implies)
OPTIMIZERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "adamw": ("torch", "torch.optim", "AdamW", {}),
    "sgdnesterov": ("torch", "torch.optim", "SGD", {"momentum": 0.9, "nesterov": True}),
    "sgdnesterov8bit": ("bitsandbytes", _BNB, "SGD8bit", {"momentum": 0.9, "nesterov": True}),
    **{
        name.lower(): ("bitsandbytes", _BNB, name, {})
        for name in ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit")
    },
    "adamw8bitkahan": ("bitsandbytes", "library.kahan", "AdamW8bitKahan", {}),
    "lion": ("lion-pytorch", "lion_pytorch", "Lion", {}),
    "prodigy": ("prodigyopt", "prodigyopt", "Prodigy", {}),
    "adafactor": ("transformers", "transformers.optimization", "Adafactor", {"relative_step": True}),
    **{
        name.lower(): ("schedulefree", "schedulefree", name, {})
        for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
    },
    **{
        name.lower(): ("dadaptation", "dadaptation", name, {})
        for name in ("DAdaptAdam", "DAdaptAdaGrad", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")
    },
    **{
        name: ("dadaptation", "dadaptation.experimental", cls, {})
        for name, cls in (
            ("dadaptation", "DAdaptAdamPreprint"),
            ("dadaptadampreprint", "DAdaptAdamPreprint"),
            ("dadaptadanip", "DAdaptAdanIP"),
        )
    },
}


def _class(module: str, name: str, package: str, what: str) -> type:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        roots = (module.partition(".")[0], package.replace("-", "_"))
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "") in roots
        if missing and package != "torch":
            raise ConfigError(f"{what} needs the package {package}: pip install {package}") from None
        raise ConfigError(f"{what}: importing {module} failed ({error})") from None
    if not isinstance(found, type):
        raise ConfigError(f"{what}: module {module} has no class {name}")
    return found


def optimizer_class(optimizer_type: str) -> tuple[type, dict[str, Any]]:
    """The class of --optimizer_type and the arguments that its name implies. Raises ConfigError."""
    what = f"--optimizer_type {optimizer_type}"
    known = OPTIMIZERS.get(optimizer_type.lower())
    if known:
        package, module, name, implied = known
        return _class(module, name, package, what), dict(implied)
    if "." in optimizer_type:
        module, _, name = optimizer_type.rpartition(".")
        return _class(module, name, module.partition(".")[0].replace("_", "-"), what), {}
    import torch

    names = {name.lower(): name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    if optimizer_type.lower() not in names:
        hint = nearest(optimizer_type.lower(), [*OPTIMIZERS, *names])
        raise ConfigError(f"{what} is not known{hint}; give a class of torch.optim or module.Class")
    return getattr(torch.optim, names[optimizer_type.lower()]), {}


def _parameters(cls: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """Named arguments of a class and whether it takes any others besides."""
    signature = inspect.signature(cls.__init__).parameters
    named = {n: p for n, p in signature.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n != "self"}
    return named, any(p.kind == p.VAR_KEYWORD for p in signature.values())


def _checked(cls: type, arguments: Mapping[str, Any], option: str, taken: Iterable[str]) -> dict[str, Any]:
    """`arguments` if `cls` has them all and the trainer gives none of them itself (`taken`)."""
    named, any_other = _parameters(cls)
    for name in arguments:
        if name in taken:
            better = "; use --learning_rate" if name == "lr" else ""
            raise ConfigError(f"--{option} {name}: the trainer gives this one itself{better}")
        if name not in named and not any_other:
            offered = sorted(named.keys() - set(taken))
            raise ConfigError(f"--{option} {name}: {cls.__name__} has no such argument{nearest(name, offered)} "
                              f"(it has {', '.join(offered)})")  # fmt: skip
    return dict(arguments)


def _arguments(options: Options) -> tuple[type, dict[str, Any]]:
    cls, implied = optimizer_class(options.optimizer_type)
    given = parse_pairs(options.optimizer_args, "optimizer_args")
    arguments = implied | _checked(cls, given, "optimizer_args", ("params", "lr"))
    if uses_relative_step(options):
        arguments["relative_step"] = True  # also where only warmup_init asks for it
    return cls, arguments


def uses_relative_step(options: Options) -> bool:
    """Adafactor finds its rate from the step number: its default, and what warmup_init needs."""
    if OPTIMIZERS.get(options.optimizer_type.lower(), ("", "", ""))[2] != "Adafactor":
        return False
    given = parse_pairs(options.optimizer_args, "optimizer_args")
    return bool(given.get("relative_step", True) or given.get("warmup_init", False))


def check(options: Options, total_steps: int | None = None) -> None:
    """Build the optimizer and the schedule for one dummy parameter, so that mistakes show before anything loads.

    `total_steps` is the length of the run where it is known already (--max_train_epochs needs the dataset for it).
    """
    import torch

    rate = options.learning_rate if options.unet_lr is None else options.unet_lr
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": rate, "name": "check"}
    length = total_steps or (options.max_train_steps if not options.max_train_epochs else 2**31)
    create_scheduler(options, create_optimizer(options, [group]), length)
    for option in ("fused_backward_pass", "stochastic_rounding"):
        if getattr(options, option):
            check_steps_alone(options.replace(stochastic_rounding=False), rate, option)


def check_steps_alone(options: Options, rate: float, option: str) -> None:
    """Raise ConfigError about `option` for an optimizer whose step for one weight is not the same without the others.

    Found by trying: three steps of two small weights, together and one after the other. bitsandbytes, some of whose
    optimizers need a GPU, updates one weight after another by its source.
    """
    import torch

    from library.memory.fused import step_alone

    what = f"--{option} does not go with --optimizer_type {options.optimizer_type}"
    if any(cls.__module__.startswith("bitsandbytes") for cls in optimizer_class(options.optimizer_type)[0].__mro__):
        return
    results = []
    for alone in (False, True):
        weights = [torch.nn.Parameter(torch.full((4, 4), 0.5 + k)) for k in range(2)]
        optimizer = create_optimizer(options, [{"params": weights, "lr": rate, "name": "check"}])
        generator = torch.Generator().manual_seed(0)
        try:
            train_mode(optimizer)
            for _ in range(3):
                for weight in weights:
                    weight.grad = torch.randn(4, 4, generator=generator)
                for weight in weights if alone else ():
                    step_alone(optimizer, 0, weight)
                if not alone:
                    optimizer.step()
        except Exception as error:
            raise ConfigError(f"{what}, which could not be tried on the CPU: {error}") from error
        results.append(torch.stack([weight.detach() for weight in weights]))
    if not torch.equal(*results):
        raise ConfigError(f"{what}, whose step looks at all weights at once; choose AdamW or Adafactor")


def create_optimizer(options: Options, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer of --optimizer_type over `groups` ({"params", "lr", "name"}), whose extra keys are kept.

    Adafactor with relative_step (its default, as in sd-scripts) finds its rate itself: the groups' rates are
    dropped and a --learning_rate that was given is an error. D-Adaptation and Prodigy need one rate for all groups.
    Raises ConfigError for a package that is not installed, an unknown class or argument and a refused value.
    """
    cls, arguments = _arguments(options)
    groups = [dict(group) for group in groups]
    rates = {group["lr"] for group in groups if group.get("lr") is not None}
    if uses_relative_step(options):
        _check_relative_step(options, rates)
        for group in groups:
            group["lr"] = None
        arguments["lr"] = None
    elif "lr" in _parameters(cls)[0] or _parameters(cls)[1]:
        arguments["lr"] = options.learning_rate
    if _can_fuse(cls, arguments, groups):
        arguments["fused"] = True
    if is_lr_free(options.optimizer_type) and len(rates - {0.0}) > 1:
        raise ConfigError(f"--optimizer_type {options.optimizer_type} finds one learning rate for all parameters, but "
                          f"the groups have {', '.join(f'{rate:g}' for rate in sorted(rates))}; "
                          "give them one rate (no network_reg_lrs, no LoRA+)")  # fmt: skip
    if getattr(options, "stochastic_rounding", False):
        from library.rounding import rounding

        cls = rounding(cls, options.seed)
    try:
        return cls(groups, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ConfigError(f"--optimizer_type {options.optimizer_type} refuses {shown}: {error}") from error


def _can_fuse(cls: type, arguments: Mapping[str, Any], groups: list[dict[str, Any]]) -> bool:
    """torch's fused kernels: the same mathematics in one kernel, without a temporary copy of all weights, and able to
    skip a step on the device (see library.health). Left alone where the user chose an implementation."""
    chosen = {"fused", "foreach", "capturable", "differentiable"} & arguments.keys()
    parameters = [p for group in groups for p in group["params"]]
    good = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return cls.__module__.startswith("torch.optim") and cls.__name__ in ("Adam", "AdamW", "SGD") and good and not chosen


def _check_relative_step(options: Options, rates: set[float]) -> None:
    remedy = "add --optimizer_args relative_step=False scale_parameter=False warmup_init=False to use"
    for name in ("learning_rate", "unet_lr"):
        if options.given(name):
            raise ConfigError(
                f"--{name} has no effect with Adafactor's relative_step, which is its default; {remedy} it"
            )
    if len(rates) > 1:
        raise ConfigError(f"Adafactor's relative_step, which is its default, has no rates per group; {remedy} them")
    if options.given("lr_scheduler") and scheduler_name(options.lr_scheduler) != "adafactor":
        raise ConfigError(f"--lr_scheduler {options.lr_scheduler} has no effect with Adafactor's relative_step, which "
                          f"is its default; {remedy} it")  # fmt: skip
    if options.lr_scheduler_type:
        raise ConfigError(f"--lr_scheduler_type has no effect with Adafactor's relative_step; {remedy} it")


# ---------------------------------------------------------------- schedules


class NoSchedule:
    """In place of a schedule for optimizers that have their own."""

    def step(self) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def steps(value: int | float, total: int) -> int:
    """--lr_warmup_steps and --lr_decay_steps: steps as they are, a ratio as that part of `total`."""
    return int(value * total) if isinstance(value, float) else value


def create_scheduler(options: Options, optimizer: Optimizer, total_steps: int) -> Any:
    """A scheduler whose `step()` is called once after each of `total_steps` optimizer steps.

    `--lr_scheduler_num_cycles` counts whole cosine waves for the schedules with a lowest rate, so transformers'
    num_cycles is half of it, as in sd-scripts. Raises ConfigError.
    """
    if is_schedule_free(options.optimizer_type) or uses_relative_step(options):
        return NoSchedule()
    arguments = parse_pairs(options.lr_scheduler_args, "lr_scheduler_args")
    if options.lr_scheduler_type:
        return _scheduler_of_class(options.lr_scheduler_type, optimizer, total_steps, arguments)
    name = scheduler_name(options.lr_scheduler)
    if name == "adafactor":
        raise ConfigError(f"--lr_scheduler {options.lr_scheduler} goes with --optimizer_type Adafactor and its "
                          "relative_step; choose another")  # fmt: skip
    from torch.optim.lr_scheduler import LambdaLR

    rate = max(float(group["lr"]) for group in optimizer.param_groups)
    return LambdaLR(optimizer, _factor(name, options, total_steps, rate, arguments))


def _factor(name: str, options: Options, total: int, rate: float, arguments: dict[str, Any]) -> Any:
    function = SCHEDULES[name]
    accepted = inspect.signature(function).parameters.keys()
    warmup, decay = steps(options.lr_warmup_steps, total), steps(options.lr_decay_steps, total)
    if warmup > total:
        raise ConfigError(f"--lr_warmup_steps {warmup} is more than the run's {total} steps; take fewer, or a ratio")
    run = {"warmup": warmup, "decay": decay, "total": total, "rate": rate}
    set_by_options = {
        "num_cycles": options.lr_scheduler_num_cycles if name == "cosine_with_restarts" else None,
        "power": options.lr_scheduler_power,
        "timescale": options.lr_scheduler_timescale,
        "min_lr_rate": options.lr_scheduler_min_lr_ratio,
        "min_lr_ratio": options.lr_scheduler_min_lr_ratio,
    }
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"):
        set_by_options["num_cycles"] = options.lr_scheduler_num_cycles / 2
    offered = sorted(accepted - OURS)
    for argument in arguments:
        if argument not in offered:
            raise ConfigError(f"--lr_scheduler_args {argument}: {name} has no such argument"
                              f"{nearest(argument, offered)} (it has {', '.join(offered) or 'none'})")  # fmt: skip
    values = {key: value for key, value in (run | set_by_options).items() if key in accepted and value is not None}
    try:
        return function(**(values | arguments))
    except TypeError as error:
        raise ConfigError(f"--lr_scheduler {name} with --lr_scheduler_args: {error}") from None


def _scheduler_of_class(name: str, optimizer: Optimizer, total: int, arguments: dict[str, Any]) -> Any:
    """A class of torch.optim.lr_scheduler or module.Class; what it calls the length of the run is filled in."""
    what = f"--lr_scheduler_type {name}"
    module, _, class_name = name.rpartition(".")
    module = module or "torch.optim.lr_scheduler"
    cls = _class(module, class_name, module.partition(".")[0].replace("_", "-"), what)
    if class_name == "ReduceLROnPlateau":
        raise ConfigError(f"{what} follows a measured loss, which a step does not have; choose another")
    _checked(cls, arguments, "lr_scheduler_args", ("optimizer", "last_epoch"))
    for length in ("total_steps", "T_max", "num_training_steps", "total_iters"):
        if length in _parameters(cls)[0] and length not in arguments and "epochs" not in arguments:
            arguments[length] = total
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} refuses its arguments: {error}") from error


# ---------------------------------------------------------------- during the run


def learning_rates(optimizer: Optimizer, groups: list[dict[str, Any]]) -> dict[str, float]:
    """Group name -> learning rate, for logs. D-Adaptation and Prodigy also have `d*<name>`, the rate that they found.

    `groups` are those given to `create_optimizer` or the optimizer's own; only their names are read.
    """
    out: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        source = groups[index] if index < len(groups) else group
        name = str(source.get("name") or (f"group{index}" if len(optimizer.param_groups) > 1 else "lr"))
        name = f"{name}_{index}" if name in out else name
        out[name] = _rate(optimizer, group)
        if is_lr_free(type(optimizer).__name__) and "d" in group:
            out[f"d*{name}"] = float(group["d"]) * out[name]
    return out


def _rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    if group.get("relative_step") and hasattr(optimizer, "_get_lr"):  # Adafactor: known once a step was made
        state = optimizer.state.get(group["params"][0], {})
        return float(optimizer._get_lr(group, state)) if "step" in state else 0.0
    if "train_mode" in group and group.get("k", 0) > 0:
        return float(group.get("scheduled_lr", group["lr"]))
    return float(group["lr"])


def eval_mode(optimizer: Optimizer) -> None:
    """Averaged weights for saving, samples and validation (schedule-free optimizers; others have nothing to do).

    The weights in training are kept aside and `train_mode` puts back exactly these: the packages compute one set
    from the other, with a rounding that would make a run depend on when it was saved. Training states have to be
    written in train mode.
    """
    if not _has_modes(optimizer) or not optimizer.param_groups[0].get("train_mode", True):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer._weights_in_training = [p.detach().clone() for p in parameters]
    optimizer.eval()


def begin_step(optimizer: Optimizer, number: int) -> None:
    """Before an optimizer step, whose random numbers depend on its number."""
    if hasattr(optimizer, "number"):
        optimizer.number = number
    train_mode(optimizer)


class Stored:
    """An optimizer as a training state keeps it: each tensor comes back in the format that it had.

    torch casts states to the format of their weights, which would round the float32 states that some optimizers have
    for half-precision weights. torch's own optimizers have states in the weights' format, but for `rounding`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        if type(self.optimizer).__module__.startswith("torch.optim"):
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        places = [place for group in state["param_groups"] for place in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            live = self.optimizer.state.get(parameter, {})
            for name, value in state["state"].get(place, {}).items():
                if hasattr(value, "dtype") and hasattr(live.get(name), "dtype") and live[name].dtype != value.dtype:
                    live[name] = value.to(live[name].device, copy=True)


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the options say of each group: the arguments of the optimizer's class, and the learning rate."""
    names = {*inspect.signature(type(optimizer).__init__).parameters, "lr", "initial_lr"}
    return [{name: group[name] for name in names & group.keys() - {"params"}} for group in optimizer.param_groups]


def take_settings(optimizer: Optimizer, scheduler: Any, asked: list[dict[str, Any]]) -> None:
    """After a state was loaded: what the options of this run say holds, and not what those of the state's run said.

    Where both say the same nothing changes, to the bit. The learning rate is that of the present schedule at the
    state's step; a class of --lr_scheduler_type, which knows no rate but the last, goes on from that in proportion.
    """
    from torch.optim.lr_scheduler import LambdaLR

    for group, own in zip(optimizer.param_groups, asked, strict=True):
        rate, base = group.get("lr"), group.get("initial_lr")
        group.update(own)
        if isinstance(scheduler, NoSchedule):
            continue
        group["lr"] = rate if base == own["initial_lr"] or not base else rate * own["initial_lr"] / base
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    if isinstance(scheduler, LambdaLR):
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def train_mode(optimizer: Optimizer) -> None:
    """Weights for training; free when they are in place already."""
    if not _has_modes(optimizer) or optimizer.param_groups[0].get("train_mode", False):
        return
    optimizer.train()
    kept = optimizer.__dict__.pop("_weights_in_training", None)
    if kept is not None:
        import torch

        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _has_modes(optimizer: Optimizer) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
