import numpy as np
import pytest
from diffusers_dino.evaluation.augmentation.regimes import check_regimes, order_balanced

KEYS = [f"image-{i:03d}" for i in range(300)]


@pytest.fixture
def skewed() -> np.ndarray:
    """`(300, 3)`: 30 of the first label, 90 of the second, 150 of the third, 30 of none."""
    targets = np.zeros((300, 3), dtype=bool)
    targets[:30, 0] = targets[30:120, 1] = targets[120:270, 2] = True
    return targets


def test_every_beginning_is_balanced(skewed):
    order = order_balanced(skewed, KEYS, 300)
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
    counts = targets[order_balanced(targets, KEYS[:100], 30)].sum(axis=0)
    assert counts[1] == counts[2]
    assert counts[0] + counts[2] == 30
    assert counts[0] >= counts[1]


def test_the_order_follows_from_keys_and_seed_alone(skewed):
    shuffle = np.random.default_rng(0).permutation(300)
    here = order_balanced(skewed, KEYS, 100, seed=3)
    there = order_balanced(skewed[shuffle], [KEYS[i] for i in shuffle], 100, seed=3)
    assert [KEYS[i] for i in here] == [KEYS[shuffle[i]] for i in there]
    assert np.array_equal(here[:40], order_balanced(skewed, KEYS, 40, seed=3))
    assert not np.array_equal(here, order_balanced(skewed, KEYS, 100, seed=4))


def test_a_regime_larger_than_the_data_names_the_numbers():
    with pytest.raises(ValueError, match=r"regime of 500 images .* fold 1 \(420 images\).* up to 420 images"):
        check_regimes([500, 50], [600, 420])
    for bad in ([], [0, 10], [50, 50]):
        with pytest.raises(ValueError, match="Regimes are different numbers"):
            check_regimes(bad, [100])
    check_regimes([420, 50], [600, 420])
    with pytest.raises(ValueError, match="5 images cannot be taken from 3"):
        order_balanced(np.ones((3, 1), dtype=bool), KEYS[:3], 5)
    with pytest.raises(ValueError, match="targets"):
        order_balanced(np.ones((3, 1), dtype=bool), KEYS[:4], 2)
