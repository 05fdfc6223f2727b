"""`diffusers-dino evaluate fidelity` as a user runs it: all checkpoints of a run, started again, on bad folders."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.evaluation.fidelity.result import FidelityResult
from diffusers_dino.hub import TrainingRecord
from diffusers_dino.training.checkpoints import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*biased upwards")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two checkpoints with averaged weights, and one that was cut short."""
    folder = tmp_path_factory.mktemp("run")
    tiny.tiny_pipeline().save_pretrained(folder / "start")
    training = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-2, "use_ema": True}
    scripts.call_script("train_dino.py", **scripts.tiny_training(folder) | training | {"output_dir": folder / "run"})
    (folder / "run" / "checkpoint-3").mkdir()
    (folder / "keys.txt").write_text("\n".join(f"{i:03d}" for i in range(14)))
    lines = [f"{i:03d}.png,{i // 2},{'Edema|Mass' if i % 3 else 'Edema'}" for i in range(24)]
    (folder / "patients.csv").write_text("\n".join(["file,patient,findings", *lines]))
    return folder


@pytest.fixture
def flags(run, tmp_path) -> dict:
    return {
        "run": run / "run",
        "data_dir": run / "images",
        "training_keys": run / "keys.txt",
        "table": run / "patients.csv",
        "num_inference_steps": 1,
        "bootstrap_repeats": 10,
        "output_dir": tmp_path / "out",
    }


def times(folder: Path) -> dict[str, int]:
    return {path.name: os.stat(path).st_mtime_ns for path in (folder / "features").glob("*.safetensors")}


@pytest.mark.slow
def test_checkpoints_are_measured_once_and_the_best_one_is_kept(flags, run, capsys):
    scripts.call_script("evaluate fidelity", **flags)
    out = flags["output_dir"]
    result = FidelityResult.load(out / "result.json")
    assert [row.images for row in result.rows] == ["checkpoint-1", "checkpoint-2", "untrained", "real"]
    assert {(row.num_images, row.num_reference, row.by_patient) for row in result.rows} == {(10, 14, True)}
    assert "| checkpoint-2 | 10, 14 |" in capsys.readouterr().out
    for name in ("table.md", "table.tex", "table.csv", "fidelity.png"):
        assert (out / name).stat().st_size

    best = result.best_checkpoint()
    facts = json.loads((out / "best" / "metric.json").read_text())
    assert (facts["metric"], facts["value"], facts["step"]) == ("frechet_pixels", best.frechet.value, best.step)
    assert TrainingRecord.load(out / "best").facts["updates"] == best.step
    kept = DinoDiffusionPipeline.from_pretrained(out / "best").unet.state_dict()
    averaged = UNet2DConditionModel.from_pretrained(run / "run" / best.images / "unet").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in averaged.items())

    before = times(out)
    gone = next(path for path in (out / "features").iterdir() if path.name.startswith("checkpoint-1"))
    gone.unlink()
    scripts.call_script("evaluate fidelity", **flags)  # as after a kill
    after = times(out)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == {gone.name}
    assert FidelityResult.load(out / "result.json") == result
    scripts.call_script("evaluate fidelity", **{**flags, "seed": 1, "steps": [2]})
    assert {name.rpartition("-")[0] for name in times(out).keys() - after.keys()} == {"checkpoint-2", "untrained"}


@pytest.mark.slow
def test_a_model_is_measured_against_the_other_half_of_the_patients(flags, run):
    flags |= {"run": None, "model": [run / "start", run / "run" / "checkpoint-2"], "training_keys": None}
    scripts.call_script("evaluate fidelity", **flags, untrained=False)
    result = FidelityResult.load(flags["output_dir"] / "result.json")
    assert [row.images for row in result.rows] == ["start", "checkpoint-2", "real"]
    assert {(row.num_images, row.num_reference) for row in result.rows} == {(12, 12)}
    assert not (flags["output_dir"] / "best").exists()
    assert result.by_label == ()
    scripts.call_script("evaluate fidelity", **flags, untrained=False, label_column="findings", fewest=9)
    labelled = FidelityResult.load(flags["output_dir"] / "result.json")
    assert labelled.rows == result.rows
    assert [(row.images, row.label, row.num_images) for row in labelled.by_label] == [
        (name, "Edema", 12) for name in ("start", "checkpoint-2", "real")
    ]
    assert labelled.too_few == ("Mass",)
    assert [row.frechet for row in labelled.by_label] == [row.frechet for row in result.rows]  # all have the label
    table = (flags["output_dir"] / "table.md").read_text()
    assert "| start, Edema | 12, 12 |" in table
    assert "Too few images: Mass" in table
    with pytest.raises(ValueError, match="No label has 99 sources"):
        scripts.call_script("evaluate fidelity", **flags, label_column="findings", fewest=99)


def test_patients_of_the_reference_are_no_sources(flags, run, tmp_path):
    from diffusers_dino.cli.evaluate import fidelity as eval_fid

    (tmp_path / "odd.txt").write_text("\n".join(f"{i:03d}" for i in range(13)))
    paths = {name: str(flags[name]) for name in ("data_dir", "table")}
    args = eval_fid.Arguments(**paths, training_keys=str(tmp_path / "odd.txt"), num_reference=5)
    sources, reference, patients, _ = eval_fid.open_sets(args, tiny.tiny_pipeline())
    assert sources.keys == [f"{i:03d}" for i in range(14, 24)]  # 013 is of the patient of 012
    assert len(reference) == 5
    assert not {patients[key] for key in sources.keys} & {patients[key] for key in reference.keys}
    other = eval_fid.open_sets(eval_fid.Arguments(data_dir=paths["data_dir"]), tiny.tiny_pipeline())[:2]
    assert not set(other[0].keys) & set(other[1].keys)


def test_what_cannot_be_evaluated_is_said_at_once(flags, run, tmp_path):
    def fails(message: str, error: type[Exception] = ValueError, **changed) -> None:
        with pytest.raises(error, match=message):
            scripts.call_script("evaluate fidelity", **{**flags, **changed})

    fails("no complete checkpoint", CheckpointError, run=run / "images")
    fails("no complete checkpoint", CheckpointError, run=tmp_path / "nowhere")
    fails("Give --run .* or --model", model=[run / "start"])
    fails("Give --run .* or --model", run=None)
    fails("Give --data_dir", data_dir=None)
    fails("give one of them", reference_dir=run / "images")
    fails("no checkpoint after 7 updates; there are those after 1, 2", steps=[1, 7])
    fails("must differ", run=None, model=[run / "run" / "best", run / "best"])
    fails("no feature extractor 'vgg'", features="vgg")
    fails("no column 'person'", patient_column="person")
    fails("give the table", table=None, label_column="findings")
