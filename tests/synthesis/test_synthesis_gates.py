"""Images that a gate refuses are drawn again, or left out by name."""

from dataclasses import replace

import pytest
import torch

from diffusers_dino.synthesis import SynthesisError, plan_interpolation, synthesise
from diffusers_dino.synthesis.exports import export
from folders import contents
from synthetic_sets import LABELS, SETTINGS, BrightnessGate, facts_of


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
    assert contents(again.folder, "*") == contents(made.folder, "*")


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


class ExceptGate(BrightnessGate):
    """Refuses one image."""

    def __call__(self, images):
        return (images != self.least).flatten(1).any(1)

    def fingerprint(self):
        return "except one"


def test_a_last_shard_may_lose_its_only_image(pipe, sources, tmp_path):
    once = plan_interpolation(sources.keys, LABELS, num_images=9, settings=replace(SETTINGS, max_attempts=1))
    seen = BrightnessGate()
    synthesise(once, pipe, sources, tmp_path / "free", gate=seen, progress=False)
    options = {"gate": ExceptGate(seen.seen[-1][0]), "max_left_out": 0.2, "progress": False}
    made = synthesise(once, pipe, sources, tmp_path / "set", **options)
    assert [shard["samples"] for shard in made.manifest["shards"]] == [8, 0]
    assert made.left_out == [8]
    assert made.images().keys == [image.key for image in made.planned()]
    before = contents(made.folder, "*")
    (made.folder / "manifest.json").unlink()
    (made.folder / "synthetic-000001.tar").unlink()
    assert contents(synthesise(once, pipe, sources, tmp_path / "set", **options).folder, "*") == before
    assert len(list((export(made, "folder", tmp_path / "exported") / "images").iterdir())) == 8


def test_a_gate_that_refuses_everything_ends_the_run(pipe, sources, plan, tmp_path):
    with pytest.raises(SynthesisError, match=r"refused all 21 images in 5 attempts.*too strict"):
        synthesise(plan, pipe, sources, tmp_path, gate=BrightnessGate(2.0), max_left_out=1.0, progress=False)


def test_a_gate_must_say_who_it_is_and_what_it_means(pipe, sources, plan, tmp_path):
    with pytest.raises(TypeError, match="needs a method fingerprint"):
        synthesise(plan, pipe, sources, tmp_path, gate=lambda images: images.mean((1, 2, 3)) > 0)
    gate = BrightnessGate()
    gate.least = torch.zeros(1, 1)  # its verdicts become (n, n)
    gate.fingerprint = lambda: "wrong"
    with pytest.raises(SynthesisError, match="4 bool, one for each image"):
        synthesise(plan, pipe, sources, tmp_path, gate=gate, progress=False)
