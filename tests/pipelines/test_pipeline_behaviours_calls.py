"""What diffusers asks of every call: arguments by their usual names, batches, outputs, callbacks, seeds, types."""

import inspect

import numpy as np
import pytest
import torch
from kinds import KINDS

import tiny
from tiny import generators

USUAL = {"generator", "output_type", "return_dict"}
OF_SAMPLING = {
    *("height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "num_images_per_prompt"),
    *("eta", "latents", "cross_attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
}


def test_arguments_have_diffusers_names_and_defaults(kind):
    parameters = inspect.signature(kind.pipeline.__call__).parameters
    wanted = USUAL | (OF_SAMPLING if kind.generates else set())
    assert wanted <= set(parameters)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in wanted)


def test_dict_and_tuple_hold_the_same(kind, images):
    pipe, options = kind.make(), {} if not kind.generates else {"num_inference_steps": 2, "output_type": "np"}
    given = (images, images.flip(0)) if kind is KINDS["interpolation"] else (images,)
    output = pipe(*given, generator=generators(*range(len(images))), **options)
    as_tuple = pipe(*given, generator=generators(*range(len(images))), return_dict=False, **options)
    assert len(as_tuple) == len(output.keys())
    for name, value in zip(output.keys(), as_tuple, strict=True):
        assert output[name] is getattr(output, name)
        for one, other in zip(output[name], value, strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_batch_is_its_images(kind, images):
    pipe = kind.make()
    together = kind.run(pipe, images[:3])
    assert len(together) == 3
    if kind.generates:  # image i has generator i
        alone = [kind.run(pipe, images[i : i + 1], generator=generators(i), num_images_per_prompt=1) for i in range(3)]
    else:
        alone = [kind.run(pipe, images[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_in_a_fixed_batch_an_image_is_the_same_bits_beside_any_others(generating, images, batch_size, guidance_scale):
    pipe = generating.make()
    pipe.enable_fixed_batch(batch_size)
    together = generating.run(pipe, images[:3], guidance_scale=guidance_scale)
    for i in range(3):
        alone = generating.run(
            pipe, images[i : i + 1], guidance_scale=guidance_scale, generator=generators(i), num_images_per_prompt=1
        )
        assert np.array_equal(alone[0], together[i])
    pipe.disable_fixed_batch()
    np.testing.assert_allclose(generating.run(pipe, images[:3], guidance_scale=guidance_scale), together, atol=1e-4)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_fixed_batch_has_rows(size):
    with pytest.raises((TypeError, ValueError), match="batch_size"):
        tiny.tiny_pipeline().enable_fixed_batch(size)


def test_guidance_changes_the_images_and_without_it_there_is_none(generating, images):
    pipe = generating.make()
    none, less, more = (generating.run(pipe, images, guidance_scale=scale) for scale in (1.0, 0.0, 5.0))
    assert np.array_equal(none, less)
    assert np.abs(more - none).max() > 1e-3


def test_callbacks_get_what_they_ask_for_and_no_more(generating, images):
    pipe, seen = generating.make(), []

    def watch(pipeline, step, timestep, tensors):
        seen.append(set(tensors))
        last = step == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else tensors

    for names in (["latents"], pipe._callback_tensor_inputs):
        result = generating.run(
            pipe, images, output_type="latent", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names
        )
        assert seen[-2:] == [set(names)] * 2
        assert not result.any()


def test_a_callback_interrupts(generating, images):
    pipe, states = generating.make(), []

    def keep(pipeline, step, timestep, tensors):
        states.append(tensors["latents"])
        pipeline._interrupt = step == 0 and len(states) == 1
        return {}

    stopped = generating.run(pipe, images, output_type="latent", callback_on_step_end=keep, num_inference_steps=3)
    assert len(states) == 1
    assert torch.equal(stopped, states[0])
    generating.run(pipe, images, callback_on_step_end=keep, num_inference_steps=3)
    assert len(states) == 4  # the next call starts afresh


def test_components_make_the_pipeline_again(kind, images):
    pipe = kind.make()
    again = kind.pipeline(**pipe.components)
    assert np.array_equal(kind.run(again, images), kind.run(pipe, images))


def test_encoding_works_without_the_other_models(generating, images):
    """`encode_prompt` of diffusers: the encoder may be freed before the denoiser is loaded."""
    whole = generating.make()
    encoder = generating.pipeline(vae=None, conditioner=whole.conditioner, unet=None, scheduler=None)
    embeds = encoder.encode_image(images)
    rest = generating.pipeline(vae=whole.vae, conditioner=None, unet=whole.unet, scheduler=whole.scheduler)
    options = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "np"}
    seeds = {"generator": generators(*range(len(images)))}
    if generating is KINDS["interpolation"]:
        target = encoder.encode_image(images.flip(0))
        apart = rest(source_embeds=embeds, target_embeds=target, fractions=[0.5], **options, **seeds).images
        seeds = {"generator": generators(*range(len(images)))}
        together = whole(images, images.flip(0), [0.5], **options, **seeds).images
    else:
        apart = rest(image_embeds=embeds, **options, **seeds).images
        together = generating.run(whole, images, guidance_scale=1.0)
    np.testing.assert_allclose(apart, together, atol=1e-6)


@pytest.mark.gpu
def test_a_pipeline_is_moved_as_a_whole(kind, images):
    pipe = kind.make()
    plain = kind.run(pipe, images)
    pipe.to("cuda")
    assert {pipe.device.type, pipe.unet.device.type, pipe.vae.device.type, pipe.conditioner.device.type} == {"cuda"}
    assert np.abs(kind.run(pipe, images) - plain).mean() < 2e-3


def test_the_progress_bar_obeys(generating, images, capsys):
    pipe = generating.make()
    pipe.set_progress_bar_config(disable=False, desc="Sampling")
    generating.run(pipe, images)
    assert "Sampling" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    generating.run(pipe, images)
    assert not capsys.readouterr().err
