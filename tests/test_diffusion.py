"""DDPM against diffusers' schedulers and against formulas written out with numpy in another way."""

import numpy as np
import pytest
import torch

from library import diffusion as d

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
T = torch.tensor([0, 1, 17, 500, 998, 999])


def schedulers(name, **more):
    import diffusers

    return getattr(diffusers, name)(**SCHEDULE, **more)


def pair(batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 4, 8, 6, generator=generator) for _ in range(2))


@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_is_that_of_diffusers(zero):
    theirs = schedulers("DDPMScheduler", rescale_betas_zero_snr=zero).alphas_cumprod.double()
    assert torch.allclose(d.alpha_bar(zero), theirs, rtol=2e-5, atol=1e-7)
    assert (float(d.alpha_bar(zero)[-1]) == 0) == zero
    assert float(d.alpha_bar(True)[0]) == pytest.approx(float(d.alpha_bar()[0]), rel=1e-12)


def test_sigma_counts_noising_steps_and_0_is_the_data():
    sigma = d.sigma_of(torch.arange(1000))
    assert torch.equal(d.timestep(sigma), torch.arange(1000)) and float(sigma[-1]) == 1
    assert torch.equal(d.alpha_bar_at(sigma), d.alpha_bar().float())
    assert float(d.alpha_bar_at(torch.zeros(1))) == 1


def test_noising_and_velocity_are_those_of_diffusers():
    x0, eps = pair()
    scheduler, ab = schedulers("DDPMScheduler"), d.alpha_bar_at(d.sigma_of(T))
    assert torch.allclose(d.noisy(x0, eps, ab), scheduler.add_noise(x0, eps, T), atol=1e-5)
    assert torch.allclose(d.velocity(x0, eps, ab), scheduler.get_velocity(x0, eps, T), atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_prediction_gives_back_data_and_noise(prediction):
    x0, eps = pair()
    ab = d.alpha_bar_at(d.sigma_of(T), zero_terminal_snr=prediction == "v")  # with v also where no data is left
    predicted = eps if prediction == "epsilon" else d.velocity(x0, eps, ab)
    found = d.data_and_noise(d.noisy(x0, eps, ab), predicted, ab, prediction)
    assert torch.allclose(found[0], x0, atol=1e-3) and torch.allclose(found[1], eps, atol=1e-5)


def test_timesteps_are_uniform_between_their_bounds():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    assert torch.equal(d.timesteps_from(uniform).bincount(), torch.full((1000,), 10))
    part = d.timesteps_from(uniform, 200, 300)
    assert part.min() == 200 and part.max() == 299 and torch.equal(part.bincount()[200:], torch.full((100,), 100))
    assert d.timesteps_from(uniform, 700, 700).unique().tolist() == [700]
    assert d.timesteps_from(uniform, 1000, 1000).unique().tolist() == [999]  # the last one there is
    assert d.timesteps_from(torch.tensor([0.9999999])).tolist() == [999]


def test_loss_weights_are_their_formulas():
    ab = d.alpha_bar().numpy()[T.numpy()]
    ratio, snr = ab / (1 - ab), d.snr(d.alpha_bar_at(d.sigma_of(T)))
    assert np.allclose(snr, ratio, rtol=1e-3)  # float32 next to 1
    assert np.allclose(d.min_snr(snr, 5, "epsilon"), np.where(ratio < 5, 1, 5 / ratio), rtol=1e-3)
    assert np.allclose(d.min_snr(snr, 5, "v"), np.where(ratio < 5, ab, 5 * (1 - ab)), rtol=1e-3)
    limited = np.minimum(ratio, 1000)
    assert np.allclose(d.like_noise_prediction(snr), 1 - 1 / (limited + 1), rtol=1e-3)
    assert np.allclose(d.debiased(snr, "epsilon"), limited**-0.5, rtol=1e-3)
    assert np.allclose(d.debiased(snr, "v"), 1 / (1 + limited), rtol=1e-3)


def test_the_loss_of_v_scaled_like_noise_prediction_is_the_loss_of_the_noise():
    x0, eps = pair()
    ab = d.alpha_bar_at(d.sigma_of(torch.tensor([100, 300, 500, 700, 900, 999])))
    x = d.noisy(x0, eps, ab)
    v = d.velocity(x0, eps, ab) + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    _, guess = d.data_and_noise(x, v, ab, "v")
    error_v = (v - d.velocity(x0, eps, ab)).square().mean((1, 2, 3))
    error_eps = (guess - eps).square().mean((1, 2, 3))
    assert torch.allclose(error_v * d.like_noise_prediction(d.snr(ab)), error_eps, rtol=1e-3)


def test_weights_stay_finite_without_any_signal():
    snr = d.snr(d.alpha_bar_at(torch.ones(1), zero_terminal_snr=True))
    assert float(snr) == 0 and float(d.min_snr(snr, 5, "v")) == 0 and float(d.debiased(snr, "v")) == 1


def test_offset_noise_shifts_whole_channels():
    noise, unit = pair()[0], torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    out = d.offset(noise, unit, 0.1) - noise
    assert torch.allclose(out, 0.1 * unit[:, :, None, None].expand_as(out), atol=1e-6)


def test_the_adaptive_strength_follows_the_mean_and_never_turns():
    x0 = torch.zeros(1, 2, 4, 4)
    x0[:, 0], x0[:, 1] = -2.0, 0.5
    assert torch.allclose(d.adaptive_strength(0.1, x0, 0.01), torch.tensor([[0.12, 0.105]]))
    assert torch.allclose(d.adaptive_strength(0.1, x0, -0.1), torch.tensor([[0.0, 0.05]]))


def test_pyramid_noise_has_unit_variance_and_long_waves():
    plain = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1))
    out = d.pyramid(plain, torch.Generator().manual_seed(2), 6, 0.8)
    again = d.pyramid(plain, torch.Generator().manual_seed(2), 6, 0.8)
    assert torch.equal(out, again) and float(out.std()) == pytest.approx(1, abs=1e-5)

    def coarse(noise):  # variance of 16x16 means: 1/256 for white noise
        return float(torch.nn.functional.avg_pool2d(noise, 16).var())

    assert coarse(plain) == pytest.approx(1 / 256, rel=0.5) and coarse(out) > 10 * coarse(plain)


