import numpy as np
import pytest

from diffusers_dino.evaluation.augmentation.cells import INTERPOLATION, RECONSTRUCTION
from diffusers_dino.evaluation.augmentation.plans import plan_regimes
from diffusers_dino.synthesis import SynthesisError

KEYS = [f"k{i:03d}" for i in range(40)]
LABELS = [frozenset({"ABCD"[i % 4], "ABCD"[(i // 4) % 4]}) for i in range(40)]
REGIMES = [10, 20, 40]


@pytest.fixture(params=[RECONSTRUCTION, INTERPOLATION])
def planned(request):
    return plan_regimes(request.param, KEYS, LABELS, REGIMES, 4, seed=1)


def test_a_regime_is_synthesised_from_its_own_images_alone(planned):
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
    with pytest.raises(ValueError, match="'reconstruction' or 'interpolation', got 'magic'"):
        plan_regimes("magic", KEYS, LABELS, [4], 1)
