"""Runs that are killed and started again, and runs as processes of their own."""

import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_dino.cli import console
from diffusers_dino.data import Preprocessing
from diffusers_dino.data.images.encoding import Encoding
from diffusers_dino.data.sharding import PlanRule, make_shards
from diffusers_dino.data.splits import SplitRule
from folders import contents, full_disk
from kills import Killed, killed_before, kills
from scripts import EXAMPLES, call_script, losses, run_script, tiny_training
from shard_runs import SALT, keys_of, picture

ROOT = EXAMPLES.parent


def _stop(*_) -> None:
    raise Killed


def edit(name: str, old: str, new: str):
    """A function that replaces a text once in a file of a folder."""

    def change(root: Path) -> None:
        (root / name).write_text((root / name).read_text().replace(old, new, 1))

    return change


@pytest.fixture
def stopped(make, monkeypatch):
    """Make shards until a function of the package is called, which stands for a kill there."""

    def run(name: str, **flags) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(f"diffusers_dino.data.sharding.{name}", _stop)
            with pytest.raises(Killed):
                make(**flags)

    return run


class TestRestart:
    @pytest.mark.parametrize("retry", [False, True])
    def test_killed_before_any_rename_or_removal(self, images, tmp_path, retry):
        """Also runs that clean up after a finished one, and runs that make a new plan as an image was mended."""
        cut, keys = tmp_path / "cut", tmp_path / "keys.csv"
        folder = tmp_path / "few"
        folder.mkdir()
        for number in range(5):
            Image.fromarray(picture(number)).save(folder / f"{number}.png")
        options = {"encoding": Encoding(Preprocessing(16)), "rule": PlanRule(SplitRule(test=0.4))}
        make = partial(make_shards, [folder], salt=SALT, part_size=5, max_unreadable=0.4, **options)
        make(output_dir=tmp_path / "whole", key_map=keys)
        expected, named = contents(tmp_path / "whole"), keys.read_bytes()
        mended = (folder / "2.png").read_bytes()

        def start() -> None:
            """Nothing yet; for a retry, a run that has its plan, one shard, and one image too few."""
            for path in (cut, keys):
                if path.exists():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if retry:
                (folder / "2.png").write_bytes(b"")
                with killed_before(9) as death:
                    make(output_dir=cut)
                assert death.happened
                assert (cut / ".work" / "plan.json").exists()
                assert list(cut.glob("*.tar"))
                (folder / "2.png").write_bytes(mended)

        run = partial(make, output_dir=cut, key_map=keys, retry_unreadable=retry)
        start()
        count = 0
        for count in kills(run, at_most=14 if retry else 100):
            if count % 3 == 0:
                with killed_before(count // 2):  # once more, on the way back
                    run()
            run()
            assert contents(cut) == expected
            assert keys.read_bytes() == named
            assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
            start()
        assert count > (12 if retry else 20)

    def test_a_folder_that_an_earlier_version_began(self, tmp_path, monkeypatch):
        """`begun.zip`: images, and a run of 2026-11-26 that was stopped after the first of three shards."""
        with zipfile.ZipFile(Path(__file__).with_name("begun.zip")) as file:
            file.extractall(tmp_path)
        monkeypatch.setattr("diffusers_dino.data.sharding.parts.prepare", _stop)
        rule = PlanRule(SplitRule(test=0.3), shard_size=3)
        make = partial(make_shards, [tmp_path / "images"], tmp_path / "out", SALT, Encoding(Preprocessing(16)), rule)
        manifest = make(part_size=5, max_unreadable=0.2)
        assert {shard["name"]: shard["sha256"] for shard in manifest["shards"]} == {
            "train-000000.tar": "ec15881824b05caae404d3c9959619a2eed36b2f77994244ec1a79b2dfcb7e76",
            "train-000001.tar": "0f62bbcab942f1edee647d31dcbce821a38278757ed2f64b81a1589af68bfc8a",
            "test-000000.tar": "782cfe1c39d02d364a657f5ecbf15dec47fcea2efa269a9258259fda83615275",
        }
        assert manifest["lineage"]["duplicates"] == [["exact", "images", "images", 1]]
        assert make() == manifest  # complete: only compared

    def test_what_is_done_is_not_done_again(self, make, stopped, tmp_path, monkeypatch):
        stopped("make.write_manifest")
        out = tmp_path / "out"
        times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert times
        monkeypatch.setattr("diffusers_dino.data.sharding.parts.prepare", _stop)
        make()
        assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        assert not (out / ".work").exists()

    @pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"bytes": 3}', "[" * 100_000, '{"shards": [3]}'])
    def test_damaged_files_of_the_work_are_named_or_made_anew(self, make, stopped, tmp_path, damage):
        expected = contents(make())
        cut = tmp_path / "cut"
        stopped("make.write_manifest", output_dir=cut)
        for record in (cut / ".work" / "shards").glob("*.json"):
            record.write_text(damage)
        (cut / ".work" / "parts" / "000001.json").write_text(damage)
        plan = cut / ".work" / "plan.json"
        plan.write_text(damage)
        with pytest.raises(ValueError, match=r"plan\.json is damaged.*retry_unreadable"):
            make(output_dir=cut)
        make(output_dir=cut, retry_unreadable=True)
        assert contents(cut) == expected

    def test_a_complete_folder_is_verified(self, make, flags, capsys):
        out = make()
        before = contents(out)
        make()
        assert "all 14 samples" in capsys.readouterr().out
        assert contents(out) == before
        call_script("shards", output_dir=out, verify=True)
        (out / "train-000000.tar").write_bytes(b"")
        for changed in ({}, {"verify": True}):
            with pytest.raises(ValueError, match=r"train-000000\.tar has 0 bytes.*Delete manifest\.json"):
                make(**changed)
        (out / "manifest.json").unlink()
        make()
        assert contents(out) == before

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"size": 16}, "size was 32, is 16"),
            ({"format": "png"}, "format was jpg, is png\n- quality was 95, is None"),
            ({"seed": 3}, "splits_seed was 0, is 3"),
            ({"drop_duplicates": "exact"}, "drop_duplicates was none, is exact"),
        ],
    )
    def test_another_configuration_is_refused(self, make, stopped, tmp_path, changed, message):
        stopped("parts.prepare")
        with pytest.raises(ValueError, match=message):
            make(**changed)
        before = contents(make())
        with pytest.raises(ValueError, match=message):
            make(**changed)
        assert contents(tmp_path / "out") == before

    def test_other_images_or_another_salt_are_refused(self, make, stopped, images, tmp_path):
        stopped("parts.prepare")
        (tmp_path / "other").write_text("another salt of 20 bytes")
        with pytest.raises(ValueError, match="fingerprint of images's images, labels and salt was"):
            make(salt_file=tmp_path / "other")
        Image.fromarray(picture(99)).save(images / "new.png")
        with pytest.raises(ValueError, match="fingerprint of images's images"):
            make()

    @pytest.mark.parametrize(
        "change",
        [
            edit("t.csv", "Mass", "Edema"),
            edit("t.csv", "p3", "p2"),
            edit("t.csv", ",PA", ",AP"),
            edit("t.csv", "3.png,", "9.png,"),
            lambda root: Image.fromarray(picture(50, 64)).save(root / "i" / "2.png"),
            lambda root: (root / "i" / "2.png").write_bytes((root / "i" / "2.png").read_bytes()[::-1]),
            lambda root: (root / "i" / "2.png").unlink(),
            lambda root: Image.fromarray(picture(1) > 99).save(root / "i" / "1.mask.png"),
            edit("mine.yaml", "id:", "invert: {from: view, values: [PA]}\nid:"),
            edit("mine.yaml", "mine", "other"),
            edit("salt", "0", "1"),
        ],
        ids=["labels", "patient", "view", "rows", "pixels", "size", "less", "mask", "polarity", "source", "salt"],
    )
    def test_a_finished_folder_takes_nothing_else(self, make, tmp_path, change):
        (tmp_path / "i").mkdir()
        for number in range(1, 6):
            Image.fromarray(picture(number)).save(tmp_path / "i" / f"{number}.png")
        rows = [f"{number}.png,p{number},Mass,PA\n" for number in range(1, 6)]
        (tmp_path / "t.csv").write_text("".join(["file,who,what,view\n", *rows]))
        (tmp_path / "mine.yaml").write_text(
            "name: mine\ntable: {file: t.csv}\nimage: 'i/{file}'\nid: '{file}'\npatient: '{who}'\n"
            "labels: {column: '{what}'}\nview: '{view}'\nmasks: 'i/{stem}.mask.png'\n"
        )
        make = partial(make, source=f"{tmp_path}/mine.yaml={tmp_path}")
        before = contents(make())
        make()
        change(tmp_path)
        with pytest.raises(ValueError, match=r"(?s)was begun with other settings:.*fingerprint of (mine|other)'s"):
            make()
        assert contents(tmp_path / "out") == before
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        del manifest["lineage"]["images"]  # as older versions wrote it
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
        if "other" in (tmp_path / "mine.yaml").read_text() or not (tmp_path / "i" / "2.png").exists():
            with pytest.raises(ValueError, match=r"images of mine was 5, is (4|None)"):
                make()

    def test_a_second_source_and_a_mended_image_are_refused_too(self, make, images, tmp_path):
        (images / "broken.png").write_bytes(b"")
        before = contents(make(max_unreadable=0.1))
        make(max_unreadable=0.1, write_key_map=tmp_path / "keys.csv")
        assert len(keys_of(tmp_path / "keys.csv")) == 15
        keys = (tmp_path / "keys.csv").read_bytes()
        (tmp_path / "more").mkdir()
        Image.fromarray(picture(77)).save(tmp_path / "more" / "a.png")
        with pytest.raises(ValueError, match="fingerprint of images2's files was None"):
            make(max_unreadable=0.1, source=[images, tmp_path / "more"], write_key_map=tmp_path / "keys.csv")
        assert (tmp_path / "keys.csv").read_bytes() == keys
        Image.fromarray(picture(78)).save(images / "broken.png")
        with pytest.raises(ValueError, match="fingerprint of images's files was"):
            make(max_unreadable=0.1)
        assert contents(tmp_path / "out") == before

    def test_a_plan_of_other_samples_is_refused(self, make, stopped, images, tmp_path):
        """Its numbers would put images of a patient into other splits."""
        expected = contents(make(output_dir=tmp_path / "whole"))
        image = (images / "Doe^02.png").read_bytes()
        (images / "Doe^02.png").write_bytes(b"")
        stopped("make._assemble", max_unreadable=0.1)
        (images / "Doe^02.png").write_bytes(image)
        for path in (tmp_path / "out" / ".work" / "parts").glob("*.bin"):
            path.unlink()
        with pytest.raises(ValueError, match=r"made when other images could be read.*retry_unreadable"):
            make()
        make(retry_unreadable=True)
        assert contents(tmp_path / "out") == expected

    def test_images_that_change_on_the_way_are_refused(self, make, stopped, images, tmp_path):
        stopped("make.write_manifest")
        Image.fromarray(picture(50, 64)).save(images / "Doe^02.png")
        with pytest.raises(ValueError, match="1 images have changed since they were prepared"):
            make()

    def test_one_work_folder_or_one_output_folder_is_held_by_one_run(self, make, flags, tmp_path):
        fcntl = pytest.importorskip("fcntl")
        for held, changed in (("out/.work", {}), ("w/out.work", {"output_dir": tmp_path / "other" / "out"})):
            (tmp_path / held).mkdir(parents=True, exist_ok=True)
            with open(tmp_path / held / "lock", "w") as other:
                fcntl.flock(other, fcntl.LOCK_EX)
                with pytest.raises(RuntimeError, match="Another run is at work"):
                    make(work_dir=tmp_path / "w", **changed)
        make(work_dir=tmp_path / "w")
        assert list((tmp_path / "w").iterdir()) == []
        begun = tmp_path / "w/out.work/configuration.json"  # of another folder of this name
        begun.parent.mkdir()
        begun.write_text("{}")
        make(work_dir=tmp_path / "w")
        assert begun.exists()
        assert not (tmp_path / "out" / ".work").exists()

    def test_shards_of_another_run_are_not_left_beside_new_ones(self, make):
        out = make()
        (out / "manifest.json").unlink()
        with pytest.raises(ValueError, match=r"holds \d+ shards of another run, such as t\w+-\d{6}\.tar"):
            make(shard_size=20)
        for path in out.glob("*.tar*"):
            path.unlink()
        assert len(list(make(shard_size=20).glob("*.tar"))) == 2

    def test_a_full_disk_is_said_and_can_be_mended(self, make, flags, monkeypatch, tmp_path):
        expected = contents(make(size=96))
        cut = tmp_path / "cut"
        with full_disk(20_000), pytest.raises(OSError) as caught:  # parts fit, shards do not
            make(size=96, output_dir=cut, part_size=2)

        assert "there is no room" in console.say_what_failed(caught.value)
        assert not list(cut.glob(".*partial"))
        assert len(list((cut / ".work" / "parts").glob("*.json"))) == 7
        make(size=96, output_dir=cut, part_size=2)
        assert contents(cut) == expected


@pytest.mark.slow
class TestProcesses:
    def test_workers_change_nothing(self, flags, tmp_path):
        outputs = []
        for workers in (0, 2):
            out = tmp_path / f"{workers}"
            printed = run_script("shards", **{**flags, "num_workers": workers, "output_dir": out})
            assert "image/s" in printed
            outputs.append(contents(out))
        assert outputs[0] == outputs[1]

    def test_killed_at_random_moments(self):
        few = ["--kills", "1", "--num_images", "60", "--num_workers", "1"]
        command = [sys.executable, str(ROOT / "benchmarks" / "kill_shards.py"), *few]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "1 kills: all" in result.stdout

    def test_shards_train(self, flags, tmp_path):
        out = tmp_path / "out"
        run_script("shards", **flags)
        options = {"train_data_dir": out, "output_dir": tmp_path / "model", "max_train_steps": 2}
        call_script("train_dino.py", **{**tiny_training(tmp_path), "train_batch_size": 2, **options})
        found = losses(tmp_path / "model")
        assert len(found) == 2
        assert torch.tensor(found).isfinite().all()
