"""Intervals: coverage, whole patients, undefined draws, those of distances and scores, bad input."""

import math

import numpy as np
import pytest
import torch

from diffusers_dino.metrics import frechet_distance, kernel_distance, manifold_figures, vendi_score
from diffusers_dino.metrics.bootstrap import (
    Bootstrap,
    Interval,
    bootstrap_interval,
    bootstrap_samples,
    estimate_frechet,
    estimate_kernel,
    estimate_manifolds,
    estimate_vendi,
    resamples,
)
from tiny import gaussian


def interval_of_mean(values, groups=None, **options) -> Interval:
    values = np.asarray(values, float)
    return bootstrap_interval(lambda rows: values[rows].mean(), len(values), groups, **options)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = interval_of_mean(random.random(40), repeats=200)
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_copies_of_a_patients_image_say_nothing_new():
    once = interval_of_mean(range(40), repeats=500)
    twice = interval_of_mean(np.repeat(np.arange(40), 4), np.repeat(np.arange(40), 4), repeats=500)
    assert tuple(twice) == pytest.approx(tuple(once))
    naive = interval_of_mean(np.repeat(np.arange(40), 4), repeats=500)
    assert naive.high - naive.low < 0.7 * (twice.high - twice.low)


def test_groups_are_drawn_whole_whatever_their_order():
    groups = ["b", "a", "b", "c", "a", "b"]
    for rows in resamples(6, groups, repeats=50):
        counts = np.bincount(rows, minlength=6)
        for name in "abc":
            assert len({counts[i] for i in range(6) if groups[i] == name}) == 1
    singles = next(iter(resamples(3, ["c", "a", "b"], repeats=1)))
    assert singles.tolist() == [[1, 2, 0][i] for i in next(iter(resamples(3, repeats=1)))]


def test_draws_depend_only_on_the_seed():
    draws = [bootstrap_samples(np.mean, 9, repeats=50, seed=seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    both = bootstrap_samples(lambda rows: [rows.mean(), rows.max()], 9, repeats=7)
    assert both.shape == (7, 2)


def test_undefined_draws_are_left_out_but_not_most_of_them():
    def rare(share: float):
        calls = iter(range(1000))
        return lambda rows: math.nan if next(calls) % 10 < 10 * share else rows.mean()

    assert math.isfinite(bootstrap_interval(rare(0.3), 20, repeats=100).low)
    with pytest.raises(ValueError, match="defined on 20 of 100 draws"):
        bootstrap_interval(rare(0.8), 20, repeats=100)


def test_bad_input_is_named():
    for message, values, groups, options in (
        ("two items or groups", [1.0], None, {}),
        ("two items or groups", [1.0, 2.0], ["a", "a"], {}),
        ("got 1 groups", [1.0, 2.0], ["a"], {}),
        ("got 2 and 0", [1.0, 2.0], None, {"repeats": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            interval_of_mean(values, groups, **options)


def test_values_are_the_figures_and_lie_inside():
    a, b = gaussian(50, 4), gaussian(40, 4, seed=1) + 0.5
    bootstrap = Bootstrap(repeats=60)
    figures = manifold_figures(a, b, 3)
    expected = {
        estimate_frechet(a, b, bootstrap): frechet_distance(a, b),
        estimate_kernel(a, b, bootstrap): kernel_distance(a, b),
        estimate_vendi(a, bootstrap): vendi_score(a),
        **dict(zip(estimate_manifolds(a, b, 3, bootstrap), tuple(vars(figures).values())[:4], strict=True)),
    }
    assert len(expected) == 7
    for estimate, value in expected.items():
        assert estimate.value == pytest.approx(value, rel=1e-9)
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.low < estimate.high
    real = gaussian(60, 2)  # a share stays a share
    for estimate in estimate_manifolds(real[:40], real[20:], 5, Bootstrap(repeats=60))[::3]:
        assert 0 <= estimate.low <= estimate.high <= 1


def test_copies_bias_what_is_said_to_be_biased():
    a, b = gaussian(60, 6), gaussian(60, 6, seed=1)
    bootstrap = Bootstrap(repeats=100)
    assert estimate_frechet(a, b, bootstrap).excess > 0.1 * frechet_distance(a, b)
    assert estimate_vendi(a, bootstrap).excess < 0
    kernel = estimate_kernel(a, b, bootstrap)
    assert abs(kernel.excess) < 0.2 * (kernel.high - kernel.low)


def test_kernel_draws_equal_sums_over_pairs():
    a, b, groups = gaussian(8, 3), gaussian(5, 3, seed=1), list("aabbbcde")
    bootstrap = Bootstrap(repeats=1, groups=groups, seed=4)
    rows = next(iter(resamples(8, groups, 1, 4)))
    columns = next(iter(resamples(5, None, 1, bootstrap.reference_seed)))

    def within(x: torch.Tensor, drawn: np.ndarray, names: list) -> float:
        weights, total, pairs = np.bincount(drawn, minlength=len(x)), 0.0, 0.0
        for i in range(len(x)):
            for j in set(range(len(x))) - {i}:
                weight = weights[i] if names[i] == names[j] else weights[i] * weights[j]
                total += weight * (x[i] @ x[j] / 3 + 1).item() ** 3
                pairs += weight
        return total / pairs

    expected = within(a, rows, groups) + within(b, columns, list(range(5)))
    expected -= 2 * ((a[rows] @ b[columns].T / 3 + 1) ** 3).mean().item()
    estimate = estimate_kernel(a, b, bootstrap)
    assert estimate.value + estimate.excess == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_the_frechet_distance_covers_its_mean_at_that_size():
    n, d = 40, 4
    truth = np.mean([frechet_distance(gaussian(n, d, seed=i), gaussian(n, d, seed=10_000 + i)) for i in range(300)])
    covered = naive = 0
    for i in range(50):
        estimate = estimate_frechet(gaussian(n, d, seed=i), gaussian(n, d, seed=10_000 + i), Bootstrap(repeats=60))
        covered += estimate.low <= truth <= estimate.high
        naive += estimate.low + estimate.excess <= truth <= estimate.high + estimate.excess
    assert covered >= 42
    assert naive <= covered - 5  # draws as they are lie above the truth


def test_patients_are_drawn_whole():
    a, b = gaussian(30, 3), gaussian(30, 3, seed=1)
    patients = np.repeat(np.arange(6), 5)
    shifted = a + gaussian(6, 3, seed=2)[patients]
    wide = estimate_frechet(shifted, b, Bootstrap(groups=patients, reference_groups=patients, repeats=80))
    narrow = estimate_frechet(shifted, b, Bootstrap(repeats=80))
    assert wide.high - wide.low > narrow.high - narrow.low
    with pytest.raises(ValueError, match="got 6 groups"):
        estimate_vendi(a, Bootstrap(groups=range(6)))


@pytest.mark.parametrize("estimate", [estimate_frechet, estimate_kernel])
def test_bad_features_are_refused(estimate):
    with pytest.raises(ValueError, match="NaN"):
        estimate(gaussian(9, 2), gaussian(9, 2, seed=1) / 0, Bootstrap())
