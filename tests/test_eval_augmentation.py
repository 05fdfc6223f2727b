"""`diffusers-dino evaluate augmentation` as a user runs it, on phantoms and at toy size; killed and started again."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import scripts
import tiny
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import stored_labels
from diffusers_dino.evaluation import AugmentationResult, evaluate_augmentation
from diffusers_dino.evaluation.augmentation.cells import load_cells
from diffusers_dino.evaluation.classifier import ClassifierSettings
from diffusers_dino.synthesis import SynthesisSettings, SyntheticSet

PHANTOMS = Path(__file__).parents[1] / "examples/data/phantom-cxr/phantom-cxr-test-000000.tar"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.tiny_pipeline().save_pretrained(folder / "fold-0")
    shutil.copytree(folder / "fold-0", folder / "fold-1")
    return folder / "fold-{fold}"


@pytest.fixture
def flags(model, tmp_path) -> dict:
    return {
        "data_dir": PHANTOMS,
        "model": model,
        "output_dir": tmp_path / "out",
        "num_labels": 2,
        "regimes": [12, 6],
        "ratios": [2],
        "num_folds": 2,
        "strategies": ["reconstruction", "interpolation"],
        "modes": ["augmentation", "full-synthetic"],
        "num_inference_steps": 1,
        "guidance_scale": 1,
        "sampling_batch_size": 6,
        "shard_size": 12,
        **scripts.TOY_CLASSIFIER,
    }


def run(flags: dict, **changed) -> Path:
    scripts.call_script("evaluate augmentation", **{**flags, **changed})
    return Path(flags["output_dir"])


@pytest.mark.slow
def test_a_killed_experiment_continues_and_ends_as_one_that_was_not(flags, tmp_path):
    flags["modes"] = ["full-synthetic"]
    out = run(flags)
    whole = load_cells(out / "cells")
    assert len(whole) == 2 * 2 * 3
    for name in ("table.md", "table.tex", "table.csv", "augmentation.png", "differences.png"):
        assert (out / name).is_file()
    result = AugmentationResult.load(out / "result.json")
    assert (result.num_folds, result.num_images, result.missing) == (2, 64, ())
    check_sources(out)
    for cell in whole:
        spec, facts = cell.spec, cell.facts
        assert facts.num_real == (0 if spec.mode == "full-synthetic" else spec.regime)
        assert facts.num_synthetic == spec.ratio * spec.regime
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    run(flags)
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before

    flags["output_dir"] = tmp_path / "killed"
    process = scripts.start_script("evaluate augmentation", **{**flags, "num_workers": 1})
    cells = tmp_path / "killed" / "cells"
    scripts.wait_until(lambda: len(list(cells.glob("*.safetensors"))) >= 3, process)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in cells.glob("*.safetensors")}
    assert len(done) < len(whole)
    run(flags)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    for one, other in zip(whole, load_cells(cells), strict=True):  # made in other processes, of other sets
        assert (one.spec, one.keys, one.facts.plan) == (other.spec, other.keys, other.facts.plan)
        assert np.array_equal(one.probabilities, other.probabilities)


def check_sources(out: Path) -> None:
    """No synthetic image stems from a patient that its fold tests."""
    with open(out / "folds.csv") as file:
        fold_of = {row["key"]: int(row["fold"]) for row in csv.DictReader(file)}
    for fold in range(2):
        for strategy, most in (("reconstruction", 24), ("interpolation", 36)):
            made = SyntheticSet.open(out / f"fold-{fold}" / strategy)
            sources = {key for image in made.plan for key in image.sources}
            assert len(sources) <= 12
            assert all(fold_of[key] != fold for key in sources)
            assert 24 <= len(made) <= most  # the small regime takes what the large one has
        training = (out / f"fold-{fold}" / "training_keys.txt").read_text().split()
        assert set(training) == {key for key, tested_in in fold_of.items() if tested_in != fold}


@pytest.mark.slow
def test_what_fails_is_named_and_the_rest_goes_on(flags, model, tmp_path):
    flags |= {"regimes": [6], "ratios": [1], "strategies": ["reconstruction"], "modes": ["augmentation"]}
    lone = tmp_path / "models"
    shutil.copytree(str(model).format(fold=0), lone / "fold-0")
    flags["model"] = lone / "fold-{fold}"
    with pytest.raises(RuntimeError, match=r"1 of 4 cells are missing. reconstruction of fold 1: .*fold-1"):
        run(flags)
    out = flags["output_dir"]
    assert "1 of 2 folds" in (out / "table.md").read_text()
    assert AugmentationResult.load(out / "result.json").missing == ("reconstruction-augmentation-1to1-regime6-fold1",)

    for changed in ({"ratios": [1, 2]}, {"learning_rate": 0.5}, {"guidance_scale": 3}):
        with pytest.raises(ValueError, match=f"(?s)was begun with other settings:.*{next(iter(changed))}"):
            run(flags, **changed)
    with pytest.raises(ValueError, match="has other folds"):
        run(flags, seed=1)

    shutil.copytree(lone / "fold-0", lone / "fold-1")
    run(flags)
    assert AugmentationResult.load(out / "result.json").missing == ()


def test_folds_are_written_for_the_generators(flags, tmp_path, capsys):
    out = run(flags, write_folds=True, model="nowhere")
    assert "64 images of 64 patients in 2 folds" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["fold-0", "fold-1", "folds.csv", "lock"]
    before = (out / "folds.csv").read_bytes()
    with pytest.raises(ValueError, match="has other folds than"):
        run(flags, write_folds=True, num_folds=3)
    assert (out / "folds.csv").read_bytes() == before

    # a generator that was trained on images of the fold that it is to be used for
    swapped = out / "fold-{fold}" / "swapped.txt"
    for fold in range(2):
        shutil.copy(out / f"fold-{1 - fold}" / "training_keys.txt", str(swapped).format(fold=fold))
    with pytest.raises(ValueError, match=r"generator of fold 0 was trained on images of 32 of the 32 patients"):
        run(flags, training_keys=swapped)

    # one generator: the patients that it has seen are not tested
    seen = tmp_path / "seen.txt"
    seen.write_text("".join(sorted((out / "fold-0" / "training_keys.txt").read_text().splitlines(True))[:20]))
    out = run(flags, write_folds=True, training_keys=seen, output_dir=tmp_path / "one")
    rows = list(csv.DictReader((tmp_path / "one" / "folds.csv").open()))
    assert {row["key"] for row in rows if row["fold"] == "-1"} == set(seen.read_text().split())
    seen.write_text("".join(f"{row['key']}\n" for row in rows))
    with pytest.raises(ValueError, match="trained on all 64 patients"):
        run(flags, training_keys=seen, output_dir=tmp_path / "none")


def test_what_cannot_be_run_is_said_before_any_work(flags, tmp_path):
    def fails(message: str, error: type[Exception] = ValueError, **changed) -> None:
        with pytest.raises(error, match=message):
            run({**flags, "output_dir": tmp_path / f"out-{len(list(tmp_path.iterdir()))}"}, **changed)

    fails(r"regime of 500 images is larger than the training data of fold 0 \(\d+ images\)", regimes=[500, 6])
    fails("timm does not make 'densenet'", classifier="densenet")
    fails("NAME=VALUE", classifier_options=["growth_rate"])
    fails("There is no cell", strategies=["magic"])
    fails("No image is labelled 'Gout'", label_names=["Gout"])
    fails("No label of .* has both", label_names=["Effusion"], num_folds=64)
    fails("cannot be shared out to 65 folds", num_folds=65)
    fails("No such file", FileNotFoundError, labels="nowhere.csv")
    table = tmp_path / "labels.csv"
    table.write_text("file,patient,findings\ntest-00000,1,Edema\n")
    fails("63 images have no row in the labels.*--keys_file", labels=table, num_labels=1)
    assert not list(tmp_path.rglob("*.npy"))
    if os.geteuid() != 0:  # root writes everywhere
        tmp_path.chmod(0o500)
        fails("not writable", PermissionError)


def test_one_generator_for_all_folds_is_warned_of(model, tmp_path, caplog):
    images = open_images(PHANTOMS, Preprocessing(64))
    options = {"regimes": [6], "ratios": [1], "strategies": ["reconstruction"], "modes": ["full-synthetic"]}
    options |= {"labels": ["Cardiomegaly", "No Finding"], "num_folds": 2, "num_workers": 0, "bootstrap_repeats": 20}
    options["classifier"] = ClassifierSettings(model="test_resnet", size=32, batch_size=4, max_steps=1)
    options["synthesis"] = SynthesisSettings(num_inference_steps=1, guidance_scale=1, batch_size=6)
    table, generator = stored_labels(images), str(model).format(fold=0)
    result = evaluate_augmentation(images, table, generator, tmp_path, **options)
    assert (len(result.configurations), result.missing) == (2, ())
    assert "may have been trained on images of the patients that are tested" in caplog.text
    assert "may have been trained" in json.loads((tmp_path / "experiment.json").read_text())["generators"]
    for cell in load_cells(tmp_path / "cells"):  # as if of other pixels
        replace(cell, facts=replace(cell.facts, settings="other")).save(tmp_path / "cells")
    with pytest.raises(ValueError, match="are of other settings: delete them"):
        evaluate_augmentation(images, table, generator, tmp_path, **options)
    with pytest.raises(ValueError, match=r"(?s)begun with other settings.*- model was"):
        evaluate_augmentation(images, table, [generator] * 2, tmp_path, **options)
