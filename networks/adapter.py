"""Adapters on the original modules of a denoiser and its text encoders: attaching, slices, dropout, merging.

An adapter belongs to one *original* module (`layers.0.attention.qkv`), whatever modules of ours (`to_q`, `to_k`,
`to_v`) hold its weight: it has one down-projection, and its output rows are sliced onto our modules. So saving
is a rename, and rank 16 means what it means in sd-scripts and ComfyUI. A parametrisation (`networks.lora`)
subclasses `Adapter`.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.errors import ConfigError
from library.layout import Entry, Layout
from library.memory.quantised_linear import is_quantised
from networks.names import Names, Space, modules_of, spaces_of


@dataclass(frozen=True)
class Dropout:
    """Probabilities, None or 0 = off. All act in train mode only, and once per forward of an original module."""

    network: float | None = None  # on the values of the down-projection's output
    rank: float | None = None  # whole ranks, drawn per item of the batch, the rest scaled by 1 / (1 - p)
    module: float | None = None  # the whole adapter


@dataclass(frozen=True)
class Target:
    """One original module that can be adapted and the modules of ours that hold it."""

    name: str
    entry: Entry
    modules: tuple[nn.Module, ...]
    our_shape: tuple[int, ...]  # of the stacked weight of our modules

    @property
    def is_large_conv(self) -> bool:
        """A convolution that looks beyond one pixel; a 1x1 convolution counts as a Linear, as in sd-scripts."""
        return isinstance(self.modules[0], nn.Conv2d) and self.modules[0].kernel_size != (1, 1)


def targets_of(model: nn.Module, names: Layout | Space) -> dict[str, Target]:
    """Every original module whose weight lies in Linear or Conv2d modules of ours, qualified, in the layout's order."""
    (space,), found = spaces_of(names if isinstance(names, Layout) else [names]), {}
    for name, entry in space.layout.their_modules.items():
        modules = tuple(_submodule(model, ours) for ours in entry.ours)
        if all(isinstance(m, nn.Linear) for m in modules) or all(_is_plain_conv(m) for m in modules):
            qualified = space.qualified(name)
            found[qualified] = Target(qualified, entry, modules, tuple(space.layout.our_shape(entry)))
    return found


def _submodule(model: nn.Module, weight: str) -> nn.Module | None:
    """The module that holds a weight; None if it is a parameter by itself."""
    return model.get_submodule(weight.removesuffix(".weight")) if weight.endswith(".weight") else None


