"""Tables of sources: encodings, lengths, joins, and what is wrong with them."""

import gzip
import itertools
import os
import tracemalloc

import pytest

from diffusers_dino.data.sources import OpenSource, open_source
from diffusers_dino.data.sources.description import describe
from source_layouts import TABLE, own, picture, write


def test_memory_does_not_grow_with_the_table(tmp_path):
    count, cell = 500, "x" * 1000
    (tmp_path / "images").mkdir()
    for number in range(count):
        (tmp_path / f"images/{number}.png").touch()
    write(
        tmp_path / "t.csv", "file,patient,finding,report\n" + "".join(f"{n}.png,{n},a,{cell}\n" for n in range(count))
    )
    source = OpenSource(describe(TABLE | {"patient": "{patient}", "labels": {"column": "{finding}"}}), tmp_path)
    records = iter(source)
    next(records)
    tracemalloc.start()
    sizes = [tracemalloc.get_traced_memory()[0] for _ in itertools.islice(records, count - 1)]
    tracemalloc.stop()
    assert len(sizes) == count - 1
    assert (sizes[-1] - sizes[99]) / (count - 100) < 400, "bytes a row: it keeps more than hashes"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_recognised(tmp_path, encoding):
    source = own(tmp_path, "a.png,1,nódulo\n")
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    (record,) = open_source(tmp_path / "own.yaml", tmp_path)
    assert record.labels == ("nódulo",)
    assert next(iter(source)).labels == ("nódulo",)


def test_another_encoding_is_refused_until_it_is_named(tmp_path):
    own(tmp_path, "a.png,1,x\n")
    (tmp_path / "t.csv").write_bytes("file,patient,finding\na.png,1,nódulo\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv.*encoding: latin-1"):
        list(open_source(tmp_path / "own.yaml", tmp_path))
    source = describe(TABLE | {"table": {"file": "t.csv", "encoding": "latin-1"}, "labels": {"column": "{finding}"}})
    assert next(iter(OpenSource(source, tmp_path))).labels == ("nódulo",)


def test_a_table_that_is_cut_off_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv.*line 3 has 2 cells, the header 3"):
        list(own(tmp_path, "a.png,1,nodule\nb.png,1\n"))
    for rows, told in (
        ("a.png,1,nodule,more\n", "line 2 has 4 cells, the header 3"),
        ('a.png,1,"nodule\n' + "b.png,1,mass\n" * 20_000, "is a quote not closed"),
    ):
        with pytest.raises(ValueError, match=rf"t\.csv.*{told}"):
            list(own(tmp_path, rows))
    write(tmp_path / "t.csv", "file,patient,finding,finding\na.png,1,x,y\n")
    with pytest.raises(ValueError, match=r"t\.csv.*several columns 'finding'"):
        list(open_source(tmp_path / "own.yaml", tmp_path))
    (tmp_path / "t.csv").unlink()
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"t\.csv is a pipe or a device"):
        open_source(tmp_path / "own.yaml", tmp_path)
    (tmp_path / "t.csv").unlink()
    whole = gzip.compress(("file,patient,finding\n" + "a.png,1,nodule\n" * 500).encode(), mtime=0)
    (tmp_path / "t.csv.gz").write_bytes(whole[: len(whole) - 12])
    with pytest.raises(ValueError, match=r"Cannot read .*t\.csv\.gz"):
        list(open_source(tmp_path / "own.yaml", tmp_path))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is empty"),
        ("file,patient\na.png,1\n", r"needs the column 'finding'.*t\.csv.*file.*patient"),
        (b"\x00\xff\x00\xfe\x80", "Cannot read"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_at_once(tmp_path, content, match):
    own(tmp_path, "")
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=match):
        open_source(tmp_path / "own.yaml", tmp_path)


def test_a_joined_table_needs_its_key(tmp_path):
    write(tmp_path / "j.csv", "name,age\na.png,40\n")
    for join in ({"file": "j.csv", "match": "{file}"}, {"file": "j.csv"}):
        with pytest.raises(ValueError, match=r"j\.csv' is joined by .* from name, age"):
            own(tmp_path, "a.png,1,nodule\n", join=join)
    own(tmp_path, "a.png,1,nodule\n", join={"file": "j.csv", "match": "{file}", "key": "{name}"}, view="{age}")
    assert next(iter(open_source(tmp_path / "own.yaml", tmp_path))).view == "40"


def test_joined_rows_and_lists_of_splits_may_be_spelt_otherwise(tmp_path):
    write(tmp_path / "j.csv", "name,view\n1.0,PA\n2,AP\n")
    write(tmp_path / "train.txt", "\ufeff1.0\n\n")
    write(tmp_path / "test.txt", "2\r\n")
    description = TABLE | {
        "join": {"file": "j.csv", "match": "{file}", "key": "{name}"},
        "image": "images/{file}.png",
        "view": "{view}",
        "split": {"lists": {"train": "train.txt", "test": "test.txt"}},
    }
    for name in "12":
        picture(tmp_path / f"images/{name}.png")
    for cells in ("1\n2.0\n", "1.0\n2\n"):
        write(tmp_path / "t.csv", "file\n" + cells)
        records = list(OpenSource(describe(description), tmp_path))
        assert [(record.view, record.split) for record in records] == [("PA", "train"), ("AP", "test")]
    write(tmp_path / "train.txt", "1\n2\n")
    both = describe(description | {"split": {"lists": {"test": "test.txt", "train": "train.txt"}}})
    assert [record.split for record in OpenSource(both, tmp_path)] == ["train", "test"]
    write(tmp_path / "train.txt", "x\ny\n")
    write(tmp_path / "test.txt", "z\n")
    source = OpenSource(describe(description), tmp_path)
    assert {record.split for record in source} == {None}
    assert "none of the 3 names in the lists of splits is an image's" in source.report.lines()


def test_cells_that_are_not_understood_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"images/a\.png.*'finding' holds 'perhaps'"):
        list(own(tmp_path, "a.png,1,perhaps\n", labels={"columns": ["finding"]}))
    with pytest.raises(ValueError, match=r"images/a\.png.*'holdout' is not a split"):
        list(own(tmp_path, "a.png,1,holdout\n", split="{finding}"))
    with pytest.raises(ValueError, match="wildcard may only be in a folder"):
        own(tmp_path, "a.png,1,x\n", image="images/{patient}/*.png")
