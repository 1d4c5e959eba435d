"""Two sets of weights for one denoiser: models whose noise levels are shared by two experts of the same size.

Both sets are kept on the host; the denoiser on the device holds the one that is needed, so that two experts take the
room of one there. A frozen denoiser is only ever copied to the device, nothing comes back. With block swap the masters
of the swapped blocks are exchanged, which copies nothing. Without an accelerator the sets are only pointed to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Pair
    from library.memory.swap import BlockSwap


class Experts:
    """`experts.use(0)`: the weights that `model` was loaded with; `use(1)`: those of `other`. Nothing is trained.

    Both models are on the host. Raises ConfigError if their weights are held differently.
    """

    def __init__(self, model: torch.nn.Module, other: torch.nn.Module, pair: Pair) -> None:
        self.pair, self.active, self.swap = pair, 0, None
        # Networks that compute with one expert only. Those of both are in neither list.
        self.own: tuple[list[Any], list[Any]] = ([], [])
        mine, theirs = _tensors(model), _tensors(other)
        held = [{name: (tuple(t.shape), t.dtype) for name, t in one.items()} for one in (mine, theirs)]
        if held[0] != held[1]:
            odd = next(name for name in mine if held[0][name] != held[1].get(name))
            raise ConfigError(
                f"{other.binding.source} holds its weights differently than {model.binding.source} ({odd}); take two "
                "files of one kind, both fp8 or neither"
            )
        self.tensors = list(mine.values())  # in the model, wherever they are at the moment
        self.sets = [[t.data.cpu() for t in mine.values()], [t.data.cpu() for t in theirs.values()]]
        self.masters: list[list[Tensor]] = []  # of the swapped blocks

    def place(self, device: torch.device, swap: BlockSwap | None, copies: bool | None = None) -> None:
        """The first set to the device, but for the blocks that are swapped. `copies`: the device has memory of its own,
        into which a set is copied; None = as it is."""
        self.copies = device.type != "cpu" if copies is None else copies
        swapped = swap.owner if swap is not None else {}
        own = [index for index, tensor in enumerate(self.tensors) if id(tensor) not in swapped]
        if swap is not None:
            self.swap = swap
            values = {id(tensor): value for tensor, value in zip(self.tensors, self.sets[1], strict=True)}
            self.masters = [[block.host for block in swap.blocks], swap.packed(values)]
        self.tensors = [self.tensors[index] for index in own]
        self.sets = [[one[index] for index in own] for one in self.sets]
        for tensor in self.tensors:
            tensor.data = tensor.data.to(device, copy=self.copies)

    def use(self, index: int) -> None:
        """The weights of that expert, and its own networks, for what is computed from now on."""
        if index == self.active:
            return
        self.active = index
        self.switch_networks()
        if self.swap is not None:
            self.swap.exchange(self.masters[index])
        for tensor, value in zip(self.tensors, self.sets[index], strict=True):
            if self.copies:
                tensor.data.copy_(value, non_blocking=True)
            else:
                tensor.data = value

    def use_for(self, sigma: Tensor) -> None:
        """The expert of these noise levels [B], all of one. Waits for the device."""
        high = sigma.float() >= self.pair.boundary
        if bool(high.all()) != bool(high.any()):
            raise ValueError(f"noise levels of both experts in one batch: {sigma.tolist()}")
        self.use(int(high.all()))

    def switch_networks(self) -> None:
        for index, networks in enumerate(self.own):
            for network in networks:
                network.set_enabled(index == self.active)


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
