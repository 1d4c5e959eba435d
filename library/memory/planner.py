"""The memory of a run, phase by phase, before it starts: real code on tensors without values.

Every phase (text, latents, training, sampling) is run inside of `FakeTensorMode`: the models are loaded from headers or
from lists of released models, quantised, adapted, called and differentiated by the code that trains, and every tensor
storage is counted. What is computed instead of run: optimizer states (from one small real step), block swap (moved
from the device's account to the host's), and blocks that do the same as others (`library.memory.extension`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library import checkpoints
from library.checkpointing import checkpoint_blocks
from library.components.tokenizers import load_tokenizers, tokenizer_paths
from library.diffusion import alpha_bar
from library.families.family import ItemInput, Text
from library.memory import extension, sketch, swap_plan
from library.memory.loading import Loading
from library.memory.precision import denoiser_recipe, text_recipe
from library.memory.quantised_linear import make_nf4_tables
from library.sample import default_settings
from library.updates import Updates

if TYPE_CHECKING:
    from library.families.family import Cond, Family, Part

LETTERS = 4  # of a token, where the tokenizer is not there: about what English text has
CAPTION = "word" * 256  # where no dataset says how long captions are
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """The largest batch of a run."""

    width: int
    height: int
    batch: int = 1
    frames: int = 1
    items: int = 0  # that are cached; 0 = not known
    captions: int = 0
    caption: str = CAPTION  # the longest one
    controls: tuple[tuple[int, int], ...] = ()  # width, height of each control picture


@dataclass
class Account:
    """Bytes by name, and their highest sum at one time."""

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"peak_bytes": self.peak, **{f"{name}_bytes": size for name, size in self.parts.items()}}


class StandIn:
    """A tokenizer that makes a token of every few letters: a plan needs their number, not which they are."""

    def __call__(self, text: Any, **how: Any) -> Any:
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else list(text)
        counts = [-(-len(one) // LETTERS) for one in texts]
        most = how.get("max_length") or max(counts)
        rows = [[1] * min(count, most) for count in counts]
        masks = [[1] * len(row) for row in rows]
        if how.get("padding") == "max_length":
            masks = [m + [0] * (most - len(m)) for m in masks]
            rows = [row + [0] * (most - len(row)) for row in rows]
        single = isinstance(text, str) and how.get("return_tensors") is None
        out = {"input_ids": rows[0] if single else rows, "attention_mask": masks[0] if single else masks}
        return BatchEncoding(out, tensor_type=how.get("return_tensors"))

    def decode(self, *ids: Any, **how: Any) -> str:
        return ""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_id"):
            return 0
        raise AttributeError(name)


class Planner:
    """One run's plan; `family` is the record for its files (`Family.resolved`).

    `accelerator` false: everything is on the host, in the formats that a run on a CPU has.
    """

    def __init__(self, options: Any, family: Family, work: Work, accelerator: bool = True) -> None:
        self.options, self.family, self.work, self.accelerator = options, family, work, accelerator
        self.dtype = DTYPES[options.mixed_precision]
        self.encoder_dtype = torch.bfloat16 if accelerator else torch.float32
        self.notes: list[str] = []
        self.sketches: dict[str, tuple[sketch.Sketch, str]] = {}
        # Stays loaded while training, for want of a cache: "encoders", "vae" -> bytes of (weights, what encoding adds)
        self.resident: dict[str, tuple[int, int]] = {}
        self.cached_text: Cond = {}  # what is cached of a caption, as shapes
        if any(getattr(options, name, False) for name in ("nf4", "nf4_vl", "nf4_t5", "nf4_llm")):
            make_nf4_tables()

    # ---------------------------------------------------------------- models

    def sketch(self, part: Part) -> tuple[sketch.Sketch, str]:
        """A part's names and shapes, from its file's header, and its layout's name."""
        if part.name not in self.sketches:
            self.sketches[part.name] = sketch.of_file(part, checkpoints.path_of(part, self.options))
        return self.sketches[part.name]

    def load(self, part: Part, dtype: torch.dtype, recipe: Any = None) -> torch.nn.Module:
        found, layout = self.sketch(part)
        loading = Loading(recipe, "cpu", dtype)
        model = checkpoints.load_from(part, found, layout, dtype=dtype, loading=loading)
        return model.requires_grad_(False).eval()

    @contextlib.contextmanager
    def phase(self) -> Iterator[sketch.Tracker]:
        tracker = sketch.Tracker()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), tracker:
                yield tracker
        finally:
            alpha_bar.cache_clear()  # a table that was made inside has no values, and would be given to who asks next

    # ---------------------------------------------------------------- phases

    def text(self) -> tuple[Account, Cond]:
        """Encoding one caption with all text encoders resident; also what it gives, as shapes."""
        parts, options = self.family.text_encoders, self.options
        tokenizers = self.tokenizers()
        with self.phase() as tracker, torch.no_grad():
            encoders = [self.load(part, self.encoder_dtype, text_recipe(options, part)) for part in parts]
            weights = tracker.live
            tracker.restart()
            caption = Text(self.family.caption_text(self.work.caption))  # with what the family puts before it
            rule = self.family.partly_live if options.cache_text_encoder_outputs else None
            if rule:
                self.cached_text = _shapes(rule.encode(encoders, tokenizers, caption, "cpu"))
                live = [model for part, model in zip(parts, encoders, strict=True) if part.name in rule.encoders]
                self.resident["encoders"] = sum(map(_bytes_of, live)), 0
            shapes = _shapes(self.family.encode(encoders, tokenizers, caption, "cpu"))
            if not options.cache_text_encoder_outputs:
                self.resident["encoders"] = weights, tracker.peak - weights
            return Account(tracker.peak, {"weights": weights, "activations": tracker.peak - weights}), shapes

    def tokenizers(self) -> list[Any]:
        """The real ones where all are on this disk."""
        family = self.family
        if all(Path(path).exists() for path, _ in tokenizer_paths(family, self.options)):
            return load_tokenizers(family, self.options)
        self.notes.append(f"no tokenizer on this disk: a token is taken for every {LETTERS} letters")
        return [StandIn() for _ in family.tokenizers]

    def pixels(self, batch: int) -> torch.Tensor:
        frames = () if self.family.frames is None else (self.work.frames,)
        return torch.empty(batch, 3, *frames, self.work.height, self.work.width)

    def item(self) -> ItemInput:
        controls = tuple(torch.empty(3, height, width) for width, height in self.work.controls)
        size = (self.work.width, self.work.height)
        return ItemInput(self.pixels(1)[0], controls, original_size=size, size=size, frames=self.work.frames)

    def latents(self) -> tuple[Account, tuple[int, ...], Cond]:
        """Encoding a batch of pictures; also the latents' shape and what else conditions an item, as shapes."""
        batch = max(1, self.options.vae_batch_size)
        with self.phase() as tracker, torch.no_grad():
            vae = self.load(self.family.vae, torch.float32)
            others = [self.load(p, self.encoder_dtype) for p in self.family.image_encoders]
            weights = tracker.live
            tracker.restart()
            latents = self.family.encode_image(vae, self.pixels(batch))
            extra = {} if self.family.encode_item is None else self.family.encode_item(vae, others, self.item())
            shapes = _shapes(extra)
            if not self.options.cache_latents:
                self.resident["vae"] = weights, tracker.peak - weights
            account = Account(tracker.peak, {"weights": weights, "activations": tracker.peak - weights})
            return account, tuple(latents.shape[1:]), shapes

    def decoding(self, shape: tuple[int, ...]) -> int:
        """Peak bytes of the VAE while it decodes one item."""
        with self.phase() as tracker, torch.no_grad():
            vae = self.load(self.family.vae, torch.float32)
            self.family.decode_latents(vae, torch.empty(1, *shape))
            return tracker.peak

    def training(self, shape: tuple[int, ...], cond: Cond) -> tuple[Account, Account, dict[str, Any]]:
        """(device, host, facts about the trained model) of one optimizer step on the largest batch."""
        with contextlib.suppress(extension.Unequal):
            return self.training_by(extension.extended, shape, cond)
        return self.training_by(extension.whole, shape, cond)

    def training_by(
        self, measure: Callable[..., tuple[int, int]], shape: tuple[int, ...], cond: Cond
    ) -> tuple[Account, Account, dict[str, Any]]:
        """The same, its step measured by one of the two functions of `library.memory.extension`."""
        options, family = self.options, self.family
        is_network = bool(options.network_module)
        is_half = options.full_bf16 or options.full_fp16
        offloaded = sketch.Elsewhere() if getattr(options, "cpu_offload_checkpointing", False) else None
        with self.phase() as tracker:
            dtype = self.dtype if is_network or is_half else torch.float32
            model = self.load(family.denoiser, dtype, denoiser_recipe(options, family))
            model.train().requires_grad_(not is_network)
            model.binding.adapted = family.adapted
            weights = tracker.live
            trained = self._network(model) if is_network else model
            parameters = [p for p in trained.parameters() if p.requires_grad]
            adapter, before = tracker.live - weights, tracker.live
            samples = {} if is_network else Updates._sample(dict(trained.named_parameters()))  # host copies, bounded
            sampled = tracker.live - before
            if options.gradient_checkpointing:
                checkpoint_blocks(model, family.blocks, **({"around": offloaded.around} if offloaded else {}))
            step = functools.partial(self._step, model, shape, cond)
            recorder = functools.partial(sketch.Recorder, tracker, offloaded)
            highest, moved = measure(recorder, step, model, family.blocks, parameters)
            del samples
            count = sum(p.numel() for p in parameters)
            gradients = sum(p.numel() * p.element_size() for p in parameters)
            sizes, number_format = [tuple(p.shape) for p in parameters], parameters[0].dtype
            counts, units = swap_plan.counts_of(model, family), swap_plan.units_of(model, family)
            blocks = {
                name: [_bytes_of(block) for block in model.get_submodule(name)] for name in counts
            }  # bytes of every block
        states = self._states(sizes, number_format)
        fused = getattr(options, "fused_backward_pass", False)
        peak = highest + states - (gradients if fused else 0)
        device = Account(peak, {
            "weights": weights, "adapter": adapter, "gradients": 0 if fused else gradients, "optimizer": states,
            "activations": highest - weights - adapter - gradients,
        })  # fmt: skip
        host = Account()
        self._keep(device, host)
        if sampled:
            device.parts["samples"] = sampled
            device.parts["activations"] -= sampled
            if self.accelerator:
                _move("samples", sampled, device, host)
        facts = {"trained_parameters": count, "offloaded_bytes": moved,
                 "blocks": {name: (sizes, units[name]) for name, sizes in blocks.items()},
                 "most_blocks_to_swap": swap_plan.largest(counts, units)}  # fmt: skip
        self.swap(device, host, facts["blocks"], options.blocks_to_swap or 0)
        if family.pair:  # both experts are kept on the host; with block swap part of one is counted already
            more = 2 * weights - host.parts.get("weights", 0)
            host.parts["experts"], host.peak = more, host.peak + more
        if offloaded:
            host.parts["block_inputs"], host.peak = moved, host.peak + moved
        return device, host, facts

    def _keep(self, device: Account, host: Account) -> None:
        """Add what stays loaded while training for want of a cache. It encodes before the step, not beside it."""
        for name, (size, encoding) in self.resident.items():
            where = host if name == "encoders" and self.options.text_encoder_cpu else device
            where.peak, where.parts[name] = where.peak + size, size
            if more := max(0, encoding - where.parts.get("activations", 0)):
                where.peak, where.parts["activations"] = where.peak + more, where.parts.get("activations", 0) + more

    def _network(self, model: torch.nn.Module) -> torch.nn.Module:
        import importlib

        from library.option_kinds import parse_pairs

        options = self.options
        arguments = {name: str(value) for name, value in parse_pairs(options.network_args, "network_args").items()}
        module = importlib.import_module(options.network_module)
        network = module.create_network(1.0, options.network_dim, options.network_alpha, None, [], model, **arguments)
        network.apply_to([], model, False, True)
        if options.full_bf16 or options.full_fp16:
            for owner in network.modules():  # `Module.to` cannot exchange tensors without values
                for name, value in owner.named_parameters(recurse=False):
                    setattr(owner, name, torch.nn.Parameter(value.detach().to(self.dtype)))
        network.prepare_grad_etc([], None)
        return network.train()

    def _step(self, model: torch.nn.Module, shape: tuple[int, ...], cond: Cond) -> None:
        """Forward and backward as `NetworkTrainer.step` has them."""
        batch, objective = self.work.batch, self.family.objective
        x0, noise = torch.empty(batch, *shape), torch.empty(batch, *shape)
        sigma = torch.empty(batch)
        conds = [{name: torch.empty(s, dtype=d) for name, (s, d) in cond.items()} for _ in range(batch)]
        noisy = objective.noisy(x0, noise, sigma)
        precise = self.dtype == torch.float32
        with contextlib.nullcontext() if precise else torch.autocast("cpu", dtype=self.dtype):
            predicted = self.family.predict(model, noisy, sigma, conds)
            target = objective.target(x0, noise, sigma, self.options)
            loss = (predicted.float() - target.float()).square().mean()
        loss.backward()

    def swap(self, device: Account, host: Account, blocks: dict[str, tuple[list[int], int]], value: int) -> None:
        """Move what --blocks_to_swap `value` keeps on the host; `blocks`: list -> (bytes of each block, unit)."""
        counts, units = {n: len(b) for n, (b, _) in blocks.items()}, {n: unit for n, (_, unit) in blocks.items()}
        chosen = swap_plan.swapped(counts, units, value)
        held = [blocks[name][0][index] for name, indices in chosen.items() for index in indices]
        if held:
            ring = min(len(held), self.options.block_swap_ring_size) * max(held)
            _move("weights", sum(held) - ring, device, host)
            host.parts["weights"], host.peak = sum(held), host.peak + ring

    def _states(self, sizes: list[tuple[int, ...]], number_format: torch.dtype) -> int:
        """Bytes of the optimizer's states, from one real step of it on a small parameter of the same format."""
        dtype = torch.float32 if getattr(self.options, "stochastic_rounding", False) else number_format
        arguments = tuple(self.options.optimizer_args or ())
        per_value, is_factored = state_bytes(self.options.optimizer_type, arguments, dtype)
        if not is_factored:
            return int(sum(math.prod(size) for size in sizes) * per_value)
        return sum(4 * (sum(size[:2]) if len(size) > 1 else math.prod(size)) for size in sizes)

    def sampling(self, shape: tuple[int, ...], cond: Cond, weights: int) -> Account:
        """One step with guidance (two items or more), then decoding; the denoiser makes room for the VAE."""
        with self.phase() as tracker, torch.no_grad():
            model = self.load(self.family.denoiser, self.dtype, denoiser_recipe(self.options, self.family))
            own = tracker.live
            tracker.restart()
            one = {name: torch.empty(s, dtype=d) for name, (s, d) in cond.items()}
            conds = [one, *self.family.unprompted(default_settings(self.family), one)]
            with contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast("cpu", dtype=self.dtype):
                self.family.predict(model, torch.empty(len(conds), *shape), torch.empty(len(conds)), conds)
            step = tracker.peak - own
        decode = self.decoding(shape)
        return Account(max(weights + step, decode), {"weights": weights, "activations": step, "decoding": decode})


