"""Arithmetic of latent consistency distillation, against diffusers' `LCMScheduler` and `DDIMScheduler`."""

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from diffusers_dino.schedules import embed_guidance
from diffusers_dino.training.consistency import ConsistencySchedule, pseudo_huber
from diffusers_dino.training.models import make_scheduler
from diffusers_dino.training.objective import PREDICTION_TYPES, prediction_target

SHAPE = (3, 4, 8, 8)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_steps", [50, 20, 7])
def test_timesteps_are_those_that_are_sampled(num_steps):
    schedule = ConsistencySchedule(make_scheduler(), num_steps)
    sampler = LCMScheduler.from_config(make_scheduler().config, original_inference_steps=num_steps)
    for count in (1, 4):
        sampler.set_timesteps(count)
        assert set(sampler.timesteps.tolist()) <= set(schedule.timesteps.tolist())


def test_neighbours_are_one_step_apart_and_end_at_the_data():
    schedule = ConsistencySchedule(make_scheduler(), 50)
    after, before = schedule.neighbours(torch.tensor([0, 19, 20, 500, 999]))
    assert after.tolist() == [19, 19, 39, 519, 999]
    assert before.tolist() == [-1, -1, 19, 499, 979]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_what_is_predicted_says_what_is_clean_and_what_is_noise(prediction_type, latents, noise):
    scheduler = make_scheduler(prediction_type=prediction_type)
    schedule = ConsistencySchedule(scheduler)
    timesteps = torch.tensor([19, 499, 899])
    noisy = schedule.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))
    target = prediction_target(scheduler, latents, noise, timesteps)
    clean, found = schedule.split(target, noisy, timesteps)
    torch.testing.assert_close(clean, latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_teachers_step_is_that_of_ddim(prediction_type, latents, noise):
    scheduler = make_scheduler(prediction_type=prediction_type)
    scheduler = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    scheduler.timesteps = scheduler.timesteps - scheduler.config["steps_offset"] + 19
    schedule = ConsistencySchedule(scheduler, 50)
    after, before = schedule.neighbours(torch.tensor([519, 519, 519]))
    clean, found = schedule.split(noise, latents, after)
    stepped = scheduler.step(noise, 519, latents).prev_sample
    torch.testing.assert_close(schedule.add_noise(clean, found, before), stepped, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_function_is_the_samplers(prediction_type, latents, noise):
    scheduler = make_scheduler(prediction_type=prediction_type)
    sampler = LCMScheduler.from_config(scheduler.config, original_inference_steps=50)
    sampler.set_timesteps(4)
    schedule = ConsistencySchedule(scheduler, 50)
    for t in sampler.timesteps:
        denoised = sampler.step(noise, t, latents, generator=torch.Generator()).denoised
        found = schedule.consistency(noise, latents, t.expand(3))
        torch.testing.assert_close(found, denoised, atol=1e-4, rtol=1e-4)


def test_at_the_data_the_function_is_the_identity(latents, noise):
    schedule = ConsistencySchedule(make_scheduler())
    assert torch.equal(schedule.consistency(noise, latents, torch.full((3,), -1)), latents)


def test_guidance_is_embedded_as_in_diffusers():
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([0.0, 1.0]), 64)
    torch.testing.assert_close(embed_guidance(torch.tensor([1.0, 2.0]), 64), expected, atol=1e-4, rtol=1e-4)


def test_steps_that_the_schedule_has_not_are_refused():
    for count in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and the 1000"):
            ConsistencySchedule(make_scheduler(), count)


def test_pseudo_huber_is_flat_at_zero_and_linear_far_away(latents):
    assert pseudo_huber(latents, latents) == pytest.approx(0, abs=1e-6)
    assert pseudo_huber(latents + 100, latents) == pytest.approx(100, rel=1e-4)
