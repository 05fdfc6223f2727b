"""What diffusers asks of every pipeline that is saved and loaded: bits, types, variants, parts that are not there."""

import json

import numpy as np
import pytest
import torch
from kinds import KINDS

import tiny

HALF = [torch.float16, torch.bfloat16]
MODELS = ("vae", "conditioner", "unet")


def dtypes(pipe):
    return {name: getattr(pipe, name).dtype for name in MODELS}


def test_a_saved_pipeline_gives_the_same(kind, images, tmp_path):
    pipe = kind.make()
    pipe.save_pretrained(tmp_path)
    loaded = kind.pipeline.from_pretrained(tmp_path)
    assert loaded.components.keys() == pipe.components.keys()
    assert not any(getattr(loaded, name).training for name in MODELS)
    assert np.array_equal(kind.run(loaded, images), kind.run(pipe, images))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_saved_loaded_and_asked_for(kind, images, tmp_path, dtype):
    pipe = kind.make().to(dtype)
    pipe.save_pretrained(tmp_path)
    loaded = kind.pipeline.from_pretrained(tmp_path, dtype=dtype)
    assert set(dtypes(loaded).values()) == {dtype}
    result = kind.run(loaded, images)
    assert np.isfinite(result).all()
    assert np.array_equal(result, kind.run(pipe, images))
    assert np.abs(result - kind.run(kind.make(), images)).mean() < 0.02


def test_each_part_may_have_its_type(kind, tmp_path):
    kind.make().save_pretrained(tmp_path)
    loaded = kind.pipeline.from_pretrained(tmp_path, dtype={"unet": torch.bfloat16, "default": torch.float16})
    assert dtypes(loaded) == {"vae": torch.float16, "conditioner": torch.float16, "unet": torch.bfloat16}


def test_variants_lie_beside_each_other(kind, images, tmp_path):
    pipe = kind.make()
    pipe.save_pretrained(tmp_path)
    kind.make().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    for name in MODELS:
        stem = "diffusion_pytorch_model"
        assert {path.name for path in (tmp_path / name).glob("*.safetensors")} == {
            f"{stem}.safetensors",
            f"{stem}.fp16.safetensors",
        }
        assert name in json.loads((tmp_path / "model_index.json").read_text())
    plain = kind.pipeline.from_pretrained(tmp_path)
    assert np.array_equal(kind.run(plain, images), kind.run(pipe, images))
    half = kind.pipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    rounded = {name: weight.half() for name, weight in pipe.unet.state_dict().items()}
    assert all(torch.equal(rounded[name], weight) for name, weight in half.unet.state_dict().items())


def test_parts_that_are_not_there_stay_away(kind, images, tmp_path):
    """Without a conditioner tokens are given; without an autoencoder latents come out, where any do."""
    pipe = kind.make()
    options = {"image_embeds": pipe.conditioner.encode(images)}
    pipe.conditioner = None
    if kind.generates:
        pipe.vae = None
    pipe.save_pretrained(tmp_path)
    loaded = kind.pipeline.from_pretrained(tmp_path)
    assert loaded.conditioner is None
    assert (loaded.vae is None) == kind.generates
    given = {**options, "output_type": "latent", "guidance_scale": 1.0} if kind.generates else options
    results = [from_tokens(kind, each, images, given) for each in (pipe, loaded)]
    assert np.array_equal(*results)


def from_tokens(kind, pipe, images, given):
    if not kind.generates:
        return kind.run(pipe, images, **given)
    generator = tiny.generators(*range(len(images)))
    tokens = given["image_embeds"]
    if kind is KINDS["interpolation"]:
        given = {**given, "source_embeds": tokens, "target_embeds": tokens.flip(0), "fractions": [0.5]}
        del given["image_embeds"]
    return pipe(**given, generator=generator, num_inference_steps=2).images.numpy()


def test_loading_to_a_device(kind, images, tmp_path):
    pipe = kind.make()
    pipe.save_pretrained(tmp_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = kind.pipeline.from_pretrained(tmp_path, device_map=device)
    assert {getattr(loaded, name).device.type for name in MODELS} == {device}
    assert np.abs(kind.run(loaded, images) - kind.run(pipe, images)).max() < 1e-3


@pytest.mark.gpu
def test_loading_balanced_over_gpus(kind, images, tmp_path):
    kind.make().save_pretrained(tmp_path)
    loaded = kind.pipeline.from_pretrained(tmp_path, device_map="balanced")
    assert np.isfinite(kind.run(loaded, images)).all()
