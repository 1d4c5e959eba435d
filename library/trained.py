"""Which models a run trains, and at which learning rates. Needs no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError

if TYPE_CHECKING:
    from library.families.family import Family
    from library.options import Options


@dataclass(frozen=True)
class Trained:
    """The denoiser, and each text encoder that the family can train."""

    denoiser: bool = True
    text: tuple[bool, ...] = ()

    @property
    def any_text(self) -> bool:
        return any(self.text)

    def sentence(self, family: Family, is_cached: bool) -> str:
        """For the plan; empty for families whose text encoders are never trained."""
        if not self.text:
            return ""
        names = [part.name for part, on in zip(family.text_encoders, self.text, strict=False) if on]
        rest = "cached" if is_cached else "used as they are"
        text = f"text encoders: {', '.join(names)} trained" if names else f"text encoders: {rest}"
        return text if self.denoiser else f"{text}; the denoiser is not"


def text_rates(options: Any, count: int) -> list[float | None]:
    """The learning rate of each of `count` text encoders, None = the general one; a missing one is the last given."""
    given = list(options.text_encoder_lr or [])
    return [given[min(k, len(given) - 1)] if given else None for k in range(count)]


def own_rate(name: str, family: Family, options: Any) -> float | None:
    """The learning rate of an original module of the denoiser, if one of the family's options gives it its own."""
    return next((getattr(options, option) for option, within in family.own_rates if within in name), None)


def set_rates(network: Any, family: Family, options: Any) -> None:
    """Give the modules of a network their own rates; those with the rate 0 leave it. Raises ConfigError."""
    given = {option: within for option, within in family.own_rates if getattr(options, option) is not None}
    if not given:
        return
    if not hasattr(network, "drop"):
        asked = [option for option in given if getattr(options, option) or options.given(option)]
        if asked:
            raise ConfigError(f"--{asked[0]} is read by networks.lora; {options.network_module} knows none")
        return
    for option, within in given.items():
        if getattr(options, option) and not any(within in name for name in network.adapters):
            raise ConfigError(f"--{option} has no effect: no module of the network has '{within}' in its name")
    rates = {name: own_rate(name, family, options) for name in network.adapters if not network.model_of[name]}
    network.drop([name for name, rate in rates.items() if rate == 0])
    network.learning_rates = {n: rate for n, rate in rates.items() if rate} | dict(network.learning_rates)


def whole_rates(denoiser: Any, family: Family, options: Any) -> dict[str, float | None]:
    """Name of each parameter of ours -> its own learning rate, 0 = not trained; only where it has one."""
    if all(getattr(options, option) is None for option, _ in family.own_rates):
        return {}
    from library.checkpoints import layout_of

    binding = denoiser.binding
    layout = layout_of(binding.part, next(iter(binding.part.layouts)), binding.layout.shapes)
    rates = {ours: own_rate(entry.theirs, family, options) for entry in layout.entries for ours in entry.ours}
    return {name: rate for name, rate in rates.items() if rate is not None}


def trained_parts(options: Options, family: Family) -> Trained:
    """Text encoders that can be trained are, unless their outputs are cached or the options say otherwise.

    Raises ConfigError for options that contradict each other.
    """
    count = len(family.text_prefixes)
    if len(options.text_encoder_lr or []) > count > 0:
        raise ConfigError(
            f"--text_encoder_lr has {len(options.text_encoder_lr)} values for {count} text encoder"
            f"{'s' if count > 1 else ''} of {family.title}"
        )
    reasons = [n for n in ("network_train_unet_only", "cache_text_encoder_outputs") if getattr(options, n)]
    wanted = options.network_train_text_encoder_only or any(options.text_encoder_lr or [])
    if count and reasons and wanted:
        other = "network_train_text_encoder_only" if options.network_train_text_encoder_only else "text_encoder_lr"
        raise ConfigError(f"--{reasons[0]} leaves the text encoders untrained, --{other} trains them; remove one")
    text = tuple(not reasons and rate != 0 for rate in text_rates(options, count))
    if options.network_train_text_encoder_only and not any(text):
        raise ConfigError("--network_train_text_encoder_only with --text_encoder_lr 0 trains nothing; remove one")
    return Trained(not options.network_train_text_encoder_only, text)
