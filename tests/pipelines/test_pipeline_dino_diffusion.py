"""`DinoDiffusionPipeline` as a diffusers user calls it."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from kinds import bare_stable_diffusion

import tiny
from diffusers_dino.latents import decode_latents
from diffusers_dino.pixels import vae_to_unit
from tiny import generate, generators


@pytest.mark.parametrize("guidance_rescale", [0.0, 0.7])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampling_equals_stable_diffusions_under_the_same_embeddings(pipe, images, guidance_scale, guidance_rescale):
    embeds = pipe.encode_image(images)
    options = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "num_images_per_prompt": 2}
    ours = generate(pipe, image_embeds=embeds, **options)
    theirs = generate(
        bare_stable_diffusion(pipe),
        prompt_embeds=embeds,
        negative_prompt_embeds=pipe.conditioner.null_condition(len(embeds)),
        **options,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_guidance_starts_from_the_saved_null_condition(pipe, images):
    before, unguided = (generate(pipe, images, guidance_scale=scale) for scale in (3.0, 1.0))
    pipe.conditioner.null_tokens.fill_(1.0)
    assert np.abs(generate(pipe, images, guidance_scale=3.0) - before).max() > 1e-4
    assert np.array_equal(generate(pipe, images, guidance_scale=1.0), unguided)


def test_image_and_its_embeddings_give_the_same_image(pipe, images):
    assert np.array_equal(generate(pipe, images), generate(pipe, image_embeds=pipe.encode_image(images)))


def test_every_way_to_hand_over_the_same_image_gives_the_same_variation(pipe):
    array = (tiny.random_images(1)[0] * 255).round().to(torch.uint8)  # (3, 32, 32)
    hwc = array.movedim(0, -1).numpy()
    ways = [array, array[None], hwc, hwc[None], PIL.Image.fromarray(hwc), [PIL.Image.fromarray(hwc)], array / 255]
    results = [generate(pipe, way) for way in ways]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-5)


def test_output_types_agree(pipe, images):
    array, tensor, pil, latent = (generate(pipe, images, output_type=kind) for kind in ("np", "pt", "pil", "latent"))
    assert array.shape == (4, 32, 32, 1)
    assert array.dtype == np.float32
    assert array.min() >= 0
    assert array.max() <= 1
    assert tensor.shape == (4, 1, 32, 32)
    np.testing.assert_array_equal(tensor.movedim(1, -1).numpy(), array)
    assert [image.mode for image in pil] == ["L"] * 4
    np.testing.assert_array_equal(np.stack([np.array(i) for i in pil]), (array[..., 0] * 255).round())
    assert latent.shape == (4, 4, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(vae_to_unit(decode_latents(pipe.vae, latent)).numpy(), tensor.numpy(), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [tiny.tiny_vae, tiny.tiny_taesd])
def test_autoencoders_of_one_and_three_channels(images, make, channels):
    pipe = tiny.tiny_pipeline(vae=make(channels))
    generated = generate(pipe, images, output_type="pil")
    assert [(image.size, image.mode) for image in generated] == [((32, 32), "L" if channels == 1 else "RGB")] * 4


def test_a_replaced_autoencoder_sets_the_size(pipe, images):
    pipe.vae = tiny.tiny_vae(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
    )
    assert pipe.vae_scale_factor == 2
    assert generate(pipe, images).shape == (4, 16, 16, 1)


def test_variations_of_one_image_stand_together(pipe, images):
    seeds = [10, 11, 20, 21]
    both = generate(pipe, images[:2], num_images_per_prompt=2, generator=generators(*seeds))
    assert len(both) == 4
    first = generate(pipe, images[:1], num_images_per_prompt=2, generator=generators(10, 11))
    second = generate(pipe, images[1:2], num_images_per_prompt=2, generator=generators(20, 21))
    np.testing.assert_allclose(both, np.concatenate([first, second]), atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_latents_take_the_place_of_the_generator(pipe, images):
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(generate(pipe, images, latents=noise, generator=None), generate(pipe, images))


def test_the_noise_of_a_seed_is_the_same_in_every_precision(pipe):
    options = {"device": torch.device("cpu"), "height": 32, "width": 32}
    full, half = (
        pipe.prepare_latents(2, 4, dtype=dtype, generator=generators(0, 1), **options)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert torch.equal(full.to(torch.bfloat16), half)


@pytest.mark.parametrize(("height", "width"), [(16, 48), (48, 16), (36, 20)])
def test_other_sizes_than_the_unets(pipe, images, height, width):
    assert generate(pipe, images[:1], height=height, width=width).shape == (1, height, width, 1)


def test_a_unet_without_a_size_needs_one_or_latents(images):
    pipe = tiny.tiny_pipeline(unet=tiny.tiny_unet(sample_size=None))
    with pytest.raises(ValueError, match=r"no sample_size: give `height` and `width`"):
        generate(pipe, images)
    assert generate(pipe, images[:1], height=16, width=24).shape == (1, 16, 24, 1)
    assert generate(pipe, images[:1], latents=torch.randn(1, 4, 6, 8)).shape == (1, 24, 32, 1)


def test_a_unet_of_a_rectangle(images):
    pipe = tiny.tiny_pipeline(unet=tiny.tiny_unet(sample_size=(8, 4)))
    assert generate(pipe, images[:1]).shape == (1, 32, 16, 1)
    assert generate(pipe, images[:1], width=32).shape == (1, 32, 32, 1)


def test_a_unet_that_projects_its_condition(images):
    unet = tiny.tiny_unet(encoder_hid_dim=tiny.TOKEN_DIM, cross_attention_dim=24)
    assert generate(tiny.tiny_pipeline(unet=unet), images).shape == (4, 32, 32, 1)


def test_own_timesteps_and_sigmas(pipe, images):
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    stepped = generate(pipe, images, num_inference_steps=3)
    same = [float(t) for t in pipe.scheduler.timesteps]
    np.testing.assert_allclose(generate(pipe, images, timesteps=same), stepped, atol=1e-4)
    sigmas = generate(pipe, images, sigmas=[10.0, 1.0, 0.1, 0.0])
    assert pipe.num_timesteps == 3
    assert np.isfinite(sigmas).all()


def test_a_callback_may_change_the_condition_and_the_guidance(pipe, images):
    def end_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return {"image_embeds": tensors["image_embeds"] * 0}

    names = ["image_embeds"]
    changed = generate(
        pipe, images, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=names, guidance_scale=4.0
    )
    assert np.abs(changed - generate(pipe, images, guidance_scale=4.0)).max() > 1e-4

    def start_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 4.0
        return {}

    started = generate(pipe, images, callback_on_step_end=start_guidance, guidance_scale=1.0)
    assert np.abs(started - generate(pipe, images, guidance_scale=1.0)).max() > 1e-4


def test_callback_objects_of_diffusers(pipe, images):
    class Darken(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * 0.5}

    assert not np.array_equal(generate(pipe, images, callback_on_step_end=Darken()), generate(pipe, images))


def test_no_step_records_a_graph(pipe, images):
    assert not generate(pipe, images, output_type="latent").requires_grad


def test_gradients_reach_the_pixels_through_encode_image(pipe, images):
    images.requires_grad_(True)
    pipe.encode_image(images).square().sum().backward()
    assert images.grad.abs().sum() > 0
