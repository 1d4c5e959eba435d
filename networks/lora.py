"""LoRA: W + alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685), and sd-scripts' network-module functions.

`--network_args` are strings, checked here; each is documented in `ARGS`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import ConfigError, nearest
from library.layout import is_below
from networks.adapter import Adapter, AdapterNetwork, Dropout, Target, Weight, seeded_generator, targets_of
from networks.names import Space, space_of

ARGS = {
    "rank_dropout": "probability of leaving out a rank, per item",
    "module_dropout": "probability of leaving out a module's adapter",
    "loraplus_lr_ratio": "LoRA+: learning rate of the up matrices / that of the down matrices (arXiv:2402.12354)",
    "loraplus_unet_lr_ratio": "the same for the denoiser",
    "loraplus_text_encoder_lr_ratio": "the same for text encoders",
    "network_reg_dims": "regex=rank,...: rank where the original module name matches, the last match wins; 0 = none",
    "network_reg_lrs": "regex=learning rate,...: the same for learning rates; 0 = not trained",
    "conv_dim": "rank of convolutions larger than 1x1",
    "conv_alpha": "their alpha; default: their rank",
    "exclude_patterns": "regexes of original module names (whole name) that get no adapter",
    "include_patterns": "regexes of original module names (whole name) that get one in any case",
    "split_qkv": "adapters of their own for q, k, v, .. where an original module holds several",
    "verbose": "print every module with its rank",
    "dropout": "as --network_dropout, which is how sd-scripts hands it to third-party modules",
}


class LoRA(Adapter):
    """One LoRA: `lora_down` [rank, *in], `lora_up` [out, rank] with rows in the original order, `alpha` a buffer."""

    def __init__(self, target: Target, rank: int, alpha: float, dropout: Dropout) -> None:
        super().__init__(target, dropout)
        self.rank, self.scale = rank, alpha / rank
        self.lora_down, self.lora_up = Weight(rank, *target.our_shape[1:]), Weight(target.entry.shape[0], rank)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=seeded_generator(target.name))

    def factor(self) -> float:
        return self.scale

    def project(self, x: Tensor) -> Tensor:
        weight, base = self.lora_down.weight, self.bases[0]
        if weight.dtype != x.dtype:  # a half-precision model without autocast; under autocast the cast is torch's
            weight = weight.to(x.dtype)
        if isinstance(base, nn.Conv2d):
            return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation)
        return F.linear(x, weight)

    def rows(self) -> Sequence[Tensor]:
        up = self.lora_up.weight
        if self.entry.op:
            up = self.entry.op.to_ours(up, tuple(up.shape))
        return up.split(self.entry.sizes) if len(self.bases) > 1 else (up,)

    def delta(self) -> Tensor:
        return self.scale * (self.lora_up.weight.float() @ self.lora_down.weight.float().flatten(1))

    def norm(self) -> Tensor:
        """||delta|| from the two rank x rank Gram matrices, without forming it; a float64 scalar."""
        down, up = self.lora_down.weight.double().flatten(1), self.lora_up.weight.double()
        return abs(self.scale) * ((down @ down.T) * (up.T @ up)).sum().clamp(min=0).sqrt()

    def shrink(self, ratio: float) -> None:
        for weight in (self.lora_down.weight, self.lora_up.weight):
            weight.mul_(math.sqrt(ratio))

    def second_parameters(self) -> set[str]:
        return {"lora_up.weight"}

    def content(self) -> dict[str, Any]:
        return {
            "down": self.lora_down.weight.detach(),
            "up": self.lora_up.weight.detach(),
            "alpha": self.scale * self.rank,
        }

    @torch.no_grad()
    def load(self, content: Mapping[str, Any], source: str) -> None:
        rank = content["down"].shape[0]
        if rank != self.rank:
            blocks = content.get("blocks", 1)
            origin = f" ({blocks} separate adapters side by side)" if blocks > 1 else ""
            raise ConfigError(
                f"{source}: {self.name} has rank {rank}{origin}, the network's is {self.rank}; "
                "set --network_dim to it or use --dim_from_weights"
            )
        self.lora_down.weight.copy_(content["down"])
        self.lora_up.weight.copy_(content["up"])
        self.alpha.fill_(content["alpha"])
        self.scale = content["alpha"] / rank


@dataclass(frozen=True)
class Settings:
    """`--network_args`, checked."""

    dropout: Dropout
    plus_ratio: float | None  # of the denoiser
    text_plus_ratio: float | None
    reg_dims: Sequence[tuple[re.Pattern, float]]
    reg_lrs: Sequence[tuple[re.Pattern, float]]
    conv_dim: int | None
    conv_alpha: float | None
    exclude: Sequence[re.Pattern]
    include: Sequence[re.Pattern]
    is_verbose: bool
    is_split: bool  # adapters of their own for what an original module holds


def parse_args(kwargs: Mapping[str, Any], neuron_dropout: float | None = None) -> Settings:
    """Check `--network_args`. Raises ConfigError naming the argument, its value and what it takes."""
    for name in kwargs:
        if name not in ARGS:
            raise ConfigError(f"network_args: '{name}' is not known{nearest(name, ARGS)} (known: {', '.join(ARGS)})")

    def number(name: str, low: float = 0.0, high: float = math.inf) -> float | None:
        return _number(name, kwargs.get(name), low, high)

    network = neuron_dropout if neuron_dropout is not None else number("dropout", 0, 1)
    plus = number("loraplus_lr_ratio")
    own = [number(f"loraplus_{part}_lr_ratio") for part in ("unet", "text_encoder")]
    ratios = [plus if ratio is None else ratio for ratio in own]
    return Settings(
        dropout=Dropout(network, number("rank_dropout", 0, 0.999), number("module_dropout", 0, 1)),
        plus_ratio=ratios[0],
        text_plus_ratio=ratios[1],
        reg_dims=_regex_values("network_reg_dims", kwargs.get("network_reg_dims"), whole=True),
        reg_lrs=_regex_values("network_reg_lrs", kwargs.get("network_reg_lrs")),
        conv_dim=None if kwargs.get("conv_dim") is None else int(number("conv_dim", 1)),
        conv_alpha=number("conv_alpha"),
        exclude=_patterns("exclude_patterns", kwargs.get("exclude_patterns")),
        include=_patterns("include_patterns", kwargs.get("include_patterns")),
        is_verbose=_flag("verbose", kwargs.get("verbose")),
        is_split=_flag("split_qkv", kwargs.get("split_qkv")),
    )


def _number(name: str, value: Any, low: float, high: float) -> float | None:
    if value is None or value == "None":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"network_args: {name}={value} is not a number") from None
    if not low <= number <= high:
        raise ConfigError(f"network_args: {name}={value} is outside {low:g}..{high:g}")
    return number


def _flag(name: str, value: Any) -> bool:
    words = {"none": False, "": False, "false": False, "0": False, "no": False, "true": True, "1": True, "yes": True}
    if str(value).lower() not in words:
        raise ConfigError(f"network_args: {name}={value} is neither true nor false")
    return words[str(value).lower()]


def _compile(name: str, regex: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise ConfigError(f"network_args: {name}: '{regex}' is not a regular expression ({error})") from None


def _regex_values(name: str, text: str | None, whole: bool = False) -> list[tuple[re.Pattern, float]]:
    """`regex=number,...`: each value ends at a comma or at the end, so that a regex may hold commas and `=` too."""
    pairs, rest = [], (text or "").strip()
    while rest:
        found = re.match(r"(.+?)=\s*([-+0-9.eE]+)\s*(?:,\s*|$)", rest)
        try:
            value = float(found[2]) if found else -1.0
        except ValueError:
            value = -1.0
        if value < 0 or whole and value != int(value):
            kind = "whole number" if whole else "number"
            raise ConfigError(f"network_args: {name}: '{rest}' is not regex=value with a {kind} of 0 or more")
        pairs.append((_compile(name, found[1].strip()), value))
        rest = rest[found.end() :]
    return pairs


def _patterns(name: str, text: str | None) -> list[re.Pattern]:
    """A Python list of strings, or regexes separated by commas."""
    return [_compile(name, item) for item in pattern_texts(text, name)]


def pattern_texts(text: str | None, name: str = "patterns") -> list[str]:
    text = (text or "").strip()
    if not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"network_args: {name}={text} is not a Python list of strings")
    return items


def spellings(name: str) -> tuple[str, str]:
    """A module's name as its model's file has it and as kohya's LoRA files have it; regexes may match either."""
    key, _, plain = name.rpartition(":")
    return plain, f"lora_{key or 'unet'}_" + plain.replace(".", "_")


