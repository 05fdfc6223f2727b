"""The strategies beside the paper's in one grid, and `filter` on a finished set, at toy size."""

import csv
from pathlib import Path

import numpy as np
import pytest

import priors
import scripts
import tiny
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import stored_labels
from diffusers_dino.evaluation import AugmentationResult, FilterResult, FoldPriors
from diffusers_dino.evaluation.augmentation.cells import load_cells
from diffusers_dino.evaluation.augmentation.generators import check_generators
from diffusers_dino.prior import describe_conditioner
from diffusers_dino.synthesis import SynthesisSettings, SyntheticSet, plan_interpolation, plan_prior, synthesise

PHANTOMS = Path(__file__).parents[2] / "examples/data/phantom-cxr/phantom-cxr-test-000000.tar"
KNOWN = ("No Finding", "Nodule", "Effusion")
LABELS = list(KNOWN[:2])
STRATEGIES = ["interpolation", "interpolation-identical", "interpolation-soft", "prior", "prior-balanced"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a tiny model, a prior of it that knows three labels of the phantoms, and one that knows one."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny.tiny_pipeline()
    pipe.save_pretrained(root / "model")
    for name, labels in (("prior", KNOWN), ("narrow", KNOWN[:1])):
        made = priors.tiny_prior_pipeline(conditioner=describe_conditioner(pipe.conditioner), labels=labels)
        made.prior.fit_tokens(pipe.encode_image(tiny.random_images(32)))
        made.save_pretrained(root / name)
    return root


@pytest.fixture
def flags(root, tmp_path) -> dict:
    return {
        "data_dir": PHANTOMS,
        "label_names": LABELS,
        "model": root / "model",
        "prior": root / "prior",
        "prior_inference_steps": 2,
        "output_dir": tmp_path / "out",
        "regimes": [8],
        "ratios": [1],
        "num_folds": 2,
        "strategies": STRATEGIES,
        "modes": ["full-synthetic"],
        "num_inference_steps": 1,
        "guidance_scale": 1,
        "sampling_batch_size": 8,
        **scripts.TOY_CLASSIFIER,
        "max_train_steps": 1,
    }


@pytest.mark.slow
def test_all_strategies_stand_side_by_side(flags):
    scripts.call_script("evaluate augmentation", **flags)
    out = flags["output_dir"]
    result = AugmentationResult.load(out / "result.json")
    assert [row.strategy for row in result.configurations] == ["real", *STRATEGIES]
    assert result.missing == ()
    assert all((out / name).is_file() for name in ("table.tex", "augmentation.png", "differences.png"))
    assert "interpolation-soft: the images of" in (out / "table.md").read_text()
    assert not (out / "fold-0" / "interpolation-soft").exists()  # it shares images
    plans = {(cell.spec.strategy, cell.spec.fold): cell.facts.plan for cell in load_cells(out / "cells")}
    assert plans["interpolation", 1] == plans["interpolation-soft", 1] != plans["interpolation-identical", 1]
    for fold in range(2):
        drawn = {name: SyntheticSet.open(out / f"fold-{fold}" / name).plan for name in STRATEGIES[-2:]}
        counts = [sum(name in image.labels for image in drawn["prior-balanced"]) for name in LABELS]
        assert min(counts) == 4
        # labels that the prior knows are asked for, also where they are not classified
        assert "Effusion" in {name for image in drawn["prior"] for name in image.labels}
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    scripts.call_script("evaluate augmentation", **flags)
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    for changed in ({"soft_labels": 2}, {"prior_guidance_scale": 2}):
        with pytest.raises(ValueError, match="begun with other settings"):
            scripts.call_script("evaluate augmentation", **{**flags, **changed})


@pytest.mark.slow
def test_a_judge_that_leaves_nothing_of_a_label_is_named_and_the_rest_goes_on(flags):
    flags |= {"strategies": ["reconstruction", "reconstruction+judge"], "prior": None, "max_train_steps": 2}
    with pytest.raises(RuntimeError, match=r"the judge of reconstruction\+judge in fold .* contradicts all"):
        scripts.call_script("evaluate augmentation", **flags, false_alarms=0.5)
    missing = AugmentationResult.load(flags["output_dir"] / "result.json").missing
    assert missing
    assert all("+judge" in name for name in missing)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prior": None}, "need a prior"),
        ({"strategies": ["interpolation"]}, "A prior goes with the strategies prior and prior-balanced"),
        ({"prior": "narrow"}, r"fold 0 cannot draw 'Nodule'.*nearest one is 'No Finding'"),
        ({"soft_labels": 0}, "exponent of soft labels must be a positive number"),
        ({"strategies": ["prior", "interpolation+judge"], "false_alarms": 0.7}, "false_alarms is in"),
        ({"strategies": ["prior+judge"], "regimes": [27]}, "use smaller regimes"),
        ({"strategies": ["soft+judge"], "prior": None}, "There is no cell"),
    ],
)
def test_what_does_not_fit_is_refused_before_images_are_made(flags, root, changed, message):
    if changed.get("prior"):
        changed = {"prior": root / changed["prior"]}
    with pytest.raises(ValueError, match=message):
        scripts.call_script("evaluate augmentation", **{**flags, **changed})
    assert not list(flags["output_dir"].glob("fold-*/*/plan.json"))


