"""A finished set in other tools' forms: the same images, labels and order."""

import csv
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dino.synthesis import (
    SynthesisSettings,
    SyntheticSet,
    XrvStyleDataset,
    as_datasets,
    export,
    plan_interpolation,
    plan_reconstruction,
    synthesise,
)
from synthetic_sets import BrightnessGate

LABELS = [{"Mass"}, {"Mass", "pleural effusion"}, {"No Finding"}, {"Device"}, {"Lung_Opacity"}]
SETTINGS = SynthesisSettings(num_inference_steps=1, batch_size=4, shard_size=4, threads=1)


@pytest.fixture(scope="module")
def made(pipe, sources, tmp_path_factory) -> SyntheticSet:
    plan = plan_reconstruction(sources.keys, LABELS, num_images=6, settings=SETTINGS)
    return synthesise(plan, pipe, sources, tmp_path_factory.mktemp("made") / "set", progress=False)


@pytest.fixture(scope="module")
def unlabelled(pipe, sources, tmp_path_factory) -> SyntheticSet:
    plan = plan_reconstruction(sources.keys, num_images=2, settings=SETTINGS)
    return synthesise(plan, pipe, sources, tmp_path_factory.mktemp("unlabelled") / "set", progress=False)


def pixels_of(made):
    return [array for _, array in made.images().read_many(range(len(made)))]


def test_a_set_opens_as_a_dataset_of_datasets(made, unlabelled, tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed: pip install 'diffusers-dino[train]'")
    rows = as_datasets(made, tmp_path)
    assert len(rows) == 6
    for row, image, pixels in zip(rows, made.planned(), pixels_of(made), strict=True):
        assert (row["key"], row["labels"], row["sources"]) == (image.key, list(image.labels), list(image.sources))
        assert (row["strategy"], row["fraction"]) == ("reconstruction", 0)
        assert np.array_equal(np.asarray(row["image"]), pixels)
    assert as_datasets(unlabelled, tmp_path)["labels"] == [None, None]


def test_a_set_opens_as_a_dataset_of_torchxrayvision(made, caplog):
    with caplog.at_level(logging.WARNING):
        data = XrvStyleDataset(made)
    assert "Device" in caplog.text
    assert "No Finding" not in caplog.text
    told = np.flatnonzero(~np.isnan(data.labels).any(axis=0)).tolist()
    known = {data.pathologies[number]: number for number in told}
    assert set(known) == {"Mass", "Effusion", "Lung Opacity"}
    assert data.labels.shape == (len(data), 18) == (6, 18)
    assert np.isnan(np.delete(data.labels, list(known.values()), axis=1)).all()
    spelled = {"Mass": "Mass", "pleural effusion": "Effusion", "Lung_Opacity": "Lung Opacity"}
    for number, image in enumerate(made.planned()):
        assert {name for name in known if data.labels[number, known[name]]} == {
            spelled[label] for label in image.labels if label in spelled
        }
    sample = data[3]
    assert (sample["img"].shape, sample["img"].dtype, sample["idx"]) == ((1, 32, 32), np.float32, 3)
    assert np.allclose(sample["img"], (torch.from_numpy(pixels_of(made)[3]) / 255 * 2 - 1) * 1024, atol=1e-3)
    assert data.totals()["Mass"][1.0] == int(data.labels[:, known["Mass"]].sum())
    assert list(data.csv["key"]) == [image.key for image in made.planned()]
    assert XrvStyleDataset(made, transform=np.negative)[0]["img"].sum() == -data[0]["img"].sum()


def test_torchxrayvision_takes_it(made):
    xrv = pytest.importorskip(
        "torchxrayvision", reason="torchxrayvision is not installed: pip install torchxrayvision"
    )
    from diffusers_dino.synthesis import XRV_PATHOLOGIES

    assert list(XRV_PATHOLOGIES) == xrv.datasets.default_pathologies
    data = XrvStyleDataset(made)
    xrv.datasets.relabel_dataset(["Effusion", "Mass"], data, silent=True)
    merged = xrv.datasets.MergeDataset([data, xrv.datasets.SubsetDataset(data, [0, 2])])
    assert len(merged) == 8
    assert merged.labels.shape == (8, 2)
    assert merged[7]["img"].shape == (1, 32, 32)


def test_labels_that_are_no_pathologies_are_refused_and_unknown_ones_are_nan(made, unlabelled):
    with pytest.raises(ValueError, match=r"None of the set's labels \(Device, Lung_Opacity"):
        XrvStyleDataset(made, ["Rib fracture"])
    assert np.isnan(XrvStyleDataset(unlabelled).labels).all()


@pytest.mark.parametrize("kind", ["folder", "xrv"])
def test_a_plain_folder_holds_the_files_of_the_set(made, kind, tmp_path):
    folder = export(made, kind, tmp_path / "out")
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(path.name for path in folder.iterdir()) == [".exported.json", "images", "labels.csv"]
    for row, image, pixels in zip(rows, made.planned(), pixels_of(made), strict=True):
        assert row["key"] == image.key
        assert np.array_equal(np.asarray(Image.open(folder / "images" / row["file"])), pixels)
        if kind == "folder":
            assert row["labels"] == "|".join(image.labels)
        else:
            assert row["Mass"] == str(int("Mass" in image.labels))
            assert row["Hernia"] == ""
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    export(made, kind, folder)  # it is there already
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    with pytest.raises(FileExistsError, match="holds something else"):
        export(made, "datasets", folder)


def test_a_folder_of_datasets_is_read_from_disk(made, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.load_from_disk(export(made, "datasets", tmp_path / "out"))
    assert rows["key"] == [image.key for image in made.planned()]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_and_kinds_are_refused(made, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "README.md").touch()
    for folder in (tmp_path / "taken", tmp_path / "taken" / "README.md"):
        with pytest.raises(FileExistsError, match="give another folder"):
            export(made, "folder", folder)
    with pytest.raises(ValueError, match="folder, datasets, xrv, not 'csv'"):
        export(made, "csv", tmp_path / "out")


def test_images_that_are_left_out_are_in_no_export(pipe, sources, tmp_path):
    settings = SynthesisSettings(1, batch_size=12, threads=1, max_attempts=1)
    plan = plan_interpolation(sources.keys[:2], [{"Mass"}, {"Mass"}], num_images=12, settings=settings)
    options, gate = {"max_left_out": 1.0, "progress": False}, BrightnessGate()
    free = synthesise(plan, pipe, sources, tmp_path / "free", gate=gate, **options)
    gate.least = np.median([array.mean() for array in pixels_of(free)]) / 255
    made = synthesise(plan, pipe, sources, tmp_path / "set", gate=gate, **options)
    assert 0 < len(made.left_out) < 12
    keys = [image.key for image in made.planned()]
    assert list(XrvStyleDataset(made).csv["key"]) == keys
    export(made, "folder", tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out" / "images").iterdir()) == keys
