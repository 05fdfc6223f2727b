"""`diffusers-dino evaluate labels` as a user runs it, on phantoms and at toy size."""

from pathlib import Path

import pytest

import scripts
import tiny
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import stored_labels
from diffusers_dino.evaluation import LabelPreservationResult, evaluate_labels
from diffusers_dino.evaluation.classifier import ClassifierSettings

PHANTOMS = Path(__file__).parents[1] / "examples/data/phantom-cxr/phantom-cxr-test-000000.tar"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """A set of either strategy, from phantoms, by an untrained model."""
    root = tmp_path_factory.mktemp("sets")
    tiny.tiny_pipeline().save_pretrained(root / "model")
    for strategy in ("reconstruction", "interpolation"):
        scripts.call_script(
            "synthesise",
            model=root / "model",
            data_dir=PHANTOMS,
            labels="stored",
            strategy=strategy,
            num_images=64,
            num_inference_steps=1,
            guidance_scale=1,
            num_drawn=0,
            output_dir=root / strategy,
        )
    return {strategy: root / strategy for strategy in ("reconstruction", "interpolation")}


@pytest.fixture
def flags(sets, tmp_path) -> dict:
    return {
        "data_dir": PHANTOMS,
        "synthetic": [f"variations={sets['reconstruction']}", str(sets["interpolation"])],
        "num_labels": 2,
        "num_folds": 3,
        **scripts.TOY_CLASSIFIER,
        "output_dir": tmp_path / "out",
    }


@pytest.mark.slow
def test_sets_are_judged_and_classifiers_are_kept(flags, sets):
    scripts.call_script("evaluate labels", **flags)
    out = flags["output_dir"]
    assert all((out / name).is_file() for name in ("table.md", "table.tex", "table.csv", "labels.png"))
    whole = LabelPreservationResult.load(out / "result.json")
    assert [(part.name, part.num_images) for part in whole.wholes] == [("variations", 64), ("interpolation", 64)]
    assert whole.num_real == 64
    before = {path: path.stat().st_mtime_ns for path in (out / "judges").iterdir()}
    assert len(before) == 3
    images = open_images(PHANTOMS, Preprocessing(32))
    classifier = ClassifierSettings(
        options='{"block_config": [1], "growth_rate": 4}', size=32, batch_size=4, max_steps=2, validation_steps=1
    )
    again = evaluate_labels(
        images,
        stored_labels(images),
        {"other": sets["reconstruction"]},
        out,
        labels=whole.labels,
        num_folds=3,
        classifier=classifier,
        bootstrap_repeats=20,
        num_workers=0,
    )
    assert {path: path.stat().st_mtime_ns for path in (out / "judges").iterdir()} == before
    assert again.wholes[0].macro == whole.wholes[0].macro
    with pytest.raises(RuntimeError, match="other images, labels, folds or settings"):
        scripts.call_script("evaluate labels", **{**flags, "max_train_steps": 3})


@pytest.mark.slow
def test_what_cannot_be_judged_is_said_at_once(flags, tmp_path):
    def fails(message: str, error: type[Exception] = ValueError, **changed) -> None:
        with pytest.raises(error, match=message):
            scripts.call_script("evaluate labels", **{**flags, **changed})

    fails("Give the sets to judge", synthetic=None)
    fails("at least 3, got 2", num_folds=2)
    (tmp_path / "empty").mkdir()
    fails("empty", FileNotFoundError, synthetic=[str(tmp_path / "empty")])
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(open_images(PHANTOMS, Preprocessing(32)).keys[:40]))
    fails("are not among the 40 real images", keys_file=keys)
    fails("timm does not make", classifier="densenet999")
