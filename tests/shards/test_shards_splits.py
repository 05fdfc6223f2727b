"""Copies across sources and splits by patient in what `make_shards` writes."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from shard_runs import facts, keys_of, picture, rows_of


class TestDuplicatesAndSplits:
    @pytest.fixture
    def copies(self, tmp_path) -> Path:
        """A second folder: two of the images again, one of them in another size, and five others."""
        folder = tmp_path / "copies"
        folder.mkdir()
        Image.fromarray(picture(2)).save(folder / "exact.bmp")
        Image.fromarray(picture(3)).resize((96, 96), Image.Resampling.BICUBIC).save(folder / "near.png")
        for number in range(5):
            Image.fromarray(picture(100 + number)).save(folder / f"{number}.png")
        return folder

    def test_copies_are_reported_across_sources_and_share_a_split(self, make, images, copies, tmp_path):
        out = make(source=[images, copies], test_fraction=0.5, write_key_map=tmp_path / "keys.csv")
        keys = keys_of(tmp_path / "keys.csv")
        found = {(row["key"], row["copy"]): row["kind"] for row in rows_of(out / "duplicates.csv")}
        pairs = {"Doe^02.png": "exact.bmp", "more/Doe^03.png": "near.png"}
        assert found == {
            (keys["Doe^02.png"], keys["exact.bmp"]): "exact",
            (keys["more/Doe^03.png"], keys["near.png"]): "perceptual",
        }
        written = facts(out)
        assert len(written) == 21
        for one, copy in pairs.items():
            assert written[keys[one]]["split"] == written[keys[copy]]["split"]
        lineage = json.loads((out / "manifest.json").read_text())["lineage"]
        assert lineage["duplicates"] == [["exact", "images", "images2", 1], ["perceptual", "images", "images2", 1]]

    @pytest.mark.parametrize(
        ("patients", "told"),
        [
            (["ANONYMOUS"] * 8, "8 of 8 images have one patient id, and so one split"),
            (["0"] * 6 + ["1", "2"], "6 of 8 images have one patient id"),
            ([""] * 8, "8 of 8 images are DICOM files without a patient id, and count as a patient each"),
            ([" ", "", *"abcdef"], "2 of 8 images are DICOM files without a patient id"),
            (list("aabbccdd"), None),
        ],
    )
    def test_patients_that_cannot_be_told_apart_are_a_warning(self, make, tmp_path, caplog, patients, told):
        dicom_files = pytest.importorskip("dicom_files")
        (tmp_path / "dicom").mkdir()
        for number, patient in enumerate(patients):
            data = dicom_files.dicom_bytes(picture(number), PatientID=patient)
            (tmp_path / "dicom" / f"{number}.dcm").write_bytes(data)
        make(source=tmp_path / "dicom", test_fraction=0)
        assert (told in caplog.text and "names another column" in caplog.text) if told else not caplog.text

    def test_a_split_without_images_is_a_warning(self, make, caplog):
        make(test_fraction=0.001, validation_fraction=0.3)
        assert caplog.text.count("No image is in the split") == 1
        assert "'test'" in caplog.text

    @pytest.mark.parametrize(("policy", "gone"), [("exact", ["exact.bmp"]), ("perceptual", ["exact.bmp", "near.png"])])
    def test_copies_are_dropped_if_asked(self, make, images, copies, tmp_path, policy, gone):
        out = make(source=[images, copies], drop_duplicates=policy, write_key_map=tmp_path / "keys.csv")
        keys = keys_of(tmp_path / "keys.csv")
        assert set(keys.values()) - set(facts(out)) == {keys[name] for name in gone}

    def test_patients_and_official_splits_of_a_source(self, make, images, tmp_path):
        names = sorted(path.relative_to(images).as_posix() for path in images.rglob("Doe*.png"))
        names = [name for name in names if "mask" not in name]
        lines = ["file,patient,label,split"]
        lines += [
            f"{name},Jane^{i // 3},{'Mass|Edema' if i % 2 else ''},{'test' if i < 3 else ''}"
            for i, name in enumerate(names)
        ]
        (images / "labels.csv").write_text("\n".join(lines))
        text = 'table: {file: labels.csv}\nimage: "{file}"\nid: "{file}"\npatient: "{patient}"\nsplit: "{split}"\n'
        text += 'labels: {column: "{label}", separator: "|"}\nlicence: CC0\ncitation: "Doe 2020"\n'
        described = tmp_path / "mine.yaml"
        described.write_text(f"name: mine\n{text}")
        out = make(
            source=f"{described}={images}",
            test_fraction=0.4,
            official_splits=True,
            num_workers=0,
            part_size=2,
            write_key_map=tmp_path / "keys.csv",
        )
        by_patient = defaultdict(set)
        for entry in facts(out).values():
            by_patient[entry["patient"]].add(entry["split"])
        assert len(by_patient) == 5
        assert all(len(splits) == 1 for splits in by_patient.values())
        keys = keys_of(tmp_path / "keys.csv")
        assert all(facts(out)[keys[name]]["split"] == "test" for name in names[:3])
        labels = {key: entry["labels"] for key, entry in facts(out).items()}
        assert labels[keys[names[1]]] == ["Mass", "Edema"]
        page = (out / "summary.html").read_text()
        for shown in ("Licence: CC0", "Doe 2020", "Mass", "Edema", "data:image/png"):
            assert shown in page
        assert "Jane" not in page
