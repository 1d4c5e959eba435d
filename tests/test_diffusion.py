"""DDPM against diffusers' schedulers and against formulas written out with numpy in another way."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from library import diffusion as d
from library import losses
from library.objective import FLOW, ddpm

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


def test_multires_noise_has_unit_variance_and_long_waves():
    plain = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))

    def shaped():
        generator = torch.Generator().manual_seed(2)
        return d.multires(plain, torch.stack([d.octaves((4, 64, 64), generator, 6, 0.8) for _ in range(2)]))

    out = shaped()
    assert torch.equal(out, shaped()) and torch.allclose(out.std((1, 2, 3)), torch.ones(2))

    def coarse(noise):  # variance of 16x16 means: 1/256 for white noise
        return float(torch.nn.functional.avg_pool2d(noise, 16).var())

    assert coarse(plain) == pytest.approx(1 / 256, rel=0.5) and coarse(out) > 10 * coarse(plain)
    alone = d.multires(plain[:1], d.octaves((4, 64, 64), torch.Generator().manual_seed(2), 6, 0.8))
    assert torch.equal(alone[0], out[0])  # what shares its batch does not change an item


def test_octaves_start_at_full_size_and_end_at_one_pixel():
    assert not d.octaves((4, 8, 8), torch.Generator(), 0, 0.5).any()
    probe = torch.Generator().manual_seed(2)
    torch.rand((), generator=probe)
    expected = torch.randn((1, 4, 8, 8), generator=probe)[0]
    assert torch.allclose(d.octaves((4, 8, 8), torch.Generator().manual_seed(2), 1, 0.5), expected)
    many = d.octaves((4, 8, 8), torch.Generator().manual_seed(2), 50, 0.5)
    assert torch.equal(many, d.octaves((4, 8, 8), torch.Generator().manual_seed(2), 4, 0.5))


# ---------------------------------------------------------------- the record


def options(**given):
    off = (
        "min_timestep max_timestep min_snr_gamma v_pred_like_loss noise_offset adaptive_noise_scale "
        "multires_noise_iterations debiased_estimation_loss scale_v_pred_loss_like_noise_pred "
        "noise_offset_random_strength"
    )
    return SimpleNamespace(**(dict.fromkeys(off.split()) | {"multires_noise_discount": 0.3} | given))


def test_the_objective_draws_timesteps_between_the_options_bounds():
    uniform = (torch.arange(1000) + 0.5) / 1000
    t = d.timestep(ddpm().sigma(uniform, 1024, options(min_timestep=100, max_timestep=600)))
    assert t.min() == 100 and t.max() == 599
    assert d.timestep(ddpm().sigma(uniform, 1024, options())).tolist() == list(range(1000))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noisy_and_target_of_the_objective(prediction):
    x0, eps = pair()
    objective, sigma = ddpm(prediction), d.sigma_of(T)
    theirs = schedulers("DDPMScheduler")
    assert torch.allclose(objective.noisy(x0, eps, sigma), theirs.add_noise(x0, eps, T), atol=1e-5)
    expected = eps if prediction == "epsilon" else theirs.get_velocity(x0, eps, T)
    assert torch.allclose(objective.target(x0, eps, sigma, options()), expected, atol=1e-5)


def test_weights_multiply_and_follow_the_schedule_in_use():
    sigma = d.sigma_of(torch.tensor([10, 500, 999]))
    ab = d.alpha_bar().numpy()[[10, 500, 999]]
    snr = ab / (1 - ab)
    both = ddpm().weight(sigma, options(min_snr_gamma=5.0, debiased_estimation_loss=True))
    assert np.allclose(both, np.minimum(1, 5 / snr) / np.sqrt(snr), rtol=1e-3)
    like = ddpm().weight(sigma, options(v_pred_like_loss=0.5))
    assert np.allclose(like, 1 + 0.5 * (np.minimum(snr, 1000) + 1) / np.minimum(snr, 1000), rtol=1e-3)
    scaled = ddpm("v").weight(sigma, options(scale_v_pred_loss_like_noise_pred=True))
    assert np.allclose(scaled, snr / (snr + 1), rtol=1e-3)
    assert torch.equal(ddpm().weight(sigma, options()), torch.ones(3))
    zero = ddpm("v", True).weight(sigma, options(min_snr_gamma=5.0))
    assert float(zero[-1]) == 0 and float(ddpm("v").weight(sigma, options(min_snr_gamma=5.0))[-1]) > 1e-3


def test_hubers_snr_schedule_is_that_of_sd_scripts():
    sigma, ab = d.sigma_of(T), d.alpha_bar().numpy()[T.numpy()]
    expected = 0.9 / (1 + np.sqrt((1 - ab) / ab)) ** 2 + 0.1
    assert np.allclose(losses.huber_c(sigma, "snr", 0.1, 1.0, ddpm().signal(sigma)), expected, rtol=1e-4)
    flow = losses.huber_c(sigma, "snr", 0.1, 1.0, FLOW.signal(sigma))
    assert torch.allclose(flow, 0.9 * (1 - sigma) ** 2 + 0.1)


def test_shaped_noise_is_what_the_options_ask_for():
    (noise, x0), objective = pair(2), ddpm()

    def drawn(**given):
        draws = [objective.draw(torch.Generator().manual_seed(k), (4, 8, 6), options(**given)) for k in range(2)]
        stacked = {name: torch.stack([one[name] for one in draws]) for name in draws[0]}
        return objective.shape_noise(noise, stacked, x0, options(**given)), stacked

    assert torch.equal(drawn()[0], noise) and drawn()[1] == {}
    plain, values = drawn(noise_offset=0.1)
    assert torch.allclose(plain - noise, 0.1 * values["offset"][..., None, None], atol=1e-6)
    weaker, values = drawn(noise_offset=0.1, noise_offset_random_strength=True)
    strength = values["offset_strength"][:, None]
    assert (strength < 1).all() and float(strength[0]) != float(strength[1])  # each item draws its own
    assert torch.allclose(weaker - noise, (0.1 * strength * values["offset"])[..., None, None], atol=1e-6)
    adaptive, values = drawn(noise_offset=0.1, adaptive_noise_scale=0.5)
    expected = (0.1 + 0.5 * x0.mean((2, 3)).abs()) * values["offset"]
    assert torch.allclose(adaptive - noise, expected[..., None, None], atol=1e-5)
    shaped, _ = drawn(noise_offset=0.1, multires_noise_iterations=4)
    assert torch.allclose(shaped.std((1, 2, 3)), torch.ones(2)) and not torch.allclose(shaped, plain)


# ---------------------------------------------------------------- sampling


def denoise(x, t):
    """A stand-in for a denoiser: smooth in x and t."""
    return 0.7 * x + 0.2 * torch.tanh(x.roll(1, -1)) + float(t) / 4000


def ours(kind, prediction, zero, steps=20):
    generator = torch.Generator().manual_seed(7)
    x, sampler = torch.randn(1, 4, 8, 8, generator=generator), ddpm(prediction, zero).sampler(kind)
    sigmas = sampler.times(steps, 1.0, 1024)
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        predicted = denoise(x, d.timestep(now))
        x = sampler.step(x, predicted, now, then, lambda: torch.randn(1, 4, 8, 8, generator=generator))
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
@pytest.mark.parametrize("kind", ddpm().sampler_names)
def test_a_whole_sampling_run_is_that_of_diffusers(kind, prediction):
    name = {"euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler", "ddim": "DDIMScheduler"}
    more = {"clip_sample": False, "set_alpha_to_one": False} if kind == "ddim" else {}
    word = "v_prediction" if prediction == "v" else "epsilon"
    expected = theirs(schedulers(name[kind], prediction_type=word, **SD, **more))
    found = ours(kind, prediction, zero=False)
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
    found = ours("euler", "v", zero=True)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert torch.isfinite(ours("euler_a", "v", zero=True)).all()


@pytest.mark.parametrize("steps", [1, 20, 30, 999, 1000])
def test_sampler_timesteps_are_those_of_diffusers(steps):
    for spacing in ("leading", "trailing"):
        scheduler = schedulers("EulerDiscreteScheduler", timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.clamp(max=999).long().tolist()
        assert d.sampler_timesteps(steps, spacing).tolist() == expected
