"""Distances, statistics, manifolds and diversity: torch-fidelity, torchmetrics, prdc, closed forms; bad input."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusers_dino.metrics import (
    FeatureSet,
    GaussianStatistics,
    frechet_distance,
    kernel_distance,
    kernel_distance_of_subsets,
    manifold_figures,
    open_extractor,
    vendi_score,
)
from diffusers_dino.metrics import distances as distances_module
from diffusers_dino.metrics import manifolds as manifolds_module
from tiny import gaussian

N, M, D = 400, 300, 24
PIXELS = open_extractor("pixels").spec


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return gaussian(N, D, dtype=torch.float32) @ gaussian(D, D, seed=1, dtype=torch.float32) / D**0.5


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return gaussian(M, D, seed=2, dtype=torch.float32) @ gaussian(D, D, seed=3, dtype=torch.float32) / D**0.5 + 0.3


@pytest.mark.parametrize("rows", [N, 15], ids=["regular", "singular"])
@pytest.mark.filterwarnings("ignore:The Fréchet distance")
def test_frechet_equals_torch_fidelity(features, reference, rows):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(x.double()) for x in (features[:rows], reference)), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(features[:rows], reference) == pytest.approx(theirs, rel=1e-4)


def test_frechet_has_its_closed_forms():
    features = gaussian(500, 8)
    features = features - features.mean(dim=0)
    shift = torch.arange(8) / 4
    assert frechet_distance(features, features + shift) == pytest.approx(shift.square().sum().item(), abs=1e-9)
    # S2 = 4 S1, so the distance is tr(S1 + 4 S1 - 2 * 2 S1) = tr S1
    trace = torch.cov(features.T).trace().item()
    assert frechet_distance(features, 2 * features) == pytest.approx(trace, rel=1e-9)
    assert frechet_distance(2 * features, features) == pytest.approx(trace, rel=1e-9)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)


def test_kernel_distance_equals_torch_fidelity_and_torchmetrics(features, reference):
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    features, reference = features[:M].double(), reference.double()
    ours = kernel_distance(features, reference)
    theirs = kid_features_to_metric(
        features, reference, kid_subsets=1, kid_subset_size=M, kid_kernel_poly_degree=3, verbose=False
    )["kernel_inception_distance_mean"]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours == pytest.approx(poly_mmd(features, reference).item(), rel=1e-4)
    assert kernel_distance_of_subsets(features, reference, 2, M)[0] == pytest.approx(theirs, rel=1e-4)


def test_kernel_distance_is_unbiased_at_any_size():
    values = [kernel_distance(gaussian(10, 64, seed=i), gaussian(7, 64, seed=i + 10_000)) for i in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    mean, deviation = kernel_distance_of_subsets(gaussian(200, 8), gaussian(150, 8, seed=1), 50, 40)
    assert abs(mean) < deviation


@pytest.mark.parametrize("k", [1, 5])
def test_manifold_figures_equal_prdc(features, reference, k, capsys):
    from prdc import compute_prdc

    theirs = compute_prdc(reference.double().numpy(), features.double().numpy(), nearest_k=k)
    ours = manifold_figures(features, reference, k)
    for name, value in theirs.items():
        assert getattr(ours, name) == pytest.approx(value, rel=1e-4)
    assert 0 < ours.precision < 1


def test_blocks_change_nothing(features, reference, monkeypatch):
    whole = manifold_figures(features, reference), kernel_distance(features, reference)
    monkeypatch.setattr(manifolds_module, "_ENTRIES", 1000)
    monkeypatch.setattr(distances_module, "_KERNEL_ENTRIES", 1000)
    assert manifold_figures(features, reference) == whole[0]
    assert kernel_distance(features, reference) == pytest.approx(whole[1], rel=1e-9)


def test_manifolds_tell_invention_from_omission():
    real = torch.cat([gaussian(100, 4), gaussian(100, 4, seed=1) + 20])
    one_mode = manifold_figures(gaussian(200, 4, seed=2), real)
    assert one_mode.precision > 0.9
    assert one_mode.recall < 0.6
    assert one_mode.coverage < 0.6
    invented = manifold_figures(gaussian(200, 4, seed=3) - 20, real)
    assert (invented.precision, invented.density, invented.coverage) == (0, 0, 0)
    assert manifold_figures(real, real).coverage == 1


def test_vendi_counts_directions():
    assert vendi_score(torch.eye(7) * 3) == pytest.approx(7)
    assert vendi_score(torch.ones(50, 3)) == pytest.approx(1)
    assert vendi_score(torch.eye(4).repeat_interleave(25, dim=0)) == pytest.approx(4)  # N > D
    features = gaussian(60, 12).double()
    kernel = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(features).T / 60
    eigenvalues = torch.linalg.eigvalsh(kernel)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi_score(features) == pytest.approx(torch.exp(-(eigenvalues * eigenvalues.log()).sum()).item(), rel=1e-9)
    assert vendi_score(features[:10]) == pytest.approx(vendi_score(torch.cat([features[:10]] * 3)), rel=1e-9)


def test_sets_smaller_than_the_feature_are_warned_of():
    with pytest.warns(UserWarning, match="6 to 30 features of 8 dimensions .* `kernel_distance`"):
        frechet_distance(gaussian(6, 8), gaussian(30, 8, seed=1))
    with pytest.warns(UserWarning, match="singular covariance"):
        frechet_distance(GaussianStatistics.of(gaussian(8, 8)), gaussian(30, 8, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(gaussian(9, 8), gaussian(9, 8, seed=1))


@pytest.mark.parametrize("figure", [frechet_distance, kernel_distance, manifold_figures])
def test_bad_features_are_named(figure):
    good, keys, spec = gaussian(12, 3), tuple(map(str, range(12))), replace(PIXELS, dim=3)
    other = FeatureSet(good, keys, replace(spec, layer="other"))
    for message, ours, theirs in (
        ("NaN", good, torch.full((12, 3), math.nan)),
        (r"N >= \d, got \(0, 3\)", good[:0], good),
        (r"N >= \d, got \(1, 3\)", good[:1], good),
        (r"got \(3,\)", good, good[0]),
        ("3 and of 2 dimensions", good, good[:, :2]),
        ("layer: 'gray values' and 'other'", FeatureSet(good, keys, spec), other),
        ("got list", good.tolist(), good),
    ):
        with pytest.raises(ValueError, match=message):
            figure(ours, theirs)


def test_bad_settings_are_named():
    good = gaussian(12, 3)
    for message, figure, arguments in (
        ("k = 0", manifold_figures, (good, good, 0)),
        ("N >= 13", manifold_figures, (good, good, 12)),
        ("2 to 12", kernel_distance_of_subsets, (good, good, 100, 13)),
        ("1 features are zero", vendi_score, (torch.cat([good, torch.zeros(1, 3)]),)),
        ("N >= 1", vendi_score, (good[:0],)),
    ):
        with pytest.raises(ValueError, match=message):
            figure(*arguments)


def feature_set(n: int) -> FeatureSet:
    return FeatureSet(gaussian(n, 256), tuple(map(str, range(n))), PIXELS)


def test_pieces_give_the_statistics_of_the_whole():
    # Far from zero: sums of squares in float64 would be off by 1e-4 here
    data = gaussian(3000, 6) * 0.01 + 1e4
    expected, kept = torch.cov(data.T), data.clone()
    streamed = GaussianStatistics(6)
    for piece in data.split(700):
        streamed.update(piece)
    for statistics in (streamed, GaussianStatistics.of(data)):
        assert statistics.count == 3000
        torch.testing.assert_close(statistics.mean, data.mean(dim=0), rtol=1e-14, atol=0)
        torch.testing.assert_close(statistics.covariance, expected, rtol=1e-7, atol=1e-12)
    assert torch.equal(data, kept)
    before = streamed.covariance
    assert torch.equal(streamed.update(data[:0]).covariance, before)


def test_files_keep_numbers_and_description(tmp_path):
    data = feature_set(300)
    path = tmp_path / "statistics.safetensors"
    GaussianStatistics.of(data).save(path)
    read = GaussianStatistics.load(path)
    assert (read.count, read.spec) == (300, PIXELS)
    assert frechet_distance(read, data) == pytest.approx(0, abs=1e-9)
    first = path.read_bytes()
    GaussianStatistics.of(data).save(path)
    assert path.read_bytes() == first


def test_what_does_not_fit_is_refused(tmp_path):
    statistics = GaussianStatistics.of(gaussian(9, 6))
    for wrong in (gaussian(9, 5), gaussian(9, 6)[0], gaussian(9, 6) / 0):
        with pytest.raises(ValueError, match=r"dimensions|must be|NaN"):
            statistics.update(wrong)
    with pytest.raises(ValueError, match="two features"):
        GaussianStatistics(6).covariance  # noqa: B018
    with pytest.raises(ValueError, match="says 256 dimensions"):
        GaussianStatistics(6, PIXELS)
    own = feature_set(9)
    other = replace(PIXELS, extractor="another")
    with pytest.raises(ValueError, match="another"):
        GaussianStatistics(256, other).update(own)
    with pytest.raises(ValueError, match="another"):
        frechet_distance(GaussianStatistics(256, other).update(own.features), own)
