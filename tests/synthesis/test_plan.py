"""Plans: which images are made from which, and that a frozen plan stays what it is."""

import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from diffusers_dino.synthesis import (
    SynthesisError,
    SynthesisSettings,
    load_plan,
    plan_interpolation,
    plan_reconstruction,
    save_plan,
)
from diffusers_dino.synthesis.plan_file import freeze_plan

KEYS = [f"image-{number}" for number in range(10)]
LABELS = [{"effusion"}, {"effusion", "mass"}, {"mass"}, {"nodule"}, set(), *[{"nodule", "mass"}] * 5]
SETTINGS = SynthesisSettings(batch_size=4, shard_size=10, threads=1)


def reconstruction(**options):
    return plan_reconstruction(KEYS, LABELS, **{"ratio": 3, "settings": SETTINGS, **options})


def interpolation(**options):
    return plan_interpolation(KEYS, LABELS, **{"ratio": 3, "settings": SETTINGS, **options})


def test_each_source_comes_as_often_and_keeps_its_labels():
    plan = reconstruction()
    assert len(plan) == 30
    assert set(Counter(image.sources[0] for image in plan).values()) == {3}
    for image in plan:
        assert set(image.labels) == LABELS[KEYS.index(image.sources[0])]
        assert image.fraction == 0
    assert len({image.key for image in plan}) == 30


def test_labels_that_are_not_known_are_not_invented():
    assert {image.labels for image in plan_reconstruction(KEYS, num_images=3)} == {None}
    assert () in {image.labels for image in reconstruction()}


@pytest.mark.parametrize("make", [reconstruction, interpolation])
def test_a_longer_plan_begins_with_the_shorter_one(make):
    short = [image[2:] for image in make(ratio=0.5)]
    assert len(short) == 5
    assert [image[2:] for image in make(ratio=2)][:5] == short


@pytest.mark.parametrize("make", [reconstruction, interpolation])
def test_seeds_differ(make):
    assert make().digest == make().digest != make(seed=1).digest
    assert [image.sources for image in make()] != [image.sources for image in make(seed=1)]


def test_pairs_share_a_label_and_take_those_of_the_nearer_image():
    for image in interpolation():
        source, target = (LABELS[KEYS.index(key)] for key in image.sources)
        assert source & target
        assert 0 < image.fraction < 1
        assert set(image.labels) == (source if image.fraction <= 0.5 else target)


def test_identical_pairs_have_the_very_same_labels():
    keys, labels = [*KEYS, *(f"{key}-twin" for key in KEYS)], LABELS * 2
    plan = plan_interpolation(keys, labels, num_images=200, identical=True)
    for image in plan:
        source, target = (labels[keys.index(key)] for key in image.sources)
        assert source == target == set(image.labels)
    assert any(len(image.labels) > 1 for image in plan)
    with pytest.raises(SynthesisError, match="No two images share a label"):
        plan_interpolation(["a", "b"], [{"x"}, {"x", "y"}], num_images=1, identical=True)


def test_only_sources_that_are_used_are_encoded():
    plan = reconstruction(ratio=0.4)
    assert sorted(plan.keys) == sorted({image.sources[0] for image in plan})
    assert "image-4" not in list(interpolation(ratio=4).keys)  # it has no label


def test_shards_are_whole_batches_and_hold_every_image_once():
    plan = reconstruction()
    assert SETTINGS.images_per_shard == 8
    assert SynthesisSettings(batch_size=64, shard_size=10).images_per_shard == 64
    assert [len(plan.shard(number)) for number in range(plan.num_shards)] == [8, 8, 8, 6]
    assert [index for number in range(plan.num_shards) for index in plan.shard(number)] == list(range(30))
    with pytest.raises(IndexError, match="4 shards"):
        plan.shard(4)


def test_large_plans_are_columns():
    keys = [f"{number:06d}" for number in range(100_000)]
    plan = plan_reconstruction(keys, [{"a"}, {"b"}] * 50_000, ratio=5)
    assert sum(column.nbytes for column in plan.columns().values()) < 12e6
    assert plan[499_999].labels in (("a",), ("b",))
    assert np.array_equal(np.bincount(plan.sources[:, 0]), np.full(100_000, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0}, "must be above 0, got 0"),
        ({"ratio": -1}, "must be above 0"),
        ({"ratio": float("nan")}, "must be above 0"),
        ({"ratio": None}, "either a ratio"),
        ({"num_images": 5}, "either a ratio"),
        ({"ratio": None, "num_images": 0}, "at least 1, got 0"),
        ({"ratio": None, "num_images": 2.5}, "whole number of at least 1, got 2.5"),
        ({"keys": []}, "no source image"),
        ({"keys": [*KEYS[1:], KEYS[1]]}, "1 source keys come more than once"),
        ({"labels": LABELS[1:]}, "10 keys and 9 sets of labels"),
        ({"labels": ["mass"] * 10}, "a collection of names"),
        ({"labels": [{"mass|nodule"}] * 10}, "rename it"),
        ({"keys": ["a\nb", *KEYS[1:]]}, "rename it"),
    ],
)
@pytest.mark.parametrize("make", [plan_reconstruction, plan_interpolation])
def test_bad_input_is_refused(make, change, message):
    arguments = {"keys": KEYS, "labels": [{"mass"}] * 10, "ratio": 1, **change}
    with pytest.raises(SynthesisError, match=message):
        make(**arguments)


