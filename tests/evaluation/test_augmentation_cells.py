"""Classifiers and cells, trained on images whose labels can be seen."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import LabelTable
from diffusers_dino.evaluation.augmentation.cells import (
    AUGMENTATION,
    REAL,
    CellJob,
    CellResult,
    CellSpec,
    run_cell,
)
from diffusers_dino.evaluation.augmentation.experiment import synthetic_images
from diffusers_dino.evaluation.augmentation.judged import FoldJudge, find_kept, judge_rows
from diffusers_dino.evaluation.augmentation.plans import plan_regimes, split_folds
from diffusers_dino.evaluation.augmentation.sets import targets_of
from diffusers_dino.evaluation.classifier import (
    ClassifierSettings,
    LabelledImages,
    make_classifier,
    predict,
    train_classifier,
)
from diffusers_dino.evaluation.folds import assign_folds
from diffusers_dino.evaluation.judge import Judge, Limits
from diffusers_dino.evaluation.packed import pack_images
from diffusers_dino.metrics.auroc import macro_auroc

SETTINGS = ClassifierSettings(
    options='{"growth_rate": 4, "block_config": [1, 1]}',
    size=32,
    batch_size=8,
    max_steps=24,
    validation_steps=8,
    learning_rate=1e-2,
)
NAMES = ("left", "right")
PREPROCESSING = Preprocessing(32, remove_borders=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """60 noisy images, bright at the left, at the right, or at both sides."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(60):
        pixels = random.integers(0, 80, (32, 32))
        pixels[8:24, 4:12] += 150 * (number % 3 != 1)
        pixels[8:24, 20:28] += 150 * (number % 3 != 0)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
    return pack_images(open_images(folder, PREPROCESSING), folder / "pack.npy")


