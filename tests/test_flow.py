"""Flow matching and losses against formulas written out independently with numpy."""

import math

import numpy as np
import pytest
import torch

from library import flow, losses

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
    assert np.allclose(mine(sampling="sigma"), shifted(1 - U, 3.0), atol=1e-5)
    logit = mine(sampling="sigma", weighting_scheme="logit_normal", logit_mean=-0.3, logit_std=0.8)
    assert np.allclose(logit, shifted(1 - sigmoid(-0.3 + 0.8 * n), 3.0), atol=1e-5)
    mode = 1 - U - 1.29 * (np.cos(math.pi * U / 2) ** 2 - 1 + U)
    assert np.allclose(mine(sampling="sigma", weighting_scheme="mode"), shifted(1 - mode, 3.0), atol=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "sigmoid", "shift", "flux_shift", "sigma"])
def test_minimum_and_maximum_cut_the_distribution_and_keep_its_shape(sampling):
    free = mine(sampling=sampling)
    cut = mine(sampling=sampling, min_sigma=0.3, max_sigma=0.8)
    assert cut.min() >= 0.3 and cut.max() <= 0.8
    inside = np.sort(free[(free >= 0.3) & (free <= 0.8)])
    quantiles = np.linspace(0.05, 0.95, 19)
    assert np.allclose(np.quantile(cut, quantiles), np.quantile(inside, quantiles), atol=0.01)


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


def test_losses_are_their_formulas():
    p, t, c = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.1, 0.7])
    d, k = (p - t).numpy(), c.numpy().reshape(2, 1, 1, 1)
    assert np.allclose(losses.elementwise(p, t, "l2"), d**2, atol=1e-6)
    assert np.allclose(losses.elementwise(p, t, "l1"), abs(d), atol=1e-6)
    root = np.sqrt(d**2 + k**2) - k
    assert np.allclose(losses.elementwise(p, t, "huber", c), 2 * k * root, atol=1e-5)
    assert np.allclose(losses.elementwise(p, t, "smooth_l1", c), 2 * root, atol=1e-5)


def test_huber_schedules():
    sigma = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(losses.huber_c(sigma, "constant", 0.1, 2.0), torch.full((3,), 0.2))
    assert torch.allclose(losses.huber_c(sigma, "exponential", 0.1, 1.0), torch.tensor([1.0, 0.1**0.5, 0.1]))
    ratio = np.array([0.0, 1.0, np.inf])  # sigma / (1 - sigma)
    assert np.allclose(losses.huber_c(sigma, "snr", 0.1, 1.0).numpy(), 0.9 / (1 + ratio) ** 2 + 0.1)


def test_a_mask_is_averaged_onto_the_latent_grid():
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    mask[:, :4, 4:6] = 1
    out = losses.masked(torch.ones(1, 2, 2, 2), mask)
    assert torch.allclose(out[0, 1], torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
