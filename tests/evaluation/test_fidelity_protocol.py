"""The fidelity protocol: rows that carry what they depend on, controls, table and figure, bad input."""

import csv
import io
import warnings
from dataclasses import replace

import pytest
import torch

import tiny
from diffusers_dino.evaluation.fidelity.plot import plot_fidelity
from diffusers_dino.evaluation.fidelity.protocol import (
    LabelledFeatures,
    compare_features,
    generate_features,
    score_fidelity,
)
from diffusers_dino.evaluation.fidelity.result import REAL, FidelityResult, Sampling
from diffusers_dino.evaluation.fidelity.sets import require_disjoint
from diffusers_dino.evaluation.fidelity.table import format_fidelity_table
from diffusers_dino.evaluation.generation import embed_images
from diffusers_dino.metrics import FeatureSet, extract_features, open_extractor
from diffusers_dino.metrics.bootstrap import Bootstrap

PIXELS = open_extractor("pixels")
SAMPLING = Sampling("DDIMScheduler", 2, 1.0, 0, 4)
KEYS = tuple(f"source-{i}" for i in range(8))


def feature_set(n: int, seed: int, shift: float = 0.0, name: str = "") -> FeatureSet:
    features = torch.rand(n, 256, generator=torch.Generator().manual_seed(seed)) + shift
    return FeatureSet(features, tuple(f"{name or seed}-{i}" for i in range(n)), PIXELS.spec)


