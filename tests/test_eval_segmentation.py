"""`diffusers-dino evaluate segmentation` as a user runs it on phantoms and at tiny size."""

import os
from pathlib import Path

import pytest

import scripts
import tiny
import tiny_text
from diffusers_dino.diffseg import DiffSegSettings, note_settings
from diffusers_dino.evaluation import SegmentationResult

PHANTOMS = Path(__file__).parents[1] / "examples/data/phantom-cxr/phantom-cxr-test-000000.tar"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny.tiny_pipeline()
    note_settings(pipe.unet, DiffSegSettings(timestep=50))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def flags(pipeline, tmp_path) -> dict:
    return {
        "pipeline": [f"ours={pipeline}"],
        "data": [f"phantoms={PHANTOMS}"],
        "output_dir": tmp_path / "out",
        "max_samples": 6,
        "mask_size": 32,
        "timesteps": [1, 300],
        "thresholds": [0.5, 1.0],
        "batch_size": 2,
        "num_examples": 2,
    }


@pytest.mark.slow
def test_figures_of_a_model_and_of_its_controls_are_written(flags):
    scripts.call_script("evaluate segmentation", **flags)
    out = flags["output_dir"]
    for name in ("table.md", "table.tex", "table.csv", "phantoms/timestep.png", "phantoms/threshold.png"):
        assert (out / name).is_file()
    assert (out / "phantoms" / "failures-ours-best_pair.png").is_file()
    assert not (out / "phantoms" / "layers.png").exists()  # it was not swept
    result = SegmentationResult.load(out / "phantoms" / "result.json")
    ours = {"ours", "ours, untrained", "ours, settings noted with it"}
    assert {row.method for row in result.methods} >= ours | {"Otsu", "mean mask of other patients"}
    noted = next(sweep for sweep in result.sweeps if sweep.method == "ours, settings noted with it")
    assert [str(setting) for setting in noted.settings] == ["t 50, threshold 0.35"]


@pytest.mark.slow
def test_checkpoints_and_stable_diffusion_stand_beside_each_other(flags, tmp_path):
    run, training = tmp_path / "run", {"max_train_steps": 2, "checkpointing_steps": 1}
    scripts.call_script("train_dino.py", **scripts.tiny_training(tmp_path, 8) | training | {"output_dir": run})
    tiny_text.stable_diffusion().save_pretrained(tmp_path / "sd")
    flags |= {
        "pipeline": [f"ours={run / 'checkpoint-1'}", f"ours={run}"],
        "stable_diffusion": tmp_path / "sd",
        "untrained": False,
        "max_samples": 4,
        "num_examples": 0,
    }
    scripts.call_script("evaluate segmentation", **flags)
    result = SegmentationResult.load(flags["output_dir"] / "phantoms" / "result.json")
    ours, theirs = result.sweeps
    assert [ours.method, theirs.method] == ["ours", "Stable Diffusion"]
    assert {setting.checkpoint for setting in ours.settings} == {"checkpoint-1", "run"}
    assert len(ours.settings) == 2 * len(theirs.settings) == 8
    assert (flags["output_dir"] / "phantoms" / "checkpoint.png").is_file()
    assert not list(flags["output_dir"].rglob("examples-*"))  # no image is drawn that was not asked for


def test_what_cannot_be_evaluated_is_said_at_once(flags, tmp_path):
    def fails(message: str, error: type[Exception] = ValueError, **changed) -> None:
        with pytest.raises(error, match=message):
            scripts.call_script("evaluate segmentation", **{**flags, **changed})

    fails("Give --data", data=None)
    fails("or --stable_diffusion", pipeline=None)
    fails("have one name", data=[str(PHANTOMS), str(PHANTOMS)])
    fails("no folder 'nowhere'", FileNotFoundError, data=["nowhere"])
    empty = tmp_path / "jsrt"
    empty.mkdir()
    fails("jsrt", FileNotFoundError, data=[f"jsrt={empty}"])
    if os.geteuid() != 0:  # root writes everywhere
        empty.chmod(0o500)
        fails("not writable", PermissionError, output_dir=empty / "out")
