"""Statistics of a stream: exact whatever the pieces, merged as one, kept in files with what they are of."""

import os

import pytest
import torch

from diffusers_dino.metrics import FeatureSet, GaussianStatistics, frechet_distance, open_extractor

PIXELS = open_extractor("pixels").spec


def features(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_pieces_and_processes_give_the_statistics_of_the_whole():
    # Far from zero: sums of squares in float64 would be off by 1e-4 here
    data = features(3000).double() * 0.01 + 1e4
    expected = torch.cov(data.T)
    streamed = GaussianStatistics(6)
    for piece in data.split(700):
        streamed.update(piece)
    halves = GaussianStatistics.of(data[:11]).merge(GaussianStatistics.of(data[11:]))
    for statistics in (streamed, halves, GaussianStatistics.of(data)):
        assert statistics.count == 3000
        torch.testing.assert_close(statistics.mean, data.mean(dim=0), rtol=1e-14, atol=0)
        torch.testing.assert_close(statistics.covariance, expected, rtol=1e-7, atol=1e-12)
    before = halves.covariance
    assert torch.equal(halves.merge(GaussianStatistics(6)).update(data[:0]).covariance, before)


def test_what_is_given_is_not_changed():
    data = features(10).double()
    kept = data.clone()
    GaussianStatistics.of(data)
    assert torch.equal(data, kept)


def test_files_keep_numbers_and_description(tmp_path):
    data = FeatureSet(features(300, 256), tuple(map(str, range(300))), PIXELS)
    path = tmp_path / "statistics.safetensors"
    GaussianStatistics.of(data).save(path)
    read = GaussianStatistics.load(path)
    assert (read.count, read.spec) == (300, PIXELS)
    assert frechet_distance(read, data) == pytest.approx(0, abs=1e-9)
    first = path.read_bytes()
    GaussianStatistics.of(data).save(path)
    assert path.read_bytes() == first


def test_what_does_not_fit_is_refused(tmp_path):
    statistics = GaussianStatistics.of(features(9))
    for wrong in (features(9, 5), features(9)[0], features(9) / 0):
        with pytest.raises(ValueError, match=r"dimensions|must be|NaN"):
            statistics.update(wrong)
    with pytest.raises(ValueError, match="5 and of 6"):
        statistics.merge(GaussianStatistics(5))
    with pytest.raises(ValueError, match="two features"):
        GaussianStatistics(6).covariance  # noqa: B018
    with pytest.raises(ValueError, match="says 256 dimensions"):
        GaussianStatistics(6, PIXELS)
    own = FeatureSet(features(9, 256), tuple(map(str, range(9))), PIXELS)
    other = type(PIXELS)(**{**PIXELS.to_dict(), "extractor": "another"})
    with pytest.raises(ValueError, match="another"):
        GaussianStatistics(256, other).update(own)
    with pytest.raises(ValueError, match="another"):
        frechet_distance(GaussianStatistics(256, other).update(own.features), own)
    with pytest.raises(FileNotFoundError):
        GaussianStatistics.load(tmp_path / "none.safetensors")
    for content in (b"", b"no tensors", os.urandom(200)):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="not a file of statistics"):
            GaussianStatistics.load(tmp_path / "bad.safetensors")
    own.save(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="not a file of statistics"):
        GaussianStatistics.load(tmp_path / "set.safetensors")
