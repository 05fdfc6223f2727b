"""Dice and the best union against independent implementations, and their conventions."""

import itertools

import pytest
import torch
from sklearn.metrics import f1_score

from diffusers_dino.metrics.dice import best_union, dice, union_of


def random_masks(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def test_dice_agrees_with_scikit_learn():
    prediction, target = random_masks(5, 12, 9), random_masks(5, 12, 9, seed=1)
    expected = [f1_score(t.flatten(), p.flatten()) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(dice(prediction, target), torch.tensor(expected, dtype=torch.float64))


def test_empty_masks_agree_only_with_each_other_and_masks_must_fit():
    empty, some = torch.zeros(4, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
    assert dice(empty, empty) == 1
    assert dice(empty, some) == dice(some, empty) == 0
    assert dice(some, some) == 1
    mask = random_masks(6, 6)
    with pytest.raises(ValueError, match=r"one size.*\(6, 6\) and \(6, 5\)"):
        dice(mask, mask[:, :5])
    with pytest.raises(ValueError, match="target is torch"):
        dice(mask, mask.long())


@pytest.mark.parametrize("seed", range(5))
def test_best_union_is_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    segments = torch.randint(7, (16, 16), generator=generator)
    segments[segments == 3] = 5  # a number that no pixel has
    target = random_masks(16, 16, seed=seed)
    choices = [c for n in (1, 2) for c in itertools.combinations(range(7), n)]
    best = max(dice(union_of(segments, choice), target).item() for choice in choices)
    found = best_union(segments, target)
    assert found.dice == pytest.approx(best, abs=1e-12)
    assert dice(union_of(segments, found.segments), target).item() == pytest.approx(best, abs=1e-12)
    assert len(found.segments) <= 2


def test_a_perfect_segment_is_taken_alone_and_what_does_not_fit_is_refused():
    segments = torch.tensor([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    assert best_union(segments, segments == 0) == (1.0, (0,))
    assert best_union(segments, segments != 0) == (1.0, (1, 2))
    assert best_union(segments, torch.zeros(3, 3, dtype=torch.bool)).dice == 0
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(3, 2\)"):
        best_union(segments, torch.zeros(3, 2, dtype=torch.bool))
