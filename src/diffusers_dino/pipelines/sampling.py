"""What schedulers of diffusers differ in, behind one face: timesteps, arguments of a step, sources of noise."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

__all__ = ["Generators", "random_numbers_of", "rewind", "set_timesteps", "states_of", "step_arguments"]

Generators = torch.Generator | list[torch.Generator] | None


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> Tensor:
    """Prepare a scheduler for sampling.

    Args:
        scheduler: Any scheduler of diffusers.
        num_inference_steps: Number of steps, spaced as the scheduler does; ignored with `timesteps` or `sigmas`.
        device: Where the timesteps will be.
        timesteps: Timesteps of one's own, descending.
        sigmas: Noise levels of one's own, descending to 0.

    Returns:
        The timesteps of the model's calls, in order: `(T,)`, more than the steps for solvers of higher order.

    Raises:
        ValueError: If both are given, or the scheduler does not take the one that is.
    """
    own = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if len(own) > 1:
        raise ValueError("Both `timesteps` and `sigmas` were given; give one of them.")
    for name in own:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{type(scheduler).__name__} does not take `{name}` of one's own. Give `num_inference_steps`, or use "
                "a scheduler that does, such as EulerDiscreteScheduler."
            )
    scheduler.set_timesteps(**(own or {"num_inference_steps": num_inference_steps}), device=device)
    return scheduler.timesteps


def step_arguments(scheduler: SchedulerMixin, generator: Generators, eta: float, batch_size: int) -> dict[str, Any]:
    """Those of `generator` and `eta` that this scheduler's `step` takes, for all its steps.

    DPMSolverSDEScheduler takes neither: it draws its noise from Brownian trees. They get one seed for each sample
    here, so that the noise follows `generator` as it does in the other schedulers.
    """
    if "noise_sampler_seed" in scheduler.config and scheduler.config["noise_sampler_seed"] is None:
        scheduler.noise_sampler_seed = None if generator is None else random_numbers_of(generator, batch_size)
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}


def random_numbers_of(generator: torch.Generator | list[torch.Generator], count: int) -> list[int]:
    """Draw one seed for each sample: from its own generator, or one after the other from the common one."""
    sources = generator if isinstance(generator, list) else [generator] * count
    return [int(torch.randint(2**31, (), generator=source, device=source.device)) for source in sources]


def states_of(generator: Generators) -> list[Tensor]:
    """Where each generator stands, for `rewind`; none for None."""
    return [source.get_state() for source in _listed(generator)]


def rewind(generator: Generators, states: list[Tensor]) -> None:
    """Put each generator back to where it stood."""
    for source, state in zip(_listed(generator), states, strict=True):
        source.set_state(state)


def _listed(generator: Generators) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [] if generator is None else [generator]
