"""Flow matching against formulas written out independently with numpy."""

import math

import numpy as np
import pytest
import torch

from library import flow

BASE = {
    "sampling": "uniform", "sigmoid_scale": 1.0, "shift": 3.0, "weighting_scheme": "uniform", "logit_mean": 0.0,
    "logit_std": 1.0, "mode_scale": 1.29, "tokens": 1024,
}  # fmt: skip
U = np.linspace(0.001, 0.999, 997)


def normal_quantile(u):
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf(x) for x in u])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def shifted(s, f):
    return f * s / (1 + (f - 1) * s)


def mine(**changes):
    return flow.sigma_from(torch.tensor(U), **{**BASE, **changes}).double().numpy()


def test_every_sampling_has_the_quantiles_of_its_formula():
    n, mu = normal_quantile(U), 0.5 + 0.65 * (1024 - 256) / (4096 - 256)
    assert np.allclose(mine(), U, atol=1e-6)
    assert np.allclose(mine(sampling="sigmoid", sigmoid_scale=1.7), sigmoid(1.7 * n), atol=1e-5)
    assert np.allclose(mine(sampling="shift"), shifted(sigmoid(n), 3.0), atol=1e-5)
    assert np.allclose(mine(sampling="flux_shift"), np.exp(mu) / (np.exp(mu) + 1 / sigmoid(n) - 1), atol=1e-5)
    qwen = np.exp(0.5 + 0.4 * (1024 - 256) / (8192 - 256))
    assert np.allclose(mine(sampling="qwen_shift"), shifted(sigmoid(n), qwen), atol=1e-5)
    assert np.allclose(mine(sampling="nextdit_shift"), np.exp(mu) / (np.exp(mu) + 1 / U - 1), atol=1e-5)
    assert np.allclose(mine(sampling="sigma"), shifted(1 - U, 3.0), atol=1e-5)
    logit = mine(sampling="sigma", weighting_scheme="logit_normal", logit_mean=-0.3, logit_std=0.8)
    assert np.allclose(logit, shifted(1 - sigmoid(-0.3 + 0.8 * n), 3.0), atol=1e-5)
    mode = 1 - U - 1.29 * (np.cos(math.pi * U / 2) ** 2 - 1 + U)
    assert np.allclose(mine(sampling="sigma", weighting_scheme="mode"), shifted(1 - mode, 3.0), atol=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "sigmoid", "shift", "flux_shift", "qwen_shift", "sigma"])
def test_minimum_and_maximum_cut_the_distribution_and_keep_its_shape(sampling):
    free = mine(sampling=sampling)
    cut = mine(sampling=sampling, min_sigma=0.3, max_sigma=0.8)
    assert cut.min() >= 0.3 and cut.max() <= 0.8
    inside = np.sort(free[(free >= 0.3) & (free <= 0.8)])
    quantiles = np.linspace(0.05, 0.95, 19)
    assert np.allclose(np.quantile(cut, quantiles), np.quantile(inside, quantiles), atol=0.01)


def test_a_cut_distribution_is_its_inverse_distribution_function():
    """F^-1(F(a) + u (F(b) - F(a))) with F written out for each sampling."""
    from statistics import NormalDist

    low, high, f = 0.25, 0.9, 3.0
    normal = NormalDist()
    unshift = lambda s: s / (f - (f - 1) * s)  # noqa: E731
    logit = lambda s: math.log(s / (1 - s))  # noqa: E731
    cut = {"min_sigma": low, "max_sigma": high}
    assert np.allclose(mine(**cut), low + (high - low) * U, atol=3e-5)
    a, b = (normal.cdf(logit(unshift(s))) for s in (low, high))
    expected = shifted(sigmoid(normal_quantile(a + (b - a) * U)), f)
    assert np.allclose(mine(sampling="shift", **cut), expected, atol=1e-4)
    a, b = 1 - unshift(low), 1 - unshift(high)  # the descending one: u = 0 is the most noise
    assert np.allclose(mine(sampling="sigma", **cut), shifted(1 - (b + (a - b) * U), f), atol=1e-4)


def test_every_number_of_tokens_has_its_own_cut():
    for tokens in (256, 4096, 256):
        mu = 0.5 + 0.65 * (tokens - 256) / (4096 - 256)
        free = np.sort(np.exp(mu) / (np.exp(mu) + 1 / sigmoid(normal_quantile(U)) - 1))
        cut = mine(sampling="flux_shift", tokens=tokens, min_sigma=0.4, max_sigma=0.7)
        inside = free[(free >= 0.4) & (free <= 0.7)]
        assert np.median(cut) == pytest.approx(np.median(inside), abs=0.005)