def test_one_prior_for_all_folds_is_warned_of(caplog):
    table = stored_labels(open_images(PHANTOMS, Preprocessing(64)))
    for priors_, warned in (("priors/{fold}", False), ("prior", True)):
        check_generators(table, np.zeros(len(table), int), "models/{fold}", priors=priors_)
        assert ("may have learned labels of the patients that are tested" in caplog.text) == warned


@pytest.fixture(scope="module")
def sets(root, tmp_path_factory) -> dict[str, Path]:
    """Sets of the bundled model, whose images are like phantoms; one with soft labels."""
    from diffusers_dino import DinoDiffusionPipeline

    folder = tmp_path_factory.mktemp("sets")
    pipe = DinoDiffusionPipeline.from_pretrained(PHANTOMS.parents[1] / "tiny-diffusion")
    images = open_images(PHANTOMS, Preprocessing(128))
    table = stored_labels(images)
    settings = SynthesisSettings(num_inference_steps=3, guidance_scale=1, batch_size=8, threads=1)
    for name, exponent in (("hard", None), ("soft", 1)):
        plan = plan_interpolation(table.keys, table.labels, num_images=24, exponent=exponent, settings=settings)
        synthesise(plan, pipe, images, folder / name, progress=False)
    return {name: folder / name for name in ("hard", "soft")}


@pytest.mark.slow
def test_a_filter_lists_what_no_judge_contradicts(sets, tmp_path):
    flags = {"data_dir": PHANTOMS, "label_names": ["Consolidation", "Effusion"], "num_folds": 3, "false_alarms": 0.0}
    flags |= {name: value for name, value in scripts.TOY_CLASSIFIER.items() if name != "bootstrap_repeats"}
    written = {}
    for name, folder in sets.items():
        out = tmp_path / name
        scripts.call_script("filter", **flags, synthetic=folder, output_dir=out)
        whole = list(csv.DictReader((folder / "labels.csv").open()))
        kept, dropped = (list(csv.DictReader((out / f"{part}.csv").open())) for part in ("kept", "dropped"))
        result = FilterResult.load(out / "filter.json")
        assert [row for row in whole if row in kept] == kept  # rows as they are, in their order
        assert len(kept) == result.num_kept
        assert {row["key"] for row in whole} == {row["key"] for row in (*kept, *dropped)}
        assert (result.num_images, result.real_dropped, result.num_hidden) == (24, 0, 0)
        if name == "soft":
            assert {row["given"] for row in dropped} <= {"0", "1"}
        before = {path.name: path.read_bytes() for path in out.glob("*.*")}
        scripts.call_script("filter", **flags, synthetic=folder, output_dir=out)
        assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before
        written[name] = (out / "judges").glob("*")
    for one, other in zip(*map(sorted, written.values()), strict=True):
        assert one.read_bytes() == other.read_bytes()  # soft labels change nothing of the judges
    tested = tmp_path / "tested.txt"
    tested.write_text("test-00063\nnobody\n")
    with pytest.raises(ValueError, match="nobody"):
        scripts.call_script("filter", **flags, synthetic=sets["hard"], output_dir=tmp_path / "n", test_keys=tested)
    made = SyntheticSet.open(sets["hard"])
    tested.write_text(made.plan.keys[0] + "\n")
    with pytest.raises(ValueError, match="are not among the 63 real images"):
        scripts.call_script("filter", **flags, synthetic=sets["hard"], output_dir=tmp_path / "t", test_keys=tested)


def test_soft_and_unlabelled_sets_are_refused_where_hard_labels_are_needed(sets, root, tmp_path):
    flags = {"data_dir": PHANTOMS, "label_names": ["Effusion"], "num_folds": 3, **scripts.TOY_CLASSIFIER}
    with pytest.raises(ValueError, match="has soft labels, of which there is no AUROC"):
        scripts.call_script("evaluate labels", **flags, synthetic=[sets["soft"]], output_dir=tmp_path / "labels")
    del flags["bootstrap_repeats"]
    pipe = tiny.tiny_pipeline()
    prior = FoldPriors(root / "prior", num_inference_steps=1).open(0, "cpu")
    settings = SynthesisSettings(num_inference_steps=1, guidance_scale=1, batch_size=2)
    synthesise(
        plan_prior((), num_images=2, settings=settings), pipe, None, tmp_path / "set", prior=prior, progress=False
    )
    with pytest.raises(ValueError, match="have no labels to judge"):
        scripts.call_script("filter", **flags, synthetic=tmp_path / "set", output_dir=tmp_path / "filtered")