def last_match(name: str, rules: Sequence[tuple[re.Pattern, float]]) -> float | None:
    """Value of the last rule whose regex is found in the name, or None."""
    values = [value for regex, value in rules if any(regex.search(s) for s in spellings(name))]
    return values[-1] if values else None


def _whole_match(name: str, patterns: Sequence[re.Pattern]) -> bool:
    dotted, kohya = spellings(name)
    return any(p.fullmatch(s) for p in patterns for s in (dotted, kohya, dotted.replace(".", "_")))


def _refuse_idle(settings: Settings, chosen: Mapping[str, Target], known: Mapping[str, Target]) -> None:
    """A regex that matches nothing is a typing error, not a wish."""
    some = ", ".join(list(known)[:3])
    for name, rules in (("network_reg_dims", settings.reg_dims), ("network_reg_lrs", settings.reg_lrs)):
        for regex, _ in rules:
            if not any(last_match(n, [(regex, 0.0)]) is not None for n in chosen):
                raise ConfigError(
                    f"network_args: {name}: '{regex.pattern}' matches none of the {len(chosen)} modules ({some}, ...)"
                )
    for name, patterns in (("exclude_patterns", settings.exclude), ("include_patterns", settings.include)):
        for regex in patterns:
            if not any(_whole_match(n, [regex]) for n in known):
                raise ConfigError(f"network_args: {name}: '{regex.pattern}' matches no module as a whole ({some}, ...)")


