"""What a card tells of each protocol: figures with N and controls, metrics for the Hub, and no key of an image."""

import json
from dataclasses import MISSING, fields, replace
from functools import cache

import pytest
from huggingface_hub import ModelCardData

import tiny
from diffusers_dino.evaluation import (
    AugmentationResult,
    FidelityResult,
    FidelityScores,
    InterpolationResult,
    LabelPreservationResult,
    MethodScores,
    PathFigures,
    PathSpace,
    Sampling,
    SegmentationResult,
    Setting,
    SweepScores,
    evaluate_memorization,
)
from diffusers_dino.evaluation.augmentation.result import Configuration
from diffusers_dino.evaluation.labels.result import Agreement, Part, RealScores
from diffusers_dino.hub.measurements import describe_result, read_result, read_results
from diffusers_dino.metrics.bootstrap import Estimate
from diffusers_dino.metrics.extractors.base import FeatureSpec
from results import RECONSTRUCTION

SPEC = FeatureSpec("xrv", "features2", 1024, 224, "gray, [-1024, 1024]", "bilinear, antialiased", "ab" * 32)
SECRET = "patient-0815"


def interpolation():
    figures = PathFigures((1.0, 0.5, 0.0), (0.0, 0.5, 1.0), 0.75, 0.9)
    space = PathSpace(figures, replace(figures, monotone_paths=0.1), figures, figures)
    return InterpolationResult(32, 512, (0.0, 0.5, 1.0), (0,), 20, 2.0, "lerp", space, space)


def fidelity():
    estimate = Estimate(12.5, 10.0, 15.0, 0.1)
    sampling = Sampling("DDIMScheduler", 50, 1.0, 0, 16)
    common = (64, 512, SPEC, sampling, 5, 200, 0, 0.95, True, *[estimate] * 7)
    rows = [
        FidelityScores(name, step, *common) for name, step in (("model", 500), ("untrained", None), ("real", None))
    ]
    return FidelityResult(tuple(rows))


def segmentation():
    setting = Setting("", "all", 300, 0.4)
    scores = ("best pair", (0.5, 0.7), 0.6, 0.4, 0.8, 0.6, 0.55, 0.65)
    methods = tuple(MethodScores(name, *scores) for name in ("ours", "ours, untrained", "Otsu"))
    sweeps = tuple(SweepScores(name, (setting,), ((0.5, 0.7),), ((3, 4),)) for name in ("ours", "ours, untrained"))
    return SegmentationResult("montgomery", (SECRET, f"{SECRET}-b"), 64, 0, methods, sweeps)


@cache
def memorization():
    images = tiny.random_images(40, channels=1, seed=3)
    result, _ = evaluate_memorization(images[:30], images[:6], images[30:], false_alarms=0.1, num_planted=2)
    closest = tuple(replace(pair, key=SECRET, training_key=SECRET) for pair in result.closest)
    return replace(result, closest=closest)


def labels():
    agreement = Agreement("macro", 1, 0.7, 0.6, 0.8, 0.75, 0.65, 0.85, -0.05, -0.1, 0.0, 0.45, 0.55)
    part = Part("variations", "reconstruction", 1.0, None, None, 40, 20, agreement, (agreement,))
    real = (RealScores("macro", 1, 0.8, 0.7, 0.9),)
    return LabelPreservationResult(("mass",), 5, 100, 50, "densenet121", 0, 0, 100, real, (part,))


def augmentation():
    row = Configuration(
        "reconstruction", "augmented", 0, 100, (0, 1), 40, 30, (0.7, 0.8), 0.75, 0.05, 0.6, 0.9, None, ()
    )
    return AugmentationResult((), 2, 40, 30, "densenet121", 0, "ab", 0, 100, 0, (), (row,))


MAKERS = [lambda: RECONSTRUCTION, interpolation, fidelity, segmentation, memorization, labels, augmentation]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_result_is_known_by_its_fields_and_told_without_keys(make, tmp_path):
    result = make()
    result.save(tmp_path / "anything.json")
    read = read_result(tmp_path / "anything.json")
    assert read == result
    told = describe_result(read, "phantoms")
    assert SECRET not in told.text + str(told.metrics)
    assert "|" in told.text
    if told.metrics:
        metadata = ModelCardData(model_name="model", eval_results=list(told.metrics)).to_yaml()
        assert SECRET not in metadata
        assert all("N = " in metric.metric_name for metric in told.metrics)
        assert all(
            metric.metric_args["num_pairs" if make is interpolation else "num_images"] for metric in told.metrics
        )
    content = json.loads((tmp_path / "anything.json").read_text())
    first = {field.name for field in fields(result) if field.default is MISSING}
    (tmp_path / "older.json").write_text(json.dumps({name: content[name] for name in first}))
    assert type(read_result(tmp_path / "older.json")) is type(result)
    (tmp_path / "wrong.json").write_text(json.dumps(dict.fromkeys(content, "?")))
    assert read_result(tmp_path / "wrong.json") is None
    (tmp_path / "wrong.json").write_text(json.dumps({**content, "more": 1}))
    assert read_result(tmp_path / "wrong.json") is None


def test_the_models_own_figures_are_declared_and_not_its_controls():
    told = describe_result(fidelity(), "phantoms")
    assert [metric.metric_type for metric in told.metrics] == ["fid", "kid"]
    assert told.metrics[0].metric_value == 12.5
    assert told.metrics[0].metric_args["features"]["layer"] == "features2"
    assert told.works == ("cohen2022torchxrayvision",)
    (dice,) = describe_result(segmentation()).metrics
    assert "ours" in dice.metric_name
    assert "untrained" not in dice.metric_name
    assert dice.dataset_name == "montgomery"


def test_copies_are_counted_and_false_alarms_named():
    told = describe_result(memorization())
    assert told.is_privacy
    assert told.metrics[0].metric_args["copies"] == 6
    assert "| near-copies of training images | 6 (100.00 %" in told.text
    assert "10.00 % false alarms" in told.text
    with pytest.raises(ValueError, match="no synthetic images"):
        describe_result(replace(memorization(), synthetic=None))


def test_folders_are_searched_and_the_order_is_that_of_the_protocols(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    fidelity().save(tmp_path / "a.json")
    RECONSTRUCTION.save(tmp_path / "deep" / "er" / "z.json")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "damaged.json").write_text("{")
    headings = [told.heading for told in read_results([tmp_path])]
    assert headings == ["Variations of unseen images", "Likeness to real images"]
    assert [told.heading for told in read_results([tmp_path / "a.json"])] == headings[1:]


def test_what_holds_no_result_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results at"):
        read_results([tmp_path / "nothing"])
    (tmp_path / "config.json").write_text(json.dumps({"num_images": 3}))
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match="holds no result of an evaluation"):
            read_results([path])
