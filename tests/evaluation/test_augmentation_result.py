"""Cells of the classification grid as files, and the table of cells whose truth is known, whole and with gaps."""

import csv
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from diffusers_dino.evaluation.augmentation.cells import CellFacts, CellResult, CellSpec, grid_of, load_cells
from diffusers_dino.evaluation.augmentation.plot import plot_augmentation, plot_differences
from diffusers_dino.evaluation.augmentation.result import AugmentationResult, summarise
from diffusers_dino.evaluation.augmentation.table import (
    format_augmentation_table,
    significance_mark,
)
from diffusers_dino.metrics.auroc import corrected_t_test

LABELS = ("Effusion & more", "No Finding")
NUM_FOLDS, NUM_TEST = 5, 60
GRID = grid_of([40, 200], [1, 5], NUM_FOLDS)
GAIN = {("interpolation", "augmentation", 5): 1.5, ("reconstruction", "full-synthetic", 1): -1.0}
FACTS = CellFacts(40, 40, 10, 100, 50, 0.6, 1.0, 3, "digest", "plan", "tiny", "cpu")


def make_cell(spec: CellSpec) -> CellResult:
    """A classifier of known skill: configurations of one fold see the same images, and blunder alike."""
    shared = np.random.default_rng(spec.fold)
    targets = shared.random((NUM_TEST, len(LABELS))) < 0.4
    noise = shared.normal(size=targets.shape)
    own = np.random.default_rng([spec.fold, spec.regime, spec.ratio, len(spec.strategy), len(spec.mode)])
    skill = 0.8 + GAIN.get((spec.strategy, spec.mode, spec.ratio), 0.0)
    scores = skill * targets + noise + 0.2 * own.normal(size=targets.shape)
    return CellResult(
        spec,
        LABELS,
        tuple(f"{spec.fold}-{i}" for i in range(NUM_TEST)),
        tuple(f"p{spec.fold}-{i // 2}" for i in range(NUM_TEST)),
        (1 / (1 + np.exp(-scores))).astype(np.float32),
        targets,
        FACTS,
    )


CELLS = {spec: make_cell(spec) for spec in GRID}


@pytest.fixture(scope="module")
def result() -> AugmentationResult:
    return summarise(list(CELLS.values()), GRID, repeats=200)


@pytest.fixture(scope="module")
def partial() -> AugmentationResult:
    """One fold of a configuration, and one of the small regime's baseline, are missing; another has not begun."""
    missing = {
        CellSpec("interpolation", "augmentation", 5, 200, 2),
        CellSpec("real", "real", 0, 40, 1),
        *(CellSpec("reconstruction", "augmentation", 1, 200, fold) for fold in range(NUM_FOLDS)),
    }
    return summarise([cell for spec, cell in CELLS.items() if spec not in missing], GRID, repeats=50)


def find(result: AugmentationResult, strategy: str, mode: str, ratio: int, regime: int):
    (row,) = (
        r for r in result.configurations if (r.strategy, r.mode, r.ratio, r.regime) == (strategy, mode, ratio, regime)
    )
    return row


def fold_aurocs(kind: tuple[str, str, int], regime: int) -> np.ndarray:
    """`(folds, L)` by scikit-learn."""
    cells = [CELLS[CellSpec(*kind, regime, fold)] for fold in range(NUM_FOLDS)]
    return np.array([roc_auc_score(cell.targets, cell.probabilities, average=None) for cell in cells])


