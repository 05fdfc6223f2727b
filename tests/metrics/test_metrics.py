"""Metrics against closed forms and independent implementations."""

import numpy as np
import pytest
import torch

from diffusers_dino.metrics import frechet_distance, pixel_features, retrieval_accuracy
from diffusers_dino.metrics.neighbours import nearest_by_cosine


def gaussian(n: int, dimensions: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_of_a_shifted_copy_is_the_squared_shift():
    features = gaussian(500, 8, seed=0)
    shift = torch.arange(8) / 4
    assert frechet_distance(features, features + shift) == pytest.approx(shift.square().sum().item(), abs=1e-9)


def test_frechet_of_a_scaled_copy_has_its_closed_form():
    features = gaussian(500, 8, seed=0)
    features = features - features.mean(dim=0)
    # S2 = 4 S1, so the distance is tr(S1 + 4 S1 - 2 * 2 S1) = tr S1
    assert frechet_distance(features, 2 * features) == pytest.approx(torch.cov(features.T).trace().item(), rel=1e-9)


@pytest.mark.parametrize("samples", [400, 30], ids=["regular", "singular covariance"])
@pytest.mark.filterwarnings("ignore:The Fréchet distance")
def test_frechet_equals_scipy(samples):
    linalg = pytest.importorskip("scipy.linalg")
    a = gaussian(samples, 64, seed=1) @ gaussian(64, 64, seed=2)
    b = gaussian(samples, 64, seed=3) + 0.5
    root = linalg.sqrtm(np.cov(a.T.numpy()) @ np.cov(b.T.numpy())).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-4)


def test_frechet_is_symmetric_and_zero_on_itself():
    a, b = gaussian(100, 16, seed=0), gaussian(80, 16, seed=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_refuses_bad_features():
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.full((4, 2), float("nan")), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="N >= 2"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="do not compare"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))


def test_retrieval_counts_own_sources_only():
    gallery = torch.eye(4)
    queries = gallery[[0, 1, 3, 2]] + 0.1
    assert retrieval_accuracy(queries, gallery) == 0.5
    assert nearest_by_cosine(queries, gallery).tolist() == [0, 1, 3, 2]


def test_retrieval_ignores_what_all_images_share():
    gallery = torch.eye(4) + 1000
    assert retrieval_accuracy(torch.eye(4) * 2 + 999.5, gallery) == 1


def test_retrieval_does_not_depend_on_the_other_queries():
    queries, gallery = gaussian(32, 8, seed=0), gaussian(32, 8, seed=1)
    assert torch.equal(nearest_by_cosine(queries, gallery)[:5], nearest_by_cosine(queries[:5], gallery))


def test_retrieval_refuses_unpaired_sets():
    with pytest.raises(ValueError, match="needs its source"):
        retrieval_accuracy(torch.zeros(3, 2), torch.zeros(4, 2))


def test_pixel_features_are_the_area_means_of_smooth_images():
    ramp = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
    features = pixel_features(ramp, side=16).view(2, 16, 16)
    assert features.shape == (2, 16, 16)
    expected = torch.linspace(0, 1, 64).view(16, 4).mean(1)
    assert torch.allclose(features[0, 3, 1:-1], expected[1:-1], atol=1e-5)


def test_pixel_features_refuse_images_smaller_than_the_thumbnail():
    with pytest.raises(ValueError, match="16 x 16"):
        pixel_features(torch.zeros(1, 1, 8, 8))
