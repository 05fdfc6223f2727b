"""What is asked of components and arguments before a pipeline works on them, and how a refusal is worded."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import DiffusionPipeline, LCMScheduler, SchedulerMixin, TCDScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..denoisers import family_of, title_of
from ..latents import VAE
from ..schedules import is_flow, require_kind

__all__ = [
    "Generators",
    "StepCallback",
    "check_callback",
    "check_channels",
    "check_choice",
    "check_components",
    "check_descent",
    "check_embeds",
    "check_finite",
    "check_generator",
    "check_number",
    "check_numbers",
    "check_schedule",
    "check_scheduler",
    "check_sides",
    "check_steps",
    "default_steps",
    "guidance_width",
    "image_size",
    "initial_noise",
    "latent_size",
    "seen_by",
]

Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[..., dict[str, Any] | None] | PipelineCallback | MultiPipelineCallbacks


def latent_size(pipe: DiffusionPipeline, give: str = "`size`") -> tuple[int, int]:
    """Height and width of the latents that a pipeline was trained on; if it does not know them, what to `give`."""
    if pipe.denoiser is None:
        raise ValueError("This pipeline has no unet and no transformer; one of them is needed.")
    size = pipe.denoiser.config.get("sample_size")
    if size is None:
        raise ValueError(f"The config of {type(pipe.denoiser).__name__} has no sample_size: give {give} in pixels.")
    return (size, size) if isinstance(size, int) else tuple(size)


def image_size(pipe: DiffusionPipeline) -> int:
    """The side in pixels of the images that a pipeline was trained on, by its denoiser; the longer one of two."""
    return max(latent_size(pipe)) * pipe.vae_scale_factor


def check_components(pipe: DiffusionPipeline) -> None:
    """Refuse a denoiser that takes other tokens than the conditioner makes, or other latents than the VAE makes.

    Likewise a second denoiser, and a fusion of other encoders than the conditioner's.
    """
    if pipe.unet is not None and pipe.transformer is not None:
        raise ValueError("A pipeline has one denoiser: give `unet` or `transformer`, and None for the other.")
    denoiser, conditioner = pipe.denoiser, pipe.conditioner
    if denoiser is None:
        return
    family, config = family_of(denoiser), denoiser.config
    width = family.token_width(config)
    if conditioner is not None:
        family.check_tokens(config, conditioner.token_dim, conditioner.config["projection_dim"] is not None)
    if pipe.fusion is not None:
        pipe.fusion.require_fit(conditioner, width)
    check_channels(pipe.vae, denoiser, *family.latent_sides)


def check_sides(pipe: DiffusionPipeline, **sides: int) -> None:
    """Refuse sides in pixels, by their names, that do not fill the denoiser's patches, or that it cannot place."""
    family, config, f = family_of(pipe.denoiser), pipe.denoiser.config, pipe.vae_scale_factor
    check_numbers(f * family.patch_size(config), **sides)
    family.check_size(config, *(side // f for side in sides.values()))


def guidance_width(denoiser: nn.Module) -> int | None:
    """Width in which a distilled UNet takes the guidance scale as an input; None of others."""
    return denoiser.config.get("time_cond_proj_dim")


def check_channels(vae: VAE | None, denoiser: nn.Module | None, *sides: str) -> None:
    """Refuse a model whose `sides` (`"in_channels"`, `"out_channels"`) are not as many as the VAE's latents have."""
    if vae is None or denoiser is None:
        return
    config, title = denoiser.config, title_of(denoiser)
    channels = {side: config["in_channels"] if config[side] is None else config[side] for side in sides}
    if set(channels.values()) != {vae.config["latent_channels"]}:
        raise ValueError(
            f"The VAE's latents have {vae.config['latent_channels']} channels, but the {title} has "
            f"{' and '.join(f'{side}={count}' for side, count in channels.items())}. They must agree: use the VAE of "
            f"the {title}'s training, and no {title} for inpainting."
        )


def check_scheduler(scheduler: Any) -> None:
    """Refuse with a ValueError what works neither as the schedulers of Stable Diffusion do, nor as those of flows."""
    needed = ["config", "set_timesteps", "step"]
    needed += [] if is_flow(scheduler) else ["scale_model_input", "init_noise_sigma"]
    lacking = [name for name in needed if not hasattr(scheduler, name)]
    if "num_train_timesteps" not in inspect.signature(type(scheduler).__init__).parameters:
        lacking.append("timesteps of its own")  # what it was made from is kept in its config, too
    if not lacking:  # the first three are the prediction, the timestep and the latents
        step = list(inspect.signature(scheduler.step).parameters.values())[3:]
        named = (each for each in step if each.kind is each.POSITIONAL_OR_KEYWORD)
        lacking = [f"step without {each.name}" for each in named if each.default is each.empty]
    if lacking:
        raise ValueError(
            f"{type(scheduler).__name__} cannot be used here: it has no {', no '.join(lacking)}. Use one of "
            "diffusers' KarrasDiffusionSchedulers, such as DDIMScheduler."
        )


def default_steps(scheduler: Any, given: int | None = None) -> int:
    """Denoising steps, if none are given: 4 with what samples distilled models (LCM, TCD), else 50."""
    return given if given is not None else 4 if isinstance(scheduler, LCMScheduler | TCDScheduler) else 50


def check_steps(scheduler: Any, timesteps: Any = None, sigmas: Any = None) -> None:
    """Refuse with a ValueError a caller's `timesteps` or `sigmas` that do not descend, or lie outside their range."""
    last = scheduler.config["num_train_timesteps"] - (0 if is_flow(scheduler) else 1)
    for name, values, top in (("timesteps", timesteps, last), ("sigmas", sigmas, math.inf)):
        if values is None:
            continue
        listed = values.tolist() if hasattr(values, "tolist") else values
        listed = listed if isinstance(listed, (list, tuple)) else []
        fits = listed and all(_is_number(value) and 0 <= value <= top for value in listed)
        if name == "sigmas" and fits and listed[0] < listed[-1]:  # the ramp that EDM's schedulers take
            listed = listed[::-1]
        if not fits or any(before <= after for before, after in pairwise(listed)):
            range_ = f"within {last} and 0" if name == "timesteps" else "of 0 or more"
            raise ValueError(f"`{name}` must be a list of descending numbers {range_}, got {values!r}.")


def check_descent(timesteps: Tensor, scheduler: Any) -> None:
    """Refuse with a ValueError the timesteps of a scheduler if they do not lead from noise to an image."""
    if not len(timesteps):
        raise ValueError(f"{type(scheduler).__name__} makes no step of one of the `sigmas`: give two or more.")
    if any(levels[0] < levels[-1] for levels in (timesteps, getattr(scheduler, "sigmas", timesteps))):
        raise ValueError(
            f"{type(scheduler).__name__} leads from an image to noise, not to an image: use a scheduler for sampling."
        )


def check_schedule(scheduler: SchedulerMixin, flow_matching: bool) -> None:
    """Refuse a scheduler of the wrong kind; warn of settings that are legal, and known to spoil latent diffusion."""
    require_kind(type(scheduler), is_flow(scheduler), flow_matching)
    config, warn = scheduler.config, partial(warnings.warn, stacklevel=3)
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            "The scheduler shifts times by a number that this pipeline does not give it (use_dynamic_shifting): build "
            "it with use_dynamic_shifting=False and a `shift`."
        )
    if config.get("clip_sample"):
        warn(
            "The scheduler clips its predictions to [-1, 1] (clip_sample=True, the default of some of diffusers' "
            "schedulers), which distorts latents: they reach further. Build it with clip_sample=False."
        )
    if not config.get("rescale_betas_zero_snr"):
        return
    if config.get("timestep_spacing") != "trailing":
        warn(
            "The schedule ends at zero SNR (rescale_betas_zero_snr=True), but with "
            f"timestep_spacing={config.get('timestep_spacing')!r} sampling does not start there. "
            "Use timestep_spacing='trailing' (Lin et al., arXiv 2305.08891, section 3.3)."
        )
    if config.get("prediction_type") == "epsilon":
        warn(
            "At zero SNR the noise is all that the model sees, so predicting it (prediction_type='epsilon') says "
            "nothing about the image. Train with prediction_type='v_prediction' (arXiv 2305.08891, section 3.2)."
        )


def check_embeds(embeds: Tensor, num_tokens: int | None, width: int | None, name: str = "image_embeds") -> None:
    """Refuse condition tokens that are not a finite `(B, num_tokens, width)`; None allows any number."""
    if not isinstance(embeds, Tensor):
        raise TypeError(f"`{name}` must be a tensor (B, S, D), got {type(embeds).__name__}.")
    shape = tuple(embeds.shape)
    fits = len(shape) == 3 and 0 not in shape and num_tokens in (None, shape[1]) and width in (None, shape[2])
    if not fits:
        raise ValueError(
            f"`{name}` must have shape (B, {num_tokens or 'S'}, {width or 'D'}), as `encode_image` gives, got {shape}."
        )
    if not torch.isfinite(embeds).all():
        raise ValueError(f"`{name}` contains NaN or infinity.")


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN, which would silently turn black, with a RuntimeError that names causes."""
    if not torch.isfinite(tensor).all():
        raise RuntimeError(
            f"The {name} contain NaN or infinity. Autoencoders can overflow in float16: use bfloat16, or call "
            "pipe.vae.to(torch.float32). In float32, suspect the weights or the noise schedule."
        )


def check_generator(generator: Any, batch_size: int | None = None) -> None:
    """Refuse what is neither None, a generator, nor a list of generators, one for each image of a batch."""
    listed = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(item, torch.Generator) for item in listed):
        raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
    if isinstance(generator, list) and batch_size not in (None, len(generator)):
        raise ValueError(
            f"A list of generators needs one for each image: {batch_size} are asked for, {len(generator)} generators "
            "were given."
        )


def seen_by(callback: StepCallback | None, names: list[str] | None) -> list[str]:
    """The names of the tensors that a callback gets: what it asks for itself, else those given, else the latents."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return callback.tensor_inputs
    return ["latents"] if names is None else names


def check_callback(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse with a ValueError names of tensors that a pipeline does not give its callbacks."""
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {known}, got {unknown}.")


def initial_noise(
    shape: tuple[int, ...], device: torch.device, generator: Generators = None, latents: Tensor | None = None
) -> Tensor:
    """Noise of a shape `(B, ...)` and unit variance: `latents`, checked, or drawn by one generator or by B of them."""
    check_generator(generator, shape[0])
    if latents is None:  # in float32, so that a seed means the same noise in every precision
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if not isinstance(latents, Tensor):
        raise TypeError(f"`latents` must be a tensor of shape {shape}, got {type(latents).__name__}.")
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
    if not torch.isfinite(latents).all():
        raise ValueError("`latents` contains NaN or infinity.")
    return latents.to(device)


def check_choice(choices: tuple[str, ...], **values: str) -> None:
    """Refuse with a ValueError, by its name, a value that is not one of the choices."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def check_number(low: float, high: float = math.inf, **numbers: float) -> None:
    """Refuse with a ValueError, by its name, what is not a finite number in `[low, high]`."""
    for name, value in numbers.items():
        number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        if not (_is_number(number) and low <= number <= high):
            kind = f"in [{low:g}, {high:g}]" if high < math.inf else "a finite number"
            if -math.inf < low and high == math.inf:
                kind += f" of {low:g} or more"
            raise ValueError(f"`{name}` must be {kind}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_numbers(multiple_of: int = 1, **numbers: int) -> None:
    """Refuse with a ValueError, by its name, a number that is not a positive integer multiple."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1 or value % multiple_of:
            kind = f"multiple of {multiple_of}" if multiple_of > 1 else "integer"
            raise ValueError(f"`{name}` must be a positive {kind}, got {value!r}.")
