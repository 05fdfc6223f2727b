"""The memorization protocol on phantoms, with copies that were planted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import priors
import tiny
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation import MemorizationResult, evaluate_memorization
from diffusers_dino.evaluation.memorization.plot import draw_closest_pairs, plot_memorization
from diffusers_dino.evaluation.memorization.table import make_report, table_of_sets
from diffusers_dino.evaluation.memorization.tokens import compare_tokens
from diffusers_dino.metrics.copy_gate import CopyGate

FALSE_ALARMS = 0.02  # which 149 images can promise
PHANTOMS = Path(__file__).parents[2] / "examples/data/phantom-cxr"


@pytest.fixture(scope="module")
def phantoms():
    images = open_images(PHANTOMS / "phantom-cxr-train-00000[0-3].tar", Preprocessing(32))
    return torch.stack([images[i]["image"] for i in range(len(images))])


def synthetic_images(phantoms: torch.Tensor) -> torch.Tensor:
    """Images that were not trained on, and copies of two that were."""
    return torch.cat([phantoms[1::2][:60], phantoms[::2][7:8], phantoms[::2][9:10].flip(-1)])


@pytest.fixture(scope="module")
def study(phantoms):
    options = {"held_out": phantoms[1::2][60:], "false_alarms": FALSE_ALARMS, "num_pairs": 5, "num_planted": 6}
    return evaluate_memorization(phantoms[::2], synthetic_images(phantoms), **options)


def test_planted_copies_head_the_closest_pairs(study, phantoms):
    result, gate = study
    first, second, third = result.closest[:3]
    assert {(x.key, x.training_key, x.mirrored) for x in (first, second)} == {("60", "7", False), ("61", "9", True)}
    assert first.relative_distance == second.relative_distance == 0
    assert first.copy
    assert third.relative_distance > 0.1
    assert [x.copy for x in result.closest] == [x.relative_distance < result.threshold for x in result.closest]
    assert gate.fingerprint() == result.gate
    assert CopyGate.calibrate(phantoms[::2], false_alarms=FALSE_ALARMS).fingerprint() == result.gate
    refused = ~gate(synthetic_images(phantoms))
    assert refused.sum() == result.synthetic.copies >= 2


def test_figures_name_their_sets_and_agree_with_each_other(study, phantoms):
    result, _ = study
    sets = {"training": len(phantoms[::2]), "synthetic": 62, "held_out": len(phantoms[1::2]) - 60}
    for name, count in sets.items():
        figures = getattr(result, name)
        assert figures.num_images == sum(figures.histogram) == count
        assert figures.low <= figures.share == figures.copies / count <= figures.high
        assert figures.authentic_low <= figures.authentic <= figures.authentic_high
        assert 0 <= figures.nearest <= figures.median <= 1
    assert result.training.share <= result.false_alarms  # the threshold comes from these
    found = {planted.change: planted.found for planted in result.planted}
    assert found["exact"] == found["mirrored"] == found["slightly blurred (1 % of the side)"] == 1
    assert found["turned by 5 degrees"] >= 0.9
    assert found["half of another image"] >= 0.9


def test_the_threshold_may_come_from_held_out_images(phantoms):
    training, others = phantoms[:120:2], phantoms[1:120:2]
    options = {"calibrate_on": "held out", "false_alarms": 0.1, "num_planted": 1}
    result, _ = evaluate_memorization(training, held_out=others, **options)
    assert (result.calibrated_on, result.synthetic, result.closest) == ("held out", None, ())
    assert 0 < result.held_out.share < 0.1


def test_images_of_the_same_patient_are_not_compared(phantoms):
    training = phantoms[:120:2]
    patients = list(range(len(training)))
    options = {"held_out": training[:20], "false_alarms": 0.05, "num_planted": 1}
    blind = evaluate_memorization(training, **options).result
    groups = {"training_groups": patients, "held_out_groups": patients[:20]}
    known = evaluate_memorization(training, **options, **groups).result
    assert blind.held_out.copies == 20  # they are the training images themselves
    assert known.held_out.copies <= 2
    assert known.training == blind.training


def test_results_go_to_json_and_back(study, tmp_path):
    result = replace(study.result, held_out=None, synthetic=None, closest=())
    result.save(tmp_path / "memorization.json")
    assert MemorizationResult.load(tmp_path / "memorization.json") == result


def test_results_are_drawn(study, phantoms):
    axes = plot_memorization(study.result).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "synthetic (N = 62)" in labels
    assert len(labels) == 4
    synthetic = synthetic_images(phantoms)
    sheet = draw_closest_pairs(study.result, synthetic, phantoms[::2], columns=2)
    assert sheet.size == (4 * 32, 2 * 32)  # two pairs in a row; the fifth has no partner
    for left in (0, 64):  # a copy and its original, mirrored as it was compared, are the same picture
        pair = sheet.crop((left, 0, left + 32, 32)), sheet.crop((left + 32, 0, left + 64, 32))
        assert pair[0].tobytes() == pair[1].tobytes()
    with pytest.raises(ValueError, match="no pair to draw"):
        draw_closest_pairs(replace(study.result, closest=()), synthetic, phantoms)


def test_bad_sets_are_refused(phantoms):
    training = phantoms[:40]
    for message, options in (
        ("nothing to compare", {"synthetic": training[:0]}),
        ("finite", {"synthetic": training[:2] * float("nan")}),
        ("no held-out images", {"calibrate_on": "held out"}),
        ("training_groups", {"held_out": training, "held_out_groups": range(len(training))}),
        ("one group an image", {"training_groups": ["p"]}),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_memorization(training, false_alarms=0.1, **options)


def test_planted_tokens_are_found_and_honest_ones_are_not():
    every = priors.tiny_tokens(1000)
    training, held_out, honest = every[:500], every[500:700], every[700:]
    planted = torch.cat([honest[:100], training[:20], training[20:40] + 0.02 * training.std(0)])
    for tokens, copies in ((honest, 0), (planted, 40)):
        found = compare_tokens(training, tokens, held_out)
        assert copies <= found.synthetic.copies <= copies + 3
        assert found.held_out.share <= 0.03
        assert found.training.share <= 0.01
    assert {one.change: one.found for one in found.planted}["exact"] == 1
    assert found.planted[1].found == 1
    patients = [number // 2 for number in range(500)]
    twins = training[0::2].repeat_interleave(2, 0)  # of one patient, so they say nothing of copies
    assert compare_tokens(twins, training_groups=patients).training.share <= 0.01


def test_tokens_stand_beside_the_images(phantoms, tmp_path):
    conditioner, training = tiny.tiny_conditioner(), phantoms[:40]
    copied = conditioner.encode(training[:30])
    options = {"conditioner": conditioner, "drawn": copied, "false_alarms": 0.1, "num_planted": 1}
    result = evaluate_memorization(training, None, phantoms[40:60], **options).result
    rows = {row[0]: row for row in table_of_sets(result)[1]}
    assert rows["tokens, drawn"][1:3] == [30, 30]
    assert rows["tokens, held out (false alarms)"][1] == 20
    assert (result.tokens.num_tokens, result.tokens.drawn) == (5, True)
    make_report(result).save(tmp_path / "report.html")
    assert "5 x 32 condition tokens that the prior drew" in (tmp_path / "report.html").read_text()
    assert len(plot_memorization(result).axes) == 2
    result.save(tmp_path / "memorization.json")
    assert MemorizationResult.load(tmp_path / "memorization.json") == result
    with pytest.raises(ValueError, match="their `conditioner`"):
        evaluate_memorization(training, drawn=copied)
    with pytest.raises(ValueError, match=r"synthetic tokens \(N, 5, 32\)"):
        compare_tokens(copied, copied[:, :1])
    with pytest.raises(ValueError, match="no held-out images"):
        compare_tokens(copied, calibrate_on="held out")
    with pytest.raises(ValueError, match="calibrate_on"):
        compare_tokens(copied, calibrate_on="synthetic")
