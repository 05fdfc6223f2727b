"""Offloading with the real hooks; the CPU plays the accelerator, so what is tested is who is called through them."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

import tiny
from tiny import generate

CPU = torch.device("cpu")


@pytest.fixture
def expected(images):
    return generate(tiny.tiny_pipeline(), images, guidance_scale=3.0)


def enable_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def enable_sequential(pipe):
    """What `enable_sequential_cpu_offload` does, which insists on a numbered device."""
    for name in ("conditioner", "unet", "vae"):
        model = getattr(pipe, name)
        cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def enable_group(pipe):
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def enable_group_of_blocks(pipe):
    pipe.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


WAYS = [enable_model, enable_sequential, enable_group, enable_group_of_blocks]


@pytest.mark.parametrize("enable", WAYS)
def test_offloaded_pipelines_generate_the_same(pipe, images, expected, enable):
    enable(pipe)
    for _ in range(2):  # hooks are put back after a call
        np.testing.assert_allclose(generate(pipe, images, guidance_scale=3.0), expected, atol=1e-5)


@pytest.mark.parametrize("enable", WAYS)
def test_embeddings_may_be_encoded_before(pipe, images, expected, enable):
    enable(pipe)
    embeds = pipe.encode_image(images)
    np.testing.assert_allclose(generate(pipe, image_embeds=embeds, guidance_scale=3.0), expected, atol=1e-5)


def test_sequential_offloading_leaves_no_weights_in_memory(pipe, images):
    enable_sequential(pipe)
    generate(pipe, images)
    for name in ("conditioner", "unet", "vae"):
        assert {parameter.device.type for parameter in getattr(pipe, name).parameters()} == {"meta"}
    null = pipe.conditioner.null_condition(2)
    assert null.device.type == "cpu"


def test_hooks_are_on_every_model(pipe):
    enable_model(pipe)
    assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in ("conditioner", "unet", "vae"))
    assert pipe.model_cpu_offload_seq.split("->") == ["conditioner", "unet", "vae"]
    pipe.remove_all_hooks()
    assert not any(hasattr(getattr(pipe, name), "_hf_hook") for name in ("conditioner", "unet", "vae"))


def test_without_an_accelerator_diffusers_says_so(pipe):
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(RuntimeError, match="requires accelerator"):
        pipe.enable_model_cpu_offload()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", ["to", "model", "sequential", "group"])
def test_on_a_gpu(images, way, dtype):
    pipe = tiny.tiny_pipeline().to(dtype)
    if way == "to":
        pipe.to("cuda")
    elif way == "model":
        pipe.enable_model_cpu_offload()
    elif way == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level")
    options = {"guidance_scale": 3.0, "generator": tiny.generators(0, 1, 2, 3)}
    on_cpu = generate(tiny.tiny_pipeline(), images, **{**options, "generator": tiny.generators(0, 1, 2, 3)})
    on_gpu = generate(pipe, images, **options)
    assert np.abs(on_gpu - on_cpu).mean() < (0.02 if dtype == torch.float16 else 2e-3)
