"""Pictures and videos from a model: Euler on flow sigmas with guidance, labelled grids, samples of a run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library import videos, workflows
from library.components import frames
from library.data import buckets, images
from library.data.images import to_tensor
from library.data.scan import picture_size
from library.families.family import ItemInput
from library.guidance import guided
from library.pictures import grid, save_png, strip
from library.prompts import fitted, requests_of, seed_of
from library.runtime import image_tokens

if TYPE_CHECKING:
    from library.families.family import Cond, Family
    from library.options import Options
    from library.prompts import Prompt
    from library.strategies import Encoders, Request


def default_settings(family: Family) -> dict[str, Any]:
    return {option.name: option.default for option in family.inference_options}


@torch.no_grad()
def generate_latents(
    family: Family,
    denoiser: torch.nn.Module,
    cond: Cond,
    uncond: Cond | None,
    *,
    shape: tuple[int, ...],
    seed: int,
    steps: int,
    scale: float,
    shift: float,
    device: Any,
    settings: Mapping[str, Any] | None = None,
    sampler: str | None = None,
) -> Tensor:
    """Latents [1,C,h,w] or [1,C,F,h,w] float32 by a sampler of the family's objective (a flow: Euler on
    dx/dsigma = velocity).

    The noise comes from a CPU generator, so a seed gives the same start on every device. The unconditional prediction
    is made, and the two are joined as the family does it, only for scale != 1. `settings` are the values of the
    family's inference options, None = their defaults.
    """
    way, generator = family.objective.sampler(sampler), torch.Generator().manual_seed(seed)

    def fresh() -> Tensor:
        return torch.randn((1, *shape), generator=generator).to(device)

    sigmas = way.times(steps, shift, image_tokens(family, shape)).to(device)
    x = frames.hinted(family.objective.start(fresh(), sigmas[0]), cond)
    settings = {**(settings or default_settings(family)), "sample_steps": steps}
    conds = [cond] if scale == 1 else [cond, *family.unprompted(settings, uncond)]
    conds = [{k: v.to(device) for k, v in c.items()} for c in conds]
    guide = family.guide(settings, cond) if family.guide else guided
    for step, (now, then) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        now_conds = [one | {"next_sigma": then} for one in conds]  # which few-step models want to know
        strength = family.scale_at(scale, float(now), settings) if family.scale_at else scale
        predicted = family.predict(denoiser, x.expand(len(conds), *shape), now.expand(len(conds)), now_conds)
        if scale != 1:
            predicted = guide(predicted[:1], predicted[1:], strength, step)
        x = way.step(x, predicted, now, then, fresh)
    return frames.put_back(x, conds[0])


@torch.no_grad()
def decode(family: Family, vae: torch.nn.Module, latents: Tensor) -> np.ndarray:
    """uint8 [H,W,3] of one picture's latents [1,C,h,w] or [1,C,1,h,w]; [F,H,W,3] of a video's."""
    pixels = family.decode_latents(vae, latents)[0].clamp(-1, 1)
    pixels = pixels.squeeze(1) if pixels.ndim == 4 else pixels
    return ((pixels + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).cpu().numpy()


def size_of(prompt: Prompt, family: Family, resolution: int) -> tuple[int, int]:
    """(width, height) of a prompt, rounded down to the family's multiple.

    What says neither has the proportions of its last control, or of its first frame, as in the pipelines of edit and
    image-to-video models.
    """
    model = prompt.controls[-1] if prompt.controls else prompt.image_path
    if model and not prompt.width and not prompt.height:
        return buckets.of_area(picture_size(model), (resolution, resolution), family.pixel_multiple).bucket
    width, height = (fitted(side or resolution, family.pixel_multiple) for side in (prompt.width, prompt.height))
    return width, height


def latent_shape(family: Family, prompt: Prompt, channels: int, resolution: int) -> tuple[int, ...]:
    """[C,h,w] for a prompt, of a video model [C,F,h,w]."""
    width, height = size_of(prompt, family, resolution)
    sides = (height // family.latent_downscale, width // family.latent_downscale)
    return (channels, family.frames.latents(prompt.frame_count or 1), *sides) if family.frames else (channels, *sides)


def item_of(prompt: Prompt, family: Family, resolution: int) -> ItemInput:
    """The facts of what a prompt asks for: its size, uncropped, its control pictures, its first frame and length.

    Controls have the family's own size, else their own proportions in the area of that picture. A first frame covers
    the video's size and is cut to it.
    """
    size = size_of(prompt, family, resolution)
    controls = tuple(_control(path, size, family) for path in prompt.controls)
    first = None
    if prompt.image_path:
        pixels = images.decode(prompt.image_path)[0]
        placement = buckets.single((pixels.shape[1], pixels.shape[0]), size)
        first = to_tensor(images.place(pixels, placement, "lanczos"))[:, None]
    return ItemInput(first, controls, original_size=size, size=size, frames=prompt.frame_count or 1)


def _control(path: str, area: tuple[int, int], family: Family) -> Tensor:
    pixels = images.decode(path)[0]
    size = (pixels.shape[1], pixels.shape[0])
    if family.control_size:
        placement = buckets.published(family.control_size(size))
    else:
        placement = buckets.of_area(size, area, family.pixel_multiple)
    return to_tensor(images.place(pixels, placement, "lanczos"))  # as diffusers' pipelines resize


def shift_of(prompt: Prompt, family: Family, shape: tuple[int, ...], run_shift: float) -> float:
    """The flow shift for latents of `shape` [C,h,w]: the prompt's, the family's, else the run's."""
    if prompt.flow_shift is not None:
        return prompt.flow_shift
    if family.sampling_shift:
        length = shape[-3] if family.frames else 1
        return family.sampling_shift(length * image_tokens(family, shape), prompt.sample_steps)
    return run_shift


