"""Sources that a user describes, and everything that can be wrong with one."""

import logging
import os
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from dicom_files import dicom_bytes
from diffusers_dino.data.sources import (
    OpenSource,
    Record,
    find_source,
    label_prevalence,
    lineage,
    open_source,
    overlaps,
    select_labels,
)
from diffusers_dino.data.sources.description import describe
from diffusers_dino.data.sources.records import salted_key
from source_layouts import TABLE, lay_out, own, picture, write

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "examples" / "configs" / "sources"
CXR = REPOSITORY.parent / "shared" / "cxr"


@pytest.mark.cxr
@pytest.mark.skipif(not CXR.is_dir(), reason=f"needs the radiographs of {CXR}")
def test_the_subset_of_nih_is_read_by_its_configuration():
    source = open_source(CONFIGS / "nih_subset.yaml", CXR)
    records = list(source)
    assert len(records) == 669
    assert len({record.patient for record in records}) == 444
    assert {record.view for record in records} <= {"PA", "AP"}
    assert all(record.labels is not None and "No Finding" not in record.labels for record in records)
    assert source.report.lines() == []


def test_another_modality_takes_a_configuration_and_no_code(tmp_path):
    write(
        tmp_path / "exams.csv", "exam;view;BI-RADS;mass;calcification\nm-7;L-MLO;4;1;2\nm-8;R-CC;1;0;0\nm-9;XCCL;1;;\n"
    )
    picture(tmp_path / "patients/p012/m-7.png", depth=16)
    picture(tmp_path / "patients/p012/m-8.png", depth=16)
    picture(tmp_path / "patients/p013/m-9.png", depth=16)
    picture(tmp_path / "masks/m-7_lesion.png")
    one, two, three = open_source(CONFIGS / "mammograms.yaml", tmp_path)
    image, mask = tmp_path / "patients/p012/m-7.png", tmp_path / "masks/m-7_lesion.png"
    assert one == Record("our_mammograms", image, "m-7", "p012", ("mass",), ("calcification",), "MLO", masks=(mask,))
    assert (two.patient, two.labels, two.view, two.masks) == ("p012", (), "CC", ())
    assert (three.patient, three.labels, three.view) == ("p013", None, "XCCL")


