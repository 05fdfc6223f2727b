"""`examples/train_dino.py` on diffusers' transformers: new ones, pretrained ones and LoRA of them."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.training import models

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SHORT = {"max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Flags of a training on frozen models of 16 latent channels with a shift, without those of the denoiser."""
    folder = tmp_path_factory.mktemp("parts")
    flags = scripts.tiny_training(folder)
    tiny.tiny_vae(latent_channels=16, shift_factor=0.1, scaling_factor=1.5).save_pretrained(folder / "vae16")
    for family in tiny.FAMILIES:
        widths = ("joint_attention_dim", "pooled_projection_dim") if family == "sd3" else ("caption_channels",)
        config = tiny.tiny_transformer_config(family, in_channels=3, **dict.fromkeys(widths, 7))  # which are replaced
        (folder / f"{family}.json").write_text(json.dumps(config))
    return {**flags, "unet_config": None, "vae": folder / "vae16"}


@pytest.fixture(scope="module")
def train(settings):
    def run(output_dir, **changes):
        scripts.call_script("train_dino.py", **{**settings, "output_dir": output_dir, **changes})
        return output_dir

    return run


def config_of(settings, family):
    return settings["vae"].parent / f"{family}.json"


@pytest.fixture(scope="module", params=["sd3", "pixart"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def trained(settings, train, family, tmp_path_factory):
    return train(tmp_path_factory.mktemp(family), transformer_config=config_of(settings, family), **SHORT)


@pytest.mark.parametrize("part", ["", "checkpoint-2"])
def test_results_and_checkpoints_are_pipelines(trained, family, part):
    pipe = models.load_trained_pipeline(trained / part)
    expected = DDIMScheduler if family == "pixart" else FlowMatchEulerDiscreteScheduler
    assert type(pipe.scheduler) is expected
    assert pipe.transformer.config["in_channels"] == 16
    assert tiny.generate(pipe, tiny.random_images(1)).shape == (1, 32, 32, 1)
    assert type(pipe.transformer).__name__ in (trained / "README.md").read_text()


def test_resumed_it_ends_with_the_same_bits(settings, train, trained, family, tmp_path):
    for name in ("checkpoint-2", "vae", "conditioner", "scheduler"):
        shutil.copytree(trained / name, tmp_path / name)
    flags = {"transformer_config": config_of(settings, family), "resume_from_checkpoint": "latest"}
    assert scripts.same_weights(train(tmp_path, **flags, **SHORT) / "transformer", trained / "transformer")


def test_a_lora_is_trained_on_it(train, trained, tmp_path):
    flags = {"pretrained_pipeline": trained, "rank": 2, "max_train_steps": 2, "vae": None, "conditioner": None}
    train(tmp_path, **flags)
    pipe = DinoDiffusionPipeline.from_pretrained(trained)
    plain = tiny.generate(pipe, tiny.random_images(1))
    pipe.load_lora_weights(tmp_path)
    assert (tiny.generate(pipe, tiny.random_images(1)) != plain).any()


def test_a_pretrained_one_goes_on(settings, train, tmp_path):
    """Stable Diffusion 3's layout, whose pooled token is narrower than its others."""
    base, vae = tmp_path / "base", settings["vae"]
    shutil.copytree(vae, base / "vae")
    sizes = {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 48, "pooled_projection_dim": 24}
    tiny.tiny_transformer("sd3", **sizes).save_pretrained(base / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(base / "scheduler")
    tiny.tiny_conditioner(projection_dim=48).save_pretrained(tmp_path / "conditioner")
    flags = {"pretrained_model_name_or_path": base, "vae": None, "max_train_steps": 1, "learning_rate": 1e-6}
    pipe = DinoDiffusionPipeline.from_pretrained(
        train(tmp_path / "out", conditioner=tmp_path / "conditioner", **flags)
    )
    assert pipe.scheduler.config["shift"] == 3.0
    assert pipe.vae.config["shift_factor"] == 0.1
    begun = load_file(base / WEIGHTS)
    for name, weight in pipe.transformer.state_dict().items():
        torch.testing.assert_close(weight, begun[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_new_one_begins_at_zero(settings, family):
    vae = models.load_vae(str(settings["vae"]))
    transformer = models.new_denoiser(str(config_of(settings, family)), vae, 32, 32)
    assert not transformer.proj_out.weight.any()
    assert transformer.config["sample_size"] == 8
    noisy, tokens = torch.randn(1, 16, 8, 8), torch.randn(1, 5, 32)
    family = models.family_of(transformer)
    assert not family.predict(transformer, noisy, torch.tensor([500.0]), tokens).any()


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"resolution": 36}, {}, "multiple of 8"),
        ({}, {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel cannot be used as a denoiser"),
        ({"unet_config": "some"}, {}, "give --unet_config or --transformer_config"),
    ],
)
def test_what_does_not_fit_is_refused(train, tmp_path, changes, config, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny.tiny_transformer_config("sd3", **config)))
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", transformer_config=file, max_train_steps=1, **changes)


def test_distillation_trains_a_lora_of_it(settings, trained, family, tmp_path):
    names = ("train_data_dir", "resolution", "train_batch_size", "learning_rate", "lr_warmup_steps")
    flags = {**{name: settings[name] for name in names}, "pretrained_pipeline": trained, "max_train_steps": 1}
    if family != "pixart":
        with pytest.raises(ValueError, match="has a flow's"):
            scripts.call_script("distill_dino.py", **flags, output_dir=tmp_path)
        return
    with pytest.raises(ValueError, match="no input for the guidance scale"):
        scripts.call_script("distill_dino.py", **flags, output_dir=tmp_path / "whole")
    scripts.call_script("distill_dino.py", **flags, rank=2, output_dir=tmp_path / "lora")
    pipe = DinoDiffusionPipeline.from_pretrained(trained)
    pipe.load_lora_weights(tmp_path / "lora")
