"""Saving, loading and sharing components, and what a saved pipeline says about itself."""

import json

import pytest
import torch
from diffusers import AutoModel, EulerDiscreteScheduler
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_dino
import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoImageConditioner
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


@pytest.mark.parametrize("kind", [DinoImageConditioner, AutoModel])
def test_the_conditioner_loads_by_itself(pipe, images, tmp_path, kind):
    pipe.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(str(tmp_path), subfolder="conditioner")
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


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    return tmp_path


def _fitted(**options):
    conditioner = tiny.tiny_conditioner(**options)
    conditioner.fit_normalization([tiny.random_images(32)])
    return conditioner


@pytest.mark.parametrize(
    "change",
    [
        lambda: tiny.tiny_conditioner(tokens="cls"),
        lambda: tiny.tiny_conditioner(tokens="all"),
        lambda: tiny.tiny_conditioner(projection_dim=32),
        lambda: tiny.tiny_conditioner(mean=(0.4, 0.4, 0.4)),
        lambda: tiny.tiny_conditioner(resample="nearest"),
        lambda: tiny.tiny_conditioner(source="another"),
        _fitted,
    ],
)
def test_a_conditioner_of_another_training_is_refused(saved, change):
    """What a new training in the folder of a finished model leaves where it is killed."""
    other = change()
    other.save_pretrained(saved / "conditioner")
    for kind in (DinoDiffusionPipeline, DiffSegPipeline):
        with pytest.raises(ValueError, match="do not belong together"):
            kind.from_pretrained(saved)
    pipe = DiffSegPipeline.from_pretrained(saved, conditioner=other)  # on purpose
    pipe.save_pretrained(saved)
    DinoDiffusionPipeline.from_pretrained(saved)


@pytest.mark.parametrize("note", [None, "text", 1, {}, {"settings": None, "statistics": None}, {"statistics": "ab"}])
def test_a_note_of_the_condition_that_is_missing_or_damaged(saved, note):
    path = saved / "unet" / "config.json"
    config = json.loads(path.read_text())
    if note is None:  # older models have none
        del config["_condition"]
        tiny.tiny_conditioner(tokens="cls").save_pretrained(saved / "conditioner")
    else:
        config["_condition"] = note
    path.write_text(json.dumps(config))
    if note is None:
        assert DinoDiffusionPipeline.from_pretrained(saved).conditioner.num_tokens == 1
    else:
        with pytest.raises(ValueError, match="do not belong together"):
            DinoDiffusionPipeline.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_belong_together_in_every_type(tmp_path, dtype):
    whole = tiny.tiny_pipeline(conditioner=_fitted())
    whole.save_pretrained(tmp_path / "single")
    DinoDiffusionPipeline.from_pretrained(tmp_path / "single", dtype=dtype).save_pretrained(tmp_path / "half")
    DinoDiffusionPipeline.from_pretrained(tmp_path / "half")
    single, half = (json.loads((tmp_path / name / "unet/config.json").read_text()) for name in ("single", "half"))
    assert single["_condition"] == half["_condition"]


def test_statistics_that_another_device_computed_are_the_same(saved):
    other = tiny.tiny_conditioner()
    other.heads[0].std *= 1 + 1e-5
    other.null_tokens += 1  # which may be chosen after training
    other.save_pretrained(saved / "conditioner")
    DinoDiffusionPipeline.from_pretrained(saved)


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