def is_adapted(name: str, adapted: Sequence[str]) -> bool:
    """Whether a module is one of the family's, or below one: `blocks.` is all of them, `blocks.*.attn` one of each.

    Without any, whether it is in a numbered block.
    """
    if not adapted:
        return re.search(r"\.\d+\.", name) is not None
    return any(name == pattern or is_below(name, pattern.rstrip(".")) for pattern in adapted)


def choose(model: nn.Module, space: Space, settings: Settings) -> tuple[dict[str, Target], dict[str, Target]]:
    """(the modules of one model to adapt, all that could be).

    They are the family's, less `exclude_patterns`, plus `include_patterns`; with `conv_dim` also large convolutions
    and what the family adapts beside them.
    """
    targets, binding = targets_of(model, space), model.binding
    adapted = tuple(getattr(binding, "adapted", ()))
    if settings.conv_dim and adapted:
        adapted += tuple(getattr(binding, "adapted_with_convs", ()))
    chosen = {
        name: target
        for name, target in targets.items()
        if _whole_match(name, settings.include)
        or (is_adapted(spellings(name)[0], adapted) and not _whole_match(name, settings.exclude))
        if not target.is_large_conv or settings.conv_dim
    }
    return chosen, targets


def choose_all(models: Sequence[nn.Module], spaces: Sequence[Space], settings: Settings) -> dict[str, Target]:
    """The modules of all models to adapt. Raises ConfigError where an argument has no effect."""
    pairs = [choose(model, space, settings) for model, space in zip(models, spaces, strict=True)]
    chosen = {name: target for some, _ in pairs for name, target in some.items()}
    targets = {name: target for _, some in pairs for name, target in some.items()}
    if settings.conv_dim and not any(target.is_large_conv for target in chosen.values()):
        raise ConfigError(
            f"network_args: conv_dim={settings.conv_dim} has no effect: no convolution of this model is adapted"
        )
    if not chosen:
        raise ConfigError("network_args: exclude_patterns leaves no module to adapt")
    _refuse_idle(settings, chosen, targets)
    return chosen


def models_of(unet: nn.Module, text_encoder: Any) -> list[nn.Module]:
    """The denoiser and the text encoders that can be trained: those that the trainer gave a `lora_key`."""
    given = text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder] if text_encoder else []
    return [unet, *(model for model in given if getattr(getattr(model, "binding", None), "lora_key", ""))]


def _adapter(target: Target, rank: int, alpha: float, settings: Settings, content: Any = None) -> LoRA:
    """One adapter; with a file's content, of the rank that this needs."""
    from networks.split import SplitLoRA, is_split, rank_of

    if not settings.is_split or not is_split(target):
        return LoRA(target, rank, alpha, settings.dropout)
    if content:
        rank, alpha = rank_of(target, content), alpha / rank * rank_of(target, content)
    return SplitLoRA(target, rank, alpha, settings.dropout)


def _build(adapters: list[LoRA], spaces: Sequence[Space], settings: Settings, multiplier: float) -> AdapterNetwork:
    network = AdapterNetwork(adapters, spaces, multiplier=multiplier)
    rates = {name: last_match(name, settings.reg_lrs) for name in network.adapters}
    network.learning_rates = {name: rate for name, rate in rates.items() if rate is not None}
    network.plus_ratios = {s.key: settings.text_plus_ratio if s.key else settings.plus_ratio for s in spaces}
    if settings.is_verbose:
        for name, adapter in network.adapters.items():
            print(f"  {name}: rank {adapter.rank}, alpha {adapter.rank * adapter.scale:g}")
    return network


