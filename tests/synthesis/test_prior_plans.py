"""Images of no source: labels as in the regime or balanced, tokens from a prior, the same bytes with any regime."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

import priors
import tiny
from diffusers_dino.data.labels import stored_labels
from diffusers_dino.evaluation import MemorizationResult
from diffusers_dino.prior import describe_conditioner
from diffusers_dino.synthesis import (
    PriorTokens,
    SynthesisError,
    SynthesisSettings,
    bind,
    load_plan,
    plan_prior,
    plan_reconstruction,
    save_plan,
    synthesise,
)
from scripts import call_script, image_folder

LABELS = [{"Edema"}, {"Edema", "Nodule"}, {"Nodule"}, {"No Finding"}, {"No Finding"}, {"No Finding"}, set()]
KEYS = [f"{number:03d}" for number in range(len(LABELS))]
SETTINGS = SynthesisSettings(num_inference_steps=2, batch_size=4, shard_size=8, threads=1)


@pytest.fixture(scope="module")
def prior(pipe):
    made = priors.tiny_prior_pipeline(conditioner=describe_conditioner(pipe.conditioner))
    made.prior.fit_tokens(pipe.encode_image(tiny.random_images(32)))
    return PriorTokens(made, num_inference_steps=3)


def counts(plan) -> Counter:
    return Counter(planned.labels for planned in plan)


def test_labels_come_as_in_the_regime_or_each_as_often():
    plan = plan_prior(KEYS, LABELS, ratio=2)
    assert counts(plan) == Counter(2 * [tuple(sorted(own)) for own in LABELS])
    assert all(planned.sources == () for planned in plan)
    balanced = plan_prior(KEYS, LABELS, num_images=60, balanced=True)
    having = Counter(label for planned in balanced for label in planned.labels)
    assert having["No Finding"] == 20
    assert min(having["Edema"], having["Nodule"]) >= 20
    assert () not in counts(balanced)


def test_a_longer_plan_begins_with_the_shorter_one_and_goes_to_a_file(tmp_path):
    for balanced in (False, True):
        short, long = (plan_prior(KEYS, LABELS, num_images=n, balanced=balanced) for n in (5, 40))
        assert [planned.labels for planned in short] == [planned.labels for planned in long][:5]
        folder = tmp_path / str(balanced)
        folder.mkdir()
        save_plan(long, folder)
        assert load_plan(folder).digest == long.digest
    assert plan_prior(KEYS, LABELS, num_images=7, seed=1).digest != plan_prior(KEYS, LABELS, num_images=7).digest


def test_the_labels_of_every_image_may_be_given():
    assert [planned.labels for planned in plan_prior((), asked=LABELS[:3])] == [
        ("Edema",),
        ("Edema", "Nodule"),
        ("Nodule",),
    ]


def test_without_labels_and_without_images_anything_is_planned():
    assert counts(plan_prior((), num_images=3)) == Counter({None: 3})
    assert len(plan_prior(KEYS, ratio=0.5)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": (), "ratio": 2}, "how many"),
        ({"keys": (), "num_images": 0}, "at least 1"),
        ({"keys": KEYS, "num_images": 3, "balanced": True}, "no labels to balance"),
        ({"keys": KEYS, "labels": [{"a"}], "ratio": 1}, "Each source needs its labels"),
        ({"keys": KEYS}, "how many images"),
        ({"keys": KEYS, "asked": LABELS}, "either images"),
        ({"keys": (), "asked": []}, "either images"),
        ({"keys": (), "asked": ["Edema"]}, "a collection of names"),
    ],
)
def test_bad_plans_are_refused(arguments, message):
    with pytest.raises(SynthesisError, match=message):
        plan_prior(**arguments)


def test_a_set_has_labels_and_no_sources_and_is_the_same_without_images(pipe, sources, prior, tmp_path):
    plan = plan_prior(KEYS, LABELS, num_images=11, settings=SETTINGS)
    made = synthesise(plan, pipe, sources, tmp_path / "with", prior=prior, progress=False)
    assert [set(own) for own in stored_labels(made.images()).labels] == [set(planned.labels) for planned in plan]
    with open(made.folder / "labels.csv", newline="") as file:
        assert {row["sources"] for row in csv.DictReader(file)} == {""}
    assert made.manifest["lineage"]["prior"] == {"guidance_scale": 1.0, "num_inference_steps": 3}
    assert "prior" in made.manifest["lineage"]["model"]
    without = synthesise(plan, pipe, None, tmp_path / "without", prior=prior, progress=False)
    for path in made.folder.glob("*.tar"):
        assert path.read_bytes() == (without.folder / path.name).read_bytes()
    again = synthesise(plan, pipe, sources, tmp_path / "with", prior=prior, progress=False)
    assert again.manifest == made.manifest


def test_what_the_gate_refuses_is_drawn_again_from_other_tokens(pipe, prior, tmp_path):
    class Half:
        seen = 0

        def __call__(self, images):
            Half.seen += 1
            return images.mean((1, 2, 3)) > (10 if Half.seen == 1 else -1)  # the first batch never

        def fingerprint(self):
            return "half"

    plan = plan_prior(KEYS, LABELS, num_images=4, settings=SETTINGS)
    made = synthesise(plan, pipe, None, tmp_path / "set", gate=Half(), prior=prior, progress=False)
    assert made.manifest["lineage"]["gate"]["refused"] == 4
    assert made.manifest["lineage"]["gate"]["redrawn"] == 4
    first, second = (prior.of(plan).draw(range(4), attempt) for attempt in (0, 1))
    assert not first.equal(second)


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        ([{"Edma"}], {}, "nearest one is 'Edema'"),
        ([{"No Finding", "Edema"}], {}, "contradicts"),
        ([{"Edema"}], {"prior": None}, "needs one"),
    ],
)
def test_what_the_prior_cannot_draw_is_refused(pipe, prior, labels, change, message):
    plan = plan_prior(["000"], labels, num_images=2, settings=SETTINGS)
    with pytest.raises(SynthesisError, match=message):
        bind(plan, pipe, None, **{"prior": prior, **change})


def test_another_models_prior_and_a_prior_for_variations_are_refused(pipe, sources, prior):
    other = PriorTokens(
        priors.tiny_prior_pipeline(conditioner=describe_conditioner(tiny.tiny_conditioner(tokens="cls")))
    )
    with pytest.raises(SynthesisError, match="another conditioner"):
        bind(plan_prior((), num_images=2, settings=SETTINGS), pipe, None, prior=other)
    with pytest.raises(SynthesisError, match="takes none"):
        bind(plan_reconstruction(sources.keys, ratio=1, settings=SETTINGS), pipe, sources, prior=prior)


def test_the_command_makes_a_set_from_a_table_and_no_image(pipe, prior, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    prior.pipe.save_pretrained(tmp_path / "prior")
    table = tmp_path / "labels.csv"
    table.write_text(
        "file,findings\n" + "".join(f"{key},{'|'.join(own)}\n" for key, own in zip(KEYS, LABELS, strict=True))
    )
    flags = {
        "model": tmp_path / "model",
        "prior": tmp_path / "prior",
        "strategy": "prior",
        "data_dir": "none",
        "labels": table,
        "ratio": 1,
        "num_inference_steps": 1,
        "prior_inference_steps": 2,
        "batch_size": 4,
        "threads": 1,
        "num_drawn": 2,
        "output_dir": tmp_path / "set",
    }
    call_script("synthesise", **flags)
    assert Path(flags["output_dir"], "examples.png").is_file()
    card = Path(flags["output_dir"], "README.md").read_text()
    assert "without an image" in card
    assert "labels that the prior was asked for" in card
    assert json.loads(Path(flags["output_dir"], "plan.json").read_text())["strategy"] == "prior"
    for change, message in (
        ({"prior": None}, "give both"),
        ({"strategy": "reconstruction", "prior": None}, "goes with --strategy prior"),
        ({"soft_labels": 1}, "goes with --strategy interpolation"),
        ({"gate": tmp_path / "gate"}, "calibrated gate"),
    ):
        with pytest.raises(ValueError, match=message):
            call_script("synthesise", **{**flags, **change})


def test_the_memorization_report_draws_the_tokens_of_a_set_again(pipe, prior, tmp_path):
    plan = plan_prior(KEYS, LABELS, num_images=5, settings=SETTINGS)
    synthesise(plan, pipe, None, tmp_path / "set", prior=prior, progress=False)
    pipe.save_pretrained(tmp_path / "model")
    prior.pipe.save_pretrained(tmp_path / "prior")
    image_folder(tmp_path / "real", 40, size=32)
    flags = {
        "training": tmp_path / "real",
        "synthetic": tmp_path / "set",
        "model": tmp_path / "model",
        "prior": tmp_path / "prior",
        "size": 32,
        "false_alarms": 0.1,
        "num_planted": 1,
        "output_dir": tmp_path / "out",
    }
    call_script("evaluate memorization", **flags)
    tokens = MemorizationResult.load(tmp_path / "out" / "memorization.json").tokens
    assert tokens.drawn
    assert tokens.synthetic.num_images == 5
    for change, message in (({"model": None}, "--prior needs"), ({"synthetic": None}, "--prior needs")):
        with pytest.raises(ValueError, match=message):
            call_script("evaluate memorization", **{**flags, **change})
    prior.pipe.prior.slots.data.add_(1)
    prior.pipe.save_pretrained(tmp_path / "prior")
    prior.pipe.prior.slots.data.sub_(1)
    with pytest.raises(ValueError, match="is not the prior"):
        call_script("evaluate memorization", **flags)
