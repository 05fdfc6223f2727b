"""`examples/make_shards.py` as a user runs it: most runs in this process, some as processes of their own."""

import csv
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import tiny
from diffusers_dino.data import Preprocessing, open_images, verify_shards
from scripts import EXAMPLES, call_script, command_line, run_script

pytest.importorskip("imagehash", reason="needs `pip install diffusers-dino[shards]`")

SALT = "0123456789abcdef0123"
ROOT = EXAMPLES.parent


def picture(seed: int, side: int = 48) -> np.ndarray:
    """Smooth blobs `(side, side)` uint8, unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of 14 images, one of them with a mask."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number in range(14):
        Image.fromarray(picture(number)).save(folder / ("more" if number % 2 else "") / f"Doe^{number:02d}.png")
    Image.fromarray(picture(0) > 128).save(folder / "Doe^00.mask.png")
    return folder


@pytest.fixture
def flags(tmp_path, images) -> dict:
    (tmp_path / "salt").write_text(SALT)
    return {
        "source": images,
        "salt_file": tmp_path / "salt",
        "output_dir": tmp_path / "out",
        "size": 32,
        "test_fraction": 0.3,
        "shard_size": 4,
        "part_size": 5,
        "num_workers": 0,
    }


@pytest.fixture
def make(flags):
    """Run the script in this process; flags by keyword win. Returns the output folder."""

    def run(**changed) -> Path:
        call_script("make_shards.py", **{**flags, **changed})
        return Path({**flags, **changed}["output_dir"])

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def facts(folder: Path) -> dict[str, dict]:
    """The JSON of each sample, by key."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    found[info.name.removesuffix(".json")] = json.load(tar.extractfile(info))
    return found


def keys_of(path: Path) -> dict[str, str]:
    """Image id -> key."""
    with open(path, newline="") as file:
        return {row["image_id"]: row["key"] for row in csv.DictReader(file)}


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class TestWhatIsWritten:
    def test_folder_opens_and_verifies(self, make, tmp_path):
        out = make(write_key_map=tmp_path / "keys.csv")
        assert verify_shards(out) == []
        manifest = json.loads((out / "manifest.json").read_text())
        assert sum(shard["samples"] for shard in manifest["shards"]) == 14
        assert manifest["preprocessing_hash"] == Preprocessing(32).fingerprint()
        names = {shard["name"] for shard in manifest["shards"]}
        assert {path.name for path in out.glob("*.tar")} == names
        assert sorted(path.name for path in out.iterdir() if ".tar" not in path.name) == [
            "duplicates.csv",
            "manifest.json",
            "summary.html",
            "unreadable.csv",
        ]
        splits = {key: entry["split"] for key, entry in facts(out).items()}
        assert set(splits.values()) == {"train", "test"}
        keys = keys_of(tmp_path / "keys.csv")
        assert set(keys.values()) == set(splits)
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
        one = content(make())
        assert content(make(output_dir=tmp_path / "again", part_size=3)) == one
        other = content(make(output_dir=tmp_path / "other", seed=1))
        assert {name for name in one if one[name] != other.get(name)} >= {"manifest.json", "train-000000.tar"}

    def test_nothing_tells_salt_or_file_names(self, make, flags, capfd, caplog):
        out = make()
        written = b"".join(content(out).values()) + "".join([*capfd.readouterr(), caplog.text]).encode()
        for secret in (SALT, "Doe^", "images/more"):
            assert secret.encode() not in written

    def test_webdataset_reads_them(self, make):
        webdataset = pytest.importorskip("webdataset")
        out = make()
        tars = sorted(map(str, out.glob("*.tar")))
        read = list(webdataset.WebDataset(tars, shardshuffle=False))
        assert len(read) == 14
        assert all({"jpg", "json"} <= set(sample) for sample in read)
        assert sum("mask.png" in sample for sample in read) == 1


