import itertools
import logging
import sys
import traceback
import warnings

import numpy as np
import pytest

pytest.importorskip("pydicom")
from pydicom import dcmread

from dicom_files import JPEGBaseline8Bit, dicom_bytes, dicom_dataset, planted_headers
from diffusers_dino.data import Preprocessing, UnreadableImageError, dicom_facts, open_images, read_image, salted_hash

FILM = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)
SALT = "0123456789abcdef"
KNOWN = {
    "Modality": "DX",
    "ViewPosition": "PA",
    "ImageLaterality": "U",
    "ImagerPixelSpacing": [0.143, 0.1430000001],
    "PatientID": "A 17",
    "StudyInstanceUID": "1.2.3",
}


def test_facts(tmp_path):
    data = dicom_bytes(FILM, 12, **KNOWN)
    expected = {"modality": "DX", "view": "PA", "laterality": "U", "spacing": [0.143, 0.143]}
    assert dicom_facts(data) == expected
    (tmp_path / "scan").write_bytes(data)
    hashed = {"patient": salted_hash("A 17", SALT), "study": salted_hash("1.2.3", SALT)}
    assert dicom_facts(tmp_path / "scan", SALT) == expected | hashed
    assert dicom_facts(dicom_dataset(FILM, 12, **KNOWN), SALT) == expected | hashed
    assert dicom_facts(dcmread(tmp_path / "scan"), SALT) == expected | hashed
    assert dicom_facts(dicom_bytes(FILM, 12), SALT) == {}


@pytest.mark.parametrize(
    ("value", "view"), [("LL", "LATERAL"), ("AP", "AP"), ("LLD", "LLD"), ("DOE", None), ("", None)]
)
def test_views(value, view):
    assert dicom_facts(dicom_bytes(FILM, 12, ViewPosition=value)).get("view") == view


@pytest.mark.parametrize(
    "spacing", [[19430517, 0.1], ["0.1", "0.2", "0.3"], [0, 0.1], [-1, 1], "0.1", [8841, 7733], ["1e-9", "1e400"]]
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")
def test_impossible_spacing_is_left_out(spacing):
    dataset = dicom_dataset(FILM, 12)
    dataset.PixelSpacing = spacing
    assert dicom_facts(dataset) == {}


def test_detector_spacing_is_second_to_the_patients():
    assert dicom_facts(dicom_bytes(FILM, 12, PixelSpacing=[0.2, 0.3], ImagerPixelSpacing=[1, 1]))["spacing"] == [
        0.2,
        0.3,
    ]


def test_salted_hash():
    name = salted_hash("patient 17", SALT)
    assert name == salted_hash(" patient 17 ", SALT.encode()) == "eff7f439573ea6ef"
    assert len({name, salted_hash("patient 18", SALT), salted_hash("patient 17", SALT + "x")}) == 3
    with pytest.raises(ValueError, match=r"at least 16 bytes, got 4\. `secrets"):
        salted_hash("patient 17", "salt")
    with pytest.raises(ValueError, match="identifier to hash is empty"):
        salted_hash(" ", SALT)


def told(data: bytes) -> list[str]:
    """All that reading a file gives away: facts, or the error with everything attached to it."""
    texts = []
    for read in (read_image, dicom_facts, lambda data: dicom_facts(data, SALT)):
        try:
            result = read(data)
            texts.append(repr(result) if isinstance(result, dict) else "")
        except UnreadableImageError as error:
            texts.append("".join(traceback.format_exception(error)))
            seen = error
            while seen is not None:  # also what a traceback does not show
                texts.append(repr(seen))
                seen = seen.__context__ or seen.__cause__
    return texts


def test_planted_identities_reach_nothing(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    random = np.random.default_rng(0)
    files = planted_headers(100)
    caplog.clear()  # what pydicom said while it wrote them
    texts, refused = [], 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number, (data, _) in enumerate(files):
            damaged = bytearray(data[: random.integers(200, len(data))])
            for place in random.integers(132, len(damaged), 3):
                damaged[place] = random.integers(256)
            cut = data[: random.integers(200, len(data))]
            found = [told(version) for version in (data, bytes(damaged), cut)]
            refused += sum("Error" in text for text in found[0])
            texts += itertools.chain.from_iterable(found)
            (tmp_path / f"{number:03d}.dcm").write_bytes(data)
        images = open_images(tmp_path, Preprocessing(16), max_unreadable=0.9)
        texts += [repr(images[index]["key"]) for index in range(len(images))]
        texts += [str(warning.message) for warning in warned]
    texts += [caplog.text, *capfd.readouterr()]
    everything = "\n".join(texts)
    secrets = {secret for _, planted in files for secret in planted}
    assert len(secrets) == 800
    assert all(any(secret.encode() in data for secret in planted) for data, planted in files)
    assert [secret for secret in secrets if secret in everything] == []
    assert 5 < refused < 100  # an identity as photometric interpretation or number of frames
    assert "'view': 'PA'" in everything
    assert "Cannot read" in caplog.text


def test_pydicom_may_speak_again_afterwards(caplog):
    read_image(dicom_bytes(FILM, 12))
    logging.getLogger("pydicom").warning("heard")
    assert "heard" in caplog.text


def test_comments_inside_the_pixels_are_not_read(caplog, capfd):
    frame = dicom_bytes((FILM % 256).astype(np.uint8), 8, JPEGBaseline8Bit)
    secret = b"JANE DOE"
    comment = b"\xff\xfe" + (len(secret) + 2).to_bytes(2, "big") + secret
    data = frame.replace(b"\xff\xd8\xff\xe0", b"\xff\xd8" + comment + b"\xff\xe0")
    assert secret in data
    assert "JANE" not in "".join([*told(data), *told(data[: len(data) // 2]), caplog.text, *capfd.readouterr()])


def test_the_missing_extra_is_named(monkeypatch):
    data = dicom_bytes(FILM, 12)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install diffusers-dino\[dicom\]"):
        read_image(data)
    with pytest.raises(ImportError, match=r"pip install diffusers-dino\[dicom\]"):
        dicom_facts(data)
