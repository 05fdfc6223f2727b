"""Nested, balanced regimes of real images, and the synthetic images that are planned for them."""

from collections import Counter

import numpy as np
import pytest

from diffusers_dino.data.labels import LabelTable
from diffusers_dino.evaluation.augmentation.cells import BALANCED, IDENTICAL, INTERPOLATION, PRIOR, RECONSTRUCTION
from diffusers_dino.evaluation.augmentation.plans import order_balanced, plan_regimes, split_folds
from diffusers_dino.synthesis import SynthesisError

KEYS = [f"k{i:03d}" for i in range(40)]
LABELS = [frozenset({"ABCD"[i % 4], "ABCD"[(i // 4) % 4]}) for i in range(40)]
REGIMES = [10, 20, 40]
MANY = [f"image-{i:03d}" for i in range(300)]


@pytest.fixture(params=[RECONSTRUCTION, INTERPOLATION])
def planned(request):
    return plan_regimes(request.param, KEYS, LABELS, REGIMES, 4, seed=1)


def test_a_regime_is_synthesised_only_from_its_own_images(planned):
    for regime in REGIMES:
        images = [planned.plan[int(number)] for number in planned.images[regime]]
        assert len(images) == regime * 4
        assert len({image.key for image in images}) == len(images)
        sources = {key for image in images for key in image.sources}
        assert sources <= set(KEYS[:regime])
        assert len(sources) >= 0.9 * regime
        assert all(image.labels for image in images)


def test_what_a_regime_needs_is_shared_and_sampled_once(planned):
    used = np.concatenate(list(planned.images.values()))
    assert sorted(set(used.tolist())) == list(range(len(planned.plan)))  # nothing is sampled in vain
    assert len(planned.plan) < 4 * sum(REGIMES)
    inner = set(planned.images[10][:10].tolist()) & set(planned.images[20].tolist())
    assert inner


def test_reconstruction_has_each_source_once_in_each_unit_of_the_ratio():
    planned = plan_regimes(RECONSTRUCTION, KEYS, LABELS, REGIMES, 4)
    assert len(planned.plan) == 160
    for ratio in range(1, 5):
        numbers = planned.images[20][: 20 * ratio].tolist()
        sources = [planned.plan[number].sources[0] for number in numbers]
        assert sorted(sources) == sorted(KEYS[:20] * ratio)


@pytest.mark.parametrize("strategy", [PRIOR, BALANCED])
def test_a_prior_is_asked_for_the_labels_of_each_regime_and_shared_by_regimes(strategy):
    planned = plan_regimes(strategy, KEYS, LABELS, REGIMES, 4, names=list("ABCDE"))
    assert len(planned.plan) < sum(len(own) for own in planned.images.values())
    for regime in REGIMES:
        for ratio in (1, 4):
            numbers = planned.images[regime][: regime * ratio].tolist()
            assert len(set(numbers)) == regime * ratio
            asked = [frozenset(planned.plan[number].labels) for number in numbers]
            if strategy == PRIOR:
                assert Counter(asked) == Counter(LABELS[:regime] * ratio)
            assert set(asked) <= set(LABELS[:regime])
    with pytest.raises(SynthesisError, match="none of the labels"):
        plan_regimes(BALANCED, KEYS, LABELS, [4], 1, names=["Z"])


def test_identical_pairs_have_the_very_same_labels():
    planned = plan_regimes(IDENTICAL, KEYS, LABELS, [40, 20], 2)
    of = dict(zip(KEYS, LABELS, strict=True))
    for image in planned.plan:
        assert of[image.sources[0]] == of[image.sources[1]] == set(image.labels)


def test_pairs_within_a_smaller_regime_are_as_frequent_as_by_chance():
    labels = [frozenset("A")] * 40  # every two images are a pair
    planned = plan_regimes(INTERPOLATION, KEYS, labels, [20, 40], 19)
    pairs = [frozenset(planned.plan[int(number)].sources) for number in planned.images[40]]
    assert len(set(pairs)) == 40 * 19  # 780 pairs: none comes again before all have come
    within = sum(pair <= set(KEYS[:20]) for pair in pairs)
    assert within / len(pairs) == pytest.approx(190 / 780, abs=0.02)
    assert len(set(planned.images[20].tolist()) & set(planned.images[40].tolist())) == within


def test_plans_are_functions_of_the_seed(planned):
    strategy = planned.plan.strategy
    again = plan_regimes(strategy, KEYS, LABELS, REGIMES, 4, seed=1)
    assert again.plan.digest == planned.plan.digest
    assert all(np.array_equal(again.images[regime], planned.images[regime]) for regime in REGIMES)
    assert plan_regimes(strategy, KEYS, LABELS, REGIMES, 4, seed=2).plan.digest != planned.plan.digest
    longer = plan_regimes(strategy, KEYS, LABELS, REGIMES, 6, seed=1)
    for regime in REGIMES:  # a larger ratio begins with the same images
        first = [planned.plan[int(n)][2:] for n in planned.images[regime]]
        assert [longer.plan[int(n)][2:] for n in longer.images[regime][: regime * 4]] == first


def test_what_cannot_be_planned_is_said():
    with pytest.raises(SynthesisError, match="regime of 2 images cannot be interpolated"):
        plan_regimes(INTERPOLATION, KEYS[:4], [{"A"}, {"B"}, {"A"}, {"B"}], [2, 4], 1)
    with pytest.raises(ValueError, match="cannot be planned from 40 images"):
        plan_regimes(RECONSTRUCTION, KEYS, LABELS, [41], 1)
    with pytest.raises(ValueError, match="by the strategy 'magic'"):
        plan_regimes("magic", KEYS, LABELS, [4], 1)


@pytest.fixture
def skewed() -> np.ndarray:
    """`(300, 3)`: 30 of the first label, 90 of the second, 150 of the third, 30 of none."""
    targets = np.zeros((300, 3), dtype=bool)
    targets[:30, 0] = targets[30:120, 1] = targets[120:270, 2] = True
    return targets


def test_every_beginning_is_balanced(skewed):
    order = order_balanced(skewed, MANY, 300)
    assert sorted(order) == list(range(300))
    for size in (8, 40, 120):
        counts = skewed[order[:size]].sum(axis=0)
        assert counts.max() - counts.min() <= 1
        assert (~skewed[order[:size]].any(axis=1)).sum() in (size // 4, size // 4 + 1)
    counts = skewed[order[:240]].sum(axis=0)  # two labels have run out
    assert counts.tolist() == [30, 90, 90]


def test_labels_that_come_together_are_balanced_as_far_as_possible():
    targets = np.zeros((100, 3), dtype=bool)
    targets[:50, 2] = True  # No Finding
    targets[50:, 0] = True  # every other image has the first label, some the second, too
    targets[50:70, 1] = True
    counts = targets[order_balanced(targets, MANY[:100], 30)].sum(axis=0)
    assert counts[1] == counts[2]
    assert counts[0] + counts[2] == 30
    assert counts[0] >= counts[1]


def test_the_order_follows_only_from_keys_and_seed(skewed):
    shuffle = np.random.default_rng(0).permutation(300)
    here = order_balanced(skewed, MANY, 100, seed=3)
    there = order_balanced(skewed[shuffle], [MANY[i] for i in shuffle], 100, seed=3)
    assert [MANY[i] for i in here] == [MANY[shuffle[i]] for i in there]
    assert np.array_equal(here[:40], order_balanced(skewed, MANY, 40, seed=3))
    assert not np.array_equal(here, order_balanced(skewed, MANY, 100, seed=4))


def test_regimes_that_cannot_be_are_refused():
    table = LabelTable(tuple(KEYS), (frozenset("A"),) * 40, tuple(KEYS))
    folds = np.repeat([0, 1], [10, 30])
    with pytest.raises(ValueError, match=r"regime of 15 images .* fold 1 \(10 images\).* up to 10 images"):
        split_folds(table, ("A",), folds, [15, 5], validation_fraction=0)
    for bad in ([], [0, 10], [5, 5]):
        with pytest.raises(ValueError, match="Regimes are different numbers"):
            split_folds(table, ("A",), folds, bad)
    with pytest.raises(ValueError, match="5 images cannot be taken from 3"):
        order_balanced(np.ones((3, 1), dtype=bool), KEYS[:3], 5)
    with pytest.raises(ValueError, match="targets"):
        order_balanced(np.ones((3, 1), dtype=bool), KEYS[:4], 2)
