"""Soft labels: what they are between two images, how a set keeps them, and what refuses them."""

import csv
import json

import numpy as np
import pytest

from diffusers_dino.data.labels import SoftLabelTable, read_label_table, read_soft_labels, stored_labels
from diffusers_dino.hub.cards import dataset_card
from diffusers_dino.synthesis import (
    SynthesisSettings,
    SyntheticSet,
    XrvStyleDataset,
    as_datasets,
    export,
    load_plan,
    plan_interpolation,
    save_plan,
    soft_labels,
    synthesise,
)
from diffusers_dino.synthesis.plan_file import PLAN

LABELS = [{"Mass"}, {"Mass", "Edema"}, {"Edema", "Nodule"}, {"Nodule"}]
SETTINGS = SynthesisSettings(num_inference_steps=1, batch_size=4, shard_size=4, threads=1)


@pytest.fixture(scope="module")
def made(pipe, sources, tmp_path_factory) -> SyntheticSet:
    plan = plan_interpolation(sources.keys, LABELS, num_images=6, exponent=2, settings=SETTINGS)
    return synthesise(plan, pipe, sources, tmp_path_factory.mktemp("soft") / "set", progress=False)


def test_labels_move_from_one_end_to_the_other():
    assert soft_labels(["a", "b"], ["b", "c"], 0.25) == {"a": 0.75, "b": 1.0, "c": 0.25}
    assert soft_labels(["a", "b"], ["b", "c"], 0.5, 2.0) == {"a": 0.75, "b": 1.0, "c": 0.25}
    assert soft_labels({"a"}, {"a"}, 0.3) == {"a": 1.0}
    assert soft_labels(["a", "b"], ["b"], 1.0) == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("exponent", [0, -1.0, float("nan"), float("inf")])
def test_an_exponent_is_a_positive_number(exponent):
    with pytest.raises(ValueError, match="exponent of soft labels must be a positive number"):
        plan_interpolation(["0", "1"], LABELS[:2], num_images=1, exponent=exponent)


def test_only_the_labels_differ_from_the_papers_rule(sources, tmp_path):
    options = {"num_images": 9, "settings": SETTINGS}
    hard = plan_interpolation(sources.keys, LABELS, **options)
    soft = plan_interpolation(sources.keys, LABELS, exponent=1, **options)
    assert [image[:4] for image in hard] == [image[:4] for image in soft]
    assert hard.digest != soft.digest != plan_interpolation(sources.keys, LABELS, exponent=3, **options).digest
    assert "exponent" not in hard.describe()  # old plans keep their digests
    labels_of = dict(zip(sources.keys, LABELS, strict=True))
    for image in soft:
        assert image.labels is None
        assert image.probabilities == soft_labels(*(labels_of[key] for key in image.sources), image.fraction)
    save_plan(soft, tmp_path)
    assert list(load_plan(tmp_path)) == list(soft)
    save_plan(hard, tmp_path)
    assert json.loads((tmp_path / PLAN).read_text())["format"] == 1  # older versions read it


def test_a_set_keeps_probabilities_in_its_table_and_shards(made):
    wanted = [image.probabilities for image in made.planned()]
    table = read_soft_labels(made.folder / "labels.csv")
    assert list(table.probabilities) == wanted
    names = ("Edema", "Mass", "Nodule")
    targets = table.targets(names)
    assert targets.dtype == np.float32
    assert np.allclose(targets, [[own.get(name, 0) for name in names] for own in wanted])
    images = made.images()
    for place, own in enumerate(wanted):
        facts = json.loads(images.companion(place, "json"))
        assert facts["probabilities"] == own
        assert "labels" not in facts
    assert SyntheticSet.open(made.folder, verify=True).plan.exponent == 2
    card = str(dataset_card(made, "Soft"))
    assert "g = 2.0" in card
    assert "sum of probabilities" in card


def test_exports_keep_probabilities(made, tmp_path):
    wanted = [image.probabilities for image in made.planned()]
    data = XrvStyleDataset(made, ("Mass", "Edema", "Hernia"))
    assert np.allclose(data.labels[:, :2], [[own.get("Mass", 0), own.get("Edema", 0)] for own in wanted])
    assert np.isnan(data.labels[:, 2]).all()
    assert sum(data.totals()["Mass"].values()) == len(made)
    folder = export(made, "folder", tmp_path / "folder")
    with open(folder / "labels.csv", newline="") as file:
        assert all(row["probabilities"] for row in csv.DictReader(file))
    with open(export(made, "xrv", tmp_path / "xrv") / "labels.csv", newline="") as file:
        rows = [float(row["Edema"]) for row in csv.DictReader(file)]
    assert np.allclose(rows, [own.get("Edema", 0) for own in wanted], atol=1e-5)
    pytest.importorskip("datasets", reason="datasets is not installed: pip install 'diffusers-dino[train]'")
    names = ("Edema", "Mass", "Nodule")
    assert as_datasets(made, tmp_path / "cache")["probabilities"] == [
        {name: own.get(name, 0.0) for name in names} for own in wanted
    ]


def test_who_needs_hard_labels_says_so(made):
    with pytest.raises(ValueError, match="soft labels, and hard ones are needed"):
        stored_labels(made.images())
    with pytest.raises(ValueError, match="soft labels, and hard ones are needed"):
        read_label_table(made.folder / "labels.csv", "key", "labels", None)


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "much", ""])
def test_a_table_holds_probabilities(tmp_path, value):
    path = tmp_path / "labels.csv"
    path.write_text(f"key,probabilities\na,Mass=0.5\nb,Mass={value}\n")
    with pytest.raises(ValueError, match=r"Line 3 .*in \[0, 1\]"):
        read_soft_labels(path)


def test_unknown_labels_and_broken_tables_are_named(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("key,probabilities\na,Mass=0.5|x=y=1\n")
    table = read_soft_labels(path)
    assert table.targets(["x=y", "Mass"]).tolist() == [[1.0, 0.5]]
    with pytest.raises(ValueError, match=r"'Mas'\. The nearest label is 'Mass'"):
        table.targets(["Mas"])
    with pytest.raises(ValueError, match=r"'Mass' of image 'a' must be in \[0, 1\], got nan"):
        SoftLabelTable(("a",), ({"Mass": float("nan")},))
    with pytest.raises(ValueError, match="one key of its own"):
        SoftLabelTable(("a", "a"), ({}, {}))
    path.write_text("key,labels\na,Mass|Edema\n")
    assert read_soft_labels(path).probabilities == ({"Mass": 1.0, "Edema": 1.0},)
    path.write_text("file,probabilities\n")
    with pytest.raises(ValueError, match="no column 'key'"):
        read_soft_labels(path)
