import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffusers_dino.data import Preprocessing, UnreadableImageError, salted_hash
from diffusers_dino.data.images.encoding import Encoding
from diffusers_dino.data.sharding import ShardError
from diffusers_dino.data.sharding.parts import assemble_shard, is_complete, list_items, prepare, read_part, write_part
from diffusers_dino.data.sources import Record

SALT = "0123456789abcdef"
PNG = Encoding(Preprocessing(16), "png")


def scan(seed: int = 0, shape: tuple[int, int] = (40, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def record(folder: Path, name: str, array: np.ndarray | None = None, **facts) -> Record:
    """A record of a PNG; without an array there is no file."""
    if array is not None:
        Image.fromarray(array).save(folder / f"{name}.png")
    return Record(**{"source": "set", "image": folder / f"{name}.png", "image_id": name, "patient": name, **facts})


def items(*records: Record):
    return list_items(records, SALT)


def test_items_are_named_by_salted_hashes_in_the_order_of_their_ids(tmp_path):
    records = [record(tmp_path, name, patient="John Doe") for name in ("b.1", "a/2")]
    named = items(*records)
    assert [item.record.image_id for item in named] == ["a/2", "b.1"]
    assert named == items(*records[::-1])
    assert {item.patient for item in named} == {salted_hash("set/John Doe", SALT)}
    assert [item.key for item in named] == [f"set-{salted_hash(f'set/{name}', SALT)}" for name in ("a/2", "b.1")]
    assert named[0].key != list_items(records, "another salt, 16+")[0].key


def test_patients_that_are_spelt_in_two_ways_are_one(tmp_path):
    names = ["1", "1.0", "Müller", unicodedata.normalize("NFD", "Müller"), "01", "1.5"]
    records = [record(tmp_path, str(place), patient=name) for place, name in enumerate(names)]
    one, other = (salted_hash(f"set/{name}", SALT) for name in ("1", "Müller"))
    assert [item.patient for item in items(*records)][:4] == [one, one, other, other]
    assert len({item.patient for item in items(*records)}) == 4


def test_an_id_names_one_image(tmp_path):
    with pytest.raises(ValueError, match="Images of set share an id"):
        items(record(tmp_path, "a"), record(tmp_path, "a"))


def test_prepared_image_and_facts(tmp_path):
    facts = {"labels": ("Mass",), "uncertain": ("Edema",), "view": "PA", "split": "test"}
    (item,) = items(record(tmp_path, "a", scan(), **facts))
    known, files = prepare(item, PNG, SALT)
    assert list(files) == ["png"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["png"]))), PNG.preprocessing(scan()))
    assert {name: known[name] for name in facts} == facts
    assert (known["size"], known["modality"], known["spacing"]) == ((40, 48), None, None)


def test_jpeg_is_close_and_of_the_asked_quality(tmp_path):
    smooth = np.asarray(Image.fromarray(scan(0, (6, 6))).resize((64, 64), Image.Resampling.BICUBIC))
    (item,) = items(record(tmp_path, "a", smooth))
    sizes = []
    for quality in (50, 95):
        _, files = prepare(item, Encoding(Preprocessing(32), "jpg", quality), SALT)
        sizes.append(len(files["jpg"]))
        image = np.asarray(Image.open(io.BytesIO(files["jpg"]))).astype(int)
    assert sizes[0] < sizes[1]
    assert np.abs(image - Preprocessing(32)(smooth)).mean() < 1


@pytest.mark.parametrize(("options", "message"), [({"format": "gif"}, "jpg or png"), ({"quality": 0}, r"1\.\.100")])
def test_bad_encoding(options, message):
    with pytest.raises(ValueError, match=message):
        Encoding(**options)


def test_inverted_images_are_turned_over(tmp_path):
    same = items(record(tmp_path, "a", scan()), record(tmp_path, "b", 255 - scan(), invert=True))
    assert prepare(same[0], PNG, SALT)[1] == prepare(same[1], PNG, SALT)[1]


def test_masks_are_united_and_follow_the_image(tmp_path):
    image = np.pad(scan(), ((0, 0), (30, 0)))  # the left border goes
    left, right = np.zeros((2, *image.shape), np.uint8)
    left[:, 34:50], right[:20, 50:] = 255, 255
    for name, mask in (("left", left), ("right", right)):
        Image.fromarray(mask[::2, ::2]).save(tmp_path / f"{name}.gif")  # half the size of the image
    masks = (tmp_path / "left.gif", tmp_path / "right.gif")
    (item,) = items(record(tmp_path, "a", image, masks=masks))
    _, files = prepare(item, Encoding(Preprocessing(40), "jpg"), SALT)
    assert list(files) == ["jpg", "mask.png"]
    mask = np.asarray(Image.open(io.BytesIO(files["mask.png"])).convert("L"))  # 1 bit a pixel
    united = np.maximum(left, right)[:, 34:74] > 0
    assert mask.shape == (40, 40)
    assert set(np.unique(mask)) == {0, 255}
    assert ((mask > 0) == united).all()


def test_a_mask_of_another_shape_is_named(tmp_path):
    Image.fromarray(scan(1, (40, 40))).save(tmp_path / "mask.png")
    (item,) = items(record(tmp_path, "a", scan(), masks=(tmp_path / "mask.png",)))
    with pytest.raises(UnreadableImageError, match="its mask is 40 x 40 pixels, but its image is 48 x 40"):
        prepare(item, PNG, SALT)


def test_a_mask_that_cannot_be_read_is_named_as_one(tmp_path):
    (tmp_path / "mask.png").touch()
    named = items(record(tmp_path, "a", scan(), masks=(tmp_path / "mask.png",)))
    write_part(tmp_path, 0, named, PNG, SALT)
    assert [one.reason for one in read_part(tmp_path, 0)[1]] == ["its mask: the file is empty"]