@pytest.mark.parametrize(("iterations", "terms"), [(0, 0), (1, 1)])
def test_pyramid_noise_starts_at_full_size(iterations, terms):
    plain = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    expected = plain
    if terms:
        probe = torch.Generator().manual_seed(2)
        torch.rand((), generator=probe)
        expected = plain + torch.randn((1, 4, 8, 8), generator=probe)[0]
    assert torch.allclose(d.pyramid(plain, generator, iterations, 0.5), expected / expected.std(), atol=1e-6)


# ---------------------------------------------------------------- sampling


def denoise(x, t):
    """A stand-in for a denoiser: smooth in x and t."""
    return 0.7 * x + 0.2 * torch.tanh(x.roll(1, -1)) + float(t) / 4000


def ours(kind, spacing, prediction, zero, last, steps=20):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    times = d.sampler_timesteps(steps, spacing)
    ab = d.alpha_bar_at(d.sigma_of(times), zero)
    ends = torch.cat([ab[1:], torch.tensor([last])])
    for t, now, then in zip(times, ab, ends, strict=True):
        predicted = denoise(x, t)
        if kind == "euler_a":
            fresh = torch.randn(x.shape, generator=generator)
            x = d.ancestral_step(x, predicted, now[None], then[None], prediction, fresh)
        else:
            x = d.deterministic_step(x, predicted, now[None], then[None], prediction)
    return x


def theirs(scheduler, steps=20):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    more = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(scheduler.scale_model_input(x, t), t), t, x, **more).prev_sample
    return x


SD = {"timestep_spacing": "leading", "steps_offset": 1}  # scheduler_config.json of SDXL base 1.0


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("kind", d.SAMPLERS)
def test_a_whole_sampling_run_is_that_of_diffusers(kind, prediction):
    name = {"euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler", "ddim": "DDIMScheduler"}
    more = {"clip_sample": False, "set_alpha_to_one": False} if kind == "ddim" else {}
    word = "v_prediction" if prediction == "v" else "epsilon"
    expected = theirs(schedulers(name[kind], prediction_type=word, **SD, **more))
    last = float(d.alpha_bar()[0]) if kind == "ddim" else 1.0
    found = ours(kind, "leading", prediction, False, last)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_zero_terminal_snr_is_sampled_from_the_last_timestep_on():
    scheduler = schedulers(
        "DDIMScheduler",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    expected = theirs(scheduler)
    assert scheduler.timesteps.tolist() == d.sampler_timesteps(20, "trailing").tolist()
    found = ours("ddim", "trailing", "v", True, 1.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert torch.isfinite(ours("euler_a", "trailing", "v", True, 1.0)).all()


@pytest.mark.parametrize("steps", [1, 20, 30, 999, 1000])
def test_sampler_timesteps_are_those_of_diffusers(steps):
    for spacing in ("leading", "trailing"):
        scheduler = schedulers("EulerDiscreteScheduler", timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.clamp(max=999).long().tolist()
        assert d.sampler_timesteps(steps, spacing).tolist() == expected
