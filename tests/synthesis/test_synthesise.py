"""From a plan to shards: the same bytes whoever makes them and however often they are stopped; nothing is lost."""

import csv
import json
import os
import resource
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from diffusers_dino.data import Preprocessing, open_images, verify_shards
from diffusers_dino.data.labels import stored_labels
from diffusers_dino.data.sharding.manifest import ShardError
from diffusers_dino.embeddings import lerp
from diffusers_dino.pipelines.compilation import compile_pipeline
from diffusers_dino.seeds import generator_for
from diffusers_dino.synthesis import (
    SynthesisError,
    SynthesisSettings,
    SyntheticSet,
    bind,
    compile_generator,
    load_plan,
    plan_interpolation,
    plan_reconstruction,
    prepare_folder,
    synthesise,
)
from diffusers_dino.synthesis.dataset import complete_set
from diffusers_dino.synthesis.run import only_run
from diffusers_dino.synthesis.shards import find_record, make_shard
from diffusers_dino.synthesis.tokens import TOKENS, PlannedSources, TokenStore
from kills import killed_before, kills
from scripts import image_folder

LABELS = [{"effusion"}, {"effusion", "mass"}, {"mass"}, {"nodule"}, {"mass"}, {"nodule"}, set()]
SETTINGS = SynthesisSettings(num_inference_steps=2, batch_size=4, shard_size=8, threads=1)


class BrightnessGate:
    """Refuses dark images; may be interrupted at a call, as a user does with Ctrl-C."""

    def __init__(self, least=0.0, interrupt_at=None):
        self.least, self.interrupt_at, self.seen = least, interrupt_at, []

    def __call__(self, images):
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(images)
        return images.mean((1, 2, 3)) >= self.least

    def fingerprint(self):
        return f"brightness {self.least}"


@pytest.fixture(scope="module")
def plan(sources):
    return plan_interpolation(sources.keys, LABELS, num_images=21, settings=SETTINGS)


@pytest.fixture(scope="module")
def whole(plan, pipe, sources, tmp_path_factory):
    """A set that was made without a stop."""
    return synthesise(plan, pipe, sources, tmp_path_factory.mktemp("whole") / "set", progress=False)


def files(folder, pattern="*"):
    found = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def facts_of(made):
    images = made.images()
    return [json.loads(images.companion(place, "json")) for place in range(len(images))]


def test_the_set_is_complete_labelled_and_readable(whole, plan):
    assert verify_shards(whole.folder) == []
    assert not (whole.folder / ".work").exists()
    images = open_images(whole.folder, Preprocessing(32))
    assert images.keys == [image.key for image in plan]
    assert images[0]["image"].shape == (1, 32, 32)
    assert [set(labels) for labels in stored_labels(images).labels] == [set(image.labels) for image in plan]
    with open(whole.folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == images.keys
    assert [tuple(row["sources"].split("|")) for row in rows] == [image.sources for image in plan]
    assert [tuple(row["labels"].split("|")) for row in rows] == [image.labels for image in plan]
    assert [float(row["fraction"]) for row in rows] == [image.fraction for image in plan]
    assert {row["strategy"] for row in rows} == {"interpolation"}
    lineage = whole.manifest["lineage"]
    assert (lineage["num_images"], lineage["seed"], lineage["plan"]) == (21, 0, whole.plan.digest)
    assert set(lineage["model"]) == {"conditioner", "scheduler", "unet", "vae"}
    assert lineage["environments"][0]["torch"] == torch.__version__


def test_pixels_are_those_that_the_pipeline_gives(whole, plan, pipe, sources):
    tokens = {key: pipe.encode_image(sample["image"])[0] for key, sample in zip(sources.keys, sources, strict=True)}
    rows = list(plan)[4:8]
    ends = (torch.stack([tokens[row.sources[end]] for row in rows]) for end in (0, 1))
    embeds = lerp(*ends, torch.tensor([row.fraction for row in rows]))
    generators = [generator_for(0, "synthesis", index, 0) for index in range(4, 8)]
    expected = pipe(image_embeds=embeds, generator=generators, num_inference_steps=2, output_type="pt").images
    made = torch.stack([whole.images()[index]["image"] for index in range(4, 8)])
    # encoded one by one here: rounding may move a value over the edge between two numbers of 0..255
    assert (made - expected).abs().max() <= 1.01 / 255


def test_shards_are_the_same_in_any_order_and_on_any_number_of_threads(whole, pipe, sources, plan, tmp_path):
    bound = bind(plan, pipe, sources)
    folder = prepare_folder(bound, tmp_path / "set")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tokens = TokenStore(bound, folder)
        assert (tokens.num_parts, tokens.encode_part(0, pipe, PlannedSources(bound, sources))) == (1, [])
        for number in (2, 0, 1):
            make_shard(bound, number, pipe, tokens, folder)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "set", "*.tar*") == files(whole.folder, "*.tar*")


