"""`examples/showcase.py`: six stages, one model; stopped, it goes on where it was."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import scripts
from checkpoints import CROPPING, save_transformers
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.hub import TrainingRecord
from tiny import tiny_encoder

PHANTOMS = scripts.EXAMPLES / "data/phantom-cxr"


@pytest.mark.slow
def test_one_command_makes_the_model_and_goes_on_where_it_was(tmp_path, monkeypatch):
    def launch(script, flags, folder, finished):  # as `launch_training`, in this process
        monkeypatch.chdir(folder)
        scripts.call_argv(script.name, flags)

    monkeypatch.setattr("showcase.launch_training", launch)
    processor = CROPPING | {"crop_size": {"height": 56, "width": 56}}
    teacher = save_transformers(tiny_encoder(patch_size=14, image_size=56), tmp_path / "teacher", processor)
    flags = {"train_data_dir": PHANTOMS / "phantom-cxr-train-*.tar", "teacher": teacher, "max_train_samples": 100}
    flags |= {"output_dir": tmp_path / "run", "max_train_steps": 1}
    scripts.call_script("showcase.py", **flags)
    model = tmp_path / "run/model"
    weights = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    assert weights["conv_in.weight"].dtype == torch.float16
    pipe = DinoDiffusionPipeline.from_pretrained(model)
    assert (pipe.conditioner.num_tokens, pipe.conditioner.token_dim) == (5, 128)
    assert TrainingRecord.load(model) == TrainingRecord.load(tmp_path / "run/tokens")
    assert "Phantom chest radiographs" in (model / "README.md").read_text()
    assert len(pipe(torch.rand(1, 1, 128, 128), num_inference_steps=1).images) == 1

    shutil.rmtree(model)  # as if it had been stopped before its end
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    scripts.call_script("showcase.py", **flags)
    assert DinoDiffusionPipeline.from_pretrained(model)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_bad_input_is_explained(tmp_path):
    with pytest.raises(ValueError, match="--train_data_dir"):
        scripts.call_script("showcase.py", output_dir=tmp_path / "run")
