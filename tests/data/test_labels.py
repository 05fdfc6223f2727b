import gzip

import numpy as np
import pytest
from PIL import Image

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import LabelTable, read_label_table, stored_labels

TABLE = """file,patient,findings
a/1.2.840.png,7,Edema|Effusion
b.jpg,7,No Finding
c,8,
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("\ufeff" + TABLE.replace("\n", "\r\n"), newline="")  # as spreadsheets write it
    return path


def test_keys_labels_and_patients_are_read(table):
    found = read_label_table(table)
    assert found.keys == ("a/1.2.840", "b", "c")
    assert found.labels == ({"Edema", "Effusion"}, {"No Finding"}, frozenset())
    assert found.patients == ("7", "7", "8")
    assert read_label_table(table, patient_column=None).patients == found.keys
    assert read_label_table(table, label_column=None).labels == (frozenset(),) * 3


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.csv.gz"])
def test_tables_are_read_as_those_of_sources_are(tmp_path, name):
    text = TABLE.replace("file,patient", " file , patient ").encode("utf-8" if name.endswith("gz") else "utf-16")
    text = text.replace(b",", b"\t") if name.endswith("tsv") else text
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    found = read_label_table(tmp_path / name)
    assert found.keys == ("a/1.2.840", "b", "c")
    assert found.labels == ({"Edema", "Effusion"}, {"No Finding"}, frozenset())


def test_patients_that_are_spelt_in_two_ways_are_one(tmp_path):
    (tmp_path / "labels.csv").write_text("file,patient,findings\na,1,\nb,1.0,\nc,2,\n")
    assert read_label_table(tmp_path / "labels.csv").patients == ("1", "1", "2")


def test_the_most_frequent_findings_come_first():
    rows = ["AB", "A", "BC", "C", "AN", "N", "N", "N"]
    table = LabelTable(tuple("abcdefgh"), tuple(map(frozenset, rows)), tuple("11112222"))
    assert table.counts() == {"N": 4, "A": 3, "B": 2, "C": 2}
    names = table.most_frequent(2, always=("N",))
    assert names == ("A", "B", "N")
    assert table.targets(names)[:3].tolist() == [[True, True, False], [True, False, False], [False, True, False]]
    assert table.restrict(["C"]).labels[2:4] == ({"C"}, {"C"})
    assert table.select(["h", "a"]).patients == ("2", "1")
    assert table.targets([]).shape == (8, 0)
    with pytest.raises(ValueError, match="3 findings"):
        table.most_frequent(4, always=("N",))
    with pytest.raises(ValueError, match="No image is labelled 'X'; there are N, A"):
        table.restrict(["A", "X"])
    with pytest.raises(KeyError, match="1 images have no row in the labels, such as z"):
        table.select(["a", "z"])


def test_labels_beside_the_images_are_the_same_as_in_the_table():
    images = open_images("examples/data/phantom-cxr", Preprocessing(64, remove_borders=False), split="test")
    table = stored_labels(images)
    assert table.keys == tuple(images.keys)
    assert np.array_equal(table.targets(["No Finding"])[:, 0], [labels == {"No Finding"} for labels in table.labels])
    assert 0 < table.counts()["No Finding"] < len(images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,findings\na,Edema\n", "no column 'patient'; its columns are 'file', 'findings'"),
        ("file,patient,findings\n,7,Edema\n", "Line 2 .* has no 'file'"),
        ("file,patient,findings\na.png,7,\na.jpg,7,\n", "1 keys come more than once"),
        ("", "is empty: it has no header"),
        ("file;patient;findings\na;7;Edema\n", "its columns are 'file;patient;findings'"),
        ("file,patient,findings\na,7\n", "line 2 has 2 cells, the header 3"),
        ("file,patient,findings\na,7,Edema,Mass\n", "line 2 has 4 cells, the header 3"),
        ("file,patient,findings,findings\na,7,Edema,Mass\n", "several columns 'findings'"),
        ('file,patient,findings\na,7,"Edema\n' + "b,7,Mass\n" * 20_000, "Cannot read .*is a quote not closed"),
        (b"file,patient,findings\na,7,n\xf3dulo\n", r"Cannot read .*labels\.csv.*Save it as UTF-8"),
        ("file,patient,findings\na,7,Edema\n".encode("utf-16-le"), r"Cannot read .*labels\.csv|no column"),
    ],
)
def test_a_table_that_does_not_say_enough_is_refused(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_label_table(path)


def test_stored_patients_that_are_spelt_in_two_ways_are_one(tmp_path):
    for name, patient in (("a", "1"), ("b", "1.0"), ("c", '"1 "'), ("d", "NaN"), ("e", "null"), ("f", '"2"')):
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_text(f'{{"labels": [], "patient": {patient}}}')
    assert stored_labels(open_images(tmp_path, Preprocessing(8))).patients == ("1", "1", "1", "d", "e", "2")


def test_images_without_stored_labels_are_named(tmp_path):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    images = open_images(tmp_path, Preprocessing(64, remove_borders=False))
    with pytest.raises(ValueError, match="No labels are stored beside image 'a'"):
        stored_labels(images)
    for facts in ("{}", '{"labels": "Mass"}', '{"labels": [["Mass"]]}', '{"labels": null}'):
        (tmp_path / "a.json").write_text(facts)
        with pytest.raises(ValueError, match="no list of labels"):
            stored_labels(images)
    for facts in (b"{", b"[]", b"3", b"\xff", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(facts)
        with pytest.raises(ValueError, match="The facts of image 'a' are damaged"):
            stored_labels(images)