def test_a_compiled_model_makes_a_set_of_its_own(small, sources, tmp_path):
    eager, compiled = bind(small, tiny.tiny_pipeline(), sources), tiny.tiny_pipeline()
    assert compile_pipeline(compiled, backend="eager")
    prepare_folder(eager, tmp_path / "set")
    assert bind(small, compiled, sources).made_with == {**eager.made_with, "compiled": True}
    with pytest.raises(SynthesisError, match="compiled"):
        synthesise(small, compiled, sources, tmp_path / "set", progress=False)


@pytest.mark.slow
def test_compiled_processes_make_the_same_bytes(plan, sources, tmp_path):
    """Each compiles by itself, and begins with another shard."""
    for order in ((0, 1, 2), (2, 1, 0)):
        torch.compiler.reset()
        pipe = tiny.tiny_pipeline()
        assert compile_generator(pipe)
        bound = bind(plan, pipe, sources)
        folder = prepare_folder(bound, tmp_path / f"{order[0]} first")
        tokens = TokenStore(bound, folder)
        tokens.encode_part(0, pipe, PlannedSources(bound, sources))
        for number in order:
            make_shard(bound, number, pipe, tokens, folder)
    assert files(tmp_path / "0 first", "*.tar*") == files(tmp_path / "2 first", "*.tar*")


def test_a_folder_that_an_earlier_version_began_is_gone_on_with(pipe, sources, tmp_path):
    shutil.unpack_archive(Path(__file__).with_name("half_made.zip"), tmp_path)  # plan, tokens and one of three shards
    begun = files(tmp_path)
    settings = SynthesisSettings(num_inference_steps=1, batch_size=2, shard_size=2, threads=1)
    plan = plan_interpolation(sources.keys[:3], LABELS[:3], num_images=5, seed=3, settings=settings)
    plan = plan.bound_to(**load_plan(tmp_path).made_with)  # other versions of torch may make other weights
    folder = prepare_folder(plan, tmp_path)
    tokens = TokenStore(plan, folder)
    assert (tokens.num_parts, tokens.has_part(0)) == (1, True)
    assert [find_record(plan, number, folder) is None for number in range(3)] == [False, True, True]
    for number in (1, 2):
        make_shard(plan, number, pipe, tokens, folder)
    made = complete_set(plan, folder)
    assert verify_shards(folder) == []
    assert [image.key for image in made.planned()] == made.images().keys
    assert begun.items() <= files(folder).items()


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(pipe, sources, plan, tmp_path):
    left_alone = synthesise(plan, pipe, sources, tmp_path / "whole", gate=BrightnessGate(), progress=False)
    for stop in (1, 5):
        with pytest.raises(KeyboardInterrupt):
            synthesise(plan, pipe, sources, tmp_path / "set", gate=BrightnessGate(interrupt_at=stop), progress=False)
    assert not (tmp_path / "set" / "manifest.json").exists()
    gate = BrightnessGate()
    synthesise(plan, pipe, sources, tmp_path / "set", gate=gate, progress=False)
    assert len(gate.seen) == 2  # of six batches: two shards of two batches were finished
    assert files(tmp_path / "set") == files(left_alone.folder)


@pytest.fixture(scope="module")
def small(sources):
    """A plan of two shards."""
    settings = SynthesisSettings(num_inference_steps=1, batch_size=2, shard_size=2, threads=1)
    return plan_reconstruction(sources.keys, LABELS, num_images=3, settings=settings)


def test_a_kill_before_any_rename_or_unlink_changes_nothing(small, pipe, sources, tmp_path):
    def make(name):
        return synthesise(small, pipe, sources, tmp_path / name, progress=False)

    expected = files(make("whole").folder, "**/*")
    count = 0
    for count in kills(lambda: make("set")):
        make("set")
        assert files(tmp_path / "set", "**/*") == expected, f"kill {count}"
        shutil.rmtree(tmp_path / "set")
    assert count > 10

    def lose_a_shard():
        (tmp_path / "set" / "synthetic-000001.tar").unlink()
        (tmp_path / "set" / "labels.csv").unlink()

    make("set")
    for number in range(0, count, 2):
        lose_a_shard()
        with killed_before(number) as death:
            make("set")
        assert len(make("set")) == 3
        assert files(tmp_path / "set", "**/*") == expected, f"kill {number}"
        if not death.happened:
            break


