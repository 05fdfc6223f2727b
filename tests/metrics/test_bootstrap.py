"""Bootstrap intervals: coverage, whole patients, undefined draws, bad input."""

import math

import numpy as np
import pytest

from diffusers_dino.metrics.bootstrap import Interval, bootstrap_interval, bootstrap_samples, resamples


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


def test_draws_depend_on_the_seed_alone():
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
    with pytest.raises(ValueError, match="two items or groups"):
        interval_of_mean([1.0])
    with pytest.raises(ValueError, match="two items or groups"):
        interval_of_mean([1.0, 2.0], ["a", "a"])
    with pytest.raises(ValueError, match="got 1 groups"):
        interval_of_mean([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="got 2 and 0"):
        interval_of_mean([1.0, 2.0], repeats=0)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        interval_of_mean([1.0, 2.0], level=95)
