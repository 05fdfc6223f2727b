"""Nearest training images, relative distances, thresholds and authenticity against direct computation."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_dino.metrics import neighbours, retrieval_accuracy
from diffusers_dino.metrics.bootstrap import share_interval
from diffusers_dino.metrics.extractors.thumbnails import local_contrast_features
from diffusers_dino.metrics.neighbours import (
    authenticity,
    calibrate_threshold,
    nearest_by_cosine,
    nearest_training,
    relative_distances,
    typical_distances,
)
from tiny import gaussian


def direct(views: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """All distances `(N, M)`, of the nearest view."""
    return (views.double()[:, :, None] - training.double()[None, None]).norm(dim=-1).amin(dim=0)


def relative(queries: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    return relative_distances(nearest_training(queries, training), typical_distances(queries, training))


@pytest.mark.parametrize(("chunk", "tile"), [(1024, 8192), (7, 11), (1, 50), (50, 1)])
def test_neighbours_are_those_of_all_distances(monkeypatch, chunk, tile):
    monkeypatch.setattr(neighbours, "_CHUNK", chunk)
    monkeypatch.setattr(neighbours, "_TILE", tile)
    views, training = gaussian(2, 20, 16), gaussian(50, 16, seed=1)
    expected = direct(views, training).min(dim=1)
    found = nearest_training(views, training)
    assert torch.allclose(found.distance, expected.values, atol=1e-12)
    assert torch.equal(found.index, expected.indices)
    own = (views.double()[found.view, torch.arange(20)] - training.double()[found.index]).norm(dim=1)
    assert torch.allclose(own, found.distance)


def test_images_of_one_group_are_not_compared(monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE", 4)
    features = gaussian(30, 8)
    patients = [f"p{i // 3}" for i in range(30)]
    same = torch.tensor([[a == b for b in patients] for a in patients])
    expected = direct(features[None], features).masked_fill(same, torch.inf).min(dim=1)
    found = nearest_training(features, features, groups=patients, training_groups=patients)
    assert torch.allclose(found.distance, expected.values)
    assert torch.equal(found.index, expected.indices)


def test_an_answer_does_not_depend_on_the_other_images():
    queries, training = gaussian(2, 65, 128), gaussian(500, 128, seed=1)
    together = nearest_training(queries, training)
    for row in (0, 31, 64):
        alone = nearest_training(queries[:, row : row + 1], training)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


def test_relative_distance_is_of_the_nearest_tenth():
    training, query = torch.arange(1, 101)[:, None].float(), torch.zeros(1, 1)
    assert typical_distances(query, training).item() == pytest.approx(10)
    assert relative(query, training).item() == pytest.approx(0.1)


def test_copies_within_the_training_set_do_not_hide_a_copy():
    training = gaussian(400, 32)
    query = training[:1] + 0.05 * gaussian(1, 32, seed=1)
    once = relative(query, training)
    training[1:21] = training[0]
    assert relative(query, training).item() == pytest.approx(once.item(), rel=0.1)  # not 1, as beside its own copies


def test_copies_have_distance_zero_also_far_from_the_origin_and_among_equals():
    for training in (gaussian(300, 64) + 1e4, torch.ones(40, 4)):
        assert (relative(training[::3], training) == 0).all()


def test_false_alarms_are_as_rare_as_was_promised():
    """Of uniform distances the threshold itself is the share that lies below it."""
    scores = torch.rand(2000, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    thresholds = torch.tensor([calibrate_threshold(row, 0.05) for row in scores])
    assert 0.02 < (thresholds > 0.05).double().mean() <= 0.055
    assert thresholds.mean() > 0.02  # and not smaller than need be


@pytest.mark.parametrize(("n", "share"), [(299, 0.01), (298, 0.01), (568, 0.01), (59, 0.05), (5000, 0.001)])
def test_the_rank_of_the_threshold_equals_scipy(n, share):
    stats = pytest.importorskip("scipy.stats")
    rank = sum(stats.binom.cdf(r, n, share) <= 0.05 for r in range(n))
    real = torch.arange(1.0, n + 1)
    if rank:
        assert calibrate_threshold(real, share) == rank
    else:
        with pytest.raises(ValueError, match="it takes 299"):
            calibrate_threshold(real, share)


def test_thresholds_that_would_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="exact copies"):
        calibrate_threshold(torch.tensor([0.0] * 3 + [0.5] * 97), 0.05)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        calibrate_threshold(torch.rand(200), 1)
    with pytest.raises(ValueError, match="NaN"):
        calibrate_threshold(torch.tensor([float("nan")] * 200))


def test_authenticity_equals_its_definition():
    generated, training = gaussian(60, 4), gaussian(50, 4, seed=1)
    spacing = direct(training[None], training).fill_diagonal_(torch.inf).amin(dim=1)
    distances = direct(generated[None], training)
    expected = [bool(row.min() > spacing[row.argmin()]) for row in distances]
    assert authenticity(nearest_training(generated, training), spacing).tolist() == expected
    assert not authenticity(nearest_training(training, training), spacing).any()


@pytest.mark.parametrize(("count", "n"), [(0, 100), (3, 100), (50, 100), (100, 100), (1, 1)])
def test_intervals_of_shares_equal_scipy(count, n):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert tuple(share_interval(count, n)) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bad_features_are_refused():
    good = torch.rand(30, 4)
    for bad in (torch.rand(0, 4), torch.rand(30, 5), torch.rand(30)):
        with pytest.raises(ValueError, match=r"nothing to compare|of the same extractor"):
            nearest_training(bad, good)
        with pytest.raises(ValueError, match=r"nothing to compare|of the same extractor"):
            typical_distances(good, bad)
    nan = good.masked_fill(good > 0.9, float("nan"))
    one = {"groups": ["one"] * 30, "training_groups": ["one"] * 30}
    for message, training, options in (
        ("training features hold NaN", nan, {}),
        ("a group for each of 30 images", good, {"groups": range(30)}),
        ("a group for each of 30 images", good, {"groups": range(29), "training_groups": range(30)}),
        ("30 images have no training image of another group", good, one),
    ):
        with pytest.raises(ValueError, match=message):
            nearest_training(good, training, **options)
    with pytest.raises(ValueError, match="At least 11"):
        typical_distances(good, good[:10])
    with pytest.raises(ValueError, match="at least one image"):
        share_interval(0, 0)


def test_local_contrast_sees_what_is_shown_and_not_how_bright():
    images = F.interpolate(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 64, mode="bicubic")
    images = 0.25 + 0.5 * images.clamp(0, 1)
    features = local_contrast_features(images)
    assert torch.allclose(features.norm(dim=1), torch.ones(8))
    darker = local_contrast_features(0.7 * images.expand(-1, 3, -1, -1) - 0.1)
    assert ((features - darker).norm(dim=1) < 0.15 * torch.cdist(features, features).fill_diagonal_(9).amin()).all()
    assert local_contrast_features(torch.full((1, 1, 64, 64), 0.3)).norm() < 1e-3


def test_retrieval_counts_own_sources_and_ignores_what_all_images_share():
    gallery = torch.eye(4)
    queries = gallery[[0, 1, 3, 2]] + 0.1
    assert retrieval_accuracy(queries, gallery) == 0.5
    assert nearest_by_cosine(queries, gallery).tolist() == [0, 1, 3, 2]
    assert retrieval_accuracy(torch.eye(4) * 2 + 999.5, torch.eye(4) + 1000) == 1
    queries, gallery = gaussian(32, 8, seed=0), gaussian(32, 8, seed=1)
    assert torch.equal(nearest_by_cosine(queries, gallery)[:5], nearest_by_cosine(queries[:5], gallery))
    with pytest.raises(ValueError, match="needs its source"):
        retrieval_accuracy(torch.zeros(3, 2), torch.zeros(4, 2))
