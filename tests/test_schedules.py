"""Schedulers of diffusion and of flow matching, one in another's place."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_dino.schedules import add_noise, is_flow, scheduler_like

FLOW_SAMPLERS = (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)


@pytest.mark.parametrize("kind", FLOW_SAMPLERS)
def test_a_sampler_of_flows_takes_the_shift_along_and_brings_it_back(kind):
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    other = scheduler_like(euler, kind)
    assert type(other) is kind
    assert is_flow(other)
    assert scheduler_like(other, FlowMatchEulerDiscreteScheduler).config["shift"] == 3.0


@pytest.mark.parametrize("kind", FLOW_SAMPLERS)
@pytest.mark.parametrize("steps", [3, 10])
def test_samplers_bring_noise_to_the_data_on_a_known_field(kind, steps):
    """Of one data point the field is known: straight lines to it, on which no solver errs."""
    scheduler = scheduler_like(FlowMatchEulerDiscreteScheduler(), kind)
    data, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    z = add_noise(scheduler, data, noise, scheduler.sigmas[:1].expand(2) * 1000)
    for i, t in enumerate(scheduler.timesteps):
        velocity = (z - data) / scheduler.sigmas[i]
        z = scheduler.step(velocity, t, z).prev_sample
    torch.testing.assert_close(z, data, atol=1e-5, rtol=0)


def test_one_euler_step_of_gaussian_data_is_the_closed_form():
    """Data of mean m and deviation d: the velocity is E[e - z | z_s], of which all three are Gaussian."""
    m, d = 0.5, 0.8
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    s, after = scheduler.sigmas[3].double(), scheduler.sigmas[4].double()
    centred = (z.double() - (1 - s) * m) / ((1 - s) ** 2 * d**2 + s**2)
    velocity = s * centred - (m + (1 - s) * d**2 * centred)
    stepped = scheduler.step(velocity.float(), scheduler.timesteps[3], z).prev_sample
    torch.testing.assert_close(stepped.double(), z + (after - s) * velocity, atol=1e-5, rtol=0)


def test_diffusion_keeps_its_noise():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    assert torch.equal(add_noise(scheduler, latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps))
    assert type(scheduler_like(scheduler, DPMSolverMultistepScheduler)) is DPMSolverMultistepScheduler
    assert not is_flow(scheduler_like(scheduler, DPMSolverMultistepScheduler))


def test_kinds_do_not_mix():
    for flow in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        with pytest.raises(ValueError, match="not trained by flow matching"):
            scheduler_like(DDIMScheduler(), flow)
    with pytest.raises(ValueError, match=r"trained by flow matching.*DPMSolverMultistepScheduler"):
        scheduler_like(FlowMatchEulerDiscreteScheduler(), DDIMScheduler)