def made_of(
    family: Family, prompt: Prompt, channels: int, resolution: int, seed: int, run_shift: float, sampler: str | None
) -> workflows.Sampled:
    """How the picture of a prompt is made, for who makes it again."""
    shape = latent_shape(family, prompt, channels, resolution)
    shift = shift_of(prompt, family, shape, run_shift)
    sigmas = family.objective.sampler(sampler).times(prompt.sample_steps, shift, image_tokens(family, shape))
    size = size_of(prompt, family, resolution)
    return workflows.Sampled(prompt, size, channels, seed, shift, sampler or "euler", sigmas)


@torch.no_grad()
def conditions_of(
    prompt: Prompt, family: Family, encode: Callable[[Request], Cond], encoders: Encoders, resolution: int, device: Any
) -> tuple[Cond, Cond]:
    """What conditions the picture of a prompt, with it and with its negative prompt."""
    extra = encoders.item(family, item_of(prompt, family, resolution), device)
    if prompt.guidance_scale is not None:
        extra["guidance"] = torch.tensor(float(prompt.guidance_scale))
    cond, uncond = (encode(request) | extra for request in requests_of(prompt, family))
    return cond, uncond


MOST_COLUMNS = 12  # of a grid: pictures are kept in memory, and a page has a width


class Samples:
    """The sample pictures of one run: base column once, then a column a call; rank 0 only."""

    def __init__(
        self,
        prompts: list[Prompt],
        family: Family,
        options: Options,
        conditions: Callable[[], list[tuple[Cond, Cond]]],
        folder: Path,
        name: str,
        decoder: Callable[[], contextlib.AbstractContextManager[torch.nn.Module]],
        device: Any,
        drawing: Callable[[], contextlib.AbstractContextManager],
        channels: int,
        resolution: int,
    ) -> None:
        self.prompts, self.family, self.options, self.conditions = prompts, family, options, conditions
        self.folder, self.name, self.device = folder / "sample", name, device
        self.drawing, self.decoder = drawing, decoder  # around the denoiser's calls; around the VAE's, which it gives
        self.channels, self.resolution = channels, resolution
        self.columns: list[tuple[str, list[np.ndarray]]] = []
        self.latents: dict[str, list[Tensor]] = {}  # of the first and of the latest column
        self.seeds = [seed_of(prompt, number, options.seed) for number, prompt in enumerate(prompts)]
        self.grid_path = folder / f"{name}-grid.png"
        # What a workflow names: LoRAs, or the file of a model that is trained whole
        self.loras: tuple[workflows.Lora, ...] = ()
        self.model = ""

    def base(self, denoiser: torch.nn.Module, network: torch.nn.Module | None) -> None:
        """The base model's column: the network switched off, or the model before its first step."""
        if network is not None:
            network.set_multiplier(0.0)
        try:
            self._column("base", denoiser, network, None)
        finally:
            if network is not None:
                network.set_multiplier(1.0)

    def render(
        self, denoiser: torch.nn.Module, network: torch.nn.Module | None, *, step: int, epoch: int | None
    ) -> None:
        """One column with the network as it is now; the grid is written anew."""
        self._column(f"step {step}", denoiser, network, f"e{epoch:06d}" if epoch is not None else f"{step:06d}")
        rows = [[pictures[i] for _, pictures in self.columns] for i in range(len(self.prompts))]
        image = grid(rows, [p.prompt for p in self.prompts], [label for label, _ in self.columns], title=self.name)
        save_png(image, self.grid_path, {})

    def _column(self, label: str, denoiser: torch.nn.Module, network: torch.nn.Module | None, tag: str | None) -> None:
        trained = network if network is not None else denoiser
        were_training = [(module, module.training) for module in (trained, denoiser)]
        for module, _ in were_training:
            module.eval()  # network dropout off
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        pictures, latents = [], []
        try:
            with self.drawing():
                conds = self.conditions()
                latents = [self._latents(denoiser, prompt, conds[k], k) for k, prompt in enumerate(self.prompts)]
            with self.decoder() as vae:
                for number, prompt in enumerate(self.prompts):
                    made = decode(self.family, vae, latents[number])
                    pictures.append(self._shown(made, prompt, number, tag))
        finally:
            for module, mode in were_training:
                module.train(mode)
            torch.set_rng_state(torch_state)
            random.setstate(python_state)
        self._keep(label, pictures, [one[0].cpu() for one in latents])

    def _shown(self, made: np.ndarray, prompt: Prompt, number: int, tag: str | None) -> np.ndarray:
        """What the grid shows of one sample, which is written if it has a tag."""
        if tag is None:
            return strip(made) if made.ndim == 4 else made
        path = self.folder / f"{self.name}_{tag}_{number:02d}_{self.seeds[number]}.png"
        shown = videos.save(made, path, {"prompt": prompt.prompt}, self.family.frames and self.family.frames.fps)[1]
        way = (self.channels, self.resolution, self.seeds[number], self.options.discrete_flow_shift)
        made = made_of(self.family, prompt, *way, self._way(prompt)[1])
        workflows.write(path, self.family, self.options, replace(made, loras=self.loras, model=self.model))
        return shown

    def _keep(self, label: str, pictures: list[np.ndarray], latents: list[Tensor]) -> None:
        """Add a column; of too many, every second one between the first and the latest goes."""
        self.columns = [c for c in self.columns if c[0] != label] + [(label, pictures)]
        if len(self.columns) > MOST_COLUMNS:
            self.columns = [*self.columns[:-1:2], self.columns[-1]]
        first = next(iter(self.latents), label)
        self.latents = {first: self.latents.get(first, latents), label: latents}

    def _latents(self, denoiser: torch.nn.Module, prompt: Prompt, pair: tuple[Cond, Cond], number: int) -> Tensor:
        shape, sampler = self._way(prompt)
        return generate_latents(
            self.family,
            denoiser,
            *pair,
            shape=shape,
            seed=self.seeds[number],
            steps=prompt.sample_steps,
            scale=prompt.scale,
            shift=shift_of(prompt, self.family, shape, self.options.discrete_flow_shift),
            device=self.device,
            sampler=sampler,
        )

    def _way(self, prompt: Prompt) -> tuple[tuple[int, ...], str | None]:
        """(shape of the latents, name of the sampler or None) of a prompt."""
        shape = latent_shape(self.family, prompt, self.channels, self.resolution)
        return shape, prompt.sample_sampler or getattr(self.options, "sample_sampler", None)


def style_distance(samples: list[Tensor], training: list[Tensor]) -> float:
    """Frechet distance between the latent vectors (one a position) of some pictures and of the training pictures,
    each [C,h,w] or [C,F,h,w].

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means and covariances over positions: colours and textures, not
    composition. 0 = the same statistics.
    """
    moments = []
    for pictures in (samples, training):
        vectors = torch.cat([p.flatten(1).T for p in pictures]).double()
        moments.append((vectors.mean(0), torch.cov(vectors.T)))
    (m1, c1), (m2, c2) = moments
    values, vectors = torch.linalg.eigh(c1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)
