from dataclasses import replace

import numpy as np
import pytest

from diffusers_dino.evaluation.augmentation.cells import (
    AUGMENTATION,
    INTERPOLATION,
    REAL,
    CellFacts,
    CellResult,
    CellSpec,
    grid_of,
    load_cells,
)

FACTS = CellFacts(50, 0, 10, 100, 60, float("nan"), 3.0, 0, "digest", "", "densenet121", "cpu")


def cell(spec: CellSpec) -> CellResult:
    probabilities = np.array([[0.25, 0.5], [1.0, 0.0]], np.float32)
    return CellResult(spec, ("A", "B"), ("k1", "k2"), ("p", "p"), probabilities, probabilities > 0.3, FACTS)


def test_a_cell_is_read_as_it_was_written(tmp_path):
    spec = CellSpec(INTERPOLATION, AUGMENTATION, 5, 200, 3)
    path = cell(spec).save(tmp_path)
    assert path.name == "interpolation-augmentation-1to5-regime200-fold3.safetensors"
    found = CellResult.load(path)
    assert (found.spec, found.labels, found.keys, found.patients) == (spec, ("A", "B"), ("k1", "k2"), ("p", "p"))
    assert np.array_equal(found.probabilities, cell(spec).probabilities)
    assert found.targets.tolist() == [[False, True], [True, False]]
    assert np.isnan(found.facts.validation_auroc)
    assert replace(found.facts, validation_auroc=0.0) == replace(FACTS, validation_auroc=0.0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_grid_of_the_issue_has_15_baselines_and_120_others():
    grid = grid_of([200, 100, 50], [1, 5], 5)
    assert len(grid) == len({spec.name for spec in grid}) == 135
    assert sum(spec.is_baseline for spec in grid) == 15


def test_cells_that_are_none_are_refused(tmp_path):
    for bad in ((REAL, AUGMENTATION, 1, 50, 0), (INTERPOLATION, AUGMENTATION, 0, 50, 0), ("magic", REAL, 0, 50, 0)):
        with pytest.raises(ValueError, match="There is no cell"):
            CellSpec(*bad)
    spec = CellSpec(REAL, REAL, 0, 50, 0)
    with pytest.raises(ValueError, match="do not fit probabilities"):
        replace(cell(spec), keys=("k1",))
    for bad in (float("nan"), 1.5):
        with pytest.raises(ValueError, match="did training diverge"):
            replace(cell(spec), probabilities=np.full((2, 2), bad))


def test_a_folder_of_cells_is_one_experiment(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cell"):
        load_cells(tmp_path)
    for spec in grid_of([20, 10], [1], 2):
        cell(spec).save(tmp_path)
    cells = load_cells(tmp_path)
    assert [one.spec for one in cells] == sorted(one.spec for one in cells)
    assert len(cells) == 20
    replace(cell(cells[3].spec), facts=replace(FACTS, settings="other")).save(tmp_path)
    with pytest.raises(ValueError, match="different settings"):
        load_cells(tmp_path)


def test_a_damaged_cell_is_named(tmp_path):
    path = cell(CellSpec(REAL, REAL, 0, 50, 0)).save(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", whole.replace(b"facts", b"fakts")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"real-regime50-fold0.*is not a whole cell"):
            CellResult.load(path)
