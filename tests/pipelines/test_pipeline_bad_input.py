"""What the pipeline refuses, and whether the message says what to do."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

import tiny
from diffusers_dino import DinoDiffusionPipeline
from tiny import generate, generators


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_pipeline()


@pytest.fixture(scope="module")
def embeds(pipe):
    return pipe.encode_image(tiny.random_images(2))


def test_neither_or_both_conditions(pipe, embeds):
    with pytest.raises(ValueError, match="either `image` or `image_embeds`"):
        generate(pipe)
    with pytest.raises(ValueError, match="either `image` or `image_embeds`"):
        generate(pipe, tiny.random_images(2), image_embeds=embeds)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_pixels_and_embeddings(pipe, embeds, value):
    image = tiny.random_images(1)
    image[0, 0, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        generate(pipe, image)
    broken = embeds.clone()
    broken[1, 2, 3] = value
    with pytest.raises(ValueError, match="`image_embeds` contains NaN"):
        generate(pipe, image_embeds=broken)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "radiograph.png"}, "PIL image"),
        ({"image_embeds": np.zeros((2, 5, 32))}, "`image_embeds` must be a tensor"),
        ({"image": tiny.random_images(1), "latents": [0.0]}, "`latents` must be a tensor"),
    ],
    ids=["image", "embeddings", "latents"],
)
def test_inputs_of_the_wrong_type(pipe, given, message):
    with pytest.raises(TypeError, match=message):
        generate(pipe, **given)


@pytest.mark.parametrize("shape", [(5, 32), (2, 4, 32), (2, 5, 16), (0, 5, 32), (2, 1, 5, 32)])
def test_embeddings_of_another_shape(pipe, shape):
    with pytest.raises(ValueError, match=r"\(B, 5, 32\).*got \("):
        generate(pipe, image_embeds=torch.zeros(shape))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("height", 30, "`height` must be a positive multiple of 4, got 30"),
        ("height", 0, "`height` must be a positive multiple of 4, got 0"),
        ("width", -8, "`width` must be a positive multiple of 4"),
        ("width", 32.0, "`width` must be a positive multiple of 4, got 32.0"),
        ("num_inference_steps", 0, "`num_inference_steps` must be a positive integer"),
        ("num_images_per_prompt", 1.5, "`num_images_per_prompt` must be a positive integer"),
        ("num_images_per_prompt", True, "`num_images_per_prompt` must be a positive integer"),
        *(
            ("guidance_scale", value, "`guidance_scale` must be a finite number of 0 or more")
            for value in (float("nan"), float("inf"), -0.1, "2.0", None, True, [2.0], torch.ones(2), np.float32("nan"))
        ),
        *(
            (name, value, rf"`{name}` must be in \[0, 1\]")
            for name in ("guidance_rescale", "eta")
            for value in (1.2, -0.1, float("nan"), "0.5", None)
        ),
        ("cross_attention_kwargs", {"scale": float("nan")}, "`scale` must be a finite number, got nan"),
        ("cross_attention_kwargs", {"scale": "half"}, "`scale` must be a finite number, got 'half'"),
        ("output_type", "jpeg", "`output_type` must be one of"),
        ("callback_on_step_end_tensor_inputs", ["prompt_embeds"], "must be among"),
        ("latents", torch.zeros(2, 4, 8, 4), "`latents` must have shape"),
        ("latents", torch.zeros(1, 4, 8, 8), "`latents` must have shape"),
        ("latents", torch.zeros(2, 3, 8, 8), "`latents` must have shape"),
        ("latents", torch.full((2, 4, 8, 8), float("nan")), "`latents` contains NaN"),
    ],
)
def test_arguments_out_of_range(pipe, embeds, argument, value, message):
    options = {"height": 32, "width": 32} if argument == "latents" else {}
    with pytest.raises(ValueError, match=message):
        generate(pipe, image_embeds=embeds, **{**options, argument: value})


@pytest.mark.parametrize("scale", [2, np.float64(2), np.float32(2), torch.tensor(2.0)])
def test_a_guidance_scale_of_any_type_of_number(pipe, embeds, scale):
    assert np.array_equal(
        generate(pipe, image_embeds=embeds, guidance_scale=scale), generate(pipe, image_embeds=embeds)
    )


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
@pytest.mark.parametrize(
    "values",
    [
        *([], (), "999", 999, {}, [500, 700, 100], [700, 700, 100], [700, -1], [700, float("nan")], ["700", "100"]),
        *([700, None], [True], [[700, 100]], torch.tensor([]), np.array([100.0, 700.0, 1.0])),
    ],
)
def test_own_schedules_that_do_not_descend(embeds, name, values):
    pipe = tiny.tiny_pipeline(scheduler=EulerDiscreteScheduler.from_config(tiny.tiny_scheduler().config))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"`{name}` must be a list of descending numbers"):
        generate(pipe, image_embeds=embeds, **{name: values})
    assert not calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [1000, 500]}, "within 999 and 0"),
        ({"timesteps": [100, 500]}, "descending"),
        ({"sigmas": [0.1, 10.0]}, "from an image to noise"),
        ({"sigmas": [10.0]}, "makes no step"),
    ],
)
def test_own_schedules_that_lead_nowhere(embeds, options, message):
    pipe = tiny.tiny_pipeline(scheduler=EulerDiscreteScheduler.from_config(tiny.tiny_scheduler().config))
    with pytest.raises(ValueError, match=message):
        generate(pipe, image_embeds=embeds, **options)
    own = [generate(pipe, image_embeds=embeds, timesteps=steps) for steps in ([900, 400], (900, 400))]
    own += [generate(pipe, image_embeds=embeds, timesteps=kind([900, 400])) for kind in (np.array, torch.tensor)]
    assert all(np.array_equal(each, own[0]) for each in own)


@pytest.mark.parametrize(
    "name",
    [
        *("SCMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
        *("RePaintScheduler", "KarrasVeScheduler"),
        *("CogVideoXDPMScheduler", "ScoreSdeVeScheduler", "DDPMWuerstchenScheduler"),
    ],
)
@pytest.mark.parametrize("settings", [{}, tiny.tiny_scheduler().config], ids=["its own", "the model's"])
def test_schedulers_of_other_models(embeds, name, settings):
    pipe = tiny.tiny_pipeline(scheduler=getattr(diffusers, name).from_config(settings))
    with pytest.raises(ValueError, match=rf"{name} (cannot be used.*KarrasDiffusion|leads from an image to noise)"):
        generate(pipe, image_embeds=embeds)


def test_what_is_not_a_scheduler(embeds):
    pipe = tiny.tiny_pipeline()
    pipe.scheduler = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity cannot be used here"):
        generate(pipe, image_embeds=embeds)


def test_generators_that_do_not_fit(pipe, embeds):
    with pytest.raises(ValueError, match="4 are asked for, 2 generators"):
        generate(pipe, image_embeds=embeds, num_images_per_prompt=2, generator=generators(0, 1))
    with pytest.raises(TypeError, match=r"torch\.Generator"):
        generate(pipe, image_embeds=embeds, generator=[0, 1])
    with pytest.raises(TypeError, match=r"torch\.Generator"):
        generate(pipe, image_embeds=embeds, generator=42)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cross_attention_dim": 48}, r"width 48 .*cross_attention_dim=32.*projection_dim=48"),
        ({"in_channels": 3}, "latents have 4 channels, but the UNet has in_channels=3"),
        ({"out_channels": 8}, "out_channels=8"),
        ({"num_class_embeds": 3}, "num_class_embeds"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "image_proj"}, "image_proj"),
        ({"cross_attention_dim": (32, 16)}, r"different widths, \[16, 32\]"),
    ],
)
def test_a_unet_that_does_not_fit(pipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        DinoDiffusionPipeline(**{**pipe.components, "unet": tiny.tiny_unet(**overrides)})


def test_a_component_that_was_replaced_by_a_wrong_one(embeds):
    pipe = tiny.tiny_pipeline()
    pipe.vae = tiny.tiny_vae(latent_channels=3)
    with pytest.raises(ValueError, match="latents have 3 channels"):
        generate(pipe, image_embeds=embeds)


def test_components_that_are_missing(embeds):
    without_vae = tiny.tiny_pipeline(vae=None)
    with pytest.raises(ValueError, match="needs a VAE"):
        generate(without_vae, image_embeds=embeds, height=64, width=64)
    latents = generate(without_vae, image_embeds=embeds, height=64, width=64, output_type="latent")
    assert latents.shape == (2, 4, 8, 8)

    without_conditioner = tiny.tiny_pipeline(conditioner=None)
    with pytest.raises(ValueError, match="no conditioner to encode"):
        generate(without_conditioner, tiny.random_images(1), guidance_scale=1.0)
    with pytest.raises(ValueError, match="null condition"):
        generate(without_conditioner, image_embeds=embeds)
    assert generate(without_conditioner, image_embeds=embeds, guidance_scale=1.0).shape == (2, 32, 32, 1)

    with pytest.raises(ValueError, match="no unet"):
        generate(tiny.tiny_pipeline(unet=None), image_embeds=embeds)
    for name in ("unet", "scheduler"):
        with pytest.raises(ValueError, match="no unet or no scheduler"):
            generate(tiny.tiny_pipeline(**{name: None}), image_embeds=embeds, height=32, width=32)


def test_numpy_integers_are_integers(pipe, embeds):
    assert generate(pipe, image_embeds=embeds, height=np.int64(32), num_images_per_prompt=np.int32(1)).shape[0] == 2


def test_images_that_come_out_as_nan(embeds):
    pipe = tiny.tiny_pipeline()
    pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"NaN or infinity.*float16"):
        generate(pipe, image_embeds=embeds)
