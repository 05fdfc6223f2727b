"""What a set does with its folder: damage is found and mended, and what is of somebody else stays as it is."""

import json
import os
import shutil
from pathlib import Path

import pytest

from diffusers_dino.data.sharding.manifest import ShardError
from diffusers_dino.synthesis import SynthesisError, SyntheticSet, bind, prepare_folder, synthesise
from diffusers_dino.synthesis.run import only_run
from diffusers_dino.synthesis.shards import find_record, make_shard
from diffusers_dino.synthesis.tokens import TOKENS, PlannedSources, TokenStore
from folders import contents
from synthetic_sets import BrightnessGate


@pytest.fixture(scope="module")
def made_but_for_the_manifest(plan, pipe, sources, tmp_path_factory):
    bound = bind(plan, pipe, sources)
    folder = prepare_folder(bound, tmp_path_factory.mktemp("unfinished") / "set")
    tokens = TokenStore(bound, folder)
    tokens.encode_part(0, pipe, PlannedSources(bound, sources))
    for number in range(bound.num_shards):
        make_shard(bound, number, pipe, tokens, folder)
    return bound, folder


@pytest.fixture
def unfinished(made_but_for_the_manifest, tmp_path):
    """All shards are made, the manifest is not yet written."""
    bound, folder = made_but_for_the_manifest
    shutil.copytree(folder, tmp_path / "set")
    return bound, tmp_path / "set"


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the finished set."""
    return shutil.copytree(whole.folder, tmp_path / "finished")


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def edit_labels(path):
    path.write_text(path.read_text().replace("mass", "none", 1))


def edit_manifest(path):
    content = json.loads(path.read_text())
    content["shards"][0]["samples"] = 2**31
    path.write_text(json.dumps(content))


def change_manifest(**changes):
    def change(path):
        content = json.loads(path.read_text())
        for name, entries in changes.items():
            (content["lineage"] if name == "gate" else content)[name] |= entries
        path.write_text(json.dumps(content))

    return change


def make_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def test_two_runs_in_one_folder_are_refused_and_remains_are_cleared_away(unfinished, pipe, sources, plan):
    _, folder = unfinished
    (folder / ".synthetic-000002.tar.1.partial").touch()
    with only_run(folder), pytest.raises(SynthesisError, match="Another run is at work"):
        synthesise(plan, pipe, sources, folder, progress=False)
    synthesise(plan, pipe, sources, folder, progress=False)
    assert not list(folder.rglob("*.partial"))


def test_a_finished_set_is_not_made_again(whole, pipe, sources, plan):
    before = {path: path.stat().st_mtime_ns for path in whole.folder.iterdir()}
    assert len(synthesise(plan, pipe, sources, whole.folder, progress=False)) == 21
    assert {path: path.stat().st_mtime_ns for path in whole.folder.iterdir()} == before
    assert list(SyntheticSet.open(whole.folder).planned()) == list(plan)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("labels.csv", Path.unlink),
        ("labels.csv", make_a_pipe),
        ("synthetic-000001.tar", "FLIP"),
        ("synthetic-000001.tar", Path.unlink),
        ("synthetic-000001.tar.index.npz", "FLIP"),
        ("manifest.json", edit_manifest),
        ("manifest.json", lambda path: path.write_text("[" * 100_000)),
        ("manifest.json", lambda path: path.write_text('{"format": 1, "shards": {}, "preprocessing": {}}')),
        ("manifest.json", lambda path: path.write_text(path.read_text().replace('"split": "train"', '"split": 1'))),
        ("manifest.json", make_a_pipe),
        ("manifest.json", change_manifest(preprocessing={"size": 64})),
        ("manifest.json", change_manifest(gate={"left_out": ["synthetic-000000001"]})),
        ("manifest.json", change_manifest(gate={"left_out": ["synthetic-999999999"]})),
        ("manifest.json", change_manifest(gate={"left_out": None})),
    ],
)
def test_a_finished_set_with_damage_is_not_opened_and_made_whole_again(
    name, damage, finished, whole, pipe, sources, plan
):
    damage = flip_a_byte if damage == "FLIP" else damage
    damage(finished / name)
    with pytest.raises((SynthesisError, ShardError, FileNotFoundError), match=name):
        SyntheticSet.open(finished)
    synthesise(plan, pipe, sources, finished, progress=False)
    assert contents(finished) == contents(whole.folder)
    assert len(SyntheticSet.open(finished, verify=True)) == 21


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labels.csv", edit_labels),
        ("labels.csv", lambda path: path.write_text(path.read_text() + "one,more,row,,0\n")),
        ("labels.csv", lambda path: os.truncate(path, 100)),
        ("labels.csv", lambda path: path.write_bytes(b"")),
        ("labels.csv", lambda path: path.write_bytes(path.read_text().encode("utf-16"))),
        ("train-000000.tar", Path.touch),
    ],
)
def test_what_somebody_changed_in_a_finished_set_is_named_and_kept(name, change, finished, pipe, sources, plan):
    change(finished / name)
    changed = contents(finished)
    with pytest.raises(SynthesisError, match=name):
        SyntheticSet.open(finished)
    with pytest.raises(SynthesisError, match=f"{name}.*Move it away"):
        synthesise(plan, pipe, sources, finished, progress=False)
    assert contents(finished) == changed


def test_other_line_ends_do_not_change_a_table_of_labels(finished):
    (finished / "labels.csv").write_bytes((finished / "labels.csv").read_bytes().replace(b"\n", b"\r\n"))
    assert repr(SyntheticSet.open(finished)).endswith("finished': 21 images by interpolation)")


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "model_index.json",
        "pytorch_lora_weights.safetensors",
        "000.png",
        "manifest.json",
        "labels.csv",
        "checkpoint-2/optimizer.safetensors",
        "train/train-000000.tar",
        "config.json",
        "fidelity.csv",
    ],
)
def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(name, small, pipe, sources, tmp_path):
    path = tmp_path / "taken" / name
    path.parent.mkdir(parents=True)
    path.write_text("of somebody")
    with pytest.raises(SynthesisError, match=rf"taken holds {name.split('/')[0]}, but no plan of it. Give another"):
        synthesise(small, pipe, sources, tmp_path / "taken", progress=False)
    assert [one for one in (tmp_path / "taken").rglob("*") if one.is_file()] == [path]
    assert path.read_text() == "of somebody"


def test_what_its_owner_keeps_beside_a_set_stays(small, pipe, sources, tmp_path):
    kept = ["set.yaml", "slurm-1.out", "run.log", "gate.safetensors", ".gitattributes"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    synthesise(small, pipe, sources, tmp_path, progress=False)
    assert {(tmp_path / name).read_text() for name in kept} == {"mine"}


@pytest.mark.parametrize("damage", [flip_a_byte, cut, Path.unlink])
@pytest.mark.parametrize("name", ["synthetic-000001.tar", ".records/synthetic-000001.tar.json"])
def test_a_damaged_shard_is_made_again(damage, name, unfinished, whole, pipe, sources, plan):
    bound, folder = unfinished
    if name.endswith("json") and damage is flip_a_byte:
        (folder / name).write_text("[]")
    else:
        damage(folder / name)
    found = [find_record(bound, number, folder) is not None for number in range(3)]
    assert found == [True, False, True]
    synthesise(plan, pipe, sources, folder, progress=False)
    assert contents(folder, "*.tar*") == contents(whole.folder, "*.tar*")


def test_damaged_tokens_are_encoded_again(unfinished, whole, pipe, sources, plan):
    _, folder = unfinished
    (folder / "synthetic-000000.tar").unlink()
    cut(folder / TOKENS / "tokens-000000.safetensors")
    synthesise(plan, pipe, sources, folder, progress=False)
    assert contents(folder, "*.tar*") == contents(whole.folder, "*.tar*")


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_shard_that_a_finished_set_has_lost_is_made_again_alone(damage, pipe, sources, plan, tmp_path):
    made = synthesise(plan, pipe, sources, tmp_path, gate=BrightnessGate(), progress=False)
    before = contents(made.folder, "*")
    damage(tmp_path / "synthetic-000002.tar")
    gate = BrightnessGate()
    synthesise(plan, pipe, sources, tmp_path, gate=gate, progress=False)
    assert sum(map(len, gate.seen)) == 5
    assert contents(tmp_path, "*") == before
