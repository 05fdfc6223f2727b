"""Intervals of distances and scores: they agree with the figures, and cover what they say they cover."""

import numpy as np
import pytest
import torch

from diffusers_dino.metrics import frechet_distance, kernel_distance, manifold_figures, vendi_score
from diffusers_dino.metrics.bootstrap import (
    Bootstrap,
    estimate_frechet,
    estimate_kernel,
    estimate_manifolds,
    estimate_vendi,
    resamples,
)
from diffusers_dino.metrics.distances import polynomial_kernel


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_are_the_figures_and_lie_inside():
    a, b = gaussian(50, 4, 0), gaussian(40, 4, 1) + 0.5
    bootstrap = Bootstrap(repeats=60)
    figures = manifold_figures(a, b, 3)
    expected = {
        estimate_frechet(a, b, bootstrap): frechet_distance(a, b),
        estimate_kernel(a, b, bootstrap): kernel_distance(a, b),
        estimate_vendi(a, bootstrap): vendi_score(a),
        **dict(
            zip(
                estimate_manifolds(a, b, 3, bootstrap),
                (figures.precision, figures.recall, figures.density, figures.coverage),
                strict=True,
            )
        ),
    }
    assert len(expected) == 7
    for estimate, value in expected.items():
        assert estimate.value == pytest.approx(value, rel=1e-9)
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.low < estimate.high


def test_a_share_stays_a_share():
    real = gaussian(60, 2, 0)
    for estimate in estimate_manifolds(real[:40], real[20:], 5, Bootstrap(repeats=60))[::3]:
        assert 0 <= estimate.low <= estimate.high <= 1


def test_copies_bias_what_is_said_to_be_biased():
    a, b = gaussian(60, 6, 0), gaussian(60, 6, 1)
    bootstrap = Bootstrap(repeats=100)
    assert estimate_frechet(a, b, bootstrap).excess > 0.1 * frechet_distance(a, b)
    assert estimate_vendi(a, bootstrap).excess < 0
    kernel = estimate_kernel(a, b, bootstrap)
    assert abs(kernel.excess) < 0.2 * (kernel.high - kernel.low)


def test_kernel_draws_equal_sums_over_pairs():
    a, b, groups = gaussian(8, 3, 0), gaussian(5, 3, 1), list("aabbbcde")
    bootstrap = Bootstrap(repeats=1, groups=groups, seed=4)
    rows = next(iter(resamples(8, groups, 1, 4)))
    columns = next(iter(resamples(5, None, 1, bootstrap.reference_seed)))

    def within(x: torch.Tensor, drawn: np.ndarray, names: list) -> float:
        weights, total, pairs = np.bincount(drawn, minlength=len(x)), 0.0, 0.0
        for i in range(len(x)):
            for j in set(range(len(x))) - {i}:
                weight = weights[i] if names[i] == names[j] else weights[i] * weights[j]
                total += weight * polynomial_kernel(x[i : i + 1], x[j : j + 1]).item()
                pairs += weight
        return total / pairs

    expected = within(a, rows, groups) + within(b, columns, list(range(5)))
    expected -= 2 * polynomial_kernel(a[rows], b[columns]).mean().item()
    estimate = estimate_kernel(a, b, bootstrap)
    assert estimate.value + estimate.excess == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_the_frechet_distance_covers_its_mean_at_that_size():
    n, d = 40, 4
    truth = np.mean([frechet_distance(gaussian(n, d, i), gaussian(n, d, 10_000 + i)) for i in range(300)])
    covered = naive = 0
    for i in range(50):
        estimate = estimate_frechet(gaussian(n, d, i), gaussian(n, d, 10_000 + i), Bootstrap(repeats=60))
        covered += estimate.low <= truth <= estimate.high
        naive += estimate.low + estimate.excess <= truth <= estimate.high + estimate.excess
    assert covered >= 42
    assert naive <= covered - 5  # draws as they are lie above the truth


def test_patients_are_drawn_whole():
    a, b = gaussian(30, 3, 0), gaussian(30, 3, 1)
    patients = np.repeat(np.arange(6), 5)
    shifted = a + gaussian(6, 3, 2)[patients]
    wide = estimate_frechet(shifted, b, Bootstrap(groups=patients, reference_groups=patients, repeats=80))
    narrow = estimate_frechet(shifted, b, Bootstrap(repeats=80))
    assert wide.high - wide.low > narrow.high - narrow.low
    with pytest.raises(ValueError, match="got 6 groups"):
        estimate_vendi(a, Bootstrap(groups=range(6)))


@pytest.mark.parametrize("estimate", [estimate_frechet, estimate_kernel])
def test_bad_features_are_refused(estimate):
    with pytest.raises(ValueError, match="NaN"):
        estimate(gaussian(9, 2, 0), gaussian(9, 2, 1) / 0, Bootstrap())