class TestRestart:
    def test_stopped_around_any_rename(self, make, tmp_path, monkeypatch):
        """Runs are stopped before or after their 1st to 6th rename, and each goes on where the last one stopped."""
        expected = content(make())
        cut, rename, runs = tmp_path / "cut", os.replace, 0
        while not (cut / "manifest.json").exists():
            left = iter(range(runs // 2 % 6, -1, -1))

            def rename_some(source, target, left=left, before=runs % 2):
                last = next(left) == 0
                if last and before:
                    raise Killed
                rename(source, target)
                if last:
                    raise Killed

            monkeypatch.setattr("diffusers_dino.data.atomic.os.replace", rename_some)
            runs += 1
            assert runs < 60
            with suppress(Killed):
                make(output_dir=cut)
        monkeypatch.undo()
        assert runs > 8
        make(output_dir=cut)
        assert content(cut) == expected

    def test_what_is_done_is_not_done_again(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr("make_shards.write_manifest", _stop, raising=False)
        with pytest.raises(Killed):
            make()
        monkeypatch.undo()
        out = tmp_path / "out"
        times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert times
        monkeypatch.setattr("staging.prepare", _stop)
        make()
        assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert not (out / ".work").exists()

    def test_a_finished_shard_that_changed_is_written_anew(self, make, tmp_path, monkeypatch):
        expected = content(make())
        cut = tmp_path / "cut"
        monkeypatch.setattr("make_shards.write_manifest", _stop, raising=False)
        with pytest.raises(Killed):
            make(output_dir=cut)
        monkeypatch.undo()
        shard = cut / "train-000000.tar"
        shard.write_bytes(shard.read_bytes()[:-700])
        (cut / "train-000001.tar").unlink()
        make(output_dir=cut)
        assert content(cut) == expected

    def test_a_complete_folder_is_verified(self, make, flags, capsys):
        out = make()
        before = content(out)
        make()
        assert "all 14 samples" in capsys.readouterr().out
        assert content(out) == before
        call_script("make_shards.py", output_dir=out, verify=True)
        (out / "train-000000.tar").write_bytes(b"")
        for changed in ({}, {"verify": True}):
            with pytest.raises(ValueError, match=r"train-000000\.tar has 0 bytes.*Delete manifest\.json"):
                make(**changed)
        (out / "manifest.json").unlink()
        make()
        assert content(out) == before

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"size": 16}, "size was 32, is 16"),
            ({"format": "png"}, "format was jpg, is png; quality was 95, is None"),
            ({"seed": 3}, "splits_seed was 0, is 3"),
            ({"drop_duplicates": "exact"}, "drop_duplicates was none, is exact"),
        ],
    )
    def test_another_configuration_is_refused(self, make, tmp_path, monkeypatch, changed, message):
        monkeypatch.setattr("staging.prepare", _stop)
        with pytest.raises(Killed):
            make()
        monkeypatch.undo()
        with pytest.raises(ValueError, match=message):
            make(**changed)
        before = content(make())
        with pytest.raises(ValueError, match=message):
            make(**changed)
        assert content(tmp_path / "out") == before

    def test_other_images_or_another_salt_are_refused(self, make, images, tmp_path, monkeypatch):
        monkeypatch.setattr("staging.prepare", _stop)
        with pytest.raises(Killed):
            make()
        monkeypatch.undo()
        (tmp_path / "other").write_text("another salt of 20 bytes")
        with pytest.raises(ValueError, match="fingerprint of images's images, labels and salt was"):
            make(salt_file=tmp_path / "other")
        Image.fromarray(picture(99)).save(images / "new.png")
        with pytest.raises(ValueError, match="fingerprint of images's images"):
            make()

    def test_two_runs_at_once_are_refused(self, make, flags):
        fcntl = pytest.importorskip("fcntl")
        work = Path(flags["output_dir"]) / ".work"
        work.mkdir(parents=True)
        with open(work / "lock", "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(RuntimeError, match="Another run is at work"):
                make()
        make()

    def test_a_full_disk_is_said_and_can_be_mended(self, make, flags, monkeypatch, tmp_path):
        expected = content(make(size=96))
        cut = tmp_path / "cut"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # parts fit, shards do not
        try:
            with pytest.raises(OSError) as caught:
                make(size=96, output_dir=cut, part_size=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        import console

        assert "there is no room" in console.say_what_failed(caught.value)
        assert not list(cut.glob(".*partial"))
        assert len(list((cut / ".work" / "parts").glob("*.json"))) == 7
        make(size=96, output_dir=cut, part_size=2)
        assert content(cut) == expected


def _stop(*_) -> None:
    raise Killed


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
            ({"shard_size": 0}, "--shard_size must be at least 1"),
            ({"part_size": 0}, "--part_size must be at least 1"),
            ({"num_workers": -1}, "--num_workers must be at least 0"),
            ({"max_unreadable": 2}, "--max_unreadable is a fraction"),
            ({"duplicate_distance": 16}, r"--duplicate_distance must be in \[0, 15\]"),
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

    def test_a_folder_without_images(self, make, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="no image in"):
            make(source=tmp_path / "empty")

    def test_sources_have_names_of_their_own(self, make, images):
        described = f"{tmp_source(images)}={images}"
        with pytest.raises(ValueError, match="mine twice"):
            make(source=[described, described])


def tmp_source(images: Path, text: str = "") -> Path:
    """A description of the images as a source of the name `mine`."""
    path = images.parent / "mine.yaml"
    path.write_text(f"name: mine\nimage: '**/*.png'\n{text}")
    return path


class TestSalt:
    def test_a_new_salt_is_made_and_kept(self, make, tmp_path, capsys):
        path = tmp_path / "new" / ".." / "fresh"
        (tmp_path / "new").mkdir()
        one = content(make(salt_file=path))
        assert "Keep it, and keep it secret" in capsys.readouterr().out
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(path.read_text().strip()) == 32
        assert content(make(salt_file=path, output_dir=tmp_path / "again")) == one

    def test_the_environment_may_hold_it(self, make, tmp_path, monkeypatch):
        expected = content(make())
        monkeypatch.setenv("DIFFUSERS_DINO_SALT", SALT)
        assert content(make(salt_file=None, output_dir=tmp_path / "again")) == expected
        monkeypatch.setenv("DIFFUSERS_DINO_SALT", "short")
        with pytest.raises(ValueError, match="at least 16 bytes"):
            make(salt_file=None, output_dir=tmp_path / "short")

    def test_the_key_map_is_private(self, make, tmp_path, images):
        make(write_key_map=tmp_path / "keys.csv")
        assert (tmp_path / "keys.csv").stat().st_mode & 0o777 == 0o600
        assert rows_of(tmp_path / "keys.csv")[0]["file"] == str(images / "Doe^00.png")


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
        seen = []
        for workers in (0, 0):
            out = make(
                source=f"{described}={images}",
                test_fraction=0.4,
                official_splits=True,
                num_workers=workers,
                part_size=2 + len(seen),
                output_dir=tmp_path / f"out{len(seen)}",
                write_key_map=tmp_path / "keys.csv",
            )
            by_patient = defaultdict(set)
            for entry in facts(out).values():
                by_patient[entry["patient"]].add(entry["split"])
            assert len(by_patient) == 5
            assert all(len(splits) == 1 for splits in by_patient.values())
            seen.append({key: entry["split"] for key, entry in facts(out).items()})
        assert seen[0] == seen[1]
        keys = keys_of(tmp_path / "keys.csv")
        assert all(seen[0][keys[name]] == "test" for name in names[:3])
        labels = {key: entry["labels"] for key, entry in facts(out).items()}
        assert labels[keys[names[1]]] == ["Mass", "Edema"]
        page = (out / "summary.html").read_text()
        for shown in ("Licence: CC0", "Doe 2020", "Mass", "Edema", "data:image/png"):
            assert shown in page
        assert "Jane" not in page


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
    written = content(out)
    written["log"] = "".join([*capfd.readouterr(), caplog.text]).encode()
    for name, data in written.items():
        for spelled in (PLANTED.encode(), PLANTED.encode("utf-16-le"), PLANTED.upper().encode()):
            assert spelled not in data, name
    patients = defaultdict(set)
    for entry in entries.values():
        patients[entry["patient"]].add(entry["split"])
    assert all(len(splits) == 1 for splits in patients.values())
    assert len(patients) < 60  # four files of a patient are his


@pytest.mark.slow
class TestProcesses:
    def test_workers_change_nothing(self, flags, tmp_path):
        outputs = []
        for workers in (0, 1, 3):
            out = tmp_path / f"{workers}"
            printed = run_script("make_shards.py", **{**flags, "num_workers": workers, "output_dir": out})
            assert "images/s" in printed
            outputs.append(content(out))
        assert outputs[0] == outputs[1] == outputs[2]

    def test_killed_at_random_moments(self):
        command = [sys.executable, str(ROOT / "benchmarks" / "kill_shards.py"), "--kills", "4", "--num_images", "60"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "4 kills: all" in result.stdout

    def test_errors_are_one_line(self, flags):
        command = [
            sys.executable,
            str(EXAMPLES / "make_shards.py"),
            *command_line(None, {**flags, "source": "nowhere"}),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.strip().splitlines()[-1].startswith("error: There is no folder 'nowhere'")
        assert "Traceback" not in result.stderr

    def test_shards_train(self, flags, tmp_path):
        out = tmp_path / "out"
        run_script("make_shards.py", **flags)
        tiny.tiny_vae().save_pretrained(tmp_path / "vae")
        tiny.tiny_conditioner().save_pretrained(tmp_path / "conditioner")
        tiny.tiny_unet().save_config(tmp_path / "unet_config")
        call_script(
            "train_dino.py",
            train_data_dir=out,
            resolution=32,
            output_dir=tmp_path / "model",
            max_train_steps=2,
            train_batch_size=2,
            validation_steps=0,
            checkpointing_steps=0,
            **{name: tmp_path / name for name in ("vae", "conditioner", "unet_config")},
        )
        losses = [
            json.loads(line)["loss"] for line in (tmp_path / "model" / "train_log.jsonl").read_text().splitlines()
        ]
        assert len(losses) == 2
        assert torch.tensor(losses).isfinite().all()