def test_a_cell_is_read_as_it_was_written(tmp_path):
    spec = CellSpec("interpolation", "augmentation", 5, 200, 3)
    cell = replace(CELLS[spec], facts=replace(FACTS, validation_auroc=float("nan")))
    path = cell.save(tmp_path)
    assert path.name == "interpolation-augmentation-1to5-regime200-fold3.safetensors"
    found = CellResult.load(path)
    assert (found.spec, found.labels, found.keys, found.patients) == (spec, LABELS, cell.keys, cell.patients)
    assert np.array_equal(found.probabilities, cell.probabilities)
    assert np.array_equal(found.targets, cell.targets)
    assert np.isnan(found.facts.validation_auroc)
    assert replace(found.facts, validation_auroc=FACTS.validation_auroc) == FACTS
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_cells_that_are_none_are_refused(tmp_path):
    for bad in (("real", "augmentation", 1), ("interpolation", "augmentation", 0), ("magic", "real", 0)):
        with pytest.raises(ValueError, match="There is no cell"):
            CellSpec(*bad, 50, 0)
    cell = CELLS[GRID[0]]
    with pytest.raises(ValueError, match="do not fit probabilities"):
        replace(cell, keys=("k1",))
    for bad in (float("nan"), 1.5):
        with pytest.raises(ValueError, match="did training diverge"):
            replace(cell, probabilities=np.full_like(cell.probabilities, bad))
    path = cell.save(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-NUM_TEST * len(LABELS) - 2] ^= 1  # a probability's last byte
    for damaged in (whole[:-1], whole[:40], b"", whole.replace(b"facts", b"fakts"), bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{cell.spec.name}.*is not a whole cell"):
            CellResult.load(path)


def test_cells_of_a_folder_are_in_the_order_of_the_grid(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cell"):
        load_cells(tmp_path)
    for cell in CELLS.values():
        cell.save(tmp_path)
    assert [one.spec for one in load_cells(tmp_path)] == sorted(CELLS)


def test_figures_are_means_of_folds_and_differences_are_paired(result):
    kind = ("interpolation", "augmentation", 5)
    row = find(result, *kind, 200)
    own, base = fold_aurocs(kind, 200), fold_aurocs(("real", "real", 0), 200)
    assert row.macro == pytest.approx(own.mean(axis=1))
    assert (row.mean, row.sd) == pytest.approx((own.mean(), own.mean(axis=1).std(ddof=1)))
    gaps = (own - base).mean(axis=1)
    test = corrected_t_test(gaps, NUM_FOLDS)
    assert tuple(test) == pytest.approx(
        (row.difference.mean, row.difference.low, row.difference.high, row.difference.p)
    )
    t = gaps.mean() / (gaps.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4))
    assert row.difference.p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    label = row.labels[1]
    assert label.folds == pytest.approx(own[:, 1])
    assert label.difference.mean == pytest.approx((own - base)[:, 1].mean())
    assert (row.num_images, row.num_patients) == (NUM_FOLDS * NUM_TEST, NUM_FOLDS * NUM_TEST // 2)
    assert row.difference.patients_low < row.difference.mean < row.difference.patients_high


def test_a_planted_gain_is_found_and_nothing_else(result):
    for row in result.configurations:
        planted = GAIN.get((row.strategy, row.mode, row.ratio), 0)
        if row.is_baseline:
            assert row.difference is None
        elif planted:
            assert np.sign(row.difference.mean) == np.sign(planted)
            assert row.difference.corrected_p < 0.05
            assert row.difference.low * row.difference.high > 0
        else:
            assert row.difference.corrected_p > 0.05
            assert significance_mark(row.difference) == ""


def test_p_values_are_corrected_over_the_whole_table(result):
    tested = [row.difference for row in result.configurations if row.difference]
    assert result.num_tests == len(tested) == 16
    smallest = min(tested, key=lambda d: d.p)
    assert smallest.corrected_p == pytest.approx(16 * smallest.p)
    labels = [label.difference for row in result.configurations for label in row.labels if label.difference]
    assert len(labels) == 32
    assert min(d.corrected_p for d in labels) == pytest.approx(32 * min(d.p for d in labels))


def test_the_order_of_cells_and_of_images_changes_nothing(result):
    cells = []
    for spec, cell in reversed(CELLS.items()):
        order = np.random.default_rng(spec.ratio).permutation(NUM_TEST)
        keys, patients = (tuple(texts[i] for i in order) for texts in (cell.keys, cell.patients))
        arrays = {"probabilities": cell.probabilities[order], "targets": cell.targets[order]}
        cells.append(replace(cell, keys=keys, patients=patients, **arrays))
    other = summarise(cells, GRID, repeats=50)
    for one, two in zip(result.configurations, other.configurations, strict=True):
        assert one.macro == pytest.approx(two.macro, abs=1e-12)
        assert one.is_baseline or one.difference.p == pytest.approx(two.difference.p)


def test_results_go_to_json_and_back(result, partial, tmp_path):
    for one in (result, partial):
        one.save(tmp_path / "result.json")
        assert AugmentationResult.load(tmp_path / "result.json") == one


def test_what_is_unfinished_has_no_mean(partial, result):
    row = find(partial, "interpolation", "augmentation", 5, 200)
    assert (row.folds, len(row.macro)) == ((0, 1, 3, 4), 4)
    assert row.mean is row.sd is row.difference is row.labels[0].mean is None
    begun = find(partial, "reconstruction", "augmentation", 1, 200)
    assert (begun.folds, begun.labels, begun.mean) == ((), (), None)
    small = [row for row in partial.configurations if row.regime == 40 and not row.is_baseline]
    assert all(row.mean is not None and row.difference is None for row in small)  # their baseline is not finished
    assert len(partial.missing) == 7
    assert "real-regime40-fold1" in partial.missing
    known = find(partial, "reconstruction", "full-synthetic", 1, 200).difference
    whole = find(result, "reconstruction", "full-synthetic", 1, 200).difference
    assert partial.num_tests == 16  # as many as were planned
    assert known.corrected_p >= whole.corrected_p  # what is significant now stays so


def test_markdown_shows_figures_differences_and_gaps(result, partial):
    text = format_augmentation_table(result, "markdown")
    row = find(result, "interpolation", "augmentation", 5, 200)
    for figure in (row.mean, row.sd, row.difference.mean, row.difference.low):
        assert f"{figure:.3f}" in text
    assert "Unfinished" not in text
    gaps = format_augmentation_table(partial, "markdown")
    assert (gaps.count("4 of 5 folds"), gaps.count("0 of 5 folds")) == (2, 1)
    assert "7 cells are missing" in gaps


def test_csv_holds_every_figure(result, partial):
    lines = list(csv.DictReader(format_augmentation_table(result, "csv").splitlines()))
    assert len(lines) == 3 * len(result.configurations)
    row = find(result, "interpolation", "augmentation", 5, 200)
    line = next(
        line
        for line in lines
        if (line["strategy"], line["mode"], line["ratio"], line["regime"], line["label"])
        == ("interpolation", "augmentation", "5", "200", "macro")
    )
    assert float(line["difference_corrected_p"]) == row.difference.corrected_p
    assert [float(line[f"fold_{fold}"]) for fold in range(5)] == list(row.macro)
    lines = list(csv.DictReader(format_augmentation_table(partial, "csv").splitlines()))
    unfinished = next(x for x in lines if x["finished_folds"] == "4" and x["label"] == "macro" and x["ratio"] == "5")
    assert (unfinished["mean"], unfinished["fold_2"]) == ("", "")
    assert unfinished["fold_3"] != ""


def test_latex_is_balanced_and_escaped(result, partial):
    for one in (result, partial):
        text = format_augmentation_table(one, "latex")
        assert text.count("{") == text.count("}")
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert all(len(re.findall(r"(?<!\\)&", row)) == 6 for row in rows[1:])  # the first one spans columns
        assert r"Effusion \& more" in text
        assert not re.search(r"(?<!\\)%", text)


def test_stars_grow_with_certainty(result):
    difference = find(result, "interpolation", "augmentation", 5, 200).difference
    marks = [significance_mark(replace(difference, corrected_p=p)) for p in (0.0009, 0.009, 0.049, 0.05)]
    assert marks == ["***", "**", "*", ""]


def test_figures_show_what_is_finished(partial):
    panels = plot_augmentation(partial).axes
    assert [len(axes.containers) for axes in panels] == [2] * 4  # both strategies for two modes and two regimes
    points = plot_differences(partial).axes[0].get_yticklabels()
    assert len(points) == 8 - 2  # of the large regime: the small one's baseline is unfinished
    nothing = summarise([CELLS[GRID[0]]], GRID, repeats=20)
    for plot in (plot_augmentation, plot_differences):
        with pytest.raises(ValueError, match="No configuration"):
            plot(nothing)


def test_a_label_with_one_class_in_a_fold_is_left_out_there_and_said():
    cells = []
    for cell in CELLS.values():
        targets = cell.targets.copy()
        targets[:, 0] &= cell.spec.fold != 3
        cells.append(replace(cell, targets=targets))
    result = summarise(cells, GRID, repeats=50)
    row = find(result, "real", "real", 0, 200)
    assert result.undefined == ("Effusion & more in fold 3",)
    assert row.labels[0].folds[3] is None
    assert row.macro[3] == row.labels[1].folds[3]
    assert find(result, "interpolation", "augmentation", 5, 200).labels[0].difference is not None
    assert "Effusion & more in fold 3" in format_augmentation_table(result)
    nothing = [replace(cell, targets=np.zeros_like(cell.targets)) for cell in cells]
    with pytest.raises(ValueError, match="No label of fold 0"):
        summarise(nothing, GRID)


def test_cells_that_do_not_belong_together_are_refused():
    cells = list(CELLS.values())

    def fails(message: str, *changed: CellResult, planned: list[CellSpec] = GRID) -> None:
        with pytest.raises(ValueError, match=message):
            summarise([*cells[len(changed) :], *changed], planned, repeats=20)

    first = cells[0]
    fails(r"different images \(2 are in only one\)", replace(first, keys=("other", *first.keys[1:])))
    fails("other labels or settings", replace(first, labels=("a", "b")))
    fails("other labels or settings", replace(first, facts=replace(FACTS, settings="other")))
    fails("other patients or labels", replace(first, patients=("other", *first.patients[1:])))
    fails("other patients or labels", replace(first, targets=~first.targets))
    fails("two cells reconstruction-", first, cells[1], cells[1])
    fails("not in the grid that was planned", planned=GRID[1:])
    twice = [c for c in cells if c.spec.fold < 2]
    twice = [replace(c, patients=tuple(p.replace("p1-", "p0-") for p in c.patients)) for c in twice]
    with pytest.raises(ValueError, match="30 patients are tested in two folds"):
        summarise(twice, [cell.spec for cell in twice])
    with pytest.raises(ValueError, match="no finished cell"):
        summarise([], GRID)
    with pytest.raises(ValueError, match="A table is one of"):
        format_augmentation_table(summarise(cells, GRID, repeats=20), "html")
