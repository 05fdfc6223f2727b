"""Every scheduler that diffusers calls compatible, under both parametrisations, against a loop over its methods."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

import tiny
from tiny import generate, generators

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers' schedulers

SCHEDULERS = [entry.name for entry in KarrasDiffusionSchedulers]
STOCHASTIC = [
    ("DDPMScheduler", {}),
    ("DDIMScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSDEScheduler", {}),
]


def pipeline_with(name, **overrides):
    pipe = tiny.tiny_pipeline()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **overrides)
    assert all(pipe.scheduler.config[key] == value for key, value in overrides.items())
    return pipe


def plain_loop(pipe, embeds, steps):
    """Unguided sampling with the scheduler's public methods and nothing else."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators(*range(len(embeds)))])
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            prediction = pipe.unet(scheduler.scale_model_input(latents, t), t, embeds).sample
        latents = scheduler.step(prediction, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    [name for name in SCHEDULERS if name not in {stochastic for stochastic, _ in STOCHASTIC} - {"DDIMScheduler"}],
)
def test_deterministic_schedulers_equal_a_plain_loop(images, name, prediction_type):
    pipe = pipeline_with(name, prediction_type=prediction_type)
    expected = plain_loop(pipe, pipe.encode_image(images), steps=4)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    actual = generate(pipe, images, generator=generators(0, 1, 2, 3), **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_keeps_half_precision(images, name):
    pipe = pipeline_with(name, prediction_type="v_prediction").to(torch.bfloat16)
    latents = generate(pipe, images[:1], num_inference_steps=4, output_type="latent")
    assert latents.dtype == torch.bfloat16
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(("name", "overrides"), STOCHASTIC)
def test_the_noise_of_stochastic_schedulers_belongs_to_its_sample(images, name, overrides):
    pipe = pipeline_with(name, **overrides)
    options = {"eta": 1.0, "output_type": "latent"}
    torch.manual_seed(0)
    together = generate(pipe, images, generator=generators(0, 1, 2, 3), **options)
    torch.manual_seed(1)  # the global state has no say
    alone = torch.cat([generate(pipe, images[i : i + 1], generator=generators(i), **options) for i in (3, 1, 0, 2)])
    torch.testing.assert_close(together[[3, 1, 0, 2]], alone, atol=2e-4, rtol=1e-4)
    same_start = generate(pipe, images[:1].expand(2, -1, -1, -1), generator=generators(0, 5), **options)
    assert (same_start[0] - same_start[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler"])
def test_one_generator_or_none_serves_a_stochastic_scheduler(images, name):
    pipe = pipeline_with(name)
    assert np.array_equal(generate(pipe, images), generate(pipe, images))
    noise = torch.zeros(2, 4, 8, 8)  # what differs then is the noise of the steps
    one, other = generate(pipe, images[:1].expand(2, -1, -1, -1), latents=noise, output_type="latent")
    assert (one - other).abs().max() > 1e-2
    free = [generate(pipe, images, generator=None) for _ in range(2)]
    assert not np.array_equal(*free)


def test_a_noise_seed_in_the_schedulers_config_is_respected(images):
    pipe = pipeline_with("DPMSolverSDEScheduler", noise_sampler_seed=7)
    generate(pipe, images)
    assert pipe.scheduler.noise_sampler_seed == 7


def test_zero_terminal_snr_as_it_should_be_is_silent(images):
    pipe = pipeline_with(
        "DDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated = generate(pipe, images, guidance_scale=3.0, guidance_rescale=0.7)
    assert pipe.scheduler.timesteps[0] == 999
    assert np.isfinite(generated).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prediction_type": "v_prediction", "timestep_spacing": "leading"}, "timestep_spacing='trailing'"),
        ({"prediction_type": "epsilon", "timestep_spacing": "trailing"}, "prediction_type='v_prediction'"),
    ],
)
def test_half_done_zero_terminal_snr_is_warned_of(images, overrides, message):
    pipe = pipeline_with("EulerDiscreteScheduler", rescale_betas_zero_snr=True, **overrides)
    with pytest.warns(UserWarning, match=message):
        generate(pipe, images)


def test_clipped_latents_are_warned_of(images):
    with pytest.warns(UserWarning, match="clip_sample=False"):
        generate(pipeline_with("DDPMScheduler", clip_sample=True), images)


def test_schedulers_refuse_what_they_do_not_take(images):
    pipe = pipeline_with("PNDMScheduler")
    with pytest.raises(ValueError, match=r"PNDMScheduler.*does not support custom sigmas"):
        generate(pipe, images, sigmas=[1.0, 0.0])
    with pytest.raises(ValueError, match="Only one of `timesteps` or `sigmas`"):
        generate(pipe, images, sigmas=[1.0, 0.0], timesteps=[5])