@pytest.fixture(scope="module")
def table(packed):
    sides = (("left",), ("right",), NAMES)
    return LabelTable(
        packed.keys, tuple(frozenset(sides[i % 3]) for i in range(60)), tuple(str(i // 2) for i in range(60))
    )


@pytest.fixture
def labelled(packed, table):
    return lambda rows: LabelledImages(packed, np.asarray(rows), table.targets(NAMES)[rows])


@pytest.fixture
def splits(table):
    folds = assign_folds(table.targets(NAMES), table.patients, 3)
    return split_folds(table, NAMES, folds, [20, 10], validation_fraction=0.2)


@pytest.fixture
def job(labelled, splits, table):
    split = splits[0]
    return CellJob(
        spec=CellSpec(REAL, REAL, 0, 20, 0),
        train=(labelled(split.ordered[:20]),),
        validation=labelled(split.validation),
        test=labelled(split.test),
        patients=tuple(table.patients[row] for row in split.test),
        labels=NAMES,
        classifier=SETTINGS,
        seed=0,
        settings="digest",
        plan="",
    )


def test_no_patient_is_in_two_parts_of_a_fold(splits, table):
    tested = np.concatenate([split.test for split in splits])
    assert sorted(tested) == list(range(60))
    for split in splits:
        parts = [{table.patients[row] for row in part} for part in split]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert len(split.ordered) == 20
        counts = table.targets(NAMES)[split.ordered[:10]].sum(axis=0)
        assert abs(int(counts[0]) - int(counts[1])) <= 1


def test_patients_of_no_fold_are_trained_on_and_never_tested(table):
    folds = np.where(np.arange(60) < 20, -1, np.arange(60) // 2 % 2)
    for split in split_folds(table, NAMES, folds, [30], validation_fraction=0):
        assert split.test.min() >= 20
        assert len(split.validation) == 0
    for message, regime, fraction in (
        (r"regime of 50 images .* fold 0 \(40 images\)", 50, 0),
        ("validation_fraction is in", 10, 0.9),
        ("20 patients are too few to keep 0.01 of them", 10, 0.01),
    ):
        with pytest.raises(ValueError, match=message):
            split_folds(table, NAMES, folds, [regime], validation_fraction=fraction)


def test_a_classifier_learns_and_is_a_function_of_its_seed(labelled):
    train, validation, test = labelled(np.arange(30)), labelled(np.arange(30, 40)), labelled(np.arange(40, 60))
    trained = train_classifier([train], validation, SETTINGS)
    found = predict(trained.model, test)
    assert found.dtype == np.float32
    assert macro_auroc(found, test.targets) > 0.9
    assert trained.best_step in (8, 16, 24)
    assert trained.validation_auroc == macro_auroc(predict(trained.model, validation), validation.targets)
    assert np.array_equal(found, predict(train_classifier([train], validation, SETTINGS).model, test))
    assert not np.array_equal(found, predict(train_classifier([train], validation, SETTINGS, seed=1).model, test))
    halves = [labelled(np.arange(12)), labelled(np.arange(12, 30))]
    assert np.array_equal(found, predict(train_classifier(halves, validation, SETTINGS).model, test))


def test_dropout_follows_the_seed_and_leaves_the_global_generator(labelled):
    train, settings = labelled(np.arange(20)), replace(SETTINGS, options='{"drop_rate": 0.5}', max_steps=3)
    state = torch.get_rng_state()
    one = predict(train_classifier([train], None, settings).model, train)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert np.array_equal(one, predict(train_classifier([train], None, settings).model, train))


def test_without_validation_images_the_last_weights_are_taken(labelled):
    train = labelled(np.arange(20))
    train_classifier([train], None, replace(SETTINGS, max_steps=10))  # whose warm-up is one update
    trained = train_classifier([train], None, replace(SETTINGS, max_steps=2))
    assert (trained.best_step, np.isnan(trained.validation_auroc)) == (2, True)
    one_class = LabelledImages(train.images, train.rows, np.ones_like(train.targets))
    assert train_classifier([train], one_class, replace(SETTINGS, max_steps=2)).best_step == 2
    with pytest.raises(ValueError, match="no image to train"):
        train_classifier([labelled(np.arange(0))], None, SETTINGS)


def test_weights_of_a_file_are_a_start(tmp_path):
    options = {"growth_rate": 4, "block_config": (1, 1), "num_classes": 7}
    torch.manual_seed(5)
    other = timm.create_model("densenet121", **options)  # three channels, seven classes
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    loaded = make_classifier(replace(SETTINGS, weights=str(tmp_path / "weights.safetensors")), 2)[1]
    assert torch.equal(
        loaded.features.denseblock1.denselayer1.conv1.weight, other.features.denseblock1.denselayer1.conv1.weight
    )
    assert loaded.classifier.weight.shape[0] == 2
    with pytest.raises(FileNotFoundError, match="no file of weights 'nowhere'"):
        make_classifier(replace(SETTINGS, weights="nowhere"), 2)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for message, changed in (
        ("timm does not make 'densenet121'", {"weights": str(tmp_path / "bad.safetensors")}),
        (r"timm does not make 'densenet12'.*densenet121", {"model": "densenet12"}),
        ("timm does not make", {"options": '{"no_such": 1}'}),
    ):
        with pytest.raises(ValueError, match=message):
            make_classifier(replace(SETTINGS, **changed), 2)


@pytest.mark.parametrize(
    "changes",
    [{"max_steps": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"channels": 2}, {"options": "[]"}, {"shear": -1.0}],
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError):
        replace(SETTINGS, **changes)


def test_a_cell_is_a_function_of_its_job(job, tmp_path):
    torch_threads = torch.get_num_threads()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run_cell(job, tmp_path / name)
    assert torch.get_num_threads() == torch_threads
    one, two = (CellResult.load(CellResult.path(tmp_path / name, job.spec)) for name in ("one", "two"))
    assert np.array_equal(one.probabilities, two.probabilities)
    assert (one.keys, one.patients, one.labels) == (two.keys, job.patients, NAMES)
    facts = one.facts
    assert (facts.num_real, facts.num_synthetic, facts.num_validation) == (20, 0, len(job.validation.rows))
    model = "densenet121 (growth_rate=4, block_config=[1, 1])"
    assert (facts.steps, facts.settings, facts.model) == (24, "digest", model)
    assert facts.seconds > 0


def test_a_cell_trains_on_the_synthetic_images_that_are_there(job, packed, table, splits, tmp_path):
    keys = [table.keys[row] for row in splits[0].ordered]
    planned = plan_regimes("reconstruction", keys, table.select(keys).labels, [20, 10], 2)
    folder = tmp_path / "synthetic"
    folder.mkdir()
    left_out = planned.plan[int(planned.images[10][3])].key
    for image in planned.plan:  # the images themselves stand in for their variations; a gate refused one of them
        if image.key != left_out:
            Image.fromarray(packed.array[packed.places[image.sources[0]]]).save(folder / f"{image.key}.png")
    synthetic = pack_images(open_images(folder, PREPROCESSING), tmp_path / "pack.npy")
    targets = targets_of(planned.plan, NAMES)
    found = synthetic_images(synthetic, planned, targets, 10, 2, synthetic.places)
    assert len(found.rows) == 19
    assert found.targets.tolist() == [
        [name in table.select([planned.plan[int(number)].sources[0]]).labels[0] for name in NAMES]
        for number in planned.images[10]
        if planned.plan[int(number)].key != left_out
    ]
    spec = CellSpec("reconstruction", AUGMENTATION, 2, 10, 0)
    settings = replace(SETTINGS, max_steps=2)
    facts = run_cell(replace(job, spec=spec, train=(*job.train, found), classifier=settings), tmp_path).facts
    assert (facts.num_real, facts.num_synthetic) == (20, 19)


def test_soft_labels_are_trained_on_and_hard_ones_as_before(labelled):
    train, validation = labelled(range(40)), labelled(range(40, 60))
    settings = replace(SETTINGS, max_steps=4, validation_steps=2)
    hard = train_classifier([train], validation, settings).model.state_dict()
    for dtype in (np.float32, np.float64):
        same = train_classifier([train._replace(targets=train.targets.astype(dtype))], validation, settings)
        assert all(torch.equal(value, hard[name]) for name, value in same.model.state_dict().items())
    soft = train._replace(targets=np.full(train.targets.shape, 0.3, np.float32))
    model = train_classifier([soft], None, replace(settings, max_steps=24)).model
    assert predict(model, train).mean() == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_targets_are_probabilities_and_validation_is_hard(labelled, value):
    train = labelled(range(8))
    wrong = train._replace(targets=np.full(train.targets.shape, value, np.float32))
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        train_classifier([train, wrong], None, SETTINGS)
    soft = train._replace(targets=train.targets.astype(np.float32))
    with pytest.raises(ValueError, match="hard labels"):
        train_classifier([train], soft, SETTINGS)


def test_a_judge_has_seen_nobody_of_its_fold_and_regimes(splits, table):
    for fold, split in enumerate(splits):
        split = split._replace(ordered=split.ordered[:10])
        train, held_out = judge_rows(table, NAMES, fold, split, seed=3)
        groups = [{table.patients[row] for row in rows} for rows in (train, held_out, np.concatenate(split))]
        assert all(groups)
        assert len(set.union(*groups)) == sum(map(len, groups)) == 30
    everything = splits[0]._replace(ordered=np.arange(60))
    with pytest.raises(ValueError, match="use smaller regimes"):
        judge_rows(table, NAMES, 0, everything, seed=3)


def test_a_judge_drops_what_shows_another_label_and_is_trained_once(labelled, tmp_path):
    judge = FoldJudge(
        Judge(tmp_path / "judge.safetensors", SETTINGS, "digest"),
        labelled(range(30)),
        labelled(range(30, 45)),
        NAMES,
        0.0,
        0,
    )
    images = labelled(range(45, 60))
    wrong = np.arange(15) % 5 == 0
    images = images._replace(targets=np.where(wrong[:, None], ~images.targets, images.targets))
    kept = find_kept(0, judge, images, tmp_path / "report.json", None)
    right = {images.images.keys[45 + row] for row in np.flatnonzero(~wrong).tolist()}
    assert set(kept) <= right
    assert len(kept) > 8
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["kept"]) == (15, len(kept))
    assert report["share of these that the same limits drop"] == 0
    before = (tmp_path / "judge.safetensors").stat().st_mtime_ns
    assert find_kept(0, judge, images, tmp_path / "report.json", None) == kept
    assert (tmp_path / "judge.safetensors").stat().st_mtime_ns == before
    nowhere = images._replace(targets=np.tile([True, False], (15, 1)) & ~labelled(range(45, 60)).targets)
    with pytest.raises(ValueError, match="contradicts all 5 images of 'left'"):
        find_kept(0, judge, nowhere, tmp_path / "report.json", None)


def test_limits_spare_all_but_a_share_of_correct_labels_and_soft_ones():
    random = np.random.default_rng(0)
    targets = random.random((200, 2)) < 0.5
    said = (random.normal(size=(200, 2)) + targets).clip(-3, 3) / 6 + 0.5
    for share in (0.0, 0.05, 0.3):
        limits = Limits.of_real(said, targets, share)
        wrong = limits.contradicted(said, targets)
        assert (wrong[targets].mean(), wrong[~targets].mean()) <= (share, share)
        assert wrong.any() == bool(share)
    assert not limits.contradicted(said, np.full(said.shape, 0.5)).any()
    one_class = Limits.of_real(said, np.ones_like(targets), 0.5)
    assert one_class.most.tolist() == [1, 1]
    for share in (-0.1, 0.6, float("nan")):
        with pytest.raises(ValueError, match="false_alarms"):
            Limits.of_real(said, targets, share)
