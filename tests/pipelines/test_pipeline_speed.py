"""diffusers' switches for speed and memory on the pipelines: each works, and gives equal or close images."""

import numpy as np
import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

import tiny
from diffusers_dino import DiffSegPipeline, DinoInterpolationPipeline
from diffusers_dino.diffseg.attention import self_attention_layers
from diffusers_dino.pipelines import deep_cache
from tiny import generate

STEPS = 10


def sample(pipe, images, **options):
    return generate(pipe, images, **{"num_inference_steps": STEPS, "guidance_scale": 3.0, **options})


@pytest.fixture
def images():
    return tiny.random_images(2)


@pytest.fixture
def expected(images):
    return sample(tiny.tiny_pipeline(), images)


def self_attention_calls(pipe):
    """A list that grows by the batch size at each call of a self-attention layer's projection."""
    calls = []
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1.to_q"):
            module.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    return calls


CACHES = {
    "deep": lambda pipe: deep_cache(pipe.unet),
    "deep, order 1": lambda pipe: deep_cache(pipe.unet, order=1),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2),
    "faster": lambda pipe: FasterCacheConfig(attention_weight_callback=lambda module: 0.5),
    "taylor": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, cache_identifiers=[r".*attn[12]"], taylor_factors_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_save_work_and_change_images_a_little(pipe, images, expected, kind):
    full = self_attention_calls(pipe)
    sample(pipe, images)
    saved = tiny.tiny_pipeline()
    saved.enable_cache(CACHES[kind](saved))
    assert saved.is_cache_enabled
    calls = self_attention_calls(saved)
    cached = sample(saved, images)
    assert sum(calls) < 0.85 * sum(full)
    assert 0 < np.abs(cached - expected).max() < 0.05
    assert np.array_equal(sample(saved, images), cached), "something of the first call was left in the cache"
    saved.disable_cache()
    assert not saved.is_cache_enabled
    assert np.array_equal(sample(saved, images), expected)


@pytest.mark.parametrize("kind", CACHES)
def test_caches_know_no_other_images(pipe, images, kind):
    """Neither of the call before, nor of the condition before on a path; and another pipeline may share the UNet."""
    pipe.enable_cache(CACHES[kind](pipe))
    path = DinoInterpolationPipeline.from_pipe(pipe)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    both = path(
        images[:1], images[1:], fractions=[0.0, 1.0], generator=torch.Generator().manual_seed(0), **options
    ).images
    np.testing.assert_allclose(both[0], sample(pipe, images[:1])[0], atol=1e-5)
    np.testing.assert_allclose(both[1], sample(pipe, images[1:])[0], atol=1e-5)


def test_a_cache_of_every_step_changes_nothing(pipe, images, expected):
    pipe.enable_cache(deep_cache(pipe.unet, every=1))
    assert np.array_equal(sample(pipe, images), expected)


def test_deep_cache_skips_the_deep_levels_of_a_unet_of_four(images):
    levels = {
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    }
    unet = tiny.tiny_unet(**levels, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    pipe = tiny.tiny_pipeline(unet=unet)
    expected = sample(pipe, images)
    pipe.enable_cache(deep_cache(unet))
    ran = []
    for name, module in unet.named_modules():
        if name.endswith(("resnets.0.conv1", "attn1.to_q")):
            module.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
    assert 0 < np.abs(sample(pipe, images) - expected).max() < 0.1
    assert ran.count("down_blocks.0.resnets.0.conv1") == ran.count("up_blocks.3.resnets.0.conv1") == STEPS
    deep = {name for name in ran if not name.startswith(("down_blocks.0", "up_blocks.3"))}
    assert {name.split(".resnets")[0].split(".attn")[0].split(".attentions")[0] for name in deep} == {
        *("down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")
    }
    assert {ran.count(name) for name in deep} == {4}  # steps 0, 1, 4, 7


def test_attention_is_cached_without_guidance_too(pipe, images):
    expected = sample(pipe, images, guidance_scale=1.0)
    pipe.enable_cache(deep_cache(pipe.unet))
    assert 0 < np.abs(sample(pipe, images, guidance_scale=1.0) - expected).max() < 0.05


def test_a_cache_in_a_fixed_batch_is_refused(pipe, images):
    pipe.enable_cache(deep_cache(pipe.unet))
    pipe.enable_fixed_batch(1)
    with pytest.raises(ValueError, match="disable_fixed_batch"):
        sample(pipe, images)


def test_faster_cache_without_guidance_is_refused(pipe, images):
    pipe.enable_cache(FasterCacheConfig(attention_weight_callback=lambda module: 0.5))
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        sample(pipe, images, guidance_scale=1.0)


@pytest.mark.parametrize("kind", ["deep", "pyramid", "taylor"])
def test_guidance_may_end_while_a_cache_is_on(pipe, images, kind):
    def only_early(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0 if step < 4 else 1.0
        return {}

    expected = sample(pipe, images[:1], callback_on_step_end=only_early)
    pipe.enable_cache(CACHES[kind](pipe))
    cached = sample(pipe, images[:1], callback_on_step_end=only_early)
    assert cached.shape == expected.shape
    assert np.abs(cached - expected).max() < 0.05


def test_callbacks_and_caches_are_told_the_timestep(pipe, images):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((pipe.current_timestep, float(timestep)))
        return {}

    sample(pipe, images, callback_on_step_end=look)
    assert len(seen) == STEPS
    assert all(own == given for own, given in seen)
    assert pipe.current_timestep is None


def test_caches_of_transformers_and_second_caches_are_refused(pipe, images):
    with pytest.raises(TypeError, match=r"FirstBlockCacheConfig.*deep_cache\(pipe.unet\)"):
        pipe.enable_cache(FirstBlockCacheConfig())
    assert not pipe.is_cache_enabled
    pipe.enable_cache(deep_cache(pipe.unet))
    with pytest.raises(ValueError, match=r"disable_cache\(\) first"):
        pipe.enable_cache(deep_cache(pipe.unet))
    with pytest.raises(ValueError, match=r"disable_cache\(\)"):
        DiffSegPipeline.from_pipe(pipe)(images, timestep=300)
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        deep_cache(pipe.unet, every=0)
    single = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with pytest.raises(ValueError, match="one level"):
        deep_cache(tiny.tiny_unet(**single))


@pytest.mark.slow
@pytest.mark.parametrize("compile_unet", ["blocks", "in place", "as a component"])
def test_compiled_unets_give_the_same_images(images, compile_unet):
    pipe = tiny.tiny_pipeline(unet=tiny.tiny_unet(**tiny.ONE_LEVEL))
    expected = sample(pipe, images)
    if compile_unet == "blocks":
        pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    elif compile_unet == "in place":
        pipe.unet.compile(fullgraph=True, backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    np.testing.assert_allclose(sample(pipe, images), expected, atol=1e-4)
    np.testing.assert_allclose(sample(pipe, images, guidance_scale=1.0).shape, expected.shape)
    assert self_attention_layers(pipe.unet).keys() == self_attention_layers(tiny.tiny_unet(**tiny.ONE_LEVEL)).keys()
    assert DiffSegPipeline.from_pipe(pipe)(images, merge_threshold=0.5).masks.shape == (2, 32, 32)


@pytest.mark.slow
def test_caches_work_on_compiled_blocks(pipe, images, expected):
    pipe.unet.compile_repeated_blocks(backend="eager")
    pipe.enable_cache(deep_cache(pipe.unet))
    assert 0 < np.abs(sample(pipe, images) - expected).max() < 0.05
