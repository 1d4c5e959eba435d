"""The shares of noise levels that the plan shows, against closed forms of each distribution."""

import math
import random
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from training_support import arguments, pictures, toy  # noqa: F401  (fixtures)

from library import noise_levels, options
from library.families.family import Pair
from library.families.sdxl import SDXL
from library.families.z_image import Z_IMAGE

EDGES = [k / 10 for k in range(11)]
NORMAL = NormalDist()


def found(*words, family=Z_IMAGE, tokens=None):
    given = options.parse(family.name, ["--output_dir", "x", *words], "test")
    return noise_levels.levels(family, given, tokens or {1024: 1}), given


def bins(cumulative):
    return [cumulative(b) - cumulative(a) for a, b in zip(EDGES, EDGES[1:], strict=False)]


def logit(x):
    return -math.inf if x <= 0 else math.inf if x >= 1 else math.log(x / (1 - x))


def before(sigma, shift):
    """What is shifted to sigma."""
    return sigma / (shift - (shift - 1) * sigma)


def flux(tokens):
    return math.exp(0.5 + 0.65 * (tokens - 256) / 3840)


CASES = {
    "uniform": (["--timestep_sampling", "uniform"], lambda x: x),
    "sigmoid": (["--timestep_sampling", "sigmoid"], lambda x: NORMAL.cdf(logit(x))),
    "shift": (
        ["--timestep_sampling", "shift", "--discrete_flow_shift", "3", "--sigmoid_scale", "1.5"],
        lambda x: NORMAL.cdf(logit(before(x, 3)) / 1.5),
    ),
    "flux_shift": (["--timestep_sampling", "flux_shift"], lambda x: NORMAL.cdf(logit(before(x, flux(1024))))),
    "logit_normal": (
        ["--timestep_sampling", "sigma", "--weighting_scheme", "logit_normal", "--logit_mean", "-0.5", "--logit_std",
         "0.7", "--discrete_flow_shift", "2"],
        # sigma = shifted(1 - x): the mean changes its sign
        lambda x: NORMAL.cdf((logit(before(x, 2)) - 0.5) / 0.7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_shares_are_those_of_the_closed_form(name):
    words, cumulative = CASES[name]
    shares = found(*words)[0].shares
    assert shares == pytest.approx(bins(cumulative), abs=5e-4) and sum(shares) == pytest.approx(1)


def test_minimum_and_maximum_cut_the_distribution():
    shares = found("--timestep_sampling", "sigmoid", "--min_timestep", "300", "--max_timestep", "900")[0].shares
    whole = NORMAL.cdf(logit(0.9)) - NORMAL.cdf(logit(0.3))
    wanted = [
        part / whole if 0.3 <= low < 0.9 else 0 for low, part in zip(EDGES, bins(CASES["sigmoid"][1]), strict=False)
    ]
    assert shares == pytest.approx(wanted, abs=1e-3)


def test_every_size_of_picture_counts_by_its_items():
    shares = found("--timestep_sampling", "flux_shift", tokens={256: 3, 4096: 1})[0].shares
    parts = [bins(lambda x, n=n: NORMAL.cdf(logit(before(x, flux(n))))) for n in (256, 4096)]
    assert shares == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(*parts, strict=True)], abs=5e-4)


def test_weights_of_the_loss_are_shown_beside():
    assert found()[0].weights is None
    levels, given = found("--timestep_sampling", "uniform", "--weighting_scheme", "cosmap")
    half = [2 / math.pi * math.atan(2 * x - 1) for x in EDGES]  # the integral of 2 / (pi (1 - 2 s + 2 s^2))
    wanted = [(b - a) / (half[-1] - half[0]) for a, b in zip(half, half[1:], strict=False)]
    assert levels.weights == pytest.approx(wanted, abs=5e-4) and levels.shares == pytest.approx([0.1] * 10)
    assert "of the loss" in noise_levels.text(levels, given)


def test_two_experts_are_told_their_share_of_the_steps():
    family = replace(Z_IMAGE, pair=Pair(Z_IMAGE.denoiser, 0.875))
    levels, given = found("--timestep_sampling", "shift", "--discrete_flow_shift", "5", family=family)
    share = 1 - NORMAL.cdf(logit(before(0.875, 5)))
    assert levels.above == pytest.approx(share, abs=5e-4)
    line = f"share of steps with sigma >= 0.875: {100 * share:.1f} % (high_noise), below: {100 - 100 * share:.1f} %"
    assert line in noise_levels.text(levels, given)


def test_the_origin_of_the_distribution_is_named_and_only_what_is_read():
    text = noise_levels.text(*found("--discrete_flow_shift", "4"))
    assert "timestep_sampling shift (family z_image), discrete_flow_shift 4.0 (command line)" in text
    assert "logit_mean" not in text
    text = noise_levels.text(*found(family=SDXL))
    assert "every timestep alike" in text and text.count(" 10.0 %") == 10


def test_no_random_number_of_the_run_moves():
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate()
    found()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_the_plan_of_a_run_shows_the_levels(toy, pictures, tmp_path, capsys):  # noqa: F811
    from library.preflight import check

    given = options.parse("z_image", arguments(toy, pictures, tmp_path), "test")
    plan = check(given)
    assert "noise levels of the training steps" in plan.text and plan.text.count(" %") >= 10
    assert "0.9 - 1.0" in capsys.readouterr().out