def test_interpolation_needs_labels_that_are_shared():
    with pytest.raises(SynthesisError, match="give the labels of the sources"):
        plan_interpolation(KEYS, None, ratio=1)
    with pytest.raises(SynthesisError, match=r"No two images share a label.*plan a reconstruction"):
        plan_interpolation(KEYS, [{key} for key in KEYS], ratio=1)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"num_inference_steps": 2.5},
        {"threads": 0},
        {"shard_size": True},
        {"max_attempts": 0},
        {"eta": 1.5},
        {"guidance_scale": float("nan")},
        {"format": "webp"},
        {"quality": 0},
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SynthesisSettings(**change)


@pytest.mark.parametrize("make", [reconstruction, interpolation])
def test_a_plan_is_written_and_read_as_it_is(make, tmp_path):
    plan = make().bound_to(model={"unet": "0123"}, gate=None)
    (tmp_path / "again").mkdir()
    save_plan(plan, tmp_path)
    read = load_plan(tmp_path)
    assert list(read) == list(plan)
    assert read.digest == plan.digest
    save_plan(read, tmp_path / "again")
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_every_setting_is_part_of_the_digest():
    changed = {"num_inference_steps": 7, "guidance_scale": 3.0, "batch_size": 5, "threads": 2, "shard_size": 16}
    changed |= {"format": "jpg", "quality": 90, "grayscale": True, "max_attempts": 2, "eta": 0.5, "restore_norm": True}
    changed |= {"guidance_rescale": 0.7}
    digests = {reconstruction(settings=replace(SETTINGS, **{name: value})).digest for name, value in changed.items()}
    assert len(digests | {reconstruction().digest}) == len(changed) + 1
    assert reconstruction().bound_to(gate="a").digest != reconstruction().bound_to(gate=None).digest


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("plan.json", lambda content: content.replace(b'"guidance_scale": 2.0', b'"guidance_scale": 4.0')),
        ("plan.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ],
)
def test_a_plan_that_was_edited_is_refused(name, edit, tmp_path):
    freeze_plan(reconstruction(), tmp_path)
    (tmp_path / name).write_bytes(edit((tmp_path / name).read_bytes()))
    with pytest.raises(SynthesisError, match="changed after it was frozen"):
        freeze_plan(reconstruction(), tmp_path)


def test_a_damaged_plan_is_named(tmp_path):
    save_plan(reconstruction(), tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(SynthesisError, match="is damaged"):
        load_plan(tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises((FileNotFoundError, SynthesisError)):
        load_plan(tmp_path)


def test_a_folder_of_another_plan_is_refused_by_what_differs(tmp_path):
    freeze_plan(reconstruction(), tmp_path)
    freeze_plan(reconstruction(), tmp_path)
    with pytest.raises(SynthesisError, match=r"guidance_scale was 2\.0, is 3\.0"):
        freeze_plan(reconstruction(settings=replace(SETTINGS, guidance_scale=3.0)), tmp_path)
    with pytest.raises(SynthesisError, match="seed was 0, is 1"):
        freeze_plan(reconstruction(seed=1), tmp_path)
    renamed = plan_reconstruction([f"x{key}" for key in KEYS], LABELS, ratio=3, settings=SETTINGS)
    with pytest.raises(SynthesisError, match="sources, fractions and labels was"):
        freeze_plan(renamed, tmp_path)


def change_rows(**columns):
    def change(folder):
        rows = load_file(folder / "plan.safetensors") | columns
        (folder / "plan.safetensors").write_bytes(save(rows))

    return change


def change_facts(**facts):
    def change(folder):
        content = json.loads((folder / "plan.json").read_bytes()) | facts
        (folder / "plan.json").write_text(json.dumps(content))

    return change


def make_a_pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "plan.json").write_text("[" * 100_000),
        lambda folder: (folder / "plan.json").write_text("null"),
        make_a_pipe("plan.json"),
        make_a_pipe("plan.safetensors"),
        change_facts(settings=[]),
        change_facts(settings={"batch_size": 1e30}),
        change_facts(label_sets={"a": 1}),
        change_facts(label_sets=[[1]]),
        change_facts(strategy="other"),
        change_facts(strategy="interpolation"),
        change_facts(strategy=["reconstruction"]),
        change_facts(seed="0"),
        change_facts(digest=None),
        change_facts(made_with=3),
        change_rows(sources=np.full((30, 1), 99)),
        change_rows(sources=np.full((30, 1), -1)),
        change_rows(sources=np.zeros((30, 3), np.int64)),
        change_rows(sources=np.zeros((0, 1), np.int64)),
        change_rows(sources=np.zeros((30, 1))),
        change_rows(fractions=np.full(30, np.nan)),
        change_rows(fractions=np.full(30, 2.0)),
        change_rows(fractions=np.zeros(5)),
        change_rows(labels=np.full(30, 77, np.int32)),
        change_rows(labels=np.zeros(30)),
        change_rows(keys=np.full(9, 255, np.uint8)),
        change_rows(keys=np.zeros(0, np.uint8)),
    ],
)
def test_nothing_in_a_plan_is_believed(change, tmp_path):
    save_plan(reconstruction(), tmp_path)
    change(tmp_path)
    with pytest.raises(SynthesisError, match="plan"):
        load_plan(tmp_path)