def _check_split(settings: Settings, adapters: Sequence[LoRA]) -> None:
    if settings.is_split and all(len(adapter.bases) == 1 for adapter in adapters):
        raise ConfigError("network_args: split_qkv=True has no effect: no adapted module holds several of ours")


def _was_split(file: Any) -> bool:
    """Whether `ss_network_args` of a LoRA file record split_qkv."""
    from networks.formats import header_of

    try:
        recorded = json.loads(header_of(file)[1].get("ss_network_args") or "{}")
        return isinstance(recorded, dict) and _flag("split_qkv", recorded.get("split_qkv"))
    except (ValueError, RecursionError, ConfigError):
        return False  # another program's metadata


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> AdapterNetwork:
    """A new network on the models' original modules. Rank 4 if None (as sd-scripts); alpha 0 or None = rank."""
    settings, dim = parse_args(kwargs, neuron_dropout), 4 if network_dim is None else int(network_dim)
    if dim < 1:
        raise ConfigError(f"network_dim {network_dim} is below 1")
    models = models_of(unet, text_encoder)
    spaces, adapters = [space_of(model) for model in models], []
    for name, target in choose_all(models, spaces, settings).items():
        rank, alpha = (settings.conv_dim, settings.conv_alpha) if target.is_large_conv else (dim, network_alpha)
        own = last_match(name, settings.reg_dims)
        rank = rank if own is None else int(own)
        if rank:
            adapters.append(_adapter(target, rank, alpha or rank, settings))
    if not adapters:
        raise ConfigError("network_args: network_reg_dims gives every module rank 0")
    _check_split(settings, adapters)
    return _build(adapters, spaces, settings, multiplier)


def create_network_from_weights(
    multiplier: float,
    file: Any,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[AdapterNetwork, Mapping[str, Tensor]]:
    """A network with a file's modules, ranks and alphas, and the file's tensors; `load_weights` loads its values.

    A file that was trained with `split_qkv` says so in its header and stays split.
    """
    from networks import formats

    if not for_inference and file and _was_split(file):
        kwargs.setdefault("split_qkv", True)
    settings, models = parse_args(kwargs), models_of(unet, text_encoder)
    spaces = [space_of(model) for model in models]
    tensors = formats.load_file(file) if weights_sd is None else weights_sd
    tensors = formats.of_models(tensors, spaces)
    modules = formats.read(tensors, spaces, str(file or "the given weights"))
    targets = {
        name: target
        for model, space in zip(models, spaces, strict=True)
        for name, target in targets_of(model, space).items()
    }
    if strange := sorted(modules.keys() - targets.keys()):
        raise ConfigError(f"{file}: {strange[0]} is not a layer that can take a LoRA")
    _refuse_idle(settings, {name: targets[name] for name in modules}, targets)
    contents = modules.items()
    adapters = [_adapter(targets[n], c["down"].shape[0], c["alpha"], settings, c) for n, c in contents]
    _check_split(settings, adapters)
    return _build(adapters, spaces, settings, multiplier), tensors


def merge_text(text_encoders: Sequence[nn.Module], file: Any, multiplier: float) -> str:
    """Add the part of a LoRA file that belongs to text encoders to their weights; returns a line, "" if it has none.

    Raises ConfigError for keys that name no module of these text encoders.
    """
    from networks import formats
    from networks.names import is_text

    tensors = {key: value for key, value in formats.load_file(file).items() if is_text(key)}
    if not tensors:
        return ""
    models = [model for model in text_encoders if getattr(model.binding, "lora_key", "")]
    if not models:
        raise ConfigError(f"{file} adapts text encoders, which this model cannot take: it was made for another one")
    spaces = [space_of(model) for model in models]
    modules = formats.read(tensors, spaces, str(file))
    for model, space in zip(models, spaces, strict=True):
        for name, target in targets_of(model, space).items():
            if content := modules.get(name):
                adapter = LoRA(target, content["down"].shape[0], content["alpha"], Dropout())
                adapter.load(content, str(file))
                adapter.to(model.device).merge(multiplier)
    return f"{file}: {len(modules)} modules of text encoders merged at {multiplier:g}"
