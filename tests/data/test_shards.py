import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from diffusers_dino.data import Preprocessing, verify_shards
from diffusers_dino.data.sharding.manifest import ShardError, check_shards, read_manifest, write_manifest, write_shard
from diffusers_dino.data.sharding.plan import plan_shards
from diffusers_dino.data.stores.archives import INDEX_SUFFIX
from diffusers_dino.files import sha256_of

KEYS = [f"set-{number:016x}" for number in range(103)]
SPLITS = ["train"] * 80 + ["test"] * 20 + [None] * 3


def samples(count: int, first: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"set-{n:016x}", {"png": bytes([n]) * (500 + n), "json": b"{}"}) for n in range(first, first + count)]


@pytest.fixture
def shards(tmp_path) -> Path:
    """A complete folder of three shards."""
    written = [write_shard(tmp_path / f"train-{n:06d}.tar", "train", samples(4, 4 * n)) for n in range(3)]
    write_manifest(tmp_path, Preprocessing(16), written, {})
    return tmp_path


class TestPlan:
    def test_each_sample_is_in_one_shard_of_its_split(self):
        planned = plan_shards(KEYS, SPLITS, 30, seed=0)
        assert [(shard.name, len(shard.samples)) for shard in planned] == [
            ("train-000000.tar", 26),
            ("train-000001.tar", 27),
            ("train-000002.tar", 27),
            ("test-000000.tar", 20),
        ]
        placed = [(number, shard.split) for shard in planned for number in shard.samples]
        assert sorted(placed) == [(n, split) for n, split in enumerate(SPLITS) if split]

    def test_sources_are_mixed(self):
        keys = [f"{'ab'[n // 500]}-{n:016x}" for n in range(1000)]
        for shard in plan_shards(keys, ["train"] * 1000, 100, seed=0):
            share = Counter(keys[number][0] for number in shard.samples)
            assert 25 <= share["a"] <= 75

    def test_order_follows_from_seed_and_keys(self):
        one, two = (plan_shards(KEYS, SPLITS, 30, seed=seed) for seed in (0, 1))
        assert one == plan_shards(KEYS, SPLITS, 30, seed=0)
        assert one[0].samples != two[0].samples
        backwards = plan_shards(KEYS[::-1], SPLITS[::-1], 30, seed=0)
        assert [[KEYS[::-1][n] for n in shard.samples] for shard in backwards] == [
            [KEYS[n] for n in shard.samples] for shard in one
        ]

    def test_nothing_is_no_shard(self):
        assert plan_shards([], [], 10, seed=0) == []
        assert plan_shards(KEYS[:2], [None, None], 10, seed=0) == []


class TestWriting:
    def test_bytes_follow_from_the_samples(self, tmp_path):
        (tmp_path / "b").mkdir()
        one = write_shard(tmp_path / "x.tar", "train", samples(3))
        two = write_shard(tmp_path / "b" / "x.tar", "train", iter(samples(3)))
        assert one == two
        assert one.sha256 == sha256_of(tmp_path / "x.tar")
        assert (one.samples, one.bytes) == (3, (tmp_path / "x.tar").stat().st_size)
        index = f"x.tar{INDEX_SUFFIX}"
        assert (tmp_path / index).read_bytes() == (tmp_path / "b" / index).read_bytes()

    def test_headers_say_nothing_of_machine_and_time(self, tmp_path):
        write_shard(tmp_path / "x.tar", "train", samples(2))
        with tarfile.open(tmp_path / "x.tar") as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)

    def test_a_failure_leaves_nothing(self, tmp_path):
        def cut_short():
            yield from samples(2)
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            write_shard(tmp_path / "x.tar", "train", cut_short())
        assert list(tmp_path.iterdir()) == []


class TestVerification:
    def test_a_whole_folder_is_right(self, shards):
        assert verify_shards(shards) == []

    @pytest.mark.parametrize("place", [0, 600, -1])
    def test_a_flipped_bit_is_found(self, shards, place):
        path = shards / "train-000001.tar"
        content = bytearray(path.read_bytes())
        content[place] ^= 4
        path.write_bytes(content)
        (problem,) = verify_shards(shards)
        assert "train-000001.tar has changed" in problem

    def test_missing_short_and_foreign_shards_are_named(self, shards):
        (shards / "train-000000.tar").unlink()
        (shards / "train-000002.tar").write_bytes(b"short")
        (shards / "train-000003.tar").write_bytes(b"new")
        problems = verify_shards(shards)
        assert [problem.split(" ", 1) for problem in problems] == [
            ["train-000000.tar", "is missing"],
            ["train-000002.tar", f"has 5 bytes, not {read_manifest(shards)['shards'][2]['bytes']}"],
            ["train-000003.tar", "is not in the manifest"],
        ]

    def test_a_changed_index_is_found(self, shards):
        index = shards / f"train-000000.tar{INDEX_SUFFIX}"
        content = bytearray(index.read_bytes())
        content[-300] ^= 1
        index.write_bytes(content)
        (problem,) = verify_shards(shards)
        assert index.name in problem
        index.unlink()
        assert verify_shards(shards) == []  # readers do without

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("samples", value) for value in (-1, 2**31, 10**400, 1.0, 1e30, True, "3", None, [3])),
            *(("bytes", value) for value in (-1, 0, 2**63, float("nan"), "9", {})),
            *(("name", value) for value in ("../train-000000.tar", "/etc/x.tar", "a\\b.tar", "x.zip", "", 7, None)),
            *(("sha256", value) for value in ("", "ab", "g" * 64, 7, None)),
            ("split", 3),
            ("name", "train-000001.tar"),
        ],
    )
    def test_what_cannot_be_is_not_believed(self, shards, key, value):
        path = shards / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["shards"][0][key] = value
        path.write_text(json.dumps(manifest))
        with pytest.raises(ShardError, match=r"manifest\.json' is damaged"):
            verify_shards(shards)
        del manifest["shards"][0][key]
        path.write_text(json.dumps(manifest | {"shards": [None]}))
        with pytest.raises(ShardError, match=r"manifest\.json' is damaged"):
            verify_shards(shards)

    def test_many_missing_shards_are_counted_at_once(self, shards):
        manifest = json.loads((shards / "manifest.json").read_text())
        entry = manifest["shards"][0]
        manifest["shards"] = [entry | {"name": f"train-{number:06d}.tar"} for number in range(2_000)]
        (shards / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ShardError, match="and 1989 more") as caught:
            check_shards(shards)
        assert len(str(caught.value)) < 2000

    @pytest.mark.parametrize(
        "content",
        [
            "[" * 100_000,
            '{"format":1,"shards":[' + "9" * 5000,
            '{"format": 1, "sha',
            '{"format": 2, "shards": []}',
            "\0" * 50,
            "[]",
            "3",
            '"a"',
        ],
    )
    def test_other_json_is_no_manifest(self, tmp_path, content):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ShardError, match=r"manifest\.json'? is (damaged|not a manifest)"):
            verify_shards(tmp_path)

    def test_a_pipe_is_no_manifest(self, tmp_path):
        os.mkfifo(tmp_path / "manifest.json")
        with pytest.raises(ShardError, match="is a pipe or a device"):
            verify_shards(tmp_path)

    def test_without_manifest_nothing_can_be_said(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
            verify_shards(tmp_path)
