"""From a plan to shards: the same bytes whoever makes them and however often they are stopped; nothing is lost."""

import csv
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
from diffusers_dino.synthesis.shards import find_record, make_shard
from diffusers_dino.synthesis.tokens import PlannedSources, TokenStore
from folders import contents, full_disk
from kills import killed_before, kills
from scripts import image_folder
from synthetic_sets import LABELS, SETTINGS, BrightnessGate, facts_of


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
    assert contents(tmp_path / "set", "*.tar*") == contents(whole.folder, "*.tar*")


def test_a_compiled_model_makes_a_set_of_its_own(small, sources, tmp_path):
    eager, compiled = bind(small, tiny.tiny_pipeline(), sources), tiny.tiny_pipeline()
    assert compile_pipeline(compiled, backend="eager")
    prepare_folder(eager, tmp_path / "set")
    assert bind(small, compiled, sources).made_with == {**eager.made_with, "compiled": True}
    with pytest.raises(SynthesisError, match="compiled"):
        synthesise(small, compiled, sources, tmp_path / "set", progress=False)


@pytest.mark.slow
def test_compiled_processes_make_the_same_bytes(plan, sources, images, tmp_path):
    """Each compiles by itself, and begins with another shard; images are the eager ones to rounding."""
    for order in ((0, 1, 2), (2, 1, 0)):
        torch.compiler.reset()
        pipe = tiny.tiny_pipeline(unet=tiny.tiny_unet(**tiny.ONE_LEVEL))
        expected = tiny.generate(pipe, images)
        assert compile_generator(pipe)
        bound = bind(plan, pipe, sources)
        folder = prepare_folder(bound, tmp_path / f"{order[0]} first")
        tokens = TokenStore(bound, folder)
        tokens.encode_part(0, pipe, PlannedSources(bound, sources))
        for number in order:
            make_shard(bound, number, pipe, tokens, folder)
        assert abs(tiny.generate(pipe, images) - expected).max() < 1e-4
    assert contents(tmp_path / "0 first", "*.tar*") == contents(tmp_path / "2 first", "*.tar*")


def test_a_folder_that_an_earlier_version_began_is_gone_on_with(pipe, sources, tmp_path):
    shutil.unpack_archive(Path(__file__).with_name("half_made.zip"), tmp_path)  # plan, tokens and one of three shards
    begun = contents(tmp_path, "*")
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
    assert begun.items() <= contents(folder, "*").items()


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(pipe, sources, plan, tmp_path):
    left_alone = synthesise(plan, pipe, sources, tmp_path / "whole", gate=BrightnessGate(), progress=False)
    for stop in (1, 5):
        with pytest.raises(KeyboardInterrupt):
            synthesise(plan, pipe, sources, tmp_path / "set", gate=BrightnessGate(interrupt_at=stop), progress=False)
    assert not (tmp_path / "set" / "manifest.json").exists()
    gate = BrightnessGate()
    synthesise(plan, pipe, sources, tmp_path / "set", gate=gate, progress=False)
    assert len(gate.seen) == 2  # of six batches: two shards of two batches were finished
    assert contents(tmp_path / "set", "*") == contents(left_alone.folder, "*")


def test_a_kill_before_any_rename_or_unlink_changes_nothing(small, pipe, sources, tmp_path):
    def make(name):
        return synthesise(small, pipe, sources, tmp_path / name, progress=False)

    expected = contents(make("whole").folder)
    count = 0
    for count in kills(lambda: make("set")):
        make("set")
        assert contents(tmp_path / "set") == expected, f"kill {count}"
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
        assert contents(tmp_path / "set") == expected, f"kill {number}"
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
    limit = min(len(content) for name, content in contents(whole.folder, "*.tar").items()) - 1
    with full_disk(limit), pytest.raises(OSError, match="too large"):  # plan and tokens fit, no shard does
        synthesise(plan, pipe, sources, tmp_path / "set", progress=False)
    left = [path.name for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert sorted(left) == ["lock", "plan.json", "plan.safetensors", "tokens-000000.safetensors"]
    synthesise(plan, pipe, sources, tmp_path / "set", progress=False)
    assert contents(tmp_path / "set", "*") == contents(whole.folder, "*")


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
