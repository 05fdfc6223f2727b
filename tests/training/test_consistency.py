"""Arithmetic of consistency distillation, against diffusers' `LCMScheduler`, `TCDScheduler` and `DDIMScheduler`."""

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline

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


@pytest.mark.parametrize(("num_steps", "num_phases"), [(50, 1), (20, 1), (7, 1), (40, 4), (20, 4), (200, 8)])
def test_timesteps_are_those_that_are_sampled(num_steps, num_phases):
    schedule = ConsistencySchedule(make_scheduler(), num_steps, num_phases)
    sampler = schedule.sampler()
    for count in (1, 4):
        sampler.set_timesteps(count)
        assert set(sampler.timesteps.tolist()) <= set(schedule.timesteps.tolist())


def test_steps_of_the_sampler_lead_from_phase_to_phase():
    schedule = ConsistencySchedule(make_scheduler(), 20, 4)
    sampler = schedule.sampler()
    sampler.set_timesteps(4)
    _, _, edges = schedule.neighbours(sampler.timesteps)
    assert edges.tolist() == [*sampler.timesteps[1:].tolist(), -1]


def test_neighbours_are_one_step_apart_and_end_at_the_data():
    schedule = ConsistencySchedule(make_scheduler(), 50, 1)
    start, end, edge = schedule.neighbours(torch.tensor([0, 19, 20, 500, 999]))
    assert start.tolist() == [19, 19, 39, 519, 999]
    assert end.tolist() == [-1, -1, 19, 499, 979]
    assert edge.tolist() == [-1] * 5


def test_a_phase_ends_where_the_next_begins():
    schedule = ConsistencySchedule(make_scheduler(), 40, 4)
    start, end, edge = schedule.neighbours(torch.tensor([0, 240, 249, 250, 274, 980]))
    assert start.tolist() == [24, 249, 249, 274, 274, 999]
    assert end.tolist() == [-1, 224, 224, 249, 249, 974]
    assert edge.tolist() == [-1, -1, -1, 249, 249, 749]


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
    schedule = ConsistencySchedule(scheduler, 50, 1)
    start, end, _ = schedule.neighbours(torch.tensor([519, 519, 519]))
    stepped = scheduler.step(noise, 519, latents).prev_sample
    torch.testing.assert_close(schedule.jump(noise, latents, start, end), stepped, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_function_of_one_phase_is_the_samplers(prediction_type, latents, noise):
    schedule = ConsistencySchedule(make_scheduler(prediction_type=prediction_type), 50, 1)
    sampler = schedule.sampler()
    sampler.set_timesteps(4)
    for t in sampler.timesteps:
        denoised = sampler.step(noise, t, latents, generator=torch.Generator()).denoised
        start, _, edge = schedule.neighbours(t.expand(3))
        torch.testing.assert_close(schedule.jump(noise, latents, start, edge), denoised, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_function_of_several_phases_is_the_samplers(prediction_type, latents, noise):
    schedule = ConsistencySchedule(make_scheduler(prediction_type=prediction_type), 40, 4)
    sampler = schedule.sampler()
    sampler.set_timesteps(4)
    for t in sampler.timesteps[:-1]:  # the last step ends beside the data
        stepped = sampler.step(noise, t, latents, eta=0.0).prev_sample
        start, _, edge = schedule.neighbours(t.expand(3))
        torch.testing.assert_close(schedule.jump(noise, latents, start, edge), stepped, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [-1, 249])
def test_at_the_end_of_a_phase_the_function_is_the_identity(prediction_type, t, latents, noise):
    schedule = ConsistencySchedule(make_scheduler(prediction_type=prediction_type))
    timesteps = torch.full((3,), t)
    assert torch.equal(schedule.jump(noise, latents, timesteps, timesteps), latents)


def test_guidance_is_embedded_as_in_diffusers():
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([0.0, 1.0]), 64)
    torch.testing.assert_close(embed_guidance(torch.tensor([1.0, 2.0]), 64), expected, atol=1e-4, rtol=1e-4)


def test_steps_that_the_schedule_has_not_are_refused():
    for count in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and the 1000"):
            ConsistencySchedule(make_scheduler(), count, 1)


def test_phases_that_the_steps_do_not_fill_are_refused():
    for steps, phases, message in ((50, 4, "multiple of 4 that divides 1000"), (40, 0, "1 or more phases")):
        with pytest.raises(ValueError, match=message):
            ConsistencySchedule(make_scheduler(), steps, phases)


def test_pseudo_huber_is_flat_at_zero_and_linear_far_away(latents):
    assert pseudo_huber(latents, latents) == pytest.approx(0, abs=1e-6)
    assert pseudo_huber(latents + 100, latents) == pytest.approx(100, rel=1e-4)
