"""From an image to semantic variations of it: latent diffusion under the tokens of a frozen DINO encoder."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from ..conditioner import DinoImageConditioner
from ..denoisers import family_of
from ..denoisers.family import with_lora_methods
from ..fusion import TokenFusion, fuse
from ..latents import decode_latents, vae_scale_factor
from ..pixels import ImageInput
from ..schedules import is_flow_model, note_flow
from .batches import FixedBatchMixin, in_batches
from .caching import UNetCacheMixin, cache_context, has_cache, restart_cache
from .checks import (
    Generators,
    StepCallback,
    check_callback,
    check_choice,
    check_components,
    check_descent,
    check_embeds,
    check_finite,
    check_generator,
    check_number,
    check_numbers,
    check_schedule,
    check_scheduler,
    check_sides,
    check_steps,
    default_steps,
    guidance_width,
    initial_noise,
    latent_size,
    seen_by,
)
from .denoiser import DenoiserMixin
from .guidance import (
    check_guidance,
    check_guide,
    check_guider,
    guidance_input,
    guided_prediction,
    predict_with_guider,
)
from .loading import ComponentLoadingMixin
from .lora import DenoiserLoraMixin
from .pipeline_output import DinoDiffusionPipelineOutput
from .turns import CallStateMixin, in_turn, samples_in_turn

__all__ = ["DinoDiffusionPipeline"]


class DinoDiffusionPipeline(
    ComponentLoadingMixin,
    DiffusionPipeline,
    DenoiserMixin,
    DenoiserLoraMixin,
    UNetCacheMixin,
    FixedBatchMixin,
    CallStateMixin,
):
    """Generate semantic variations of images, as in DiNO-Diffusion (arXiv 2407.11594, section 2.3, reconstruction).

    The image takes the place that the prompt has in Stable Diffusion: its DINO tokens are the denoiser's condition.
    A component may be None if the calls do not need it: no `vae` for latents out, no `conditioner` for `image_embeds`
    in and no guidance. Components that do not fit together raise a ValueError.

    Args:
        vae: Autoencoder of images with 1 or 3 channels.
        conditioner: Images to condition tokens, and the null condition of guidance.
        unet: Denoiser of the VAE's latents; its `cross_attention_dim` is the conditioner's `token_dim`.
        scheduler: Any of diffusers' `KarrasDiffusionSchedulers`, with the noise schedule of the denoiser's training;
            for one trained by flow matching a `FlowMatch...` scheduler, or one with `use_flow_sigmas`.
        flow_matching: Whether the denoiser was trained by flow matching; by default what its config notes, else what
            `scheduler` says. It is noted in the denoiser's config, and schedulers of the other kind are refused.
        fusion: What tells the tokens of several encoders apart, if the denoiser was trained with it.
        transformer: Denoiser in place of a UNet, of a class in `diffusers_dino.denoisers`.
        guider: One of diffusers' guiders, in place of `guidance_scale` and its like.
        guide: An earlier checkpoint of the denoiser, or a smaller one trained like it, for `autoguidance_scale`.

    Example:
        ```python
        import torch
        from diffusers.utils import load_image
        from diffusers_dino import DinoDiffusionPipeline

        pipe = DinoDiffusionPipeline.from_pretrained("outputs/quickstart/model")  # or an id on the Hub
        image, generator = load_image("radiograph.png"), torch.Generator().manual_seed(0)
        variations = pipe(image, num_images_per_prompt=4, generator=generator).images
        ```
    """

    model_cpu_offload_seq = "conditioner->fusion->guide->unet->transformer->vae"
    _optional_components = [  # noqa: RUF012 - the base class's form
        *("vae", "conditioner", "unet", "transformer", "scheduler", "fusion", "guider", "guide")
    ]
    _unlisted_if_none = ("fusion", "transformer", "guider", "guide")  # a saved None of the others stays None
    _callback_tensor_inputs = ["latents", "image_embeds"]  # noqa: RUF012 - the base class's form
    _guidance_rescale = 0.0
    _cross_attention_kwargs: dict[str, Any] | None = None

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        conditioner: DinoImageConditioner,
        unet: UNet2DConditionModel | None = None,
        scheduler: SchedulerMixin | None = None,
        flow_matching: bool | None = None,
        fusion: TokenFusion | None = None,
        transformer: ModelMixin | None = None,
        guider: BaseGuidance | None = None,
        guide: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        check_guider(guider, None, None)
        self.register_modules(
            vae=vae,
            conditioner=conditioner,
            unet=unet,
            scheduler=scheduler,
            fusion=fusion,
            transformer=transformer,
            guider=guider,
            guide=guide,
        )
        check_components(self)
        note_flow(self.denoiser, scheduler, flow_matching)
        if transformer is not None:
            with_lora_methods(transformer)
        note_flow(guide, scheduler, flow_matching)
        check_guide(guide, self.denoiser)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side; 8, Stable Diffusion's, without a VAE."""
        return vae_scale_factor(self.vae) if self.vae is not None else 8

    @property
    def guidance_rescale(self) -> float:
        """The rescale of the current call."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the null condition is evaluated beside the condition; a distilled UNet takes the scale instead."""
        return super().do_classifier_free_guidance and guidance_width(self.denoiser) is None

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Those of the current call."""
        return self._cross_attention_kwargs

    def encode_image(self, image: ImageInput, encoders: Sequence[str] | None = None) -> Tensor:
        """Encode `image`, as in `__call__`, to condition tokens `(B, S, D)`, class token first, for `image_embeds`.

        `encoders` names those of several encoders to use, see `conditioner.encoder_names`; by default all. It is for
        models that were trained with `encoder_dropout`; others are warned of. A ValueError for unknown names, or none.
        """
        if self.conditioner is None:
            raise ValueError("This pipeline has no conditioner to encode `image` with. Give `image_embeds`.")
        if encoders is not None and not (self.fusion is not None and self.fusion.config["encoder_dropout"]):
            warnings.warn(
                "This model was not trained with a dropout of encoders: it has not seen images of only some of them.",
                stacklevel=2,
            )
        with in_turn(self, within=True):
            # an offloaded module does not know where it will run: its hooks act when it is called, not its `encode`
            pixels = send_to_device(self.conditioner.preprocess(image), self._execution_device)
            batches = pixels if isinstance(pixels, tuple) else (pixels,)
            return in_batches(lambda *rows: self.conditioner(rows, encoders), self._fixed_batch, *batches)

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
        guidance_scale: float = 1.0,
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
        if has_cache(self.denoiser) and self._fixed_batch is not None:
            raise ValueError("A cache keeps features of a whole batch: disable_cache() or disable_fixed_batch().")
        if has_cache(self.denoiser) and self.guider is not None:
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
            width = family_of(self.denoiser).token_width(self.denoiser.config)
            check_embeds(image_embeds, num_tokens, width, f"{name}_embeds")
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

    @samples_in_turn
    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        image_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
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
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DinoDiffusionPipelineOutput | tuple:
        """Generate variations of B images.

        Args:
            image: B source images of any type that `diffusers_dino.pixels.to_unit` reads, sizes may differ.
            image_embeds: In place of `image`: tokens `(B, S, D)` from `encode_image`.
            height: Of the generated images in pixels; by default what the denoiser's config or `latents` say.
            width: As `height`.
            num_inference_steps: Denoising steps; by default 50, and 4 with `LCMScheduler`.
            timesteps: Your own timesteps in place of `num_inference_steps`, for schedulers that take them, descending.
            sigmas: Your own noise levels, descending to 0, likewise.
            guidance_scale: Classifier-free guidance away from the null condition, as in Imagen (arXiv 2205.11487,
                eq. 2), of 0 or more: 1 or less is none, at half the cost. Use 1 for a model that was trained without
                dropping its condition: it does not know the null condition.
            guidance_rescale: In [0, 1], against over-exposure by guidance; 0.7 with zero terminal SNR (Lin et al.,
                arXiv 2305.08891, section 3.4).
            guidance_start: Guidance starts after this fraction of the steps, and ends with `guidance_end`: a limited
                interval keeps more diversity (Kynkäänniemi et al., arXiv 2404.07724). Outside it, steps cost half.
            guidance_end: As `guidance_start`, in [0, 1].
            autoguidance_scale: Guidance away from `guide` under the same condition (Karras et al., arXiv 2406.02507,
                eq. 3): 1 is none. It adds to `guidance_scale`, within the same interval, and costs a pass of `guide`.
            num_images_per_prompt: Variations of each image, n.
            eta: Stochasticity of DDIM in [0, 1]; other schedulers ignore it.
            generator: One for the call, or a list of B * n: then each image depends only on its own generator and
                source, not on the batch or its place there. CPU generators give the same noise on every device.
            latents: Initial noise of unit variance, `(B * n, L, h, w)`, in place of drawing it.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: False returns a tuple.
            cross_attention_kwargs: For the attention processors; `{"scale": s}` weighs a loaded LoRA.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after each step; the tensors in the dict
                that it returns replace those of the loop.
            callback_on_step_end_tensor_inputs: Which tensors it gets: `"latents"` (the default) and
                `"image_embeds"`, the condition tokens `(B * n, S, D)`.

        Returns:
            B * n images, those of one source together.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has the wrong value, or the components do not fit together or are missing.
            RuntimeError: If the images come out with NaN or infinity, or another call uses the pipeline meanwhile.
        """
        # 1. Check
        height, width = self._default_size(height, width, latents)
        num_inference_steps = default_steps(self.scheduler, num_inference_steps)
        callback_on_step_end_tensor_inputs = seen_by(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            image,
            image_embeds,
            height,
            width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            autoguidance_scale=autoguidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            output_type=output_type,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        denoiser = self.denoiser
        device, dtype = self._execution_device, denoiser.dtype

        # 2. Encode
        if image_embeds is None:
            image_embeds = self.encode_image(image)
        image_embeds = image_embeds.repeat_interleave(num_images_per_prompt, dim=0).to(device, dtype)  # (B * n, S, D)
        batch_size, null_embeds = len(image_embeds), None
        if self.conditioner is not None:  # also without guidance, which a callback may start later
            null_embeds = self.conditioner.null_condition(batch_size).to(device, dtype)

        # 3. Prepare timesteps, noise, and what the scheduler's step takes
        # schedulers read them as numbers, and a GPU would be waited for at each: only the denoiser's are on the device
        timesteps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, "cpu", timesteps, sigmas)
        check_descent(timesteps, self.scheduler)
        denoiser_timesteps = (timesteps.float() if timesteps.is_floating_point() else timesteps).to(device)
        self._num_timesteps = len(timesteps)
        channels = denoiser.config.in_channels
        latents = self.prepare_latents(batch_size, channels, height, width, dtype, device, generator, latents)
        step_kwargs = self.prepare_extra_step_kwargs(generator, eta, batch_size)

        # 4. Denoise
        def predict(model: ModelMixin, inputs: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            """What a denoiser predicts `(B, L, h, w)` from scaled latents of that shape, under tokens `(B, S, D)`."""
            return in_batches(
                lambda inputs, tokens: family_of(model).predict(
                    model,
                    inputs,
                    t.expand(len(inputs)),  # one each, as FasterCache splits the batch
                    fuse(self.fusion, tokens),
                    guidance=guidance_input(denoiser, self.guidance_scale, inputs),
                    attention_kwargs=self.cross_attention_kwargs,
                ),
                self._fixed_batch,
                inputs,
                tokens,
            )

        times, cached = timesteps.tolist(), has_cache(denoiser)
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, _: sample)  # flows have none
        restart_cache(denoiser)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = times[i]
                within = guidance_start <= i / len(timesteps) < guidance_end
                guided = self.do_classifier_free_guidance and within and self.guider is None
                inputs = scale_model_input(torch.cat([latents] * 2) if guided else latents, t)

                if self.guider is not None:
                    ask = partial(predict, denoiser, inputs, denoiser_timesteps[i])
                    step = (i, len(timesteps), t)
                    prediction = predict_with_guider(self.guider, denoiser, ask, image_embeds, null_embeds, step)
                else:
                    tokens = torch.cat([null_embeds, image_embeds]) if guided else image_embeds
                    with cache_context(denoiser, cached, times[i], guided):
                        prediction = predict(denoiser, inputs, denoiser_timesteps[i], tokens)
                    null, conditional = prediction.chunk(2) if guided else (None, prediction)
                    weak = None
                    if autoguidance_scale != 1 and within:
                        weak = predict(self.guide, inputs[-batch_size:], denoiser_timesteps[i], image_embeds)
                    prediction = guided_prediction(
                        conditional, null, self.guidance_scale, weak, autoguidance_scale, self.guidance_rescale
                    )
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "image_embeds": image_embeds}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors.update(callback_on_step_end(self, i, t, given) or {})
                    latents, image_embeds = tensors["latents"], tensors["image_embeds"]
                progress_bar.update()
        restart_cache(denoiser)  # and keep nothing in memory
        self._current_timestep = None

        # 5. Decode
        images = latents if output_type == "latent" else self._decode(latents)
        images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return DinoDiffusionPipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, L, h, w)` to pixels `(B, C, H, W)` float32 of nominal range [-1, 1]."""
        latents = latents.to(self.vae.dtype)
        pixels = in_batches(partial(decode_latents, self.vae), self._fixed_batch, latents).float()
        check_finite(pixels, "generated images")
        return pixels

    def _default_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Fill in the size that was not given: of `latents`, else of the denoiser's config."""
        if height is not None and width is not None:
            return height, width
        if latents is None:
            rows, columns = latent_size(self, "`height` and `width`")
        elif isinstance(latents, Tensor):
            rows, columns = latents.shape[-2:]
        else:
            raise TypeError(f"`latents` must be a tensor (B * n, L, h, w), got {type(latents).__name__}.")
        f = self.vae_scale_factor
        return rows * f if height is None else height, columns * f if width is None else width
