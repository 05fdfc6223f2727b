"""Saving, loading and sharing components, and what a saved pipeline says about itself."""

import json

import pytest
import torch
from diffusers import AutoModel, EulerDiscreteScheduler
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_dino
import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner
from tiny import generate


def test_the_index_names_the_components_by_library_and_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["_diffusers_version"]
    assert index == {
        "_class_name": "DinoDiffusionPipeline",
        "conditioner": ["diffusers_dino", "DinoImageConditioner"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    saved = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path in saved if not path.endswith((".json", ".safetensors"))]


def test_the_conditioner_loads_alone(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    alone = DinoImageConditioner.from_pretrained(tmp_path, subfolder="conditioner")
    assert torch.equal(alone.encode(images), pipe.encode_image(images))


def test_diffusers_finds_the_conditioner_by_the_index(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="conditioner")
    assert isinstance(loaded, DinoImageConditioner)
    assert torch.equal(loaded.encode(images), pipe.encode_image(images))


def test_components_given_at_loading_replace_the_saved_ones(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    vae = tiny.tiny_taesd()
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path, vae=vae, scheduler=scheduler, conditioner=None)
    assert loaded.vae is vae
    assert loaded.scheduler is scheduler
    assert loaded.conditioner is None
    generated = generate(loaded, image_embeds=pipe.encode_image(images), guidance_scale=1.0)
    assert generated.shape == (4, 32, 32, 3)


def test_a_wrong_component_at_loading_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="width 48"):
        DinoDiffusionPipeline.from_pretrained(tmp_path, unet=tiny.tiny_unet(cross_attention_dim=48))
    with pytest.raises(ValueError, match="is of type"):
        DinoDiffusionPipeline.from_pretrained(tmp_path, conditioner=torch.nn.Linear(2, 2))


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        DinoDiffusionPipeline.from_pretrained(tmp_path)


def test_corrupt_weights(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        DinoDiffusionPipeline.from_pretrained(tmp_path)


def test_the_package_is_registered_once(pipe):
    assert LOADABLE_CLASSES["diffusers_dino"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    diffusers_dino.registration.register()
    assert LOADABLE_CLASSES["diffusers_dino"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}


def test_public_names_are_there_and_no_others():
    assert set(diffusers_dino.__all__) <= set(dir(diffusers_dino))
    for name in diffusers_dino.__all__:
        assert getattr(diffusers_dino, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
        diffusers_dino.Unknown  # noqa: B018
