"""What `diffusers-dino shards` writes, the salt that its keys are made with, and the library call behind it."""

import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffusers_dino.data import Preprocessing, open_images, verify_shards
from folders import contents
from shard_runs import SALT, facts, keys_of, picture, rows_of


class TestWhatIsWritten:
    def test_folder_opens_and_verifies(self, make, tmp_path):
        out = make(write_key_map=tmp_path / "keys.csv")
        assert verify_shards(out) == []
        manifest = json.loads((out / "manifest.json").read_text())
        assert sum(shard["samples"] for shard in manifest["shards"]) == 14
        assert manifest["preprocessing_hash"] == Preprocessing(32).fingerprint()
        assert {path.name for path in out.glob("*.tar")} == {shard["name"] for shard in manifest["shards"]}
        others = {path.name for path in out.iterdir() if ".tar" not in path.name}
        assert others == {"duplicates.csv", "manifest.json", "summary.html", "unreadable.csv"}
        splits = {key: entry["split"] for key, entry in facts(out).items()}
        assert set(splits.values()) == {"train", "test"}
        keys = keys_of(tmp_path / "keys.csv")
        assert set(keys.values()) == set(splits)
        read = list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))
        assert {sample["__key__"] for sample in read if {"jpg", "json"} <= set(sample)} == set(splits)
        assert sum("mask.png" in sample for sample in read) == 1
        for split in ("train", "test"):
            data = open_images(out, Preprocessing(32), split=split)
            assert sorted(data.keys) == sorted(key for key, given in splits.items() if given == split)
            assert data[0]["image"].shape == (1, 32, 32)

    def test_images_and_masks_are_the_prepared_ones(self, make, tmp_path):
        out = make(format="png", test_fraction=0, write_key_map=tmp_path / "keys.csv")
        keys = keys_of(tmp_path / "keys.csv")
        data = open_images(out, Preprocessing(32))
        for number in range(14):
            name = f"more/Doe^{number:02d}.png" if number % 2 else f"Doe^{number:02d}.png"
            stored = data.companion(data.keys.index(keys[name]), "png")
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), Preprocessing(32)(picture(number)))
            taken = data[data.keys.index(keys[name])]["image"][0]  # not prepared a second time
            assert np.array_equal((taken * 255).round().byte().numpy(), Preprocessing(32)(picture(number)))
        again = open_images(out, Preprocessing(16))
        assert again[0]["image"].shape == (1, 16, 16)
        mask = data.companion(data.keys.index(keys["Doe^00.png"]), "mask.png")
        expected = Preprocessing(32).prepare_mask(picture(0) > 128, (slice(0, 48), slice(0, 48)))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask))), expected)
        with pytest.raises(KeyError, match="no companion"):
            data.companion(data.keys.index(keys["Doe^02.png"]), "mask.png")

    def test_runs_on_the_same_images_are_equal(self, make, tmp_path):
        one = contents(make())
        assert contents(make(output_dir=tmp_path / "again", part_size=3)) == one
        other = contents(make(output_dir=tmp_path / "other", seed=1))
        assert {name for name in one if one[name] != other.get(name)} >= {"manifest.json", "train-000000.tar"}

    def test_nothing_tells_salt_or_file_names(self, make, flags, capfd, caplog):
        out = make()
        written = b"".join(contents(out).values()) + "".join([*capfd.readouterr(), caplog.text]).encode()
        for secret in (SALT, "Doe^", "images/more"):
            assert secret.encode() not in written


class TestSalt:
    def test_a_new_salt_is_made_and_kept(self, make, tmp_path, capsys):
        path = tmp_path / "new" / ".." / "fresh"
        (tmp_path / "new").mkdir()
        one = contents(make(salt_file=path))
        assert "Keep it, and keep it secret" in capsys.readouterr().out
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(path.read_text().strip()) == 32
        assert contents(make(salt_file=path, output_dir=tmp_path / "again")) == one

    def test_the_environment_may_hold_it(self, make, tmp_path, monkeypatch):
        expected = contents(make())
        monkeypatch.setenv("DIFFUSERS_DINO_SALT", SALT)
        assert contents(make(salt_file=None, output_dir=tmp_path / "again")) == expected
        monkeypatch.setenv("DIFFUSERS_DINO_SALT", "short")
        with pytest.raises(ValueError, match="at least 16 bytes"):
            make(salt_file=None, output_dir=tmp_path / "short")

    def test_the_key_map_is_private_and_holds_no_formula(self, make, tmp_path, images):
        (tmp_path / "keys.csv").write_text("of an earlier run")
        (tmp_path / "keys.csv").chmod(0o666)
        (images / "Doe^02.png").rename(images / "=Doe^02.png")
        make(write_key_map=tmp_path / "keys.csv")
        assert (tmp_path / "keys.csv").stat().st_mode & 0o777 == 0o600
        rows = {row["image_id"]: row["file"] for row in rows_of(tmp_path / "keys.csv")}
        assert rows["Doe^00.png"] == str(images / "Doe^00.png")
        assert rows["'=Doe^02.png"] == str(images / "=Doe^02.png")
