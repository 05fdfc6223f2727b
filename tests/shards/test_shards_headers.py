"""That nothing of headers and metadata is in anything that `make_shards` writes or says."""

from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from folders import contents
from shard_runs import facts, picture, rows_of

PLANTED = "Zebulon"


def plant_in_dicoms(folder: Path, count: int) -> None:
    """DICOM files whose headers say the planted word wherever text may stand, some of them damaged."""
    pytest.importorskip("pydicom", reason="needs `pip install diffusers-dino[dicom]`")
    import dicom_files

    for number in range(count):
        word = f"{PLANTED}{number:03d}"
        patient = f"{PLANTED}-{number // 4}"
        dataset = dicom_files.dicom_dataset(picture(200 + number), PatientID=patient, ViewPosition="PA")
        for keyword in ("PatientName", "InstitutionName", "ReferringPhysicianName", "StudyDescription", "StudyID"):
            setattr(dataset, keyword, word)
        for keyword in ("PatientComments", "ImageComments", "AccessionNumber", "DerivationDescription", "Laterality"):
            setattr(dataset, keyword, word)
        dataset.Modality = word if number % 3 else "DX"
        if number % 5 == 0:
            dataset.ViewPosition = word
        dataset.add_new(0x00090010, "LO", word)
        dataset.add_new(0x00091001, "UT", word)
        data = dicom_files.to_bytes(dataset)
        if number % 10 == 1:
            data = data[: -len(data) // 3]
        elif number % 10 == 2:  # a value that is none of its kind, which pydicom quotes in a warning
            data = data.replace(b"PA", b"P?", 1)
        (folder / f"{number:03d}.dcm").write_bytes(data)


def plant_in_pictures(folder: Path) -> None:
    """PNG and JPEG files with the planted word in their metadata, whole and cut short."""
    text, exif = PngInfo(), Image.Exif()
    text.add_text("Comment", f"{PLANTED}-png")
    text.add_itxt("Author", f"{PLANTED}-itxt")
    exif[0x010E], exif[0x9C9C] = f"{PLANTED}-exif", f"{PLANTED}-xp".encode("utf-16-le")
    for number in range(3):
        image = Image.fromarray(picture(400 + number))
        image.save(folder / f"p{number}.png", pnginfo=text, exif=exif)
        image.save(folder / f"j{number}.jpg", exif=exif, comment=f"{PLANTED}-comment")
        image.save(folder / f"t{number}.tif", description=f"{PLANTED}-tiff")
    for name in ("p0.png", "j0.jpg", "t0.tif"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-900])


def test_headers_go_nowhere(make, tmp_path, capfd, caplog):
    """Nothing planted in 100 DICOM headers and in metadata is in a shard, a log, the manifest, a table or the page."""
    folder = tmp_path / "headers"
    folder.mkdir()
    plant_in_dicoms(folder, 100)
    plant_in_pictures(folder)
    capfd.readouterr(), caplog.clear()  # pydicom warned of what was planted
    assert sum(PLANTED.encode() in path.read_bytes() for path in folder.iterdir()) >= 106
    out = make(source=folder, max_unreadable=0.3, shard_size=20)
    entries = facts(out)
    assert 90 <= len(entries) < 109
    assert len(rows_of(out / "unreadable.csv")) == 109 - len(entries)
    assert {entry["modality"] for entry in entries.values()} == {None, "DX"}
    assert {entry["view"] for entry in entries.values()} == {None, "PA"}
    written = contents(out)
    written["log"] = "".join([*capfd.readouterr(), caplog.text]).encode()
    for name, data in written.items():
        for spelled in (PLANTED.encode(), PLANTED.encode("utf-16-le"), PLANTED.upper().encode()):
            assert spelled not in data, name
    patients = defaultdict(set)
    for entry in entries.values():
        patients[entry["patient"]].add(entry["split"])
    assert all(len(splits) == 1 for splits in patients.values())
    assert len(patients) < 60  # four files of a patient are his
