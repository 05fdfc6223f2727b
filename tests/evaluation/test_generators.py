"""Whether generators have seen the patients that they help to test: a check that must have had something to check."""

import re
import unicodedata

import numpy as np
import pytest

from diffusers_dino.data.labels import LabelTable
from diffusers_dino.evaluation.augmentation.generators import check_generators, write_folds

KEYS = tuple(f"röntgen/{i:03d}" for i in range(24))
TABLE = LabelTable(KEYS, tuple(frozenset("AB"[i % 2]) for i in range(24)), tuple(f"p{i // 2}" for i in range(24)))
FOLDS = np.repeat([0, 1], 12)
SPELLINGS = {
    "as they are": str,
    "file names": lambda key: f"{key.rpartition('/')[2]}.png",
    "relative paths": lambda key: f"./{key}.dcm",
    "full paths": lambda key: f"/data/cxr/{key}.png",
    "Windows paths": lambda key: f"D:\\cxr\\{key}.PNG".replace("/", "\\"),
    "accents in two signs": lambda key: unicodedata.normalize("NFD", key),
    "spaces and a return": lambda key: f"  {key} \r",
}


def write(path, keys) -> str:
    path.write_text("\n".join(keys), encoding="utf-8", newline="")
    return str(path)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_leak_is_found_however_keys_are_spelt(spelling, tmp_path):
    own = [write(tmp_path / f"{fold}.txt", map(SPELLINGS[spelling], np.array(KEYS)[fold != FOLDS])) for fold in (0, 1)]
    said = check_generators(TABLE, FOLDS, "model-{fold}", own)
    assert "no generator was trained on an image of a patient" in said
    assert "12 of 12 for fold 0, 12 of 12 for fold 1" in said
    with pytest.raises(ValueError, match="generator of fold 0 was trained on images of 6 of the 6 patients"):
        check_generators(TABLE, FOLDS, "model-{fold}", own[::-1])
    folds = write_folds(TABLE, ("A", "B"), tmp_path / "out", num_folds=2, training_keys=own[0])
    assert (folds[12:] == -1).all()
    assert (folds[:12] >= 0).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "holds no key"),
        (["", "  "], "holds no key"),
        (
            ["elsewhere/000.png", "mimic/s1"],
            "None of the 2 keys in .* it cannot be checked what the generator has seen",
        ),
        (["file,patient", "röntgen/000,p0"], "None of the 2 keys"),
        ([f"{number}" for number in range(1000, 1024)], "None of the 24 keys"),
    ],
)
def test_keys_of_no_image_are_refused(keys, message, tmp_path):
    path = write(tmp_path / "keys.txt", keys)
    good = write(tmp_path / "good.txt", KEYS[12:])
    for check in (
        lambda: check_generators(TABLE, FOLDS, "model", path),
        lambda: check_generators(TABLE, FOLDS, "model-{fold}", [good, path]),
        lambda: write_folds(TABLE, ("A", "B"), tmp_path / "out", num_folds=2, training_keys=path),
    ):
        with pytest.raises(ValueError, match=message):
            check()
    assert not (tmp_path / "out").exists()


def test_how_many_keys_matched_is_recorded_and_few_are_warned_of(tmp_path, caplog):
    path = write(tmp_path / "keys.txt", [KEYS[3], *(f"elsewhere-{i}" for i in range(99))])
    tested = np.where(np.arange(24) < 12, -1, 0)
    assert "1 of 100" in check_generators(TABLE, tested, "model", path)
    assert "1 of the 100 keys" in caplog.text
    alone = LabelTable(KEYS, TABLE.labels, KEYS)
    assert re.search("Patients are not known", check_generators(alone, tested, "model", path))
    assert "not checked" in check_generators(TABLE, tested, "model-{fold}")


def test_a_patient_is_known_by_an_image_that_is_not_used(tmp_path):
    used = TABLE.select(KEYS[::2])  # one image of each patient; the generators saw the other ones
    path = write(tmp_path / "keys.txt", KEYS[1::2])
    folds = np.repeat([0, 1], 6)
    with pytest.raises(ValueError, match="None of the 12 keys"):
        check_generators(used, folds, "model", path)
    with pytest.raises(ValueError, match="fold 0 was trained on images of 6 of the 6 patients"):
        check_generators(used, folds, "model-{fold}", path, TABLE)
    with pytest.raises(ValueError, match="trained on all 12 patients"):
        write_folds(used, ("A",), tmp_path / "out", num_folds=2, training_keys=path, known=TABLE)


def test_keys_that_look_like_formulas_are_read_as_they_were_written(tmp_path):
    table = LabelTable(tuple(f"={key}" for key in KEYS), TABLE.labels, TABLE.patients)
    folds = write_folds(table, ("A", "B"), tmp_path, num_folds=2)
    assert np.array_equal(write_folds(table, ("A", "B"), tmp_path, num_folds=2), folds)
