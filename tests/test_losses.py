"""Losses and masks against formulas written out independently with numpy."""

import numpy as np
import pytest
import torch

from library import losses


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)


def test_losses_are_their_formulas():
    (p, t), c = pair(), torch.tensor([0.1, 0.7])
    d, k = (p - t).numpy(), c.numpy().reshape(2, 1, 1, 1)
    assert np.allclose(losses.elementwise(p, t, "l2"), d**2, atol=1e-6)
    assert np.allclose(losses.elementwise(p, t, "l1"), abs(d), atol=1e-6)
    root = np.sqrt(d**2 + k**2) - k
    assert np.allclose(losses.elementwise(p, t, "huber", c), 2 * k * root, atol=1e-5)
    assert np.allclose(losses.elementwise(p, t, "smooth_l1", c), 2 * root, atol=1e-5)


def test_huber_is_quadratic_near_zero_and_linear_far_away():
    zero, c = torch.zeros(1, 2), torch.tensor([0.5])
    near, far = torch.tensor([[1e-2, -1e-2]]), torch.tensor([[1e3, -1e3]])
    assert torch.allclose(losses.elementwise(near, zero, "huber", c), near**2, rtol=1e-2)
    assert torch.allclose(losses.elementwise(far, zero, "huber", c), 2 * 0.5 * far.abs(), rtol=1e-2)
    assert torch.allclose(losses.elementwise(far, zero, "smooth_l1", c), 2 * far.abs(), rtol=1e-2)


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_half_precision_predictions_are_compared_in_float32(kind):
    p, t = pair()
    c = torch.full((2,), 0.3)
    out = losses.elementwise(p.bfloat16(), t, kind, c)
    assert out.dtype == torch.float32
    assert torch.equal(out, losses.elementwise(p.bfloat16().float(), t, kind, c))


def test_huber_schedules():
    sigma = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(losses.huber_c(sigma, "constant", 0.1, 2.0), torch.full((3,), 0.2))
    assert torch.allclose(losses.huber_c(sigma, "exponential", 0.1, 1.0), torch.tensor([1.0, 0.1**0.5, 0.1]))
    assert torch.allclose(losses.huber_c(sigma, "exponential", 0.1, 3.0), torch.tensor([3.0, 3 * 0.1**0.5, 0.3]))


def test_the_snr_schedule_is_the_ddpm_one_at_the_same_ratio_of_noise_to_data():
    """x_sigma scaled to unit variance has alpha_bar = (1 - s)^2 / ((1 - s)^2 + s^2); then sd-scripts' formula."""
    s = np.linspace(0, 0.999, 50)
    alpha_bar = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
    theirs = 0.9 / (1 + np.sqrt((1 - alpha_bar) / alpha_bar)) ** 2 + 0.1
    assert np.allclose(losses.huber_c(torch.tensor(s), "snr", 0.1, 1.0).numpy(), theirs, atol=1e-9)
    assert float(losses.huber_c(torch.ones(1), "snr", 0.1, 1.0)) == pytest.approx(0.1)


def test_a_mask_is_averaged_onto_the_latent_grid_and_not_renormalised():
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    mask[:, :4, 4:6] = 1
    out = losses.masked(torch.ones(1, 2, 2, 2), mask)
    assert torch.allclose(out[0, 1], torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
    assert float(out.mean()) == pytest.approx(0.625)


def test_nothing_is_learned_where_the_mask_is_zero():
    p, t = pair()
    p.requires_grad_(True)
    mask = torch.ones(2, 4, 4)
    mask[:, 2:] = 0
    losses.masked(losses.elementwise(p, t, "l2"), mask).mean().backward()
    assert not p.grad[:, :, 2:].any() and p.grad[:, :, :2].all()
