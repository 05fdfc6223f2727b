"""Label preservation: sets of known truth, judges that may not know the sources, and what is refused."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import LabelTable
from diffusers_dino.evaluation.classifier import ClassifierSettings, LabelledImages, predict, train_classifier
from diffusers_dino.evaluation.folds import assign_folds
from diffusers_dino.evaluation.labels.judges import Judges, SyntheticImages, held_out_pairs
from diffusers_dino.evaluation.labels.plot import plot_label_preservation
from diffusers_dino.evaluation.labels.result import JudgedSet, LabelPreservationResult, score_real, score_sets
from diffusers_dino.evaluation.labels.table import format_preservation_table
from diffusers_dino.evaluation.packed import PackedImages, pack_images
from diffusers_dino.synthesis import Plan, plan_interpolation, plan_prior, plan_reconstruction

LABELS = ("disc", "bar")
NUM_REAL, SIZE = 60, 16
SETTINGS = ClassifierSettings(
    options='{"growth_rate": 4, "block_config": [1, 1]}',
    size=SIZE,
    batch_size=16,
    max_steps=60,
    validation_steps=30,
    learning_rate=1e-2,
)


def draw(labels: frozenset[str], seed: int) -> np.ndarray:
    """A noisy picture that shows its labels."""
    image = np.random.default_rng(seed).normal(100, 20, (SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE]
    image += 90 * ("disc" in labels) * ((y - 5) ** 2 + (x - 5) ** 2 < 12)
    return (image + 90 * ("bar" in labels) * (abs(y - 12) < 2)).clip(0, 255).astype(np.uint8)


def pack(pictures: dict[str, np.ndarray], folder: Path) -> PackedImages:
    folder.mkdir()
    for key, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{key}.png")
    return pack_images(
        open_images(folder, Preprocessing(SIZE, remove_borders=False)), folder.parent / f"{folder.name}.npy"
    )


@pytest.fixture(scope="module")
def table() -> LabelTable:
    keys = tuple(f"{i:03d}" for i in range(NUM_REAL))
    kinds = [frozenset(), frozenset({"disc"}), frozenset({"bar"}), frozenset({"disc", "bar"})]
    return LabelTable(
        keys, tuple(kinds[i // 2 % 4] for i in range(NUM_REAL)), tuple(f"p{i // 2}" for i in range(NUM_REAL))
    )


def make_judges(table: LabelTable, real: PackedImages, folder: Path, **options) -> Judges:
    folder.mkdir(exist_ok=True)
    folds = assign_folds(table.targets(LABELS), table.patients, 3)
    return Judges(real, table, LABELS, folds, options.pop("settings", SETTINGS), folder, **options)


@pytest.fixture(scope="module")
def judges(table, tmp_path_factory) -> Judges:
    root = tmp_path_factory.mktemp("judges")
    real = pack(
        {key: draw(labels, i) for i, (key, labels) in enumerate(zip(table.keys, table.labels, strict=True))},
        root / "real",
    )
    judges = make_judges(table, real, root / "weights")
    for pair in ((0, 1), (0, 2), (1, 2)):
        judges.train(pair)
    return judges


def make_set(plan: Plan, folder: Path, faithful: bool) -> SyntheticImages:
    pictures = {p.key: draw(frozenset(p.labels) if faithful else frozenset(), 1000 + p.index) for p in plan}
    return SyntheticImages(plan.strategy, pack(pictures, folder), list(plan), len(plan.keys))


@pytest.fixture(scope="module")
def sets(table, tmp_path_factory) -> dict[str, SyntheticImages]:
    root = tmp_path_factory.mktemp("sets")
    labelled = [i for i, labels in enumerate(table.labels) if labels]
    keys, labels = [table.keys[i] for i in labelled], [table.labels[i] for i in labelled]
    return {
        "faithful": make_set(plan_reconstruction(table.keys, table.labels, ratio=2), root / "a", True),
        "empty": make_set(plan_reconstruction(table.keys, table.labels, ratio=1), root / "b", False),
        "between": make_set(plan_interpolation(keys, labels, num_images=150), root / "c", True),
    }


@pytest.fixture(scope="module")
def judged(judges, sets) -> dict[str, JudgedSet]:
    return {name: judges.judge(images) for name, images in sets.items()}


@pytest.fixture(scope="module")
def result(judges, judged) -> LabelPreservationResult:
    found = [judges.judge_real(pair) for pair in ((0, 1), (0, 2), (1, 2))]
    rows, probabilities = (np.concatenate(parts) for parts in zip(*found, strict=True))
    numbers = np.repeat([0, 1, 2], [len(own) for own, _ in found])
    targets, patients = judges.table.targets(LABELS)[rows], [judges.table.patients[i] for i in rows]
    real = score_real(probabilities, targets, numbers, rows, patients, LABELS, repeats=50)
    parts = score_sets({name: [one] for name, one in judged.items()}, LABELS, ratios=[1], repeats=100)
    return LabelPreservationResult(LABELS, 3, NUM_REAL, NUM_REAL // 2, "densenet121", 0, 0, 100, real, parts)


def test_faithful_images_are_told_from_those_that_show_nothing(result):
    found = {part.name: part.macro for part in result.wholes}
    assert found["faithful"].synthetic > 0.9
    assert found["faithful"].sources > 0.9
    assert found["faithful"].synthetic_low > found["faithful"].shuffled_high
    assert found["empty"].synthetic_low < 0.5 < found["empty"].synthetic_high
    assert found["empty"].difference_high < 0
    assert found["empty"].sources == pytest.approx(found["faithful"].sources)  # the same real images and labels
    assert found["empty"].shuffled_low < 0.5 < found["empty"].shuffled_high
    assert result.real[0].auroc > 0.9
    assert [row.num_positive for row in result.real] == [2, 30, 28]  # labels, and images, each once


def test_ratios_and_fractions_are_shown_apart(result, sets):
    faithful = [part for part in result.parts if part.name == "faithful"]
    assert [(part.ratio, part.num_images) for part in faithful] == [(2, 120), (1, 60)]
    between = [part for part in result.parts if part.name == "between" and part.near is not None]
    assert [(part.near, part.far) for part in between] == [(0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5)]
    assert sum(part.num_images for part in between) == len(sets["between"].planned) == 150
    assert all(part.near is None for part in faithful)


def test_a_ratio_need_not_be_whole(judged):
    faithful = judged["faithful"]
    some = faithful.select(np.flatnonzero(faithful.rounds <= 1.5))
    parts = score_sets({"some": [some]}, LABELS, ratios=[1, 2], repeats=2)
    assert [(part.ratio, part.num_images) for part in parts] == [(1.5, 90), (1, 60)]


def test_no_judge_has_seen_a_source_of_what_it_judges(judges, sets, judged):
    for name, images in sets.items():
        pairs = judges.pairs_of(images)
        for image, pair, number in zip(images.planned, pairs.tolist(), judged[name].judges.tolist(), strict=True):
            own = {int(judges.folds[judges.table.keys.index(key)]) for key in image.sources}
            assert own <= set(pair)
            assert number == 3 * pair[0] + pair[1]
    assert len({tuple(pair) for pair in judges.pairs_of(sets["between"]).tolist()}) == 3


def test_a_judge_does_not_know_labels_that_cannot_be_seen(table, tmp_path):
    """Copies of noise with labels by lot: a classifier that was trained on the sources would give all labels back."""
    random = np.random.default_rng(0)
    by_lot = [frozenset(name for name in LABELS if random.random() < 0.5) for _ in range(NUM_REAL)]
    blind = replace(table, labels=tuple(by_lot))
    pictures = {key: draw(frozenset(), i) for i, key in enumerate(table.keys)}
    real = pack(pictures, tmp_path / "real")
    still = {"shear": 0.0, "translation": 0.0, "min_scale": 1.0, "max_scale": 1.0}
    settings = replace(SETTINGS, max_steps=100, **still)  # one view of each image, to be learnt by heart
    seen = LabelledImages(real, np.arange(NUM_REAL), blind.targets(LABELS))
    known = predict(train_classifier([seen], None, settings).model, seen)
    assert roc_auc_score(seen.targets, known) > 0.95  # so a leak would show
    judges = make_judges(blind, real, tmp_path / "weights", validation_fraction=0.0, settings=settings)
    plan = plan_reconstruction(blind.keys, blind.labels, ratio=1)
    copies = pack({p.key: pictures[p.sources[0]] for p in plan}, tmp_path / "copies")
    images = SyntheticImages(plan.strategy, copies, list(plan), len(plan.keys))
    for pair in judges.pairs_for([images]):
        judges.train(pair)
    judged = judges.judge(images)
    np.testing.assert_allclose(judged.synthetic, judged.sources, atol=1e-6)
    (part,) = score_sets({"copies": [judged]}, LABELS, repeats=100)
    assert part.macro.synthetic_low < 0.5 < part.macro.synthetic_high
    assert part.macro.difference == pytest.approx(0, abs=1e-6)


def test_labels_are_judged_on_the_source_that_they_are_of(judges, sets, judged):
    images, found = sets["between"], judged["between"]
    of = dict(zip(judges.table.keys, zip(judges.table.patients, judges.table.labels, strict=True), strict=True))
    for image, patient, targets in zip(images.planned, found.patients, found.targets.tolist(), strict=True):
        nearer = image.sources[0] if image.fraction <= 0.5 else image.sources[1]
        assert of[nearer] == (patient, frozenset(image.labels))
        assert targets == [name in image.labels for name in LABELS]


def test_a_judge_is_kept_and_another_is_not_taken_for_it(judges, table, tmp_path):
    path = judges.train((0, 1))
    again = make_judges(table, judges.real, tmp_path / "again").train((0, 1))
    assert again.read_bytes() == path.read_bytes()  # trained twice, it is the same
    before = path.stat().st_mtime_ns
    assert judges.train((0, 1)) == path
    assert path.stat().st_mtime_ns == before
    for changed in ({"settings": replace(SETTINGS, max_steps=61)}, {"seed": 1}):
        other = make_judges(table, judges.real, judges.folder, **changed)
        with pytest.raises(ValueError, match="other images, labels, folds or settings"):
            other.train((0, 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="its weights have changed"):
        judges.judge_real((0, 1))
    path.write_bytes(whole)
    damaged = judges.folder / "judge-7-8.safetensors"
    damaged.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        judges.train((7, 8))
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match="train it first"):
        judges.judge_real((7, 8))


def test_the_report_goes_to_files_and_back(result, tmp_path):
    result.save(tmp_path / "result.json")
    assert LabelPreservationResult.load(tmp_path / "result.json") == result
    text = format_preservation_table(result)
    macro = result.wholes[0].macro
    assert f"{macro.synthetic:.3f} [{macro.synthetic_low:.3f}, {macro.synthetic_high:.3f}]" in text
    assert "0.4 to 0.5" in text
    assert f"{NUM_REAL} real ones ({NUM_REAL // 2} patients" in text
    lines = list(csv.DictReader(format_preservation_table(result, "csv").splitlines()))
    assert len(lines) == 3 * len(result.parts)
    assert float(lines[0]["synthetic"]) == macro.synthetic
    assert format_preservation_table(result, "latex").count(r"\\") == 1 + len(result.parts)
    with pytest.raises(ValueError, match="A table is one of"):
        format_preservation_table(result, "html")


def test_the_figure_has_a_panel_for_each_set_and_for_fractions(result):
    assert len(plot_label_preservation(result).axes) == 4  # three sets, and one more for interpolation
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_label_preservation(replace(result, parts=()))


def test_a_label_with_one_class_has_no_figure(judged, result):
    one = judged["faithful"]
    constant = replace(one, targets=np.column_stack([one.targets[:, 0], np.zeros(len(one.patients), bool)]))
    part = score_sets({"constant": [constant]}, LABELS, repeats=20)[0]
    assert part.labels[1].synthetic is part.labels[1].synthetic_low is part.labels[1].shuffled_low is None
    assert part.macro.synthetic == part.labels[0].synthetic
    assert part.macro.num_positive == 1
    assert "one class" in format_preservation_table(replace(result, parts=(part,)))
    nothing = replace(one, targets=np.zeros_like(one.targets))
    assert score_sets({"nothing": [nothing]}, LABELS, repeats=20)[0].macro.synthetic is None


def test_judges_that_see_nothing_are_said_to(result):
    assert result.judges_see
    assert "no better than chance" not in format_preservation_table(result)
    for low in (0.45, None):
        blind = replace(result, real=(replace(result.real[0], low=low), *result.real[1:]))
        assert not blind.judges_see
        for style in ("markdown", "latex"):
            assert "no better than chance" in format_preservation_table(blind, style)


def test_bad_input_is_named(judges, judged, sets, table):
    one, images = judged["faithful"], sets["faithful"]
    strange, unlabelled = (
        images.planned[0]._replace(**odd) for odd in ({"sources": ("elsewhere",)}, {"labels": None})
    )
    swapped = [image._replace(labels=("disc",)) for image in images.planned]
    for message, call in (
        ("synthetic images are in", lambda: replace(one, synthetic=np.full_like(one.synthetic, np.nan))),
        ("as many of everything", lambda: replace(one, sources=one.sources[:-1])),
        ("parts of one strategy", lambda: score_sets({"mixed": [one, judged["between"]]}, LABELS)),
        ("does not have the 1 labels", lambda: score_sets({"set": [one]}, LABELS[:1])),
        ("at least 3, got 2", lambda: held_out_pairs(np.array([[0, 1]]), 2)),
        ("below 3", lambda: held_out_pairs(np.array([[0, 3]]), 3)),
        (r"1 sources of .* such as elsewhere", lambda: judges.judge(replace(images, planned=[strange]))),
        ("1 synthetic images have no labels", lambda: judges.judge(replace(images, planned=[unlabelled]))),
        (r"of 120 images of .* other labels", lambda: judges.judge(replace(images, planned=swapped))),
        ("There is no image", lambda: judges.judge(replace(images, planned=[]))),
        ("in their order", lambda: replace(judges, table=table.select(table.keys[::-1]))),
        ("validation_fraction", lambda: replace(judges, validation_fraction=0.7)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_images_of_no_source_are_judged_by_the_labels_that_were_asked_for(judges, table, result, tmp_path):
    labelled = [own for own in table.labels if own]
    plan = plan_prior((), asked=labelled)
    sets = {name: make_set(plan, tmp_path / name, name == "shown") for name in ("shown", "blank")}
    assert len(judges.pairs_for(list(sets.values()))) == 3  # all judges have their share
    judged = {name: [judges.judge(images)] for name, images in sets.items()}
    parts = score_sets(judged, LABELS, ratios=[1], repeats=50)
    shown, blank = (part.macro for part in parts)
    assert shown.synthetic_low > 0.9
    assert blank.synthetic_low < 0.5 < blank.synthetic_high
    assert shown.sources is shown.difference is shown.sources_low is None
    assert [(part.num_images, part.num_patients, part.ratio) for part in parts] == [(len(labelled), 0, 0)] * 2
    mixed = replace(result, parts=(*parts, *result.parts))
    for style in ("markdown", "latex"):
        assert "no source" in format_preservation_table(mixed, style)
    assert "no source" not in format_preservation_table(result)
    assert len(plot_label_preservation(mixed).axes) == 6
