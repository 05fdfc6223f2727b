"""What comes before the loop of a pipeline that makes images: checks, noise, and what the scheduler's step takes."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ..denoisers import family_of
from ..pixels import ImageInput
from ..schedules import is_flow_model
from .caching import has_cache
from .checks import (
    Generators,
    check_callback,
    check_choice,
    check_components,
    check_embeds,
    check_generator,
    check_number,
    check_numbers,
    check_schedule,
    check_scheduler,
    check_sides,
    check_steps,
    initial_noise,
    latent_size,
)
from .guidance import check_guidance

__all__ = ["SamplingInputsMixin"]


class SamplingInputsMixin:
    """The life-cycle steps before the loop of a pipeline that generates images, and its fixed batch."""

    _fixed_batch: int | None = None

    def enable_fixed_batch(self, batch_size: int) -> None:
        """Show encoder, denoiser and autoencoder exactly `batch_size` rows at a time, the last batch filled up.

        An image is then the same bits whatever the number of images in its call, if its generator is its own; a
        compiled model sees one shape; memory is that of one batch. Guidance makes two rows of an image.
        """
        check_numbers(batch_size=batch_size)
        self._fixed_batch = batch_size

    def disable_fixed_batch(self) -> None:
        """Back to all rows at once, the default."""
        self._fixed_batch = None

    def check_inputs(
        self,
        image: ImageInput | None,
        image_embeds: Tensor | None,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        autoguidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        name: str = "image",
    ) -> None:
        """Refuse what cannot work before any work is done; arguments and errors as in `__call__`.

        Messages call `image` what `name` says, and `image_embeds` that with `_embeds` after it.
        """
        check_choice(("pil", "np", "pt", "latent"), output_type=output_type)
        if self.denoiser is None or self.scheduler is None:
            raise ValueError("This pipeline has no unet or no scheduler; both are needed to generate.")
        if self.vae is None and output_type != "latent":
            raise ValueError(f"output_type={output_type!r} needs a VAE and this pipeline has none: ask for 'latent'.")
        check_scheduler(self.scheduler)
        check_number(0, 1, eta=eta)
        if "scale" in (cross_attention_kwargs or {}):  # another would stay in the layers after the call
            check_number(-math.inf, scale=cross_attention_kwargs["scale"])
            if not family_of(self.denoiser).takes_scale:
                raise ValueError(
                    f"{type(self.denoiser).__name__} takes no scale of a LoRA in its call: weigh it by set_adapters."
                )
        if self._fixed_batch is not None and has_cache(self.denoiser):
            raise ValueError("A cache keeps features of a whole batch: disable_cache() or disable_fixed_batch().")
        if self.guider is not None and has_cache(self.denoiser):
            raise ValueError(
                "A guider asks the denoiser several times a step, which a cache mixes up: disable_cache()."
            )
        check_guidance(self, guidance_scale, guidance_rescale, guidance_start, guidance_end, autoguidance_scale)
        check_components(self)
        check_schedule(self.scheduler, is_flow_model(self.denoiser))
        if (image is None) == (image_embeds is None):
            raise ValueError(f"Give either `{name}` or `{name}_embeds`, and not both.")
        if image_embeds is not None:
            num_tokens = None if self.conditioner is None else self.conditioner.num_tokens
            token_width = family_of(self.denoiser).token_width(self.denoiser.config)
            check_embeds(image_embeds, num_tokens, token_width, f"{name}_embeds")
        check_sides(self, height=height, width=width)
        check_numbers(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_steps(self.scheduler, timesteps, sigmas)
        check_generator(generator)
        check_callback(callback_on_step_end_tensor_inputs or (), self._callback_tensor_inputs)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Draw the initial noise, or take it from `latents`, and scale it to what the scheduler starts from.

        Arguments are as in `__call__`, with `batch_size` for B * n and `num_channels_latents` for L. The result is
        `(B * n, L, height / f, width / f)` with f pixels per latent, in `dtype` on `device`.
        """
        f = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // f, width // f)
        latents = initial_noise(shape, device, generator, latents).to(dtype)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # schedulers of flows have none

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float, batch_size: int) -> dict[str, Any]:
        """Those of `generator` and `eta` (see `__call__`) that the scheduler's `step` takes, for all its steps.

        DPMSolverSDEScheduler takes neither: it draws its noise from Brownian trees. They get one seed for each of the
        `batch_size` samples here, so that the noise follows `generator` as it does in the other schedulers.
        """
        config = self.scheduler.config
        if "noise_sampler_seed" in config and config["noise_sampler_seed"] is None:
            sources = generator if isinstance(generator, list) else [generator] * batch_size
            self.scheduler.noise_sampler_seed = (
                None
                if generator is None
                else [int(torch.randint(2**31, (), generator=each, device=each.device)) for each in sources]
            )
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}

    def _default_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Fill in the size that was not given: of `latents`, else of the denoiser's config."""
        if height is not None and width is not None:
            return height, width
        if isinstance(latents, Tensor):
            rows, columns = latents.shape[-2:]
        else:
            rows, columns = latent_size(self, "`height` and `width`")
        f = self.vae_scale_factor
        return rows * f if height is None else height, columns * f if width is None else width
