"""What the pipelines have in common: their components, and the steps of a call between its two ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..conditioner import DinoImageConditioner
from ..latents import decode_latents, vae_scale_factor
from ..pixels import ImageInput, vae_to_unit
from .caching import UNetCacheMixin, cache_context, has_cache, restart_cache
from .checks import (
    OUTPUT_TYPES,
    check_components,
    check_embeds,
    check_finite,
    check_generator,
    check_numbers,
    check_schedule,
    condition_width,
)
from .components import ComponentsPipeline
from .guidance import guide, rescale_guidance
from .lora import UNetLoraLoaderMixin
from .sampling import Generators, rewind, set_timesteps, states_of, step_arguments

__all__ = ["DinoPipeline", "StepCallback", "callback_inputs"]

StepCallback = Callable[..., dict[str, Any] | None] | PipelineCallback | MultiPipelineCallbacks


class DinoPipeline(ComponentsPipeline, StableDiffusionMixin, UNetLoraLoaderMixin, UNetCacheMixin):
    """A latent diffusion model under the tokens of a frozen DINO encoder; what it is asked for is up to the subclass.

    Args:
        vae: Autoencoder of images with 1 or 3 channels.
        conditioner: Images to condition tokens, and the null condition of guidance.
        unet: Denoiser of the VAE's latents; its `cross_attention_dim` is the conditioner's `token_dim`.
        scheduler: Any of diffusers' `KarrasDiffusionSchedulers`, with the noise schedule of the UNet's training.

    Raises:
        ValueError: If the components do not fit together. A component may be None, for a pipeline that does not need
            it: no `vae` for latents out, no `conditioner` for tokens in and no guidance.
    """

    model_cpu_offload_seq = "conditioner->unet->vae"
    _optional_components = ["vae", "conditioner"]  # noqa: RUF012 - the base class's form; a saved None stays None
    _callback_tensor_inputs = ["latents", "image_embeds"]  # noqa: RUF012 - the base class's form

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        conditioner: DinoImageConditioner,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        check_components(vae, conditioner, unet)
        self.register_modules(vae=vae, conditioner=conditioner, unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._guidance_rescale = 0.0
        self._cross_attention_kwargs = None
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side; 8, Stable Diffusion's, without a VAE."""
        return vae_scale_factor(self.vae) if self.vae is not None else 8

    @property
    def guidance_scale(self) -> float:
        """The scale of the current call. A callback may set `_guidance_scale` to change it between steps."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """The rescale of the current call."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the null condition is evaluated beside the condition."""
        return self._guidance_scale > 1

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Those of the current call."""
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Model calls of the current sampling, for callbacks that work with a share of them."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback may set `_interrupt = True`: the remaining steps are skipped."""
        return self._interrupt

    def encode_image(self, image: ImageInput) -> Tensor:
        """Encode images to condition tokens, for `image_embeds`.

        Args:
            image: B images of any type that `diffusers_dino.pixels.to_unit` reads, sizes may differ.

        Returns:
            Tokens `(B, S, D)`, class token first, on the device that the pipeline computes on.
        """
        if self.conditioner is None:
            raise ValueError("This pipeline has no conditioner to encode `image` with. Give `image_embeds`.")
        # called like this, not through `conditioner.encode`, because a module that is offloaded does not know where
        # it will run: accelerate's hooks move weights and inputs when the module itself is called
        pixels = self.conditioner.preprocess(image)
        device = self._execution_device
        pixels = tuple(p.to(device) for p in pixels) if isinstance(pixels, tuple) else pixels.to(device)
        return self.conditioner(pixels)

    def _check_components(self, guidance_scale: float, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if self.unet is None or self.scheduler is None:
            raise ValueError("This pipeline has no unet or no scheduler; both are needed to generate.")
        if self.vae is None and output_type != "latent":
            raise ValueError(f"output_type={output_type!r} needs a VAE and this pipeline has none: ask for 'latent'.")
        if self.conditioner is None and guidance_scale > 1:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs the conditioner's null condition, and this pipeline has no "
                "conditioner. Give guidance_scale=1, or load the conditioner."
            )
        check_components(self.vae, self.conditioner, self.unet)
        check_schedule(self.scheduler.config)

    def _check_condition(self, name: str, image: ImageInput | None, image_embeds: Tensor | None) -> None:
        """Refuse what is given neither as images nor as tokens, or as both, or as wrong tokens."""
        if (image is None) == (image_embeds is None):
            raise ValueError(f"Give either `{name}` or `{name}_embeds`, and not both.")
        if image_embeds is not None:
            num_tokens = None if self.conditioner is None else self.conditioner.num_tokens
            check_embeds(image_embeds, num_tokens, condition_width(self.unet), f"{name}_embeds")

    def _check_sampling(
        self,
        height: int,
        width: int,
        *,
        num_inference_steps: int,
        guidance_rescale: float,
        num_images_per_prompt: int,
        generator: Generators,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        check_numbers(self.vae_scale_factor, height=height, width=width)
        check_numbers(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_generator(generator)
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` must be in [0, 1], got {guidance_rescale}.")
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )

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

        Noise is drawn in float32 whatever `dtype` is, so that a seed means the same noise in every precision.

        Args:
            batch_size: Images to generate, B.
            num_channels_latents: L, of the UNet's input.
            height: Of the images, in pixels.
            width: Of the images, in pixels.
            dtype: Of the latents that come back.
            device: Where they come back.
            generator: One for the batch, or a list of B, one for each image.
            latents: Noise of unit variance, `(B, L, h, w)`, in place of drawing it.

        Returns:
            `(batch_size, num_channels_latents, height / f, width / f)` with f pixels per latent.

        Raises:
            ValueError: If the number of generators is not `batch_size`, or `latents` has another shape.
        """
        f = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // f, width // f)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"A list of generators needs one for each generated image: {batch_size} are asked for, "
                f"{len(generator)} generators were given."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def _sample(
        self,
        conditions: Sequence[Tensor],
        height: int,
        width: int,
        *,
        num_inference_steps: int,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        guidance_scale: float,
        guidance_rescale: float,
        eta: float,
        generator: Generators,
        latents: Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: list[str],
        same_noise: bool = True,
    ) -> list[Tensor]:
        """Denoise under each of several conditions `(B, S, D)`, one after the other: latents `(B, L, h, w)` of each.

        With `same_noise` the generators start at the same state for each of them.
        """
        device, dtype, states = self._execution_device, self.unet.dtype, states_of(generator)
        steps = num_inference_steps, device, timesteps, sigmas
        done = []
        with self.progress_bar(total=len(conditions) * len(set_timesteps(self.scheduler, *steps))) as progress_bar:
            for image_embeds in conditions:
                if same_noise:
                    rewind(generator, states)
                # a callback may have changed these under the condition before
                self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
                self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
                batch_size = len(image_embeds)
                schedule = set_timesteps(self.scheduler, *steps)  # and forget the steps before
                self._num_timesteps = len(schedule)
                noise = self.prepare_latents(
                    batch_size, self.unet.config.in_channels, height, width, dtype, device, generator, latents
                )
                denoised = self._denoise(
                    noise,
                    image_embeds.to(device, dtype),
                    schedule,
                    step_arguments(self.scheduler, generator, eta, batch_size),
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    progress_bar,
                )
                done.append(denoised)
        return done

    def _denoise(
        self,
        latents: Tensor,
        image_embeds: Tensor,
        schedule: Tensor,
        step_kwargs: dict[str, Any],
        callback: StepCallback | None,
        callback_inputs: list[str],
        progress_bar: Any,
    ) -> Tensor:
        null_embeds = self._null_embeds(len(image_embeds), latents.device, latents.dtype)
        cached, guided, times = has_cache(self.unet), None, schedule.tolist()
        for i, t in enumerate(schedule):
            if self.interrupt:
                continue
            self._current_timestep = times[i]
            if guided != self.do_classifier_free_guidance:  # at the first step, and where a callback changes it
                guided = self.do_classifier_free_guidance
                restart_cache(self.unet, guided)
            with cache_context(self.unet, cached, times[i]):
                prediction = self._predict(latents, t, image_embeds, null_embeds)
            latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]
            if callback is not None:
                tensors = {"latents": latents, "image_embeds": image_embeds}
                given = {name: tensors[name] for name in callback_inputs}
                tensors.update(callback(self, i, t, given) or {})
                latents, image_embeds = tensors["latents"], tensors["image_embeds"]
            progress_bar.update()
        restart_cache(self.unet)  # and keep nothing in memory
        self._current_timestep = None
        return latents

    def _default_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Fill in the size that was not given: of `latents`, else of the UNet's config."""
        if height is not None and width is not None:
            return height, width
        if self.unet is None:
            raise ValueError("This pipeline has no unet, which is needed to generate.")
        size = self.unet.config.get("sample_size")
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise TypeError(f"`latents` must be a tensor (B * n, L, h, w), got {type(latents).__name__}.")
            size = tuple(latents.shape[-2:])
        if size is None:
            raise ValueError("The UNet's config has no sample_size: give `height` and `width` in pixels.")
        rows, columns = (size, size) if isinstance(size, int) else size
        default_height, default_width = rows * self.vae_scale_factor, columns * self.vae_scale_factor
        return default_height if height is None else height, default_width if width is None else width

    def _null_embeds(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The null condition `(batch_size, S, D)`, also without guidance, as a callback may start it later."""
        if self.conditioner is None:
            return None
        return self.conditioner.null_condition(batch_size).to(device, dtype)

    def _predict(self, latents: Tensor, t: Tensor, image_embeds: Tensor, null_embeds: Tensor | None) -> Tensor:
        """What the scheduler's `prediction_type` says, after guidance: of the shape of `latents`."""
        guided = self.do_classifier_free_guidance
        embeds = torch.cat([null_embeds, image_embeds]) if guided else image_embeds
        inputs = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
        prediction = self.unet(
            inputs,
            t.expand(len(inputs)).to(inputs.device),  # one each, as FasterCache splits the batch
            encoder_hidden_states=embeds,
            cross_attention_kwargs=self.cross_attention_kwargs,
            return_dict=False,
        )[0]
        if not guided:
            return prediction
        null, conditional = prediction.chunk(2)
        prediction = guide(null, conditional, self.guidance_scale)
        if self.guidance_rescale > 0:
            prediction = rescale_guidance(prediction, conditional, self.guidance_rescale)
        return prediction

    def _to_images(self, latents: list[Tensor], output_type: str) -> Any:
        """Decode the latents `(B, L, h, w)` of F conditions: B * F images, those of one row of the batches together.

        Each batch is decoded as it was made, so that its images do not depend on the other conditions by a bit.
        """
        parts = latents if output_type == "latent" else [self._decode(batch) for batch in latents]
        images = torch.stack(parts, dim=1).flatten(0, 1)
        if output_type == "latent":
            return images
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, L, h, w)` to images `(B, C, H, W)` float32 in [0, 1]."""
        decoded = decode_latents(self.vae, latents.to(self.vae.dtype)).float()  # nominally in [-1, 1]
        check_finite(decoded)
        return vae_to_unit(decoded)


def callback_inputs(callback: StepCallback | None, names: list[str] | None) -> list[str]:
    """Which tensors a callback gets: those that it asks for itself, those named, or the latents."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return callback.tensor_inputs
    return ["latents"] if names is None else names
