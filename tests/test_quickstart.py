"""The quickstart, shortened, as a user runs it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import scripts
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.diffseg import noted_settings
from diffusers_dino.evaluation import MemorizationResult, ReconstructionResult
from diffusers_dino.evaluation.fidelity.result import REAL, UNTRAINED, FidelityResult
from forks import Forks

ROOT = Path(__file__).resolve().parents[1]


def test_a_copy_alone_says_what_is_missing(tmp_path):
    started = scripts.start_script(shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path))
    printed, _ = started.communicate()
    assert re.fullmatch(r"error: There is no .*/train_dino\.py\. .* in a clone\.", printed.splitlines()[-1])
    assert "Traceback" not in printed
    assert started.returncode == 1


STOPPED = "train_dino.py was stopped before its end"


@pytest.mark.parametrize(
    ("training", "code", "said"),
    [
        ("", 1, STOPPED),
        ("raise SystemExit(3)", 3, "train_dino.py failed: exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "train_dino.py failed: signal 9"),
    ],
)
def test_it_goes_no_further_where_training_failed_or_was_stopped(tmp_path, training, code, said):
    """Also where an earlier model is in the folder."""
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / "examples" / name)
    (tmp_path / "train_dino.py").write_text(training)
    shutil.copytree(ROOT / "examples/data/tiny-diffusion", tmp_path / "out/model")
    script = shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    started = scripts.start_script(script, output_dir=tmp_path / "out")
    printed, _ = started.communicate()
    assert started.returncode == code, printed
    assert said in printed
    assert "load the pipeline" not in printed


@pytest.mark.slow
def test_quickstart_writes_a_report_and_a_pipeline_that_loads(tmp_path, monkeypatch):
    config = yaml.safe_load((ROOT / "examples" / "configs" / "quickstart.yaml").read_text())
    config.update(max_train_samples=32, cache_views=1, lr_warmup_steps=1)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    options = [f"--output_dir={tmp_path / 'out'}", f"--config={tmp_path / 'short.yaml'}"]
    options += ["--max_train_steps=3", "--num_seeds=1", "--num_sources=1", "--num_variations=2"]
    options += ["--num_paths=1", "--num_points=3", "--num_inference_steps=2", "--num_planted=4", "--num_tuning=4"]
    monkeypatch.chdir(tmp_path)  # nothing may depend on where it is started
    started = Forks("quickstart.py", options, {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, 1)
    printed, _ = started.communicate()
    assert started.returncode == 0, printed

    result = ReconstructionResult.load(tmp_path / "out" / "reconstruction.json")
    assert (result.num_images, result.num_training_images) == (64, 512)
    assert result.by_pixels.nearest_training_image > 0.2  # the control needs no training
    report = (tmp_path / "out" / "report.html").read_text()
    assert f"{result.by_encoder.nearest_training_image:.3g}" in report
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', report))
    assert len(re.findall("<img", report)) == 7  # loss, variations, distances, pairs, paths, labels, segments
    fidelity = FidelityResult.load(tmp_path / "out" / "fidelity.json")
    assert {(row.num_images, row.num_reference) for row in fidelity.rows} == {(64, 512)}
    generated, untrained, real = (fidelity.row(name) for name in ("generated, without guidance", UNTRAINED, REAL))
    assert real.frechet.value < min(generated.frechet.value, untrained.frechet.value)
    assert real.coverage.value > max(generated.coverage.value, untrained.coverage.value)
    assert all(f"{row.frechet.value:.3g} [" in report for row in fidelity.rows)
    memorization = MemorizationResult.load(tmp_path / "out" / "memorization.json")
    assert (memorization.training.num_images, memorization.synthetic.num_images) == (512, 128)
    assert memorization.held_out.share <= 0.05  # phantoms that are not copies
    assert memorization.synthetic.copies == 0
    dice = json.loads((tmp_path / "out" / "segmentation.json").read_text())
    assert dice["control: mean mask of the training set"] == pytest.approx(0.85, abs=0.02)  # as benchmarks.md says
    assert all(f"<td>{value:.3g}</td>" in report for value in dice.values())

    pipe = DinoDiffusionPipeline.from_pretrained(tmp_path / "out" / "model")
    images = pipe(Image.new("L", (128, 128), 90), num_inference_steps=2).images
    assert images[0].size == (128, 128)
    assert noted_settings(pipe.unet.config).timestep in (100, 300, 500)  # chosen on training phantoms, and saved