def _is_plain_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def seeded_generator(name: str) -> torch.Generator:
    """A CPU generator that depends on torch's initial seed and a module's name, not on the order of creation."""
    digest = hashlib.sha256(f"{torch.initial_seed()}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Weight(nn.Module):
    """A bare weight under the name that LoRA files give it, made without touching torch's global generator."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class _Place:
    """Where an adapter is attached. A method of it, and no closure, so that compiled blocks can be the same code."""

    def __init__(self, adapter: Adapter, index: int, base: Any) -> None:
        self.adapter, self.index, self.base = adapter, index, base

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter._forward(self.index, self.base, x, *args, **kwargs)


class Adapter(nn.Module):
    """Adapts one original module. Our modules are held outside the state dict. Subclasses fill in what raises here."""

    def __init__(self, target: Target, dropout: Dropout) -> None:
        super().__init__()
        self.name, self.entry, self.our_shape, self.dropout = target.name, target.entry, target.our_shape, dropout
        self.multiplier, self.enabled = 1.0, True
        object.__setattr__(self, "bases", target.modules)  # outside nn.Module's registry: not ours to save or train
        self._previous: list[Any] = []
        self._shared: tuple | None = None

    rank: int

    def project(self, x: Tensor) -> Tensor:
        """What all slices share, computed once per forward: [..., rank]."""
        raise NotImplementedError

    def factor(self) -> float:
        """What the projected values are multiplied by, the network's multiplier apart."""
        raise NotImplementedError

    def rows(self) -> Sequence[Tensor]:
        """One [out_i, rank] per module of ours: what it adds is `linear(projected, rows[i])`."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """The change of the original weight at multiplier 1, [out, in], float32."""
        raise NotImplementedError

    def norm(self) -> Tensor:
        """Frobenius norm of `delta()`, a scalar."""
        raise NotImplementedError

    def shrink(self, ratio: float) -> None:
        """Scale `delta()` by `ratio`, in place."""
        raise NotImplementedError

    def second_parameters(self) -> set[str]:
        """Names of the parameters whose learning rate LoRA+ multiplies."""
        raise NotImplementedError

    def content(self) -> dict[str, Any]:
        """What a file holds of this module (see `networks.formats`)."""
        raise NotImplementedError

    def load(self, content: Mapping[str, Any], source: str) -> None:
        """Take over a file's content. Raises ConfigError where its size differs."""
        raise NotImplementedError

    def attach(self) -> None:
        """Replace the `forward` of our modules; other replacements that are there already keep working."""
        if self._previous:
            raise ConfigError(f"the adapter of {self.name} is attached already; remove() it first")
        for index, module in enumerate(self.bases):
            self._previous.append(module.__dict__.get("forward"))
            module.forward = _Place(self, index, module.forward).forward

    def remove(self) -> None:
        """Give our modules their own `forward` back."""
        for module, previous in zip(self.bases, self._previous, strict=False):
            del module.forward
            if previous is not None:
                module.forward = previous
        self._previous, self._shared = [], None

    def _forward(self, index: int, base: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base(x, *args, **kwargs)
        if not self.enabled or self.multiplier == 0:
            return out
        hidden, rows = self._common(index, x) if len(self.bases) > 1 else self._compute(x)
        if hidden is None:
            return out
        return self._add(out, self.part(hidden, index), rows[index])

    def part(self, hidden: Tensor, index: int) -> Tensor:
        """What the slice `index` reads of the values that all slices share."""
        return hidden

    def _add(self, out: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """out + hidden @ rows^T; as one addmm where it can be, which saves a pass over `out` (2 % of a step on CPU)."""
        rows = rows if rows.dtype == hidden.dtype else rows.to(hidden.dtype)
        if isinstance(self.bases[0], nn.Conv2d):
            return out + F.conv2d(hidden, rows[:, :, None, None]).to(out.dtype)
        if out.dtype != hidden.dtype or out.ndim < 2:
            return out + F.linear(hidden, rows).to(out.dtype)
        return torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2), rows.t()).view(out.shape)

    def _common(self, index: int, x: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """The product that the slices of one forward share, and with it their one dropout mask.

        It is shared only with a slice that has not used it yet and gets the same tensor object, unchanged, in the
        same gradient mode. The last slice drops it, or the end of the input does where some slices get another one
        (HunyuanImage's linear1), so nothing outlives the forward. Every forward draws afresh in the same order, so a
        checkpointed block that runs again under torch's restored generator draws the same mask.
        """
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        key = (version, torch.is_grad_enabled(), self.training)
        if self._shared is not None:
            kept, kept_key, left, result = self._shared
            if kept() is x and kept_key == key and index in left:
                left.discard(index)
                if not left:
                    self._shared = None
                return result
        result = self._compute(x)
        kept = weakref.ref(x, self._dropped)
        self._shared = (kept, key, set(range(len(self.bases))) - {index}, result)
        return result

    def _dropped(self, reference: weakref.ref) -> None:
        if self._shared is not None and self._shared[0] is reference:
            self._shared = None

    def _compute(self, x: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        drop = self.dropout
        if self.training and drop.module and torch.rand(()).item() < drop.module:  # CPU generator: no device sync
            return None, ()
        hidden, scale = self.project(x), self.factor() * self.multiplier
        if self.training:
            if drop.network:
                hidden = F.dropout(hidden, drop.network)
            if drop.rank:
                hidden = hidden * self._rank_mask(hidden)
        return hidden if scale == 1 else hidden * scale, self.rows()

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """[B, 1, ..., rank] (channels first for a convolution), kept ranks scaled by 1 / (1 - p)."""
        p = self.dropout.rank
        axis = 1 if isinstance(self.bases[0], nn.Conv2d) else hidden.ndim - 1
        shape = [n if i in (0, axis) else 1 for i, n in enumerate(hidden.shape)]
        kept = torch.rand(shape, device=hidden.device) > p
        return kept.to(hidden.dtype) / (1 - p)

    def base_weights(self) -> list[Tensor]:
        return [module.weight for module in self.bases]

    @torch.no_grad()
    def merge(self, multiplier: float = 1.0, dtype: torch.dtype | None = None) -> None:
        """Add `multiplier * delta` to our modules' weights, the sum taken in float32. Quantised weights are refused."""
        parts = self.entry.split(self.delta().reshape(self.entry.shape), self.our_shape)
        for module, part in zip(self.bases, parts, strict=True):
            weight = module.weight
            if is_quantised(module) or weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
                held = "a quantised weight" if is_quantised(module) else f"a weight of {weight.dtype}"
                raise ConfigError(f"{self.name}: {held} cannot take a merge; load the base unquantised")
            change = part.reshape(weight.shape).to(weight.device, torch.float32)
            module.weight.data = (weight.float() + multiplier * change).to(dtype or weight.dtype)


class AdapterNetwork(nn.Module):
    """All adapters of one denoiser and of its text encoders behind sd-scripts' network interface.

    The state dict is that of a kohya file: `lora_unet_<original name, dots as underscores>.<parameter>`, and
    `lora_te1_...` for a text encoder. `names` are those of all models that the network knows.
    """

    def __init__(self, adapters: Iterable[Adapter], names: Names, *, multiplier: float = 1.0) -> None:
        super().__init__()
        self.spaces, self.save_format = spaces_of(names), "comfy"
        self.learning_rates: Mapping[str, float] = {}  # module name -> its own learning rate
        self.plus_ratios: Mapping[str, float | None] = {}  # model -> LoRA+: rate of the second matrix / of the first
        self.untrained: tuple[str, ...] = ()  # modules whose learning rate is 0
        self.adapters: dict[str, Adapter] = {adapter.name: adapter for adapter in adapters}
        known = modules_of(self.spaces)
        self.model_of: dict[str, str] = {name: known[name][0].key for name in self.adapters}
        for name, adapter in self.adapters.items():
            space, plain, _ = known[name]
            self.add_module(space.prefixes["kohya"] + plain.replace(".", "_"), adapter)
        self.set_multiplier(multiplier)

    @property
    def layout(self) -> Layout:
        """The denoiser's."""
        return self.spaces[0].layout

    def prepare_network(self, args: Any) -> None:
        """Nothing to prepare; the trainer offers its options."""

    def apply_to(self, text_encoder: Any, unet: nn.Module, apply_te: bool = False, apply_unet: bool = True) -> None:
        """Attach to the models. Adapters of a model that is not asked for are dropped: not trained, not saved."""
        kept = {n: a for n, a in self.adapters.items() if (apply_te if self.model_of[n] else apply_unet)}
        if apply_te and not any(self.model_of[name] for name in kept):
            raise ConfigError("text encoders of this model cannot be trained; use --network_train_unet_only")
        if not kept:
            raise ConfigError("the network has no module of what is to be trained")
        self.drop(self.adapters.keys() - kept.keys())
        for adapter in self.adapters.values():
            adapter.attach()

    def drop(self, names: Iterable[str]) -> None:
        """Leave out some modules before the network is attached."""
        dropped = [self.adapters[name] for name in names]
        for module, adapter in list(self._modules.items()):
            if adapter in dropped:
                del self._modules[module]
        self.adapters = {name: adapter for name, adapter in self.adapters.items() if adapter not in dropped}

    def remove(self) -> None:
        """Detach from the model, which computes what it did before."""
        for adapter in self.adapters.values():
            adapter.remove()

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier
        for adapter in self.adapters.values():
            adapter.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        for adapter in self.adapters.values():
            adapter.enabled = is_enabled

    def enable_gradient_checkpointing(self) -> None:
        """The blocks of the model are checkpointed; the adapters inside them need nothing."""

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None:
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(name not in self.untrained)

    def on_epoch_start(self, text_encoder: Any, unet: nn.Module) -> None:
        if not self.training:  # it walks all modules, and this is called at every step
            self.train()

    def on_step_start(self, text_encoder: Any, unet: nn.Module) -> None:
        """Nothing is kept from one step to the next."""

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [p for name, a in self.adapters.items() if name not in self.untrained for p in a.parameters()]

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Any, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and what to call them: one per model, learning rate and, with LoRA+, kind of matrix.

        `text_encoder_lr` is one rate for all text encoders or a list, whose last one holds for the rest.
        Modules whose learning rate is 0 are left out, get no gradient and are listed in `untrained`.
        """
        groups, names, untrained = [], [], []
        for key, label, general in self._rates(text_encoder_lr, unet_lr, default_lr):
            mine = [name for name in self.adapters if self.model_of[name] == key]
            own = {name: self.learning_rates[name] for name in mine if name in self.learning_rates}
            parts = [(label, general, [name for name in mine if name not in own])]
            for i, rate in enumerate(dict.fromkeys(own.values())):
                parts.append((f"{label} reg_lr_{i}", rate, [name for name in own if own[name] == rate]))
            for title, rate, members in parts:
                if not rate:
                    untrained += members
                    continue
                for suffix, ratio, pick in self._kinds(key):
                    params = [p for n in members for k, p in self.adapters[n].named_parameters() if pick(n, k)]
                    if params:
                        groups.append({"params": params, "lr": rate * ratio})
                        names.append(title + suffix)
        self.untrained = tuple(untrained)
        for name in untrained:
            self.adapters[name].requires_grad_(False)
        if not groups:
            raise ConfigError("no module of the network has a learning rate above 0; set --learning_rate or --unet_lr")
        return groups, names

    def _rates(
        self, text_encoder_lr: Any, unet_lr: float | None, default_lr: float | None
    ) -> list[tuple[str, str, float | None]]:
        """(model, what to call it, learning rate) of every model that has adapters."""
        given = [text_encoder_lr] if isinstance(text_encoder_lr, int | float) else list(text_encoder_lr or [])
        out, number = [], 0
        for space in self.spaces:
            rate, label = unet_lr, "unet"
            if space.key:
                rate = given[min(number, len(given) - 1)] if given else None
                number, label = number + 1, f"text_encoder{number + 1}"
            if space.key in self.model_of.values():
                out.append((space.key, label, default_lr if rate is None else rate))
        return out

    def _kinds(self, key: str) -> list[tuple[str, float, Any]]:
        ratio = self.plus_ratios.get(key)
        if not ratio or ratio == 1:
            return [("", 1.0, lambda name, key: True)]
        second = {name: self.adapters[name].second_parameters() for name in self.adapters}
        return [
            ("", 1.0, lambda n, key: key not in second[n]),
            (" plus", ratio, lambda n, key: key in second[n]),
        ]

    def prepare_optimizer_params(
        self, text_encoder_lr: Any, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Shrink every module's update whose Frobenius norm exceeds the limit to it (`--scale_weight_norms`).

        Returns how many were shrunk, and the mean and the maximum of the norms afterwards.
        """
        adapters = list(self.adapters.values())
        norms = torch.stack([adapter.norm() for adapter in adapters]).cpu()  # one synchronisation
        ratios = (max_norm_value / norms.clamp(min=1e-30)).clamp(max=1.0)
        for adapter, ratio in zip(adapters, ratios.tolist(), strict=True):
            if ratio < 1:
                adapter.shrink(ratio)
        after = norms * ratios
        return int((ratios < 1).sum()), float(after.mean()), float(after.max())

    def is_mergeable(self) -> bool:
        """Whether the weights that it adapts can take it; quantised ones cannot."""
        return not any(is_quantised(module) for adapter in self.adapters.values() for module in adapter.bases)

    def merge(self, multiplier: float | None = None, dtype: torch.dtype | None = None) -> None:
        for adapter in self.adapters.values():
            adapter.merge(self.multiplier if multiplier is None else multiplier, dtype)

    def merge_to(
        self,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: Any = None,
        device: Any = None,
    ) -> None:
        """Load a file's tensors (any format) and add them, times the multiplier, to the model (`--base_weights`)."""
        self.load_tensors(weights_sd, "the given weights")
        if device is not None:
            self.to(device)
        self.merge(dtype=dtype)

    def load_weights(self, file: Any) -> str:
        """Load a file in any format; returns a line about it. Raises ConfigError naming what does not fit."""
        from networks import formats

        return self.load_tensors(formats.load_file(file), str(file))

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str) -> str:
        from networks import formats

        mine = formats.of_models(tensors, self.spaces)
        modules = formats.read(mine, self.spaces, source)
        strange = sorted(modules.keys() - self.adapters.keys())
        if strange:
            raise ConfigError(
                f"{source}: {len(strange)} of its {len(modules)} modules are not in this network, for instance "
                f"{strange[0]}; use --dim_from_weights, or widen the network (include_patterns, network_reg_dims)"
            )
        for name, content in modules.items():
            self.adapters[name].load(content, source)
        absent = len(self.adapters) - len(modules)
        rest = f", {absent} modules of the network are not in it and start from nothing" if absent else ""
        if left := len(tensors) - len(mine):
            rest += f", {left} tensors of text encoders left out, which are not trained"
        return f"{source}: {len(modules)}/{len(self.adapters)} modules loaded{rest}"

    def canonical(self) -> dict[str, dict[str, Any]]:
        """Original module name -> what a file holds of it (see `networks.formats`)."""
        return {name: adapter.content() for name, adapter in self.adapters.items()}

    def save_weights(self, file: Any, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> str:
        """Write the network in `save_format`, with hashes, re-open it, and return `N/N keys match`."""
        from networks import formats

        return formats.save_file(self.canonical(), file, self.save_format, self.spaces, dtype, metadata)

    def summary(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        ranks = sorted({a.rank for a in self.adapters.values()})
        text = sum(bool(self.model_of[name]) for name in self.adapters)
        where = f" ({text} of text encoders)" if text else ""
        return f"{len(self.adapters)} modules{where}, {count:,} parameters, rank {', '.join(map(str, ranks))}"


@torch.no_grad()
def update_sizes(network: AdapterNetwork) -> dict[str, float]:
    """Original module name -> ||dW|| / ||W|| (Frobenius), the network's multiplier included."""
    sizes = {}
    for name, adapter in network.adapters.items():
        base = math.sqrt(sum(float(w.float().square().sum()) for w in adapter.base_weights()))
        sizes[name] = abs(network.multiplier) * float(adapter.norm()) / base if base else 0.0
    return sizes