def test_a_source_of_the_catalogue_can_be_changed(tmp_path):
    lay_out("mimic_cxr_jpg", tmp_path)
    lines = ["aa-1,1,1,validate", "aa-2,1,1,train", "bb-1,2,2,test"]
    write(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split\n" + "\n".join(lines))
    source = open_source(CONFIGS / "mimic_official_split.yaml", tmp_path)
    assert [record.split for record in source] == ["validation", "train", "test", None]
    assert source.report.unjoined.count == 2, "bb-2 has no split, and its study no labels"


def test_what_does_not_fit_is_counted_and_named(tmp_path, caplog):
    rows = "a.png,1,nodule\ngone.png,1,mass\nb.png,,none found\na.png,1,mass\n"
    source = own(tmp_path, rows, images=("a.png", "b.png", "extra.png"))
    with caplog.at_level(logging.WARNING):
        records = list(source)
    assert [(record.image_id, record.patient, record.labels) for record in records] == [
        ("a.png", "1", ("nodule",)),
        ("b.png", "b.png", ()),
    ]
    report = source.report
    assert (report.missing.count, report.missing.examples) == (1, ["images/gone.png"])
    assert (report.unlisted.count, report.unlisted.examples) == (1, ["images/extra.png"])
    assert (report.repeated.count, report.repeated.examples) == (1, ["a.png"])
    assert (report.no_patient.count, report.no_patient.examples) == (1, ["b.png"])
    for name in ("gone.png", "extra.png", "b.png", "a.png"):
        assert name in caplog.text
    many = own(tmp_path, "a.png,1,nodule\n" + "".join(f"x{n}.png,1,nodule\n" for n in range(50)))
    assert len(list(many)) == 1
    assert (many.report.missing.count, len(many.report.missing.examples)) == (50, 10)


@pytest.mark.parametrize(
    ("name", "stray"),
    [
        ("chexpert", "train/patient00009/study1/view1_frontal.jpg"),
        ("brax", "images/id_9/Study_1/Series_1/image-9.png"),
        ("nih_chest_xray14", "images_003/images/00009999_000.png"),
        ("padchest", "7/stray.png"),
        ("mimic_cxr_jpg", "files/p10/p10000009/s50000009/stray.jpg"),
    ],
)
def test_a_stray_image_of_a_known_source_is_named(tmp_path, name, stray):
    expected = lay_out(name, tmp_path)
    picture(tmp_path / stray)
    source = open_source(name, tmp_path)
    assert len(list(source)) == len(expected)
    assert source.report.unlisted.examples == [stray]


def test_label_files_are_taken_from_torchxrayvision_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchxrayvision", raising=False)  # else its own files would be read
    lay_out("nih_chest_xray14", tmp_path / "nih")
    package = tmp_path / "site" / "torchxrayvision"
    write(package / "__init__.py", "raise RuntimeError('reading a label file imports nothing')")
    write(package / "data" / "Data_Entry_2017_v2020.csv.gz", (tmp_path / "nih/Data_Entry_2017_v2020.csv").read_text())
    (tmp_path / "nih/Data_Entry_2017_v2020.csv").unlink()
    if find_spec("torchxrayvision") is None:
        with pytest.raises(FileNotFoundError, match="Data_Entry_2017_v2020"):
            open_source("nih_chest_xray14", tmp_path / "nih")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert len(list(open_source("nih_chest_xray14", tmp_path / "nih"))) == 3


def test_rows_cannot_lead_out_of_the_folder(tmp_path):
    picture(tmp_path / "secret.png")
    source = own(tmp_path / "root", "../../secret.png,1,nodule\n")
    with pytest.raises(ValueError, match="out of"):
        list(source)
    description = describe(TABLE | {"image": "{file}"})
    write(tmp_path / "root/t.csv", f"file\n{tmp_path / 'secret.png'}\n")
    with pytest.raises(ValueError, match="give a folder that holds it"):
        list(OpenSource(description, tmp_path / "root"))
    write(tmp_path / "root/t.csv", f"file\n{tmp_path / 'root/images/a.png'}\n")
    (record,) = OpenSource(description, tmp_path / "root")
    assert record.image == tmp_path / "root/images/a.png"


def test_the_same_name_in_two_folders_is_refused(tmp_path):
    for folder in ("part1", "part2"):
        picture(tmp_path / folder / "a.png")
    write(tmp_path / "t.csv", "file\na.png\n")
    with pytest.raises(ValueError, match=r"'a\.png' is in several of the folders"):
        list(OpenSource(describe(TABLE | {"image": "part*/{file}"}), tmp_path))


def test_missing_folders_tables_and_images_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_source("padchest", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"brax needs 'master_spreadsheet_update.csv'.*physionet.org"):
        open_source("brax", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No image of kermany in .*chest_xray/train"):
        list(open_source("kermany", tmp_path))
    with pytest.raises(FileNotFoundError, match=r"No image of own.*2 rows have none there, the first 'images/x.png'"):
        list(own(tmp_path, "x.png,1,nodule\ny.png,1,nodule\n", images=()))


def test_unknown_names_bring_the_closest(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'padchest'"):
        open_source("padchst", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*own\.yaml"):
        open_source(tmp_path / "own.yaml", tmp_path)
    (tmp_path / "b.yaml").write_text("base: mimic")
    with pytest.raises(ValueError, match="no source 'mimic'"):
        find_source(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pattient": "{patient}"}, "unknown key 'pattient'. Did you mean 'patient'"),
        ({"labels": {"column": "{finding}", "columns": ["a"]}}, "exactly one of column, columns and constant"),
        ({"labels": {"column": "{finding}", "map": {False: "x"}}}, "put them in quotes"),
        ({"labels": "finding"}, "labels of .* must be a mapping"),
        ({"derive": {"path": "(?P<x>"}}, "not a regular expression"),
        ({"name": "a/b"}, "not a name of a source"),
        ({"repeats": "mean"}, "repeats is any or majority"),
        ({"labels": {"column": "finding"}}, r'labels: column is a column in braces and quotes: write "\{finding\}"'),
        ({"labels": {"column": {"finding": None}}}, r'write "\{finding\}"'),
        ({"patient": "who"}, r'patient is a column in braces and quotes: write "\{who\}"'),
        ({"patient": {"who": None}}, r'write "\{who\}"'),
        ({"patient": ["{who}", "who"]}, r'write "\{who\}"'),
        ({"patient": {"from": "who", "map": {}}}, r'write "\{who\}"'),
        ({"view": {"view": None}}, r'view is .*write "\{view\}"'),
        ({"id": "file"}, r'id is .*write "\{file\}"'),
        ({"image": "images/a.png"}, "image is a column in braces"),
        ({"invert": {"from": "view"}}, "invert is"),
        ({"where": {"usable": True}}, "put them in quotes"),
        ({"labels": {"constant": [False]}}, "put them in quotes"),
        ({"raw": {"width": 0, "height": 4}}, "raw of .* at least 1 pixel"),
        ({"image": None}, "image"),
        ("- a\n- b", "does not describe a source"),
        ("a: [", "not a YAML file"),
        ("a: " + "[" * 5000, "not a YAML file"),
        (b"name: n\xf3dulo", "not a YAML file"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(tmp_path, change, match):
    if isinstance(change, dict):
        change = yaml.safe_dump({key: value for key, value in (TABLE | change).items() if value is not None})
    (tmp_path / "own.yaml").write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(ValueError, match=match):
        find_source(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("rule", "labels"),
    [
        ({"constant": "Mass"}, ("Mass",)),
        ({"column": "{finding}", "none": "No Finding"}, ("No",)),
        ({"column": "{finding}", "unlabelled": "No news"}, ("No",)),
        ({"columns": "flag", "positive": "yes", "negative": "no"}, ("flag",)),
        ({"columns": ["flag"], "positive": ["yes"], "negative": "no"}, ("flag",)),
        ({"columns": "*", "exclude": "file", "positive": "yes", "negative": ["no", "No"]}, ("flag",)),
    ],
)
def test_one_word_is_a_word_and_not_its_letters(tmp_path, rule, labels):
    write(tmp_path / "t.csv", "file,finding,flag\na.png,No,yes\n")
    picture(tmp_path / "images/a.png")
    (record,) = OpenSource(describe(TABLE | {"labels": rule}), tmp_path)
    assert record.labels == labels


@pytest.mark.parametrize(("value", "left"), [(1, 2), ("1", 1), ([1, 2], 3), (["1", "1.0"], 2), (7, 0)])
def test_numbers_choose_rows_and_polarity_however_they_are_written(tmp_path, value, left):
    write(tmp_path / "t.csv", "file,use\na.png,1\nb.png,1.0\nc.png,2\nd.png,\n")
    for name in "abcd":
        picture(tmp_path / f"images/{name}.png")
    if left:
        assert len(list(OpenSource(describe(TABLE | {"where": {"use": value}}), tmp_path))) == left
    inverted = OpenSource(describe(TABLE | {"invert": {"from": "use", "values": value}}), tmp_path)
    assert sum(bool(record.invert) for record in inverted) == left
    assert [record.invert for record in inverted][-1] is None


@pytest.mark.parametrize(
    ("findings", "rule", "told"),
    [
        ("xxxx", {"column": "{finding}"}, "all 4 images have the same label: 'x'"),
        ("    ", {"column": "{finding}"}, "all 4 images have the same label: no label"),
        ("nnnn", {"column": "{finding}", "none": "n"}, "all 4 images have the same label: no finding"),
        ("0000", {"columns": ["finding"]}, "all 4 images have the same label: no finding"),
        ("xxyx", {"column": "{finding}"}, None),
        ("xxxx", {"constant": "x"}, None),
    ],
)
def test_one_label_for_all_images_is_a_warning(tmp_path, caplog, findings, rule, told):
    rows = "".join(f"{n}.png,{n},{finding}\n" for n, finding in enumerate(findings))
    list(own(tmp_path, rows, tuple(f"{n}.png" for n in range(4)), labels=rule))
    assert (told in caplog.text) if told else not caplog.text


NFD = unicodedata.normalize("NFD", "Müller")


@pytest.mark.parametrize(
    ("cell", "file", "image"),
    [
        (r"sub\a.png", "sub/a.png", "images/{file}"),
        (r".\sub\a.png", "sub/a.png", "images/{file}"),
        (r"images\sub\a.png", "sub/a.png", "{file}"),
        (" a.png ", "a.png", "images/{file}"),
        ("7.0", "7.png", "images/{file}.png"),
        ("Müller.png", f"{NFD}.png", "images/{file}"),
        (f"{NFD}.png", "Müller.png", "images/{file}"),
        (f"{NFD}\\a.png", "Müller/a.png", "images/{file}"),
        ("7.0", "7.png", "imag*/{file}.png"),
        ("Müller.png", f"{NFD}.png", "imag*/{file}"),
    ],
)
def test_paths_of_other_systems_lead_to_the_file(tmp_path, cell, file, image):
    (record,) = own(tmp_path, f"{cell},1,nodule\n", (file,), image=image)
    assert record.image.samefile(tmp_path / "images" / file)


def test_with_a_salt_messages_name_no_file_and_no_id(tmp_path, caplog):
    salt, name = "a salt of 16 bytes", "Doe^Jane"
    rows = f"{name}/a.png,1,nodule\n{name}/b.png,,x\n{name}/gone.png,1,mass\n{name}/a.png,1,mass\n"
    source = own(tmp_path, rows, images=(f"{name}/a.png", f"{name}/b.png", f"{name}/extra.png"))
    records = list(source.records(salt))
    assert len(records) == 2
    assert caplog.text.count("own-") == 3
    assert salted_key("own", f"{name}/b.png", salt) in caplog.text
    for wrong in (
        {"labels": {"columns": ["finding"]}},
        {"split": "{finding}"},
        {"image": "../{file}"},
        {"sidecar": ".json", "view": "{x}"},
    ):
        source = own(tmp_path, f"{name}/a.png,1,perhaps\n", **wrong)
        (tmp_path / f"images/{name}/a.json").write_text("{")
        with pytest.raises(ValueError) as caught:
            list(source.records(salt))
        assert "Jane" not in str(caught.value)
    (tmp_path / "t.csv").write_text(f"file,patient,finding\n{name}/none.png,1,x\n")
    with pytest.raises(FileNotFoundError) as caught:
        list(source.records(salt))
    assert "Jane" not in str(caught.value) + caplog.text


def test_columns_of_joined_tables_and_of_sidecars_are_taken_apart(tmp_path):
    write(tmp_path / "j.csv", "file,dicom_path\na.png,p07/s1\nb.png,p07/s2\n,p99/s3\n")
    derive = {"dicom_path": r"(?P<person>p\d+)"}
    join = {"file": "j.csv", "match": "{file}"}
    joined = own(tmp_path, "a.png,,\nb.png,,\n", join=join, derive=derive, patient="{person}")
    assert [record.patient for record in joined] == ["p07", "p07"]
    for name in "ab":
        write(tmp_path / f"images/{name}.json", {"dicom_path": "p08/s1"})
    for sidecar in (".json", "json"):
        beside = own(tmp_path, "a.png,,\nb.png,,\n", sidecar=sidecar, derive=derive, patient="{person}")
        assert [record.patient for record in beside] == ["p08", "p08"]


def test_a_blank_key_joins_no_blank(tmp_path):
    write(tmp_path / "j.csv", "study,view\n,PA\n7,AP\n")
    join = {"file": "j.csv", "match": "{patient}", "key": "{study}"}
    source = own(tmp_path, "a.png,,\nb.png,7,\n", join=join, view="{view}", patient="{file}")
    assert [record.view for record in source] == [None, "AP"]
    assert source.report.unjoined.examples == ["a blank"]


def test_rows_are_chosen_by_what_comes_with_the_image(tmp_path):
    images = ("p1/a.png", "p2/b.png")
    for name, kind in zip(images, ("DX", "CT"), strict=True):
        write((tmp_path / "images" / name).with_suffix(".json"), {"kind": kind})
    rows = "p1/a.png,,\np2/b.png,,\nlost.png,,\n"
    for where, more in (
        ({"folder": "images/p1"}, {}),
        ({"person": "p1"}, {"derive": {"path": r"(?P<person>p\d)"}}),
        ({"kind": ["DX", "CR"]}, {"sidecar": ".json"}),
    ):
        source = own(tmp_path, rows, images, where=where, **more)
        assert [record.image_id for record in source] == ["p1/a.png"]
        assert source.report.missing.examples == ["images/lost.png"]


def test_keys_that_are_left_blank_are_as_left_out(tmp_path):
    source = own(tmp_path, "a.png,,\nb.png,,\n", where=None, derive=None, sidecar=None, image="./images/{file}")
    assert len(list(source)) == 2


def test_files_without_a_table_are_taken_by_the_rule_of_folders(tmp_path):
    dicom = dicom_bytes(np.arange(120, dtype=np.uint8).reshape(12, 10))
    for name in ("a.png", "a.seg.png", "a.mask.png", "@eaDir/a.png", "__MACOSX/b.png", "1.2.840.7.png", "1.2.840.png"):
        picture(tmp_path / name)
    for name, content in {
        "IM0001": dicom,
        "CR.1.2.840.7": dicom,
        "CR.1.2.840.8": dicom,
        "b.IMA": dicom[132:],
        "notes": b"x",
        "c.txt": b"x",
        "d.json": b"{}",
    }.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "e.png").mkdir()
    source = OpenSource(describe({"name": "own", "image": "./**/*"}), tmp_path)
    series = {"CR.1.2.840.7", "CR.1.2.840.8"}  # the last number is no extension
    taken = {i if (i := record.image_id) in series else i + record.image.suffix for record in source}
    assert taken == {"a.png", "1.2.840.7.png", "1.2.840.png", "IM0001", "b.IMA", *series}
    report = source.report
    assert (report.companions.examples, report.hidden.count) == (["a.seg.png"], 4)  # two folders of systems, too


def test_rare_labels_are_dropped_and_their_images_become_unlabelled():
    def record(number: int, *labels: str) -> Record:
        return Record("x", Path("x"), str(number), "p", labels, uncertain=("rare",))

    records = [record(n, "common") for n in range(20)] + [record(n, "rare") for n in range(20, 21)]
    records += [record(n) for n in range(21, 30)] + [Record("x", Path("x"), "30", "p")]
    assert label_prevalence(records) == pytest.approx({"common": 20 / 30, "rare": 1 / 30})
    selected = list(select_labels(records, 0.04))
    assert [r.labels for r in selected[19:22]] == [("common",), None, ()]
    assert selected[0].uncertain == ()
    assert selected[-1] == records[-1]
    assert [r.labels for r in select_labels(records, 1 / 30)] == [r.labels for r in records], "the bound is included"
    with pytest.raises(TypeError, match="twice"):
        select_labels(iter(records))
    with pytest.raises(ValueError, match="fraction"):
        select_labels(records, 4)


def test_overlaps_follow_the_lineage(tmp_path):
    assert lineage("covid19_radiography") >= {"rsna_pneumonia", "nih_chest_xray14", "kermany", "padchest"}
    found = overlaps(["nih_chest_xray14", "covid19_radiography", "jsrt", find_source(CONFIGS / "nih_subset.yaml")])
    assert {(one.first, one.second) for one in found} == {
        ("nih_chest_xray14", "covid19_radiography"),
        ("nih_chest_xray14", "nih_subset"),
        ("covid19_radiography", "nih_subset"),
    }
    assert str(overlaps(["tbx11k", "montgomery"])[0]).endswith("(of montgomery)")
    assert overlaps(["padchest", "chexpert", "jsrt"]) == []
