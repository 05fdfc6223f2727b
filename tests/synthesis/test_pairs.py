"""The label rule and the pair sampler, against all pairs of small sets and on large ones."""

import time
from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dino.synthesis import interpolated_labels, sample_pairs
from diffusers_dino.synthesis.pairs import _unrank, permute

label_sets = st.lists(st.frozensets(st.sampled_from("abcde"), max_size=3), min_size=2, max_size=12)
seeds = st.integers(0, 2**32)


def compatible(labels):
    return {(i, j) for i, j in combinations(range(len(labels)), 2) if set(labels[i]) & set(labels[j])}


@given(labels=label_sets, seed=seeds)
@settings(max_examples=150, deadline=None)
def test_every_pair_that_shares_a_label_comes_once_a_round(labels, seed):
    expected = compatible(labels)
    if not expected:
        with pytest.raises(ValueError, match="No two images share a label"):
            sample_pairs(labels, seed)
        return
    drawn = list(islice(sample_pairs(labels, seed), 3 * len(expected)))
    fractions = {}
    for start in range(0, len(drawn), len(expected)):
        round_ = drawn[start : start + len(expected)]
        assert {(pair.source, pair.target) for pair in round_} == expected
        for pair in round_:
            assert 0 < pair.fraction < 1
            fractions.setdefault((pair.source, pair.target), set()).add(pair.fraction)
    assert all(len(values) == 3 for values in fractions.values())


@given(labels=label_sets.filter(compatible), seed=seeds, count=st.integers(1, 30), more=st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_the_sequence_depends_on_labels_and_seed_alone(labels, seed, count, more):
    short = list(islice(sample_pairs(labels, seed), count))
    assert (
        list(islice(sample_pairs([sorted(own, reverse=True) for own in labels], seed), count + more))[:count] == short
    )


def test_seeds_and_rounds_differ_in_order():
    labels = [{"a"}] * 30
    first, second = (list(islice(sample_pairs(labels, seed), 435)) for seed in (0, 1))
    assert {pair[:2] for pair in first} == {pair[:2] for pair in second}
    assert sum(a[:2] == b[:2] for a, b in zip(first, second, strict=True)) < 15
    both = list(islice(sample_pairs(labels, 0), 870))
    assert sum(a[:2] == b[:2] for a, b in zip(both[:435], both[435:], strict=True)) < 15


def test_each_pair_is_as_likely_to_come_early():
    labels = [{"a", "b"}, {"a", "b"}, {"a"}, {"b"}, {"b", "c"}, {"c"}]
    expected = compatible(labels)
    count = Counter(pair[:2] for seed in range(3000) for pair in islice(sample_pairs(labels, seed), 2))
    assert set(count) == expected
    mean = 2 * 3000 / len(expected)
    assert max(abs(value - mean) for value in count.values()) < 5 * mean**0.5


def test_fractions_are_spread_evenly_over_pairs_and_over_rounds():
    labels = [{"a"}] * 40
    fractions = np.sort([pair.fraction for pair in islice(sample_pairs(labels, 3), 780)])
    assert np.abs(fractions - (np.arange(780) + 0.5) / 780).max() < 1.63 / 780**0.5  # Kolmogorov-Smirnov, 1 %
    one_pair = np.sort([pair.fraction for pair in islice(sample_pairs([{"a"}, {"a"}], 3), 100)])
    assert np.diff(one_pair).max() < 0.03


def test_a_hundred_thousand_images_start_at_once():
    rng = np.random.default_rng(0)
    names = np.array([f"label {i}" for i in range(15)])
    labels = [names[rng.random(15) < 0.15].tolist() for _ in range(100_000)]
    start = time.process_time()
    drawn = list(islice(sample_pairs(labels, 0), 20_000))
    assert time.process_time() - start < 20
    assert len({pair[:2] for pair in drawn}) == 20_000
    assert all(set(labels[pair.source]) & set(labels[pair.target]) for pair in drawn)
    assert {min(pair.target // 10_000, 9) for pair in drawn} == set(range(10))


@given(total=st.integers(1, 3000), key=seeds)
@settings(max_examples=50, deadline=None)
def test_the_permutation_is_one(total, key):
    assert sorted(permute(np.arange(total), total, key).tolist()) == list(range(total))


@given(rank=st.integers(0, 10**12))
@settings(max_examples=200, deadline=None)
def test_pairs_are_numbered_without_a_gap(rank):
    (i,), (j,) = _unrank(np.array([rank]))
    assert 0 <= i < j
    assert j * (j - 1) // 2 + i == rank


@given(source=st.frozensets(st.sampled_from("abc")), target=st.frozensets(st.sampled_from("abc")), r=st.floats(0, 1))
def test_the_label_is_that_of_the_nearer_image(source, target, r):
    if not source & target:
        with pytest.raises(ValueError, match="share no label"):
            interpolated_labels(source, target, r)
        return
    result = interpolated_labels(source, target, r)
    assert result == (source if r <= 0.5 else target)
    if r != 0.5:
        assert result == interpolated_labels(target, source, 1 - r) or 1 - r == 0.5


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan")])
def test_labels_outside_the_path_are_refused(fraction):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        interpolated_labels({"a"}, {"a"}, fraction)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["Effusion", "Effusion"], "a collection, got 'Effusion' for image 0"),
        ([], "No two images"),
        ([{"a"}, {"b"}, set()], "No two images"),
    ],
)
def test_labels_that_make_no_pair_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        sample_pairs(labels)