def test_equal_minimum_and_maximum_are_one_sigma():
    assert np.allclose(mine(sampling="shift", min_sigma=0.6, max_sigma=0.6), 0.6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
def test_sigma_sampling_is_within_a_step_of_sd_scripts_table(scheme):
    """u by scheme, index floor(1000 u) into sigmas of t = 1000..1, each shifted."""
    table = shifted(np.arange(1000, 0, -1) / 1000, 3.0)
    n = normal_quantile(U)
    u = {"uniform": U, "logit_normal": sigmoid(n), "mode": 1 - U - 1.29 * (np.cos(math.pi * U / 2) ** 2 - 1 + U)}[
        scheme
    ]
    theirs = table[np.floor(1000 * u).astype(int)]
    assert np.abs(mine(sampling="sigma", weighting_scheme=scheme) - theirs).max() <= 3.0 / 1000 + 1e-6


def test_quantiles_for_validation_split_the_drawn_sigmas_as_they_say():
    """A Kolmogorov-Smirnov distance: the share of drawn sigmas below the q-quantile is q."""
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    chosen = {**BASE, "sampling": "shift", "min_sigma": 0.1, "max_sigma": 0.95}
    drawn, points = flow.sigma_from(uniform, **chosen), [0.1, 0.3, 0.5, 0.7, 0.9]
    shares = (drawn[None] <= flow.sigma_quantiles(points, **chosen)[:, None]).double().mean(dim=1)
    assert float((shares - torch.tensor(points, dtype=torch.float64)).abs().max()) < 1.63 / math.sqrt(20_000)  # 1 %


def test_a_samplers_sigmas_go_from_noise_to_data():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 0, 9)[:-1]))
    assert torch.allclose(flow.shifted_sigmas(8, 3.0), scheduler.sigmas, atol=1e-6)


def test_sigmas_that_are_stretched_to_a_last_one_are_those_of_diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for steps, tokens in ((2, 256), (7, 1000), (50, 6889)):
        mu = math.log(flow.qwen_shift(tokens))
        for terminal in (0.02, 0.1):
            theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal)
            theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
            ours = flow.shifted_sigmas(steps, math.exp(mu), terminal)
            assert torch.allclose(ours, theirs.sigmas, atol=1e-6) and ours[-2] == pytest.approx(terminal)
    assert flow.shifted_sigmas(1, 3.0, 0.02).tolist() == [1, 0]


def test_noising_velocity_and_perturbation():
    generator = torch.Generator().manual_seed(0)
    x0, noise, extra = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(3))
    sigma, gamma = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0.1, 0.2, 0.3])
    noisy = flow.noisy(x0, noise, sigma)
    assert torch.equal(noisy[0], x0[0]) and torch.equal(noisy[2], noise[2])
    assert torch.allclose(noisy[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.allclose(noisy - sigma.view(3, 1, 1, 1) * flow.velocity(x0, noise), x0, atol=1e-6)
    assert torch.allclose(flow.ip_noise(noise, extra, gamma)[2], noise[2] + 0.3 * extra[2])


@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
def test_every_prediction_type_has_its_minimum_at_the_true_velocity(kind):
    x, v, noisy, sigma = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.2, 0.9])
    guess, goal = flow.apply_prediction_type(v, v, noisy, sigma, kind)
    assert torch.equal(guess, goal)
    guess, goal = flow.apply_prediction_type(x, v, noisy, sigma, kind)
    factor = sigma.view(2, 1) if kind == "sigma_scaled" else 1.0
    assert torch.allclose((guess - goal).abs(), (factor * (x - v)).abs(), atol=1e-6)


def test_loss_weights_and_flux_shift():
    sigma = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(flow.loss_weight(sigma, "sigma_sqrt"), sigma**-2)
    s = sigma.numpy()
    assert np.allclose(flow.loss_weight(sigma, "cosmap").numpy(), 2 / (np.pi * (1 - 2 * s + 2 * s**2)))
    assert torch.equal(flow.loss_weight(sigma, "none"), torch.ones(3))
    assert flow.flux_shift(256) == pytest.approx(math.exp(0.5)) and flow.flux_shift(4096) == pytest.approx(
        math.exp(1.15)
    )