def test_of_two_plans_that_begin_at_once_in_one_folder_one_is_made(small, pipe, sources, tmp_path):
    other = plan_reconstruction(sources.keys, LABELS, num_images=3, seed=1, settings=small.settings)

    def make(plan):
        try:
            return synthesise(plan, pipe, sources, tmp_path / "set", progress=False).plan.seed
        except SynthesisError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        first, second = sorted(pool.map(make, (small, other)), key=lambda answer: isinstance(answer, str))
    assert "Another run is at work in" in second or "seed was" in second
    assert SyntheticSet.open(tmp_path / "set", verify=True).plan.seed == first


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
    assert files(finished, "**/*") == files(whole.folder, "**/*")
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
    changed = files(finished, "**/*")
    with pytest.raises(SynthesisError, match=name):
        SyntheticSet.open(finished)
    with pytest.raises(SynthesisError, match=f"{name}.*Move it away"):
        synthesise(plan, pipe, sources, finished, progress=False)
    assert files(finished, "**/*") == changed


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


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


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
    assert files(folder, "*.tar*") == files(whole.folder, "*.tar*")


def test_damaged_tokens_are_encoded_again(unfinished, whole, pipe, sources, plan):
    _, folder = unfinished
    (folder / "synthetic-000000.tar").unlink()
    cut(folder / TOKENS / "tokens-000000.safetensors")
    synthesise(plan, pipe, sources, folder, progress=False)
    assert files(folder, "*.tar*") == files(whole.folder, "*.tar*")


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_shard_that_a_finished_set_has_lost_is_made_again_alone(damage, pipe, sources, plan, tmp_path):
    made = synthesise(plan, pipe, sources, tmp_path, gate=BrightnessGate(), progress=False)
    before = files(made.folder)
    damage(tmp_path / "synthetic-000002.tar")
    gate = BrightnessGate()
    synthesise(plan, pipe, sources, tmp_path, gate=gate, progress=False)
    assert sum(map(len, gate.seen)) == 5
    assert files(tmp_path) == before


def test_refused_images_are_drawn_again_and_the_others_stay_as_they_are(whole, pipe, sources, plan, tmp_path):
    images = whole.images()
    brightness = sorted(float(images[number]["image"].mean()) for number in range(21))
    gate = BrightnessGate(brightness[5])
    made = synthesise(plan, pipe, sources, tmp_path / "set", gate=gate, max_left_out=1.0, progress=False)
    figures = made.manifest["lineage"]["gate"]
    facts = facts_of(made)
    redrawn = [one["attempt"] for one in facts if one["attempt"]]
    assert figures["redrawn"] == len(redrawn) > 0
    assert figures["refused"] == sum(redrawn) + SETTINGS.max_attempts * len(made.left_out)
    places = {key: number for number, key in enumerate(images.keys)}
    for number, key in enumerate(made.images().keys):
        image = made.images()[number]["image"]
        assert image.mean() >= brightness[5]
        assert torch.equal(image, images[places[key]]["image"]) == (facts[number]["attempt"] == 0)
    again = synthesise(plan, pipe, sources, tmp_path / "again", gate=gate, max_left_out=1.0, progress=False)
    assert files(again.folder) == files(made.folder)


def test_images_that_never_pass_are_named_and_not_counted(pipe, sources, plan, tmp_path):
    once = plan_interpolation(sources.keys, LABELS, num_images=21, settings=replace(SETTINGS, max_attempts=1))
    free = synthesise(once, pipe, sources, tmp_path / "free", progress=False).images()
    brightness = sorted((float(free[number]["image"].mean()), free.keys[number]) for number in range(21))
    gate = BrightnessGate(brightness[2][0])
    with pytest.raises(SynthesisError, match="refused at least 2 of 21 images in all 1 attempts"):
        synthesise(once, pipe, sources, tmp_path / "set", gate=gate, progress=False)
    made = synthesise(once, pipe, sources, tmp_path / "set", gate=gate, max_left_out=0.1, progress=False)
    dark = sorted(key for _, key in brightness[:2])
    assert sorted(made.manifest["lineage"]["gate"]["left_out"]) == dark
    assert len(made) == len(made.images()) == 19
    listed = [line.split(",")[0] for line in (made.folder / "labels.csv").read_text().splitlines()[1:]]
    assert listed == made.images().keys == [image.key for image in made.planned()]
    assert not set(dark) & set(listed)


def test_a_gate_that_refuses_everything_ends_the_run(pipe, sources, plan, tmp_path):
    with pytest.raises(SynthesisError, match=r"refused all 8 images of shard 0 in 5 attempts.*too strict"):
        synthesise(plan, pipe, sources, tmp_path, gate=BrightnessGate(2.0), max_left_out=1.0, progress=False)


