"""`examples/train_dino.py` by flow matching."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.training.models import load_trained_pipeline

FLOW = {"prediction_type": "flow_prediction", "flow_shift": 2.0}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return scripts.tiny_training(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """A run of four updates, with a checkpoint after each second one."""
    folder = tmp_path_factory.mktemp("flow")
    changes = {**FLOW, "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "output_dir": folder}
    scripts.call_script("train_dino.py", **{**settings, **changes})
    return folder


@pytest.mark.parametrize("part", ["", "checkpoint-2"])
def test_the_result_and_its_checkpoints_sample_the_flow(trained, part):
    pipe = load_trained_pipeline(trained / part)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipe.scheduler.config["shift"] == 2.0
    images = pipe(tiny.random_images(2), num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (2, 1, 32, 32)


def test_the_card_says_what_was_trained(trained):
    card = (trained / "README.md").read_text()
    assert "flow matching" in card
    assert "| flow shift | 2.0 |" in card


def test_a_lora_follows_the_flow_of_its_pipeline(settings, trained, tmp_path):
    changes = {"pretrained_pipeline": trained, "rank": 2, "max_train_steps": 1, "flow_times": "uniform"}
    given = {name: value for name, value in settings.items() if name not in ("vae", "conditioner", "unet_config")}
    scripts.call_script("train_dino.py", **{**given, **changes, "output_dir": tmp_path})
    pipe = DinoDiffusionPipeline.from_pretrained(trained)
    pipe.load_lora_weights(tmp_path)
    assert pipe(tiny.random_images(1), num_inference_steps=1, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_gamma": 5.0, **FLOW}, "leave --snr_gamma out"),
        ({"rescale_betas_zero_snr": True, **FLOW}, "zero terminal SNR"),
        ({**FLOW, "flow_shift": 0.0}, "positive"),
        ({"flow_shift": 2.0}, "flow_prediction"),
        ({"flow_times": "uniform"}, "--prediction_type flow_prediction"),
    ],
)
def test_settings_of_the_other_kind_are_refused(settings, tmp_path, changes, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        scripts.call_script("train_dino.py", **{**settings, "max_train_steps": 1, "output_dir": tmp_path, **changes})
