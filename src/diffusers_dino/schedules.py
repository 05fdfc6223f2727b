"""Noise schedules of diffusion and of flow matching: which is which, and how one sampler takes another's place.

Flow matching mixes on a straight line, `z_s = (1 - s) z + s e` with s in [0, 1], and its model predicts the velocity
`e - z` (Lipman et al., arXiv 2210.02747; Esser et al., arXiv 2403.03206, section 2). The model is told s as the
timestep `s * num_train_timesteps`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import ModelMixin

__all__ = ["add_noise", "embed_guidance", "is_flow", "is_flow_model", "note_flow", "require_kind", "scheduler_like"]

_NOTE = "_flow_matching"  # diffusers keeps and passes on what begins so, without reading it


def is_flow(scheduler: SchedulerMixin | None) -> bool:
    """Whether a scheduler samples a flow: diffusers' `FlowMatch...`, or another one with `use_flow_sigmas`."""
    flow_sigmas = getattr(scheduler, "config", {}).get("use_flow_sigmas")
    return type(scheduler).__name__.startswith("FlowMatch") or bool(flow_sigmas)


def is_flow_model(denoiser: ModelMixin) -> bool:
    """Whether a denoiser was trained by flow matching, as `note_flow` noted in its config."""
    return bool(denoiser.config.get(_NOTE))


def note_flow(
    denoiser: ModelMixin | None, scheduler: SchedulerMixin | None, flow_matching: bool | None = None
) -> None:
    """Note in the config of a denoiser, which is saved, whether it is of a flow: if not said, as `scheduler` is.

    A note that is there already stays, unless `flow_matching` says otherwise.
    """
    if denoiser is not None and (flow_matching is not None or denoiser.config.get(_NOTE) is None):
        denoiser.register_to_config(**{_NOTE: is_flow(scheduler) if flow_matching is None else flow_matching})


def add_noise(scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a model is shown at timesteps `(B,)`: latents and noise `(B, L, h, w)`, mixed to unit variance."""
    if is_flow(scheduler):
        s = (timesteps / scheduler.config["num_train_timesteps"]).view(-1, 1, 1, 1).to(latents)
        return (1 - s) * latents + s * noise
    schedule = DDPMScheduler.from_config(scheduler.config)  # some others do not keep unit variance
    return schedule.add_noise(latents, noise, timesteps)


def require_kind(kind: type[SchedulerMixin], samples_flows: bool, flow_matching: bool) -> None:
    """Refuse with a ValueError, by its name, a scheduler that does not fit how a model was trained."""
    if samples_flows and not flow_matching:
        raise ValueError(
            f"This model was not trained by flow matching, and {kind.__name__} samples only models that were: use "
            "DDIMScheduler, or another of diffusers' KarrasDiffusionSchedulers."
        )
    if flow_matching and not samples_flows:
        raise ValueError(
            f"This model was trained by flow matching, which {kind.__name__} does not sample as it is: use "
            "FlowMatchEulerDiscreteScheduler, or DPMSolverMultistepScheduler or UniPCMultistepScheduler with "
            "use_flow_sigmas=True and prediction_type='flow_prediction'."
        )


def scheduler_like(scheduler: SchedulerMixin, kind: type[SchedulerMixin]) -> SchedulerMixin:
    """A scheduler of class `kind` with the noise schedule of `scheduler`; a ValueError if `kind` cannot have it."""
    settings, to_flow = dict(scheduler.config), kind.__name__.startswith("FlowMatch")
    can_flow = to_flow or "use_flow_sigmas" in inspect.signature(kind.__init__).parameters
    if not is_flow(scheduler):
        require_kind(kind, to_flow, False)
        return kind.from_config(settings)
    require_kind(kind, can_flow, True)
    shift = settings.get("shift", settings.get("flow_shift", 1.0))
    if to_flow:
        return kind.from_config(settings, shift=shift)
    return kind.from_config(settings, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)


def embed_guidance(guidance_scale: Tensor, width: int) -> Tensor:
    """Guidance scales `(B,)`, 1 being none, as a distilled UNet takes them: `(B, width)` (arXiv 2310.04378)."""
    return get_timestep_embedding((guidance_scale - 1) * 1000, width, downscale_freq_shift=1)
