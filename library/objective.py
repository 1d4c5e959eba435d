"""What a family trains: how data and noise are mixed, what the denoiser says, how its error is weighed, how to sample.

A record of pure functions. `options` is the run's; sigma is in 0..1, 0 = data, float32 [B]. Imports no torch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """A way from noise to data."""

    times: Callable[..., Tensor]  # (steps, shift, image tokens) -> [steps + 1] sigmas that it visits
    step: Callable[..., Tensor]  # (x, predicted, sigma now, sigma then, () -> fresh noise) -> x at `then`


@dataclass(frozen=True)
class Objective:
    name: str
    reads: frozenset[str]  # options that only some objectives read: given to another family they are an error
    sigma: Callable[[Tensor, int, Any], Tensor]  # (uniform [B], image tokens, options) -> sigma [B]
    noisy: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x0, noise, sigma) -> x_sigma
    target: Callable[..., Tensor]  # (x0, noise, sigma, options) -> what a perfect `predict` returns
    compare: Callable[..., tuple[Tensor, Tensor]]  # (predicted, target, noisy, sigma, options) -> (guess, goal)
    weight: Callable[[Tensor, Any], Tensor]  # (sigma, options) -> loss weight [B]
    times: Callable[..., Tensor]  # (steps, shift, image tokens) -> [steps + 1] sigmas that a sampler visits
    step: Callable[..., Tensor]  # (x, predicted, sigma now, sigma then) -> x at `then`
    samplers: Mapping[str, Sampler] = field(default_factory=dict)  # others than `times` and `step`, which are Euler's
    signal: Callable[[Tensor], Tensor] = lambda sigma: 1 - sigma  # data / (data + noise) in x_sigma, for huber's snr
    # What shapes the noise: drawn for one item, (generator, shape [C,h,w], options) -> tensors; and, with these of the
    # whole batch, (noise [B,C,h,w], tensors, x0, options) -> noise
    draw: Callable[..., dict[str, Tensor]] = lambda generator, shape, options: {}
    shape_noise: Callable[..., Tensor] = lambda noise, drawn, x0, options: noise
    start: Callable[[Tensor, Tensor], Tensor] = lambda noise, sigma: (
        noise
    )  # what a sampler begins with, at its first sigma
    prediction_type: str = "flow"  # modelspec's word for what the denoiser predicts
    zero_terminal_snr: bool = False  # of DDPM: the last timestep holds no data

    def sampler(self, name: str | None = None) -> Sampler:
        """The sampler of that name; None = the objective's first."""
        plain = Sampler(self.times, lambda x, predicted, now, then, fresh: self.step(x, predicted, now, then))
        return plain if name is None or name == "euler" else self.samplers[name]

    @property
    def sampler_names(self) -> tuple[str, ...]:
        return ("euler", *self.samplers)


def _sigma(uniform: Tensor, tokens: int, options: Any) -> Tensor:
    from library import flow

    return flow.sigma_from(uniform, tokens=tokens, **sigma_options(options))


def sigma_options(o: Any) -> dict[str, Any]:
    """The options that shape the distribution of sigma, as arguments of `flow.sigma_from`."""
    return {
        "sampling": o.timestep_sampling,
        "sigmoid_scale": o.sigmoid_scale,
        "shift": o.discrete_flow_shift,
        "weighting_scheme": o.weighting_scheme,
        "logit_mean": o.logit_mean,
        "logit_std": o.logit_std,
        "mode_scale": o.mode_scale,
        "min_sigma": (o.min_timestep or 0) / 1000,
        "max_sigma": (1000 if o.max_timestep is None else o.max_timestep) / 1000,
    }