@pytest.fixture(scope="module")
def result() -> FidelityResult:
    reference, bootstrap = feature_set(20, 0), Bootstrap(repeats=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = []
        for step in (4, 1, 2):
            options = {"step": step, "sampling": SAMPLING, "bootstrap": bootstrap}
            rows.append(score_fidelity(f"checkpoint-{step}", feature_set(16, step, 1 / step), reference, **options))
        rows.append(score_fidelity(REAL, feature_set(16, 9), reference, bootstrap=bootstrap))
    return FidelityResult(tuple(rows))


def test_labels_of_images_that_were_left_out_are_not_counted():
    features = feature_set(8, 0)
    labels = dict.fromkeys(features.keys, frozenset({"A"})) | {"unreadable": frozenset({"B"})}
    images = LabelledFeatures(features, labels)
    found = compare_features({"ours": images}, images, neighbors=2, bootstrap_repeats=2, fewest=4)
    assert [row.label for row in found.by_label] == ["A"]
    assert found.too_few == ()


def test_a_label_of_one_patient_has_no_figures_of_its_own():
    features = feature_set(8, 0)
    labels = dict.fromkeys(features.keys, frozenset({"A"}))
    labels |= dict.fromkeys(features.keys[:4], frozenset({"A", "B"}))
    patients = {key: "one" if "B" in own else key for key, own in labels.items()}
    images = LabelledFeatures(features, labels, patients)
    found = compare_features({"ours": images}, images, neighbors=2, bootstrap_repeats=2, fewest=4)
    assert [row.label for row in found.by_label] == ["A"]
    assert found.too_few == ("B",)


def test_the_table_says_what_was_drawn():
    features = feature_set(8, 0)
    known = LabelledFeatures(features, patients={key: key for key in features.keys})
    unknown = known._replace(patients=None)
    for sets, unit in (((known, known), "patients"), ((unknown, unknown), "images"), ((unknown, known), "images, or")):
        named = dict(zip(("synthetic", "training"), sets, strict=True))
        found = compare_features(named, known, neighbors=2, bootstrap_repeats=2)
        assert f"2 draws of {unit}" in format_fidelity_table(found)


def test_figures_go_to_json_and_back(result, tmp_path):
    result.save(tmp_path / "result.json")
    read = FidelityResult.load(tmp_path / "result.json")
    assert read == result
    row = read.rows[0]
    assert (row.num_images, row.num_reference, row.features, row.sampling) == (16, 20, PIXELS.spec, SAMPLING)
    assert read.row(REAL).sampling is None
    assert row.is_singular


def test_the_nearest_checkpoint_is_the_best(result):
    assert [row.step for row in result.checkpoints] == [1, 2, 4]
    assert result.best_checkpoint("frechet").step == result.best_checkpoint("kernel").step == 4
    assert result.row("nothing") is None
    with pytest.raises(ValueError, match="no checkpoint"):
        FidelityResult(result.rows[3:]).best_checkpoint()


def test_tables_carry_what_figures_depend_on(result):
    markdown, latex = (format_fidelity_table(result, style) for style in ("markdown", "latex"))
    assert f"{result.rows[0].frechet.value:.3g} [" in markdown
    for word in ("16, 20", "pixels", "no weights", "DDIMScheduler, steps: 2", "biased upwards"):
        assert word in markdown
    assert latex.count(r"\\") == 5
    rows = list(csv.DictReader(io.StringIO(format_fidelity_table(result, "csv"))))
    assert [row["images"] for row in rows] == [row.images for row in result.rows]
    assert float(rows[0]["kernel low"]) == result.rows[0].kernel.low
    assert (rows[0]["extractor"], rows[0]["seed"], rows[3]["seed"]) == ("pixels", "0", "")
    with pytest.raises(ValueError, match="not 'html'"):
        format_fidelity_table(result, "html")
    with pytest.raises(ValueError, match="no result"):
        format_fidelity_table(FidelityResult(()))


def test_the_figure_shows_checkpoints_and_controls(result):
    axes = plot_fidelity(result).axes
    assert [list(axis.lines[0].get_xdata()) for axis in axes] == [[1, 2, 4]] * 3
    assert list(axes[0].lines[0].get_ydata()) == [row.frechet.value for row in result.checkpoints]
    assert axes[0].lines[1].get_label() == REAL
    with pytest.raises(ValueError, match="no checkpoint"):
        plot_fidelity(FidelityResult(result.rows[3:]))


def test_noise_depends_on_seed_and_key_alone(pipe):
    tokens = embed_images(pipe, tiny.random_images(8, channels=1))
    whole = generate_features(pipe, tokens, KEYS, PIXELS, SAMPLING, progress=False)
    backwards = generate_features(pipe, tokens.flip(0), KEYS[::-1], PIXELS, replace(SAMPLING, batch_size=3), False)
    torch.testing.assert_close(backwards.select(KEYS).features, whole.features, atol=1e-4, rtol=0)
    other = generate_features(pipe, tokens, KEYS, PIXELS, replace(SAMPLING, seed=1), False)
    assert not torch.allclose(other.features, whole.features, atol=1e-3)
    with pytest.raises(ValueError, match="got 7"):
        generate_features(pipe, tokens, KEYS[:7], PIXELS, SAMPLING)
    with pytest.raises(ValueError, match="has a DDIMScheduler, not the Euler"):
        generate_features(pipe, tokens, KEYS, PIXELS, replace(SAMPLING, scheduler="Euler"))


def test_few_images_are_warned_of_and_the_kernel_distance_is_beside():
    with pytest.warns(UserWarning, match="8 images against 20 are too few for features of 256"):
        scores = score_fidelity("few", feature_set(8, 1), feature_set(20, 2), bootstrap=Bootstrap(repeats=5))
    assert scores.kernel.low < scores.kernel.high


def test_sets_that_do_not_compare_are_refused():
    ours, reference = feature_set(8, 1), feature_set(20, 2)
    other = FeatureSet(reference.features, reference.keys, replace(PIXELS.spec, extractor="xrv", layer="features2"))
    with pytest.raises(ValueError, match=r"'pixels' and 'xrv'.*'features2'"):
        score_fidelity("other", ours, other)
    with pytest.raises(ValueError, match=r"such as '1-0' \(8 keys are in both\)"):
        require_disjoint(ours, feature_set(20, 1))
    require_disjoint(ours, feature_set(20, 2, name="1"))  # other images that happen to have the same names
    require_disjoint(ours, reference)
    with pytest.raises(ValueError, match="N >= 6"):
        score_fidelity("small", feature_set(5, 1), reference, bootstrap=Bootstrap(repeats=5))
    empty = extract_features(PIXELS, torch.empty(0, 1, 32, 32))
    with pytest.raises(ValueError, match=r"got \(0, 256\)"):
        score_fidelity("empty", empty, reference)
