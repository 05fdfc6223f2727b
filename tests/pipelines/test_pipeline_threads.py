"""A pipeline serves one call at a time: a second one, from another thread or a callback, is refused."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from kinds import KINDS

import tiny
from adapters import adapter
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoPriorPipeline
from diffusers_dino.pipelines import deep_cache
from tiny import generate


@contextmanager
def held(pipe, run):
    """Start a run in another thread, and stay with it in the UNet's first pass; afterwards let it end."""
    started, go_on = threading.Event(), threading.Event()

    def stop(*arguments):
        started.set()
        assert go_on.wait(60)

    hook = pipe.unet.register_forward_pre_hook(stop)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        try:
            assert started.wait(60) or future.result()
            hook.remove()
            yield future
        finally:
            hook.remove()
            go_on.set()


def own(pipe):
    """A pipeline for another thread, with the same weights."""
    return type(pipe).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))


def test_a_second_call_is_refused_and_the_first_is_not_changed(kind, images):
    pipe = kind.make()
    expected = kind.run(pipe, images)
    with held(pipe, lambda: kind.run(pipe, images)) as first:
        with pytest.raises(RuntimeError, match="in use by another call"):
            kind.run(pipe, images.flip(0))
        if kind.generates:
            with pytest.raises(RuntimeError, match=r"one at a time.*from_pipe"):
                pipe.encode_image(images)
    assert np.array_equal(first.result(), expected)
    assert np.array_equal(kind.run(pipe, images), expected)


def test_many_threads_get_the_right_images_or_an_error(images):
    pipe = tiny.tiny_pipeline()
    settings = [{"num_inference_steps": n, "guidance_scale": scale} for n in (2, 3, 5) for scale in (1.0, 3.0)]
    expected = [generate(pipe, images[:1], **each) for each in settings]

    def serve(number, pipe):
        try:
            return np.array_equal(generate(pipe, images[:1], **settings[number]), expected[number])
        except RuntimeError as error:
            return "in use by another call" in str(error) and "refused"

    with ThreadPoolExecutor(6) as pool:
        shared = list(pool.map(lambda number: serve(number, pipe), list(range(6)) * 4))
        apart = list(pool.map(lambda number: serve(number, own(pipe)), list(range(6)) * 2))
    assert {True} <= set(shared) <= {True, "refused"}
    assert apart == [True] * 12


def test_pipelines_with_one_scheduler_take_turns_too(generating, images):
    pipe = generating.make()
    with held(pipe, lambda: generating.run(pipe, images)):
        with pytest.raises(RuntimeError, match="The DDIMScheduler of this"):
            generating.run(generating.pipeline.from_pipe(pipe), images)
        generating.run(own(pipe), images)  # its own is enough


def test_attention_is_not_read_while_the_unet_samples(images):
    pipe = KINDS["diffusion"].make()
    segmenter = DiffSegPipeline.from_pipe(pipe)
    maps = segmenter.attention_maps(images)
    with held(pipe, lambda: generate(pipe, images)), pytest.raises(RuntimeError, match="UNet2DConditionModel of this"):
        segmenter.attention_maps(images)
    with held(pipe, lambda: segmenter.attention_maps(images)) as first:
        with pytest.raises(RuntimeError, match="UNet2DConditionModel of this"):
            generate(own(pipe), images)
        with pytest.raises(RuntimeError, match="UNet2DConditionModel of this"):
            DiffSegPipeline.from_pipe(pipe)(images)
    assert torch.equal(first.result(), maps)


@pytest.mark.parametrize("reason", ["offloading", "a scale of LoRA"])
def test_a_model_that_changes_in_a_call_is_used_alone(images, reason):
    pipe = KINDS["diffusion"].make()
    if reason == "offloading":
        add_hook_to_module(pipe.unet, ModelHook())
    options = {"cross_attention_kwargs": {"scale": 0.5}} if reason == "a scale of LoRA" else {}
    with held(pipe, lambda: generate(pipe, images, **options)), pytest.raises(RuntimeError, match="one of the two"):
        generate(own(pipe), images)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.load_lora_weights(adapter(0)[0]),
        lambda pipe: pipe.set_adapters("default_0"),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
        lambda pipe: pipe.enable_cache(deep_cache(pipe.unet)),
        lambda pipe: pipe.disable_cache(),
    ],
)
def test_the_unet_is_not_changed_while_it_samples(images, change):
    pipe = KINDS["diffusion"].make()
    with held(pipe, lambda: generate(pipe, images)), pytest.raises(RuntimeError, match="UNet2DConditionModel of this"):
        change(own(pipe))


def test_a_callback_may_encode_and_segment_but_not_sample(generating, images):
    pipe, seen = generating.make(), []

    def callback(pipe, step, timestep, tensors):
        with pytest.raises(RuntimeError, match="in use by another call"):
            generating.run(pipe, images)
        seen.append(pipe.encode_image(images))
        seen.append(DiffSegPipeline.from_pipe(pipe).attention_maps(images))
        return {}

    expected = generating.run(pipe, images)
    assert np.array_equal(generating.run(pipe, images, callback_on_step_end=callback), expected)
    assert len(seen) == 4


def test_after_an_error_the_pipeline_is_free(kind, images):
    pipe = kind.make()
    expected = kind.run(pipe, images)
    hook = pipe.unet.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kind.run(pipe, images)
    hook.remove()
    assert np.array_equal(kind.run(pipe, images), expected)


def test_a_prior_serves_one_call_at_a_time_and_takes_only_sound_guidance():
    prior = DinoPriorPipeline.from_pretrained(Path(__file__).parents[2] / "examples/data/tiny-prior")

    def callback(pipe, step, timestep, tensors):
        with pytest.raises(RuntimeError, match="in use by another call"):
            pipe(num_inference_steps=1)
        return {}

    call = {"num_inference_steps": 2, "guidance_scale": 1.5}
    plain, watched = (
        prior(generator=tiny.generators(0)[0], callback_on_step_end=each, **call).image_embeds
        for each in (None, callback)
    )
    assert torch.equal(plain, watched)
    for scale in (float("nan"), -1.0, "2", None):
        with pytest.raises(ValueError, match="`guidance_scale` must be a finite number"):
            prior(guidance_scale=scale)


def test_pipelines_without_a_scheduler_encode_side_by_side(images):
    whole = tiny.tiny_pipeline()
    one, other = (
        DinoDiffusionPipeline(vae=None, conditioner=whole.conditioner, unet=None, scheduler=None) for _ in range(2)
    )
    with ThreadPoolExecutor(2) as pool:
        tokens = list(pool.map(lambda pipe: [pipe.encode_image(images) for _ in range(4)], [one, other]))
    assert all(torch.equal(each, tokens[0][0]) for each in (*tokens[0], *tokens[1]))
