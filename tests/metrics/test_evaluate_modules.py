"""The evaluation modules as `evaluate` loads them: from a path, without a network, a batch at a time."""

import evaluate
import pytest
import torch

from diffusers_dino.metrics import (
    FeatureSet,
    GaussianStatistics,
    frechet_distance,
    kernel_distance,
    manifold_figures,
    open_extractor,
    vendi_score,
)
from diffusers_dino.metrics.evaluate_modules import module_path

SPEC = open_extractor("pixels").spec


@pytest.fixture
def load(tmp_path):
    """`evaluate.load` with caches of its own."""

    def load(name: str, *config: str) -> evaluate.EvaluationModule:
        return evaluate.load(module_path(name), *config, cache_dir=str(tmp_path / "cache"))

    return load


def features(n: int, seed: int, d: int = 256) -> torch.Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed))


def test_distances_of_batches_are_those_of_the_whole(load):
    ours, real = features(40, 0, 6), features(40, 1, 6) + 0.2
    figures = manifold_figures(ours, real, 3)
    counts = {"num_predictions": 40, "num_references": 40}
    frechet = {"frechet_distance": frechet_distance(ours, real), "kernel_distance": kernel_distance(ours, real)}
    for name, options, expected in (
        ("frechet_distance", {}, frechet),
        ("kernel_distance", {}, {"kernel_distance": kernel_distance(ours, real)}),
        ("manifold_figures", {"k": 3}, {**vars(figures)}),
    ):
        module = load(name)
        for rows in torch.arange(40).split(15):
            module.add_batch(predictions=ours[rows], references=real[rows].numpy())
        assert module.compute(**options) == pytest.approx({**expected, **counts})


def test_vendi_needs_no_reference(load):
    ours = features(20, 0, 6)
    module = load("vendi_score")
    module.add_batch(predictions=ours)
    assert module.compute() == pytest.approx({"vendi_score": vendi_score(ours), "num_predictions": 20})


@pytest.mark.filterwarnings("ignore:The Fréchet distance")
def test_a_reference_may_come_from_a_file(load, tmp_path):
    ours, real = features(12, 0), FeatureSet(features(30, 1), tuple(map(str, range(30))), SPEC)
    real.save(tmp_path / "set.safetensors")
    GaussianStatistics.of(real).save(tmp_path / "statistics.safetensors")
    for file in ("set", "statistics"):
        module = load("frechet_distance", "from_file")
        module.add_batch(predictions=ours)
        figures = module.compute(reference_file=str(tmp_path / f"{file}.safetensors"))
        assert figures["frechet_distance"] == pytest.approx(frechet_distance(ours, real), rel=1e-6)
        assert (figures["num_predictions"], figures["num_references"]) == (12, 30)
        assert ("kernel_distance" in figures) == (file == "set")
    for name in ("kernel_distance", "manifold_figures"):
        figures = load(name, "from_file").compute(predictions=ours, reference_file=tmp_path / "set.safetensors")
        assert figures["num_references"] == 30


def test_a_damaged_file_is_told_as_either_kind(load, tmp_path):
    (tmp_path / "damaged").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"(?s)As statistics: .*As features: "):
        load("frechet_distance", "from_file").compute(predictions=features(5, 0), reference_file=tmp_path / "damaged")


def test_what_cannot_be_measured_is_said(load):
    with pytest.warns(UserWarning, match="singular"):
        load("frechet_distance").compute(predictions=features(5, 0), references=features(5, 1))
    with pytest.raises(ValueError, match="needs `reference_file`"):
        load("kernel_distance", "from_file").compute(predictions=features(5, 0))
    with pytest.raises(ValueError, match='"from_file"'):
        load("kernel_distance").compute(predictions=features(5, 0), references=features(5, 1), reference_file="x")
    with pytest.raises(ValueError, match="rows of 2, 3 numbers"):
        load("vendi_score").compute(predictions=[[1.0, 2.0], [1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="one of frechet_distance"):
        module_path("fid")