def test_a_mask_of_several_structures_is_refused(tmp_path):
    Image.fromarray(np.tile(np.arange(3, dtype=np.uint8), (40, 16))).save(tmp_path / "mask.png")
    (item,) = items(record(tmp_path, "a", scan(), masks=(tmp_path / "mask.png",)))
    with pytest.raises(UnreadableImageError, match="its mask: a mask has two values, this one has 3"):
        prepare(item, PNG, SALT)


def test_dicom_tells_patient_view_and_spacing_and_nothing_else(tmp_path):
    dicom_files = pytest.importorskip("dicom_files")
    fields = {"PatientID": "Doe^1", "ViewPosition": "AP", "Modality": "DX", "PixelSpacing": [0.2, 0.3]}
    (tmp_path / "a.dcm").write_bytes(dicom_files.dicom_bytes(scan(), **fields))
    known, _ = prepare(*items(record(tmp_path, "a", image=tmp_path / "a.dcm")), PNG, SALT)
    assert (known["view"], known["modality"]) == ("AP", "DX")
    assert known["spacing"] == [0.5, 0.75]  # 40 rows became 16
    assert known["patient"] == salted_hash(f"set/{salted_hash('Doe^1', SALT)}", SALT)
    (of_source,) = items(record(tmp_path, "a", image=tmp_path / "a.dcm", patient="7", view="PA"))
    known, _ = prepare(of_source, PNG, SALT)
    assert (known["patient"], known["view"]) == (of_source.patient, "PA")  # the source's word goes first


def test_a_patient_in_the_headers_of_several_plain_folders_is_one(tmp_path):
    dicom_files = pytest.importorskip("dicom_files")
    (tmp_path / "a.dcm").write_bytes(dicom_files.dicom_bytes(scan(), PatientID="7"))
    named = [items(record(tmp_path, "a", image=tmp_path / "a.dcm", source=s)) for s in ("images", "images2", "other")]
    one, same, other = (prepare(item, PNG, SALT)[0]["patient"] for (item,) in named)
    assert one == same != other


def test_unreadable_images_are_named_without_a_word_of_theirs(tmp_path):
    (tmp_path / "quotes.png").write_bytes(b"\x89PNG\r\n\x1a\nJane Doe")
    (tmp_path / "text.png").write_bytes(b"Jane Doe")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    records = [record(tmp_path, name) for name in ("quotes", "text", "empty", "missing", "folder")]
    records += [record(tmp_path, "black", np.zeros((9, 9), np.uint8)), record(tmp_path, "good", scan())]
    named = items(*records)
    assert write_part(tmp_path, 0, named, PNG, SALT) == (7, 6)
    samples, unreadable = read_part(tmp_path, 0)
    ids = {item.key: item.record.image_id for item in named}
    assert [ids[sample.key] for sample in samples] == ["good"]
    reasons = {ids[one.key]: one.reason for one in unreadable}
    assert sorted(reasons) == ["black", "empty", "folder", "missing", "quotes", "text"]
    assert reasons["missing"] == "No such file or directory"
    assert reasons["empty"] == "the file is empty"
    assert reasons["black"] == "all its pixels are equal"
    for reason in reasons.values():
        assert "Doe" not in reason
        assert str(tmp_path) not in reason


def test_parts_become_shards(tmp_path):
    named = items(*(record(tmp_path, f"{n}", scan(n), labels=(f"L{n}",)) for n in range(5)))
    for part, several in enumerate((named[:3], named[3:])):
        assert not is_complete(tmp_path, part)
        write_part(tmp_path, part, several, PNG, SALT)
        assert is_complete(tmp_path, part)
    samples = [sample for part in range(2) for sample in read_part(tmp_path, part)[0]]
    planned = "test-000000.tar", "test"
    folders = tmp_path, tmp_path / "out", tmp_path / "done"
    for folder in folders[1:]:
        folder.mkdir()
    chosen = [samples[n] for n in (4, 0, 2)]
    shard = assemble_shard(*planned, chosen, *folders)
    path = tmp_path / "out" / "test-000000.tar"
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [named[n].key for n in (4, 0, 2)]
    facts = json.loads(read[0]["json"])
    told = {"source", "patient", "labels", "uncertain", "view", "modality", "spacing", "size", "split"}
    assert set(facts) == told
    assert (facts["labels"], facts["split"], facts["size"]) == (["L4"], "test", [40, 48])

    content, changed = path.read_bytes(), path.stat().st_mtime_ns
    assert assemble_shard(*planned, chosen, *folders) == shard
    assert path.stat().st_mtime_ns == changed  # what is whole is left alone
    path.write_bytes(content[:-1] + b"x")
    assert assemble_shard(*planned, chosen, *folders) == shard
    assert path.read_bytes() == content


def test_a_damaged_part_is_not_passed_on(tmp_path):
    write_part(tmp_path, 0, items(record(tmp_path, "a", scan())), PNG, SALT)
    blob = tmp_path / "000000.bin"
    blob.write_bytes(blob.read_bytes()[:-1])
    assert not is_complete(tmp_path, 0)
    blob.write_bytes(b"x" * (blob.stat().st_size + 1))
    assert is_complete(tmp_path, 0)  # its size is right
    samples, _ = read_part(tmp_path, 0)
    with pytest.raises(ShardError, match=r"delete .*000000\.bin and 000000\.json"):
        assemble_shard("x.tar", "train", samples, tmp_path, tmp_path, tmp_path)
    assert not (tmp_path / "x.tar").exists()
