"""Where and in which precision a run computes: device, processes, models on demand, sigma and loss of its options."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library import batches, checkpoints, flow, losses, trackers
from library.checkpointing import checkpoint_blocks, largest_list
from library.components.tokenizers import load_tokenizers
from library.data.dataset import item_seed
from library.errors import ConfigError
from library.families.family import Text
from library.memory.base_networks import add_network
from library.memory.denoiser import DenoiserMemory
from library.memory.experts import Experts
from library.memory.fused import separate
from library.memory.loading import Loading
from library.memory.precision import text_recipe
from library.processes import TIMEOUT, Processes, all_reduce
from library.trained import text_rates, whole_rates

if TYPE_CHECKING:
    from library.batches import Draws
    from library.families.family import Cond, Family, Part
    from library.options import Options
    from library.preflight import Plan

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVE_DTYPES = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DROPOUT = 3  # random stream of a micro-step, beside those of library.batches


def image_tokens(family: Family, shape: tuple[int, ...]) -> int:
    """Of the denoiser for latents [..,h,w], one frame: patches of pixel_multiple / latent_downscale."""
    patch = max(1, family.pixel_multiple // family.latent_downscale)
    return (shape[-2] // patch) * (shape[-1] // patch)


def has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Runtime:
    def __init__(self, options: Options, plan: Plan) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self.options, self.family, self.plan, self.trained = options, plan.family, plan, plan.trained
        self.seconds, self.now = {}, "the start"
        handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=options.ddp_timeout or TIMEOUT))]
        self.accelerator = Accelerator(
            log_with=trackers.tracker_names(options) or None,
            project_dir=trackers.project_dir(options),
            kwargs_handlers=handlers,
        )
        self.device, self.rank, self.world = (
            self.accelerator.device,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.processes = Processes(self.rank, self.world, options.ddp_timeout)
        by_launcher = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
        if self.device.type == "cpu" and by_launcher:
            # `accelerate launch` sets one thread unless told otherwise, which suits the host of a GPU, not a CPU run.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.world))
        if options.mixed_precision == "fp16" and self.device.type == "mps":
            raise ConfigError("--mixed_precision fp16 is not reliable on this device (mps); use bf16 or no")
        if options.mixed_precision == "bf16" and self.device.type == "cuda" and not has_bf16():
            raise ConfigError("--mixed_precision bf16: this GPU has no bf16 arithmetic; use fp16, or no")
        torch.manual_seed(options.seed)  # the network's first weights are drawn from it
        self.dtype = DTYPES[options.mixed_precision]
        self._vae = self._image = None
        self._text: dict[str, torch.nn.Module] = {}  # text encoders by part name
        self.memory = DenoiserMemory(options, self.family, self.device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the enclosed work to `self.seconds[name]`; `self.now` says what is being done."""
        start, before, self.now = time.perf_counter(), self.now, name
        yield  # after an exception `now` stays: it says what failed
        self.now = before
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def wait(self, name: str) -> None:
        """For the other processes, however long their work takes while they live."""
        self.processes.wait(name)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    # ---------------------------------------------------------------- models

    def load_vae(self) -> torch.nn.Module:
        """The VAE, float32 (half-precision VAEs overflow in several families), frozen, on the device."""
        if self._vae is None:
            self._vae = self._load(self.family.vae, torch.float32)
        return self._vae

    def _load(self, part: Part, dtype: torch.dtype) -> torch.nn.Module:
        on_cpu = self.options.text_encoder_cpu and part in self.family.text_encoders
        loading = Loading(text_recipe(self.options, part), "cpu" if on_cpu else self.device, dtype)
        return self._load_part(part, dtype, loading).requires_grad_(False).eval()

    def _load_part(self, part: Part, dtype: torch.dtype, loading: Loading) -> torch.nn.Module:
        path = checkpoints.path_of(part, self.options)
        model = checkpoints.load_part(part, path, dtype=dtype, device=loading.device, loading=loading)
        if loading.recipe and self.is_main:
            print(f"{part.name}: {loading.summary()}", flush=True)
        return model

    @property
    def encoder_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def load_image_encoders(self) -> list[torch.nn.Module]:
        """In the family's order, frozen, on the device."""
        if self._image is None:
            self._image = [self._load(part, self.encoder_dtype) for part in self.family.image_encoders]
        return self._image

    def load_text_encoders(self, names: Collection[str] | None = None) -> tuple[list[torch.nn.Module], list[Any]]:
        """(text encoders, tokenizers) in the family's order, on the device; frozen, but those that are fine-tuned.

        Of the encoders only those of these part names, if any are given.
        """
        trained, loaded = self.trained.text, dict(self._text)
        for k, part in enumerate(self.family.text_encoders):
            if part.name not in loaded and (names is None or part.name in names):
                self._text[part.name] = self._load_text_encoder(part, k < len(trained) and trained[k])
        models = [self._text[p.name] for p in self.family.text_encoders if names is None or p.name in names]
        if self.family.text_prefixes and self._text.keys() != loaded.keys():
            for model, prefix in zip(models, self.family.text_prefixes, strict=False):
                model.binding.lora_key = prefix.removeprefix("lora_")
            self._merge_into(models)
        return models, self.tokenizers

    def _load_text_encoder(self, part: Part, is_trained: bool) -> torch.nn.Module:
        """One that is trained computes as the denoiser does; fine-tuned, it has float32 weights as that has."""
        if not is_trained:
            return self._load(part, self.encoder_dtype)
        model = self._load(part, self.weight_dtype)
        model.requires_grad_(not self.options.network_module)
        if self.options.fused_backward_pass:
            separate(model)
        if self.options.gradient_checkpointing:
            checkpoint_blocks(model, largest_list(model))
        return model

    def _merge_into(self, encoders: list[torch.nn.Module]) -> None:
        """The text encoders' part of --base_weights."""
        from networks import lora

        for path, multiplier in self.plan.base_weights:
            if line := lora.merge_text(encoders, path, multiplier):
                self.say(line)

    @property
    def trained_encoders(self) -> dict[str, torch.nn.Module]:
        """By part name; loads the text encoders if one is trained."""
        models = self.load_text_encoders()[0] if self.trained.any_text else []
        pairs = zip(self.family.text_encoders, models, self.trained.text, strict=False)
        return {part.name: model for part, model, on in pairs if on}

    def freeze_unread(self) -> None:
        """Freeze the weights of fine-tuned text encoders that no output depends on: the layers behind the one read."""
        models, tokenizers = self.load_text_encoders()
        weights = [p for model in models for p in model.parameters() if p.requires_grad]
        cond = self.family.encode(models, tokenizers, Text("a"), self.device)
        total = sum(value.float().sum() for value in cond.values())
        for weight, grad in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
            weight.requires_grad_(grad is not None)

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    @functools.cached_property
    def tokenizers(self) -> list[Any]:
        return load_tokenizers(self.family, self.options)

    def release(self, *, keep_text: Collection[str], keep_vae: bool) -> None:
        """Drop the encoders that the loop does not need, before the denoiser is loaded; `keep_text` are part names."""
        self._text = {name: model for name, model in self._text.items() if name in keep_text}
        if not keep_vae:
            self._vae = self._image = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of models that are trained: float32 if they are fine-tuned and nothing else is asked for."""
        options = self.options
        full = not options.network_module and not (options.full_bf16 or options.full_fp16)
        return torch.float32 if full else self.dtype

    def load_denoiser(self) -> torch.nn.Module:
        part, pair = self.family.denoiser, self.family.pair
        dtype = self.weight_dtype
        model = self._load_part(part, dtype, self.memory.loading(dtype))
        if pair:
            model.experts = Experts(model, self._load_part(pair.part, dtype, self.memory.loading(dtype)), pair)
        model.binding.adapted = self.family.adapted
        model.binding.adapted_with_convs = self.family.adapted_with_convs
        return model

    def add_base(self, network: Any, path: str, weights: Any, denoiser: torch.nn.Module) -> None:
        """One of --base_weights: merged, or kept attached where the denoiser is quantised."""
        if add_network(network, path, weights, denoiser, self.device, self.dtype) and self.is_main:
            print(f"{path}: attached, because quantised weights cannot take a merge", flush=True)

    def prepare_denoiser(self, model: torch.nn.Module, *, trained: bool) -> None:
        model.requires_grad_(trained)
        if trained:
            named = dict(model.named_parameters())
            for name, rate in whole_rates(model, self.family, self.options).items():
                named[name].requires_grad_(rate != 0)
        if trained and self.options.fused_backward_pass:
            separate(model)
        model.train()
        self.memory.prepare(model, trained=trained, checkpointed=self.options.gradient_checkpointing)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Around the denoiser's calls for sample pictures."""
        with self.memory.sampling(), self.autocast():
            yield

    @contextlib.contextmanager
    def decoder(self) -> Iterator[torch.nn.Module]:
        """The VAE for sample pictures. The denoiser makes room for it, unless it stays anyway, or with --highvram."""
        stays = self._vae is not None or self.options.highvram
        with contextlib.nullcontext() if stays else self.memory.away():
            try:
                yield self.load_vae()
            finally:
                if not stays:
                    self.release(keep_text=self._text, keep_vae=False)

    def prepare_network(self, network: torch.nn.Module) -> None:
        """Network on the device in float32, or in half precision with --full_fp16/--full_bf16."""
        half = self.options.full_bf16 or self.options.full_fp16
        network.to(self.device, dtype=self.dtype if half else torch.float32)
        network.save_format = self.options.save_format or self.family.save_formats[0]
        if self.options.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        network.prepare_grad_etc([], None)

    def parameter_groups(self, network: torch.nn.Module | None, denoiser: torch.nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups; with a network as sd-scripts' interface gives them, else whole models."""
        options = self.options
        rate = options.unet_lr if options.unet_lr is not None else options.learning_rate
        if network is None:
            return self._whole_groups(denoiser, rate)
        text = options.text_encoder_lr
        if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):  # optional in sd-scripts' interface
            result = network.prepare_optimizer_params_with_multiple_te_lrs(text, rate, options.learning_rate)
        else:
            result = network.prepare_optimizer_params(text[0] if text else None, rate, options.learning_rate)
        groups, names = result if isinstance(result, tuple) else (result, None)
        for group, name in zip(groups, names or [], strict=False):
            group.setdefault("name", name)
        return [group | {"params": list(group["params"])} for group in groups]

    def _whole_groups(self, denoiser: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
        groups = []
        rates, models = text_rates(self.options, len(self.trained.text)), self.trained_encoders
        for part, own in zip(self.family.text_encoders, rates, strict=False):
            if part.name in models:
                groups.append((models[part.name], self.options.learning_rate if own is None else own, part.name))
        own = self._denoiser_groups(denoiser, rate) if self.trained.denoiser else []
        return own + [
            {"params": [p for p in model.parameters() if p.requires_grad], "lr": value, "name": name}
            for model, value, name in groups
        ]

    def _denoiser_groups(self, denoiser: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
        """One for each learning rate; tables of embeddings apart, because decay would wear away rows that no item of
        the dataset reads."""
        own, groups = whole_rates(denoiser, self.family, self.options), {}
        tables = {id(m.weight) for m in denoiser.modules() if isinstance(m, torch.nn.Embedding)}
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((own.get(name, rate), id(parameter) in tables), []).append(parameter)
        return [
            {"params": params, "lr": value, "name": f"denoiser {value:g}" if own else "denoiser"}
            | ({"weight_decay": 0.0} if is_table else {})
            for (value, is_table), params in groups.items()
        ]

    def named_trained(self, network: torch.nn.Module | None, denoiser: torch.nn.Module) -> dict[str, Tensor]:
        modules = {"": network if network is not None else denoiser}
        if network is None:
            modules |= {f"{name}.": model for name, model in self.trained_encoders.items()}
        return {k + name: p for k, m in modules.items() for name, p in m.named_parameters() if p.requires_grad}

    def save_dtype(self) -> torch.dtype | None:
        return SAVE_DTYPES[self.options.save_precision] if self.options.save_precision else None

    # ---------------------------------------------------------------- the step's surroundings

    def seed(self, step: int, index: int) -> None:
        """Seed torch's and Python's generators for one micro-step (network dropout), so that nothing carries over."""
        value = item_seed(self.options.seed + DROPOUT, step, index, self.rank)
        torch.manual_seed(value)
        random.seed(value)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # Casts of trained weights that are swapped are not kept: they would hold what the swap has freed.
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=not self.memory.swapped)

    def to_device(self, cond: Cond) -> Cond:
        return {name: value.to(self.device, non_blocking=True) for name, value in cond.items()}

    def draw(self, keys: list[tuple[int, int, int]], shape: tuple[int, ...]) -> Draws:
        """The random numbers of the items `keys` for latents of `shape`, on the CPU."""
        options, objective = self.options, self.family.objective
        more = functools.partial(objective.draw, options=options)
        return batches.draw(keys, options.seed, shape, bool(options.ip_noise_gamma), more)

    def draws_to_device(self, draws: Draws) -> Draws:
        if self.device.type != "cpu":
            for name, value in vars(draws).items():
                if isinstance(value, dict):
                    setattr(draws, name, self.to_device(value))
                elif value is not None:
                    setattr(draws, name, value.to(self.device, non_blocking=True))
        return draws

    def latent_channels(self, denoiser: torch.nn.Module) -> int:
        return self.family.channels_of(denoiser)

    def tokens(self, latents: Tensor) -> int:
        return image_tokens(self.family, latents.shape)

    def sigma(self, uniform: Tensor, latents: Tensor, options: Any = None) -> Tensor:
        """[B] float32, by the run's sampling options or by those of one step."""
        return self.family.objective.sigma(uniform, self.tokens(latents), options or self.options)

    def perturbed(self, draws: Draws) -> Tensor:
        """The noise that is mixed in: with --ip_noise_gamma perturbed, while the target keeps the clean noise."""
        if draws.perturbation is None:
            return draws.noise
        gamma = torch.full_like(draws.gamma_scale, self.options.ip_noise_gamma)
        if self.options.ip_noise_gamma_random_strength:
            gamma = gamma * draws.gamma_scale
        return flow.ip_noise(draws.noise, draws.perturbation, gamma)

    def huber_c(self, sigma: Tensor) -> Tensor | None:
        o = self.options
        if o.loss_type not in ("huber", "smooth_l1"):
            return None
        signal = self.family.objective.signal(sigma)
        return losses.huber_c(sigma, o.huber_schedule, o.huber_c, o.huber_scale, signal)

    def reduce_gradients(self, parameters: list[Tensor]) -> None:
        """Sum gradients over the processes, flat; each batch's loss already carries its share."""
        self.memory.before_update()
        if self.world == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]  # of two networks only one takes part in a step
        for p in parameters:
            if p.grad is None:  # a process without a batch in the last step of an epoch still takes part
                p.grad = torch.zeros_like(p)
        for part in self.memory.together([p.grad for p in parameters]):
            flat = torch._utils._flatten_dense_tensors([gradient.to(self.device) for gradient in part])
            all_reduce(flat)
            for old, summed in zip(part, torch._utils._unflatten_dense_tensors(flat, part), strict=True):
                old.copy_(summed)
