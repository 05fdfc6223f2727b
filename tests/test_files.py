"""What base modules promise of files and folders: whole or not there, one run at a time, begun with these settings."""

import csv
import errno
import io
import json
import os
import re
from pathlib import Path

import pytest

from diffusers_dino.data.labels import read_label_table
from diffusers_dino.files import (
    atomic_write,
    csv_text,
    lock_file,
    lock_folder,
    make_writable_folder,
    open_private,
    read_json,
    read_regular,
    recover_folder,
    remove_partials,
    save_atomically,
    write_csv,
    write_json,
)
from diffusers_dino.frozen import freeze
from kills import kills

SETTINGS = {"size": 32, "splits": {"test": 0.1, "seed": 0}, "sides": (1, 2), "path": None}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_and_stop() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        write_and_stop()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_write_left_can_be_removed(tmp_path):
    with atomic_write(tmp_path / "file") as file:
        file.flush()
        assert len(os.listdir(tmp_path)) == 1
        remove_partials(tmp_path)
        assert os.listdir(tmp_path) == []
        (tmp_path / file.name).touch()  # to be renamed
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    for content in ("one", "two"):
        with save_atomically(tmp_path / "folder") as partial:
            (partial / content).touch()

    def write_and_stop() -> None:
        with save_atomically(tmp_path / "folder") as partial:
            (partial / "three").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder", "folder/two"]


def test_a_folder_whose_replacement_was_killed_is_recovered(tmp_path):
    folder = tmp_path / "folder"

    def save(content: str) -> None:
        with save_atomically(folder) as partial:
            (partial / "content").write_text(content)

    save("old")
    found = []
    for _ in kills(lambda: save("new")):
        recover_folder(folder)
        assert os.listdir(tmp_path) == ["folder"]
        found.append((folder / "content").read_text())
        save("old")
    assert set(found) == {"old", "new"}
    assert sorted(found, reverse=True) == found  # the old one up to some moment, the new one from there on
    recover_folder(folder)
    assert (folder / "content").read_text() == "new"
    recover_folder(tmp_path / "absent")
    assert os.listdir(tmp_path) == ["folder"]


def test_tables_and_private_files(tmp_path):
    write_csv(tmp_path / "t.csv", ["a", "b"], [["x,y", 1], ["", None]])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n"x,y",1\n,\n'


@pytest.mark.parametrize("before", [None, 0o600, 0o666, 0o400, "link"])
def test_private_files_are_read_by_nobody_else(tmp_path, before):
    path = tmp_path / "secret"
    if before == "link":
        (tmp_path / "open").touch(0o666)
        path.symlink_to(tmp_path / "open")
    elif before is not None:
        path.write_text("old")
        path.chmod(before)
    (tmp_path / ".secret.1.partial").write_text("of a killed run")
    with open_private(path) as file:
        file.write("sält \udce4\n")
    assert path.read_bytes() == "sält ".encode() + b"\xe4\n"
    assert path.lstat().st_mode & 0o777 == 0o600
    assert set(os.listdir(tmp_path)) <= {"secret", "open"}
    with pytest.raises(TypeError), open_private(path) as file:
        file.write(b"not a text")
    assert path.read_text(errors="replace").startswith("sält")


def test_tables_for_people_hold_no_formulas():
    cells = ["=1+1", "+cmd|' /C calc'!A0", "-2+3+cmd", "@SUM(A1)", "\t=x", "\r@x", " =x", Path("=a/b"), "-Mass"]
    numbers = ["-0.5", "+0.05", "-0.1 [-0.2, +0.3]", "-1e-05", "-3 %", "-", "-nan", -1, None, "a=b", "Mass|-x", ""]
    escaped, kept = csv.reader(io.StringIO(csv_text(cells, [numbers]), newline=""))
    assert escaped == [f"'{cell}".replace("\r", " ") for cell in cells]
    assert kept == ["" if number is None else str(number) for number in numbers]


def test_one_run_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with lock_folder(tmp_path), pytest.raises(RuntimeError, match="Another run is at work"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass
    path = tmp_path / "x.safetensors"
    with lock_file(path), pytest.raises(OSError, match=r"x\.safetensors"), lock_file(path, OSError):
        pass
    with lock_file(path), lock_file(tmp_path / "y.safetensors"):
        pass
    assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path):
        assert "There are no locks" in caplog.text


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_forces_nothing_to_disk_is_written_to(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"x")
    with save_atomically(tmp_path / "folder") as folder:
        (folder / "file").touch()
    assert (tmp_path / "file").read_bytes() == b"x"
    assert (tmp_path / "folder" / "file").exists()


class TestReadJson:
    def test_what_write_json_wrote(self, tmp_path):
        (tmp_path / "a.json").write_text('{"a": [1, null]}')
        assert read_json(tmp_path / "a.json") == {"a": [1, None]}
        assert read_regular(tmp_path / "a.json") == b'{"a": [1, null]}'

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\0" * 100, b"[1] 2"]
    )
    def test_damage_is_named(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(KeyError, match=r"a\.json is damaged: "):
            read_json(tmp_path / "a.json", error=KeyError)

    def test_only_files_of_a_sensible_size(self, tmp_path):
        with open(tmp_path / "huge.json", "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ValueError, match=r"huge\.json has more than 67,108,864 bytes"):
            read_json(tmp_path / "huge.json")
        (tmp_path / "a.json").write_text(json.dumps("x" * 100))
        with pytest.raises(ValueError, match="more than 101 bytes"):
            read_json(tmp_path / "a.json", limit=101)
        assert read_json(tmp_path / "a.json", limit=102) == "x" * 100

    def test_pipes_devices_and_folders_are_not_read(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("/dev/zero")
        for name in (tmp_path / "pipe", tmp_path / "link", "/dev/null"):
            with pytest.raises(ValueError, match="is a pipe or a device"):
                read_json(name)
        for call in (read_json, read_label_table, lambda path: write_json(path, {})):
            with pytest.raises(IsADirectoryError, match="is a folder, where a file is needed"):
                call(tmp_path)
        with pytest.raises(FileNotFoundError):
            read_json(tmp_path / "absent.json")


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="there is a file of that name"):
        make_writable_folder(tmp_path / "file")


class TestFreeze:
    def test_the_first_run_writes_and_the_next_compares(self, tmp_path):
        freeze(tmp_path / "begun.json", SETTINGS)
        before = (tmp_path / "begun.json").read_bytes()
        freeze(tmp_path / "begun.json", SETTINGS)
        freeze(tmp_path / "begun.json", SETTINGS | {"new_option": None})
        assert (tmp_path / "begun.json").read_bytes() == before

    def test_each_difference_is_named(self, tmp_path):
        freeze(tmp_path / "begun.json", SETTINGS)
        changed = {"size": 16, "splits": {"test": 0.1, "seed": 3}, "sides": (1, 3), "more": True}
        lines = [
            f"{tmp_path} was begun with other settings:",
            "- size was 32, is 16",
            "- splits: seed was 0, is 3",
            "- sides was [1, 2], is [1, 3]",
            "- more was None, is True",
        ]
        with pytest.raises(ValueError, match=re.escape("\n".join(lines))):
            freeze(tmp_path / "begun.json", changed)
        with pytest.raises(KeyError, match="the set was begun"):
            freeze(tmp_path / "begun.json", changed, KeyError, "the set")

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "begun.json").write_text('{"size": ')
        with pytest.raises(ValueError, match=r"begun\.json is damaged"):
            freeze(tmp_path / "begun.json", SETTINGS)