def test_a_gate_must_say_who_it_is_and_what_it_means(pipe, sources, plan, tmp_path):
    with pytest.raises(TypeError, match="needs a method fingerprint"):
        synthesise(plan, pipe, sources, tmp_path, gate=lambda images: images.mean((1, 2, 3)) > 0)
    gate = BrightnessGate()
    gate.least = torch.zeros(1, 1)  # its verdicts become (n, n)
    gate.fingerprint = lambda: "wrong"
    with pytest.raises(SynthesisError, match="4 bool, one for each image"):
        synthesise(plan, pipe, sources, tmp_path, gate=gate, progress=False)


def test_another_gate_model_or_data_set_is_refused(whole, plan, pipe, sources, tmp_path):
    with pytest.raises(SynthesisError, match=r"gate was None, is brightness 0\.0"):
        synthesise(plan, pipe, sources, whole.folder, gate=BrightnessGate())
    other = tiny.tiny_pipeline(unet=tiny.tiny_unet(layers_per_block=2))
    with pytest.raises(SynthesisError, match="model: unet"):
        synthesise(plan, other, sources, whole.folder)
    scheduled = tiny.tiny_pipeline(scheduler=tiny.tiny_scheduler(timestep_spacing="trailing"))
    with pytest.raises(SynthesisError, match="model: scheduler"):
        synthesise(plan, scheduled, sources, whole.folder)
    strangers = image_folder(tmp_path / "strangers", 9, 32)
    for number in (7, 8):
        (strangers / f"{number:03d}.png").rename(strangers / f"{number - 7:03d}.png")
    with pytest.raises(SynthesisError, match="source_pixels was"):
        synthesise(plan, pipe, open_images(strangers, Preprocessing(32)), whole.folder)
    more = plan_reconstruction([*sources.keys, "absent"], ratio=1, settings=SETTINGS)
    with pytest.raises(SynthesisError, match="1 of the plan's 8 sources are not among the 7 images, such as absent"):
        synthesise(more, pipe, sources, tmp_path / "set")
    with pytest.raises(TypeError, match=r"use DinoDiffusionPipeline.from_pipe"):
        synthesise(plan, object(), sources, whole.folder)


def test_unreadable_sources_are_named_and_no_other_image_takes_their_place(pipe, tmp_path):
    folder = image_folder(tmp_path / "sources", 7, 32)
    sound = {number: (folder / f"{number:03d}.png").read_bytes() for number in (1, 2)}
    for number in sound:
        (folder / f"{number:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")

    def attempt():
        images = open_images(folder, Preprocessing(32), max_unreadable=0.5)
        plan = plan_reconstruction(images.keys, ratio=1, settings=SETTINGS)
        return synthesise(plan, pipe, images, tmp_path / "set", progress=False)

    with pytest.raises(SynthesisError, match=r"2 source image\(s\) cannot be read.*001.png.*002.png.*Mend them"):
        attempt()
    for number, content in sound.items():
        (folder / f"{number:03d}.png").write_bytes(content)
    assert len(attempt()) == 7


def test_a_full_disk_leaves_nothing_that_counts(whole, pipe, sources, plan, tmp_path):
    limit = min(len(content) for name, content in files(whole.folder, "*.tar").items()) - 1
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))  # plan and tokens fit, no shard does
    try:
        with pytest.raises(OSError, match="too large"):
            synthesise(plan, pipe, sources, tmp_path / "set", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    left = [path.name for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert sorted(left) == ["lock", "plan.json", "plan.safetensors", "tokens-000000.safetensors"]
    synthesise(plan, pipe, sources, tmp_path / "set", progress=False)
    assert files(tmp_path / "set") == files(whole.folder)


def test_colour_can_be_stored_as_jpeg_or_grey(sources, tmp_path):
    pipe = tiny.tiny_pipeline(vae=tiny.tiny_vae(3))
    for options, shape in (({"format": "jpg"}, (3, 32, 32)), ({"grayscale": True}, (1, 32, 32))):
        settings = replace(SETTINGS, **options)
        plan = plan_reconstruction(sources.keys, num_images=3, settings=settings)
        made = synthesise(plan, pipe, sources, tmp_path / str(len(shape) + shape[0]), progress=False)
        with tarfile.open(made.folder / "synthetic-000000.tar") as tar:
            assert tar.getnames()[0] == f"synthetic-000000000.{settings.format}"
        assert made.images()[0]["image"].shape == shape
        assert facts_of(made)[0]["labels"] is None
