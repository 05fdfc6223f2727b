"""Images that cannot be read, and arguments that make no sense."""

import os
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from diffusers_dino.data import Preprocessing, open_images
from folders import contents
from shard_runs import facts, keys_of, picture, rows_of


class TestDamage:
    def test_few_unreadable_images_are_reported(self, make, images, tmp_path):
        (images / "broken.png").write_bytes((images / "Doe^02.png").read_bytes()[:200])
        out = make(max_unreadable=0.1, write_key_map=tmp_path / "keys.csv")
        (row,) = rows_of(out / "unreadable.csv")
        assert row["key"] == keys_of(tmp_path / "keys.csv")["broken.png"]
        assert row["reason"].startswith("it is damaged")
        assert row["key"] not in facts(out)
        assert "it is damaged" in (out / "summary.html").read_text()

    def test_many_are_an_error_that_can_be_mended(self, make, images, tmp_path):
        for number in range(6):
            (images / f"broken{number}.png").write_bytes(b"")
        message = r"At least 6 of 20 images cannot be read, more than the tolerated 5\.0%.*6 x 'the file is empty'"
        with pytest.raises(ValueError, match=message):
            make(part_size=20)
        out = tmp_path / "out"
        assert len(rows_of(out / "unreadable.csv")) == 6
        assert not list(out.glob("*.tar"))
        for number in range(6):
            Image.fromarray(picture(50 + number)).save(images / f"broken{number}.png")
        with pytest.raises(ValueError, match="6 of 20"):
            make(part_size=20)
        make(part_size=20, retry_unreadable=True)
        assert len(facts(out)) == 20
        assert rows_of(out / "unreadable.csv") == []

    def test_what_was_mended_after_the_plan_gets_a_new_plan(self, make, images, tmp_path, monkeypatch):
        expected = contents(make())
        whole = (images / "Doe^02.png").read_bytes()
        (images / "Doe^02.png").write_bytes(b"")
        monkeypatch.setattr("diffusers_dino.data.sharding.make.write_manifest", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(output_dir=tmp_path / "cut", max_unreadable=0.1)
        monkeypatch.undo()
        (images / "Doe^02.png").write_bytes(whole)
        assert contents(make(output_dir=tmp_path / "cut", retry_unreadable=True)) == expected

    def test_work_ends_when_too_much_is_unreadable(self, make, images):
        for path in images.glob("Doe*.png"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match="At least 5 of 14"):
            make()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"source": None}, "Name the images"),
            ({"source": "nowhere"}, "no folder 'nowhere'"),
            ({"source": "padchets=nowhere"}, "Did you mean 'padchest'"),
            ({"salt_file": None}, "Give --salt_file FILE"),
            ({"salt_file": "out/salt"}, "Put it elsewhere"),
            ({"write_key_map": "out/keys.csv"}, "Put it elsewhere"),
            ({"shard_size": 0}, "shard_size must be at least 1"),
            ({"part_size": 0}, "part_size must be at least 1"),
            ({"num_workers": -1}, "num_workers must be at least 0"),
            ({"max_unreadable": 2}, "max_unreadable is a fraction"),
            ({"duplicate_distance": 16}, r"duplicate_distance must be in \[0, 15\]"),
            ({"test_fraction": 1}, "leave some for training"),
            ({"quality": 101}, r"1\.\.100"),
            ({"clip_percent": 50}, "clip_percent"),
        ],
    )
    def test_bad_arguments(self, make, tmp_path, monkeypatch, changed, message):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("DIFFUSERS_DINO_SALT", raising=False)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make(**changed)

    def test_images_are_those_that_training_takes(self, make, images, tmp_path, caplog):
        """By one rule: DICOM under any name, no hidden files, companions, links that lead nowhere or pipes."""
        dicom_files = pytest.importorskip("dicom_files")
        data = dicom_files.dicom_bytes(picture(60))
        for name, written in {
            "IM0001": data,
            "1.2.840.113619": dicom_files.dicom_bytes(picture(61)),
            "scan.IMA": dicom_files.dicom_bytes(picture(62)),
            "bare.dcm": dicom_files.dicom_bytes(picture(63))[132:],
            "notes.txt": b"no image",
            "._a.png": b"a fork of macOS",
            "@eaDir/Doe^00.png": b"a thumbnail",
        }.items():
            (images / name).parent.mkdir(exist_ok=True)
            (images / name).write_bytes(written)
        Image.fromarray(picture(64)).save(images / "Doe^02.seg.png")
        (images / "gone.png").symlink_to(images / "nowhere.png")
        os.mkfifo(images / "pipe.png")
        out = make(write_key_map=tmp_path / "keys.csv")
        assert caplog.text.count("left out: ") == 4
        assert "Doe" not in caplog.text
        keys = keys_of(tmp_path / "keys.csv")
        trained = open_images(images, Preprocessing(32))
        assert set(keys) == set(trained.store.paths)
        assert len(facts(out)) == len(keys) == 18
        assert rows_of(out / "unreadable.csv") == []

    def test_tars_beside_images_are_not_guessed_at(self, make, images):
        (images / "more" / "train-000000.tar").write_bytes(b"")
        with pytest.raises(ValueError, match="1 tar or Parquet files beside 14 images: which are meant"):
            make()

    def test_sound_files_of_other_kinds_do_not_count_as_damaged(self, make, images):
        dicom_files = pytest.importorskip("dicom_files")
        for number in range(6):
            dataset = dicom_files.dicom_dataset(picture(number))
            dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
            del dataset.PixelData
            (images / f"report{number}.dcm").write_bytes(dicom_files.to_bytes(dataset))
        out = make()
        assert len(facts(out)) == 14
        assert {row["reason"] for row in rows_of(out / "unreadable.csv")} == {
            "it is not an image (Basic Text SR Storage)"
        }
        make()

    @pytest.mark.parametrize(
        "blank", [np.full((40, 40), 9), np.full((40, 40, 3), (9, 0, 200)), np.full((40, 40), 60000)]
    )
    def test_a_blank_image_is_unreadable_here_and_in_training(self, make, images, blank):
        Image.fromarray(blank.astype(np.uint16 if blank.max() > 255 else np.uint8)).save(images / "blank.png")
        (row,) = rows_of(make(max_unreadable=0.1) / "unreadable.csv")
        assert row["reason"] == "all its pixels are equal"
        trained = open_images(images, Preprocessing(32), in_memory=True, max_unreadable=0.1)
        (message,) = trained.unreadable.values()
        assert message.endswith("blank.png: all its pixels are equal")
        assert trained[trained.keys.index("blank")]["key"] != "blank"
        with pytest.raises(ValueError, match="1 of 15 images cannot be read"):
            open_images(images, Preprocessing(32), in_memory=True)

    def test_sources_have_names_of_their_own(self, make, images, tmp_path):
        (tmp_path / "mine.yaml").write_text("name: mine\nimage: '**/*.png'\n")
        with pytest.raises(ValueError, match="mine is given twice"):
            make(source=[f"{tmp_path}/mine.yaml={images}"] * 2)