def _shapes(cond: Cond) -> Cond:
    return {name: (tuple(value.shape), value.dtype) for name, value in cond.items()}


def _bytes_of(module: torch.nn.Module) -> int:
    seen = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())}
    return sum(seen.values())


def _move(name: str, size: int, device: Account, host: Account) -> None:
    device.parts[name] -= size
    device.peak -= size
    host.parts[name] = host.parts.get(name, 0) + size
    host.peak += size


@functools.cache
def state_bytes(optimizer_type: str, arguments: tuple[str, ...], dtype: torch.dtype) -> tuple[float, bool]:
    """(bytes of state for each value, whether the state is one number a row and a column) of an optimizer."""
    from types import SimpleNamespace

    from library import optim
    from library.options import OPTIONS

    values = {option.name: option.default for option in OPTIONS}
    values |= {"optimizer_type": optimizer_type, "optimizer_args": list(arguments), "learning_rate": 1e-4}
    values["given"] = lambda name: False  # a rate that the optimizer ignores is the run's mistake, not the plan's
    sizes = []
    for side in (128, 256):
        parameter = torch.nn.Parameter(torch.zeros(side, side, dtype=dtype))
        parameter.grad = torch.ones_like(parameter)
        optimizer = optim.create_optimizer(SimpleNamespace(**values), [{"params": [parameter], "lr": 1e-4}])
        optim.train_mode(optimizer)
        optimizer.step()
        tensors = [t for t in _tensors(optimizer.state.get(parameter, {})) if t.numel() > 1]
        sizes.append(sum(t.numel() * t.element_size() for t in tensors))
    return sizes[1] / 256**2, sizes[1] < 3 * sizes[0]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def make(options: Any, family: Family, work: Work, accelerator: bool = True) -> dict[str, Any]:
    """The whole plan, as written by `--json`: device and host by phase, their peaks, the caches on disk.

    `family` is the record by its name or the one for these files, which is taken in any case.
    """
    family = family.resolved(options)
    planner = Planner(options, family, work, accelerator)
    text, cond = planner.text()
    latents, shape, extra = planner.latents()
    device, host, facts = planner.training(shape, cond | extra)
    if options.text_encoder_cpu:
        host.peak, text = max(host.peak, text.peak), Account()
    phases = {"text": text, "latents": latents, "training": device}
    if options.sample_prompts:
        phases["sampling"] = planner.sampling(shape, cond | extra, device.parts["weights"])
    cached = _cached(options, work, shape, planner.cached_text or cond, extra)
    resident = {} if accelerator else cached["memory"]
    peak = max(phases, key=lambda name: phases[name].peak)
    return {
        "family": family.name,
        "largest_batch": {"width": work.width, "height": work.height, "frames": work.frames, "batch": work.batch},
        "device": {
            "peak_bytes": phases[peak].peak,
            "peak_phase": peak,
            "phases": {name: account.as_dict() for name, account in phases.items()},
        },
        "host": {"peak_bytes": host.peak + sum(cached["memory"].values()), **host.parts, **cached["memory"]},
        "disk": {"cache_bytes": cached["disk"]},
        "trained_parameters": facts["trained_parameters"],
        "most_blocks_to_swap": facts["most_blocks_to_swap"],
        "notes": planner.notes + ([] if not resident else ["device and host are the same memory"]),
    }


def _cached(options: Any, work: Work, shape: tuple[int, ...], cond: Cond, extra: Cond) -> dict[str, Any]:
    """Bytes of the caches: latents at 2 bytes a value, text as the encoders give it."""

    def size(shapes: Cond) -> int:
        return sum(torch.Size(s).numel() * torch.empty((), dtype=d).element_size() for s, d in shapes.values())

    each = {"latents": 2 * torch.Size(shape).numel() + size(extra) // 2, "text": size(cond)}
    counts = {"latents": work.items, "text": work.captions or work.items}
    held = {"latents": options.cache_latents, "text": options.cache_text_encoder_outputs}
    to_disk = {"latents": options.cache_latents_to_disk, "text": options.cache_text_encoder_outputs_to_disk}
    total = {name: each[name] * counts[name] for name in each}
    memory = {f"cached_{n}_bytes": total[n] for n in each if held[n] and (n == "text" or not to_disk[n])}
    return {"memory": memory, "disk": sum(total[name] for name in each if to_disk[name])}