def _noisy(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    from library import flow

    return flow.noisy(x0, noise, sigma)


def _compare(predicted: Tensor, target: Tensor, noisy: Tensor, sigma: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    from library import flow

    return flow.apply_prediction_type(predicted, target, noisy, sigma, options.model_prediction_type)


def _weight(sigma: Tensor, options: Any) -> Tensor:
    from library import flow

    return flow.loss_weight(sigma, options.weighting_scheme)


def _times(steps: int, shift: float, tokens: int, terminal: float = 0.0) -> Tensor:
    from library import flow

    return flow.shifted_sigmas(steps, shift, terminal)


FLOW = Objective(
    name="flow",
    reads=frozenset(
        "timestep_sampling sigmoid_scale discrete_flow_shift weighting_scheme logit_mean logit_std mode_scale "
        "model_prediction_type".split()
    ),
    sigma=_sigma,
    noisy=_noisy,
    target=lambda x0, noise, sigma, options: noise - x0,
    compare=_compare,
    weight=_weight,
    times=_times,
    step=lambda x, velocity, now, then: x + (then - now) * velocity,  # Euler on dx/dsigma = velocity
)


def flow_from(terminal: float) -> Objective:
    """FLOW, sampled so that the last step starts at sigma `terminal`."""
    return replace(FLOW, times=partial(_times, terminal=terminal))


def flow_linear_quadratic() -> Objective:
    """FLOW, sampled in small even steps and then in growing ones."""
    return replace(FLOW, times=_linear_quadratic_times)


def flow_karras(low: float, high: float) -> Objective:
    """FLOW, sampled at noise levels s = `high` .. `low` of x0 + s noise, spaced as Karras et al. 2022 do; sigma is
    s / (1 + s), so that the first sigma is below 1."""
    return replace(FLOW, times=partial(_karras_times, low=low, high=high), start=lambda noise, sigma: sigma * noise)


def edm(low: float, high: float, data: float) -> Objective:
    """EDM's objective (Karras et al. 2022) for a `predict` that returns velocities, `data` the deviation of the data.

    Its noise level s is sigma / (1 - sigma): the sigmas of --timestep_sampling sigmoid are log-normal noise levels.
    """
    return replace(
        flow_karras(low, high),
        name="edm",
        reads=FLOW.reads - {"model_prediction_type"},
        compare=partial(_edm_compare, data=data),
        prediction_type="edm",
    )


def _edm_compare(
    predicted: Tensor, target: Tensor, noisy: Tensor, sigma: Tensor, options: Any, data: float
) -> tuple[Tensor, Tensor]:
    """What the network itself returns, whose plain error is EDM's weighted error of the data: with D the data that is
    meant, (s^2 + data^2) / (s data)^2 |D - x0|^2 = |F - F*|^2, and F - F* is the error of the velocity times
    sqrt(s^2 + data^2) / (data (1 + s))."""
    from library import flow

    scale = ((sigma**2 + (data * (1 - sigma)) ** 2).sqrt()) / data
    scale = flow.expand(scale, noisy)
    return predicted * scale, target * scale


def _linear_quadratic_times(steps: int, shift: float, tokens: int) -> Tensor:
    from library import flow

    return flow.linear_quadratic_sigmas(steps, shift)


def _karras_times(steps: int, shift: float, tokens: int, low: float, high: float) -> Tensor:
    from library import flow

    return flow.karras_sigmas(steps, low, high, shift)


# ---------------------------------------------------------------- DDPM: Stable Diffusion 1, 2 and XL


def ddpm(prediction: str = "epsilon", zero_terminal_snr: bool = False) -> Objective:
    """DDPM for a denoiser that predicts "epsilon" or "v"; its sigma is (t + 1) / 1000."""
    schedule = {"prediction": prediction, "zero": zero_terminal_snr}
    times, zero = partial(_ddpm_times, **schedule), {"zero": zero_terminal_snr}
    return Objective(
        name="ddpm",
        reads=frozenset(),
        sigma=_ddpm_sigma,
        noisy=partial(_ddpm_noisy, **zero),
        target=partial(_ddpm_target, **schedule),
        compare=lambda predicted, target, noisy, sigma, options: (predicted, target),
        weight=partial(_ddpm_weight, **schedule),
        times=times,
        step=partial(_ddpm_step, **schedule),
        samplers={
            "euler_a": Sampler(times, partial(_ancestral_step, **schedule)),
            "ddim": Sampler(times, partial(_ddim_step, **schedule)),
        },
        signal=partial(_ddpm_signal, **zero),
        draw=_draw_shapes,
        shape_noise=_shape_noise,
        prediction_type=prediction,
        zero_terminal_snr=zero_terminal_snr,
    )


def _ddpm_sigma(uniform: Tensor, tokens: int, options: Any) -> Tensor:
    from library import diffusion

    high = diffusion.STEPS if options.max_timestep is None else options.max_timestep
    return diffusion.sigma_of(diffusion.timesteps_from(uniform, options.min_timestep or 0, high))


def _ab(sigma: Tensor, zero: bool) -> Tensor:
    from library import diffusion

    return diffusion.alpha_bar_at(sigma, zero)


def _ddpm_noisy(x0: Tensor, noise: Tensor, sigma: Tensor, zero: bool) -> Tensor:
    from library import diffusion

    return diffusion.noisy(x0, noise, _ab(sigma, zero))


def _ddpm_target(x0: Tensor, noise: Tensor, sigma: Tensor, options: Any, prediction: str, zero: bool) -> Tensor:
    from library import diffusion

    return noise if prediction == "epsilon" else diffusion.velocity(x0, noise, _ab(sigma, zero))


def _ddpm_signal(sigma: Tensor, zero: bool) -> Tensor:
    data, noise = _ab(sigma, zero).sqrt(), (1 - _ab(sigma, zero)).sqrt()
    return data / (data + noise)


def _ddpm_weight(sigma: Tensor, options: Any, prediction: str, zero: bool) -> Tensor:
    """sd-scripts' weights, multiplied. Their SNR is that of the schedule in use, with zero terminal SNR too."""
    import torch

    from library import diffusion

    snr, weight = diffusion.snr(_ab(sigma, zero)), torch.ones_like(sigma)
    if options.min_snr_gamma:
        weight = weight * diffusion.min_snr(snr, options.min_snr_gamma, prediction)
    if options.scale_v_pred_loss_like_noise_pred:
        weight = weight * diffusion.like_noise_prediction(snr)
    if options.v_pred_like_loss:
        weight = weight * (1 + options.v_pred_like_loss / diffusion.like_noise_prediction(snr))
    if options.debiased_estimation_loss:
        weight = weight * diffusion.debiased(snr, prediction)
    return weight


def _draw_shapes(generator: torch.Generator, shape: tuple[int, ...], options: Any) -> dict[str, Tensor]:
    """What --noise_offset and --multires_noise_iterations draw for one item; nothing where they are off."""
    import torch

    from library import diffusion

    drawn = {}
    if options.noise_offset:
        strength = torch.rand((), generator=generator) if options.noise_offset_random_strength else torch.ones(())
        drawn = {"offset": torch.randn(shape[0], generator=generator), "offset_strength": strength}
    if options.multires_noise_iterations:
        iterations, discount = options.multires_noise_iterations, options.multires_noise_discount
        drawn["octaves"] = diffusion.octaves(shape, generator, iterations, discount)
    return drawn


def _shape_noise(noise: Tensor, drawn: dict[str, Tensor], x0: Tensor, options: Any) -> Tensor:
    from library import diffusion

    if "offset" in drawn:
        strength = options.noise_offset * drawn["offset_strength"][:, None]
        if options.adaptive_noise_scale:
            strength = diffusion.adaptive_strength(strength, x0, options.adaptive_noise_scale)
        noise = diffusion.offset(noise, drawn["offset"], strength)
    return diffusion.multires(noise, drawn["octaves"]) if "octaves" in drawn else noise


def _ddpm_times(steps: int, shift: float, tokens: int, prediction: str, zero: bool) -> Tensor:
    import torch

    from library import diffusion

    t = diffusion.sampler_timesteps(steps, "trailing" if zero else "leading")
    return torch.cat([diffusion.sigma_of(t), torch.zeros(1)])


def _ddpm_step(x: Tensor, predicted: Tensor, now: Tensor, then: Tensor, prediction: str, zero: bool) -> Tensor:
    from library import diffusion

    return diffusion.deterministic_step(x, predicted, _ab(now, zero), _ab(then, zero), prediction)


def _ddim_step(
    x: Tensor, predicted: Tensor, now: Tensor, then: Tensor, fresh: Callable, prediction: str, zero: bool
) -> Tensor:
    """Euler's step, but the last one ends at timestep 0, which is not quite the data (`set_alpha_to_one` false)."""
    from library import diffusion

    return _ddpm_step(x, predicted, now, then.clamp(min=1 / diffusion.STEPS), prediction, zero)


def _ancestral_step(
    x: Tensor, predicted: Tensor, now: Tensor, then: Tensor, fresh: Callable, prediction: str, zero: bool
) -> Tensor:
    from library import diffusion

    return diffusion.ancestral_step(x, predicted, _ab(now, zero), _ab(then, zero), prediction, fresh())
