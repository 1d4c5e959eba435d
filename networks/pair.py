"""Two networks behind the interface of one: an adapter for each of two experts (`library.memory.experts`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from library.errors import ConfigError


class PairNetwork(nn.Module):
    """`make()` is called for each name; a step trains the one whose turn it is, the other gets no gradient."""

    def __init__(self, names: tuple[str, str], make: Callable[[], Any]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: make() for name in names})
        if not all(hasattr(one, "set_enabled") for one in self.networks.values()):
            raise ConfigError("--network_per_expert needs a network that can be switched off; use networks.lora")
        self.trained: list[list[nn.Parameter]] | None = None

    @property
    def members(self) -> list[Any]:
        return list(self.networks.values())

    @property
    def multiplier(self) -> float:
        return self.members[0].multiplier

    @property
    def adapters(self) -> Mapping[str, Any]:
        return {f"{name}:{key}": a for name, one in self.networks.items() for key, a in one.adapters.items()}

    @property
    def save_format(self) -> str:
        return self.members[0].save_format

    @save_format.setter
    def save_format(self, value: str) -> None:
        for one in self.members:
            one.save_format = value

    def take_turn(self, index: int) -> None:
        if self.trained is None:  # some modules may be frozen, by a learning rate of 0
            self.trained = [[p for p in one.parameters() if p.requires_grad] for one in self.members]
        for number, parameters in enumerate(self.trained):
            for parameter in parameters:
                parameter.requires_grad_(number == index)

    def apply_to(self, text_encoder: Any, unet: nn.Module, apply_te: bool = False, apply_unet: bool = True) -> None:
        """Attach both; which one computes is decided by the expert in `unet.experts`."""
        for index, one in enumerate(self.members):
            one.apply_to(text_encoder, unet, apply_te, apply_unet)
            unet.experts.own[index].append(one)
        unet.experts.switch_networks()

    def load_weights(self, file: str) -> str:
        """One file for both, or the file of one expert, beside which the other one's has to be."""
        names = list(self.networks)
        found = next((name for name in names if name in file), None)
        files = {name: file.replace(found, name) if found else file for name in names}
        return "; ".join(f"{name}: {self.networks[name].load_weights(path)}" for name, path in files.items())

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Any, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        groups, titles = [], []
        for name, one in self.networks.items():
            own, labels = one.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)
            groups += own
            titles += [f"{label} {name}" for label in labels]
        return groups, titles

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> None:
        for one in self.members:
            one.apply_max_norm_regularization(max_norm_value, device)

    def set_multiplier(self, multiplier: float) -> None:
        for one in self.members:
            one.set_multiplier(multiplier)

    def enable_gradient_checkpointing(self) -> None:
        for one in self.members:
            one.enable_gradient_checkpointing()

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        for one in self.members:
            one.prepare_grad_etc(text_encoder, unet)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        if not self.training:
            self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        for one in self.members:
            one.on_step_start(text_encoder, unet)
