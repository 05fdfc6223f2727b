"""Saving, loading and sharing components, and what a saved pipeline says about itself."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoModel, EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_dino
import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner
from tiny import generate


def test_saved_and_loaded_pipelines_generate_the_same_bits(pipe, images, tmp_path):
    pipe.conditioner.fit_normalization([tiny.random_images(16, seed=1)])
    pipe.conditioner.null_tokens.normal_(generator=torch.Generator().manual_seed(0))
    pipe.save_pretrained(tmp_path)
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    options = {"num_images_per_prompt": 2, "guidance_scale": 3.0, "num_inference_steps": 5}
    assert np.array_equal(generate(loaded, images, **options), generate(pipe, images, **options))


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loading_in_half_precision(pipe, images, tmp_path, dtype):
    pipe.save_pretrained(tmp_path)
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.conditioner.dtype} == {dtype}
    assert np.abs(generate(loaded, images) - generate(pipe, images)).mean() < 0.02


def test_components_are_shared_by_another_pipeline(pipe, images):
    other = DinoDiffusionPipeline.from_pipe(pipe)
    assert all(other.components[name] is component for name, component in pipe.components.items())
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(other, images), generate(pipe, images))
    again = DinoDiffusionPipeline(**pipe.components)
    assert again.unet is pipe.unet


def test_a_pipeline_starts_from_stable_diffusions_components(pipe, images):
    stable_diffusion = StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=None,
        tokenizer=None,
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made = DinoDiffusionPipeline.from_pipe(stable_diffusion, conditioner=pipe.conditioner)
    made.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(made, images), generate(pipe, images))


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


IMPORTS = """
import sys
import diffusers
before = set(sys.modules)
import diffusers_dino
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "diffusers_dino"))
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers_dino{module} import {name}
print("diffusers_dino" in LOADABLE_CLASSES)
"""


@pytest.mark.parametrize(
    ("module", "name"), [("", "DinoImageConditioner"), (".conditioner", "DinoImageConditioner")], ids=["top", "module"]
)
def test_importing_the_package_imports_nothing_and_using_it_registers_it(module, name):
    code = IMPORTS.format(module=module, name=name)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:2] == ["[]", "True"]
