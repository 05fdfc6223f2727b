"""From an image to semantic variations of it: latent diffusion under the tokens of a frozen DINO encoder."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
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
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..conditioner import DinoImageConditioner
from ..denoisers import family_of
from ..denoisers.family import with_lora_methods
from ..fusion import TokenFusion, fuse
from ..latents import decode_latents, vae_scale_factor
from ..pixels import ImageInput
from ..schedules import embed_guidance, is_flow_model, note_flow
from .batches import in_batches
from .caching import UNetCacheMixin, cache_context, has_cache, restart_cache
from .checks import (
    Generators,
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
    check_steps,
    default_steps,
    guidance_width,
)
from .guidance import check_guide, check_guider, guided_prediction, predict_with_guider
from .loading import ComponentLoadingMixin
from .lora import DenoiserLoraMixin
from .pipeline_output import DinoDiffusionPipelineOutput
from .turns import in_turn, samples_in_turn

__all__ = ["DinoDiffusionPipeline", "StepCallback"]

StepCallback = Callable[..., dict[str, Any] | None] | PipelineCallback | MultiPipelineCallbacks


class DinoDiffusionPipeline(
    ComponentLoadingMixin, DiffusionPipeline, StableDiffusionMixin, DenoiserLoraMixin, UNetCacheMixin
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
        if unet is not None and transformer is not None:
            raise ValueError("A pipeline has one denoiser: give `unet` or `transformer`, and None for the other.")
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
        check_components(vae, conditioner, self.denoiser, fusion)
        note_flow(self.denoiser, scheduler, flow_matching)
        if transformer is not None:
            with_lora_methods(transformer)
        note_flow(guide, scheduler, flow_matching)
        check_guide(guide, self.denoiser)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._guidance_rescale = 0.0
        self._cross_attention_kwargs = None
        self._num_timesteps = 0
        self._interrupt = False
        self._fixed_batch: int | None = None

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
        """Whether the null condition is evaluated beside the condition; a distilled UNet takes the scale instead."""
        return self._guidance_scale > 1 and guidance_width(self.denoiser) is None

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

    def enable_freeu(self, *args: float, **kwargs: float) -> None:
        """As in diffusers; a ValueError without a UNet, whose skip connections it weighs."""
        if self.unet is None:
            raise ValueError("FreeU weighs the skip connections of a UNet, and this pipeline has none.")
        super().enable_freeu(*args, **kwargs)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As in diffusers; a ValueError for the UNet of a pipeline that has none."""
        if unet and self.unet is None:
            raise ValueError("There is no unet to fuse: call it with unet=False, or on the transformer itself.")
        super().fuse_qkv_projections(unet, vae)

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
            several = isinstance(pixels, tuple)

            def encode(*pixels: Tensor) -> Tensor:
                return self.conditioner(pixels if several else pixels[0], encoders)

            return in_batches(encode, self._fixed_batch, *(pixels if several else (pixels,)))

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
        if self._fixed_batch is not None and has_cache(self.denoiser):
            raise ValueError("A cache keeps features of a whole batch: disable_cache() or disable_fixed_batch().")
        check_scheduler(self.scheduler)
        check_number(0, 1, eta=eta)
        if "scale" in (cross_attention_kwargs or {}):  # another would stay in the layers after the call
            check_number(-math.inf, scale=cross_attention_kwargs["scale"])
        self._check_guidance(guidance_scale, guidance_rescale, guidance_start, guidance_end, autoguidance_scale)
        check_components(self.vae, self.conditioner, self.denoiser, self.fusion)
        check_schedule(self.scheduler, is_flow_model(self.denoiser))
        family, config = family_of(self.denoiser), self.denoiser.config
        if "scale" in (cross_attention_kwargs or {}) and not family.takes_scale:
            raise ValueError(
                f"{type(self.denoiser).__name__} takes no scale of a LoRA in its call: weigh it by set_adapters."
            )
        if (image is None) == (image_embeds is None):
            raise ValueError(f"Give either `{name}` or `{name}_embeds`, and not both.")
        if image_embeds is not None:
            num_tokens = None if self.conditioner is None else self.conditioner.num_tokens
            check_embeds(image_embeds, num_tokens, family.token_width(config), f"{name}_embeds")
        f = self.vae_scale_factor
        check_numbers(f * family.patch_size(config), height=height, width=width)
        family.check_size(config, height // f, width // f)
        check_numbers(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_steps(self.scheduler, timesteps, sigmas)
        check_generator(generator)
        if unknown := set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )

    def _check_guidance(self, scale: float, rescale: float, start: float, end: float, autoguidance: float) -> None:
        """Refuse guidance that cannot work, for `check_inputs`."""
        check_number(0, guidance_scale=scale, autoguidance_scale=autoguidance)
        check_number(0, 1, guidance_rescale=rescale, guidance_start=start, guidance_end=end)
        if start > end:
            raise ValueError(f"`guidance_start` {start} must not be above `guidance_end` {end}.")
        if self.guider is not None and (scale, rescale, start, end, autoguidance) != (2.0, 0.0, 0.0, 1.0, 1.0):
            raise ValueError(
                f"The {type(self.guider).__name__} of this pipeline has settings of its own: leave those of the call "
                "at their defaults, or clear the guider by pipe.guider = None."
            )
        if self.guider is not None and has_cache(self.denoiser):
            raise ValueError(
                "A guider asks the denoiser several times a step, which a cache mixes up: disable_cache()."
            )
        if autoguidance != 1 and self.guide is None:
            raise ValueError(
                f"autoguidance_scale={autoguidance} needs a weaker version of the denoiser: give the pipeline an "
                "earlier checkpoint as `guide`."
            )
        check_guider(self.guider, self.denoiser, self.conditioner)
        check_guide(self.guide, self.denoiser)
        if self.conditioner is None and scale > 1 and guidance_width(self.denoiser) is None:
            raise ValueError(
                f"guidance_scale={scale} needs the conditioner's null condition, and this pipeline has no "
                "conditioner. Give guidance_scale=1, or load the conditioner."
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

        Arguments are as in `__call__`, with `batch_size` for B * n and `num_channels_latents` for L. The result is
        `(B * n, L, height / f, width / f)` with f pixels per latent, in `dtype` on `device`.
        """
        f = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // f, width // f)
        check_generator(generator, batch_size)
        if latents is None:  # in float32, so that a seed means the same noise in every precision
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        elif not torch.isfinite(latents).all():
            raise ValueError("`latents` contains NaN or infinity.")
        latents = latents.to(device=device, dtype=dtype)
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
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        height, width = self._default_size(height, width, latents)
        num_inference_steps = self._default_steps(num_inference_steps)
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
        times, cached = timesteps.tolist(), has_cache(denoiser)
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, _: sample)  # flows have none
        restart_cache(denoiser)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = times[i]
                within = guidance_start <= i / len(timesteps) < guidance_end
                guided, autoguided = self.do_classifier_free_guidance and within, autoguidance_scale != 1 and within
                inputs = torch.cat([latents] * 2) if guided and self.guider is None else latents
                inputs = scale_model_input(inputs, t)

                if self.guider is not None:
                    predict = partial(self._predict, denoiser, inputs, denoiser_timesteps[i])
                    step = (i, len(timesteps), t)
                    prediction = predict_with_guider(self.guider, denoiser, predict, image_embeds, null_embeds, step)
                else:
                    tokens = torch.cat([null_embeds, image_embeds]) if guided else image_embeds
                    with cache_context(denoiser, cached, times[i], guided):
                        prediction = self._predict(denoiser, inputs, denoiser_timesteps[i], tokens)
                    null, conditional = prediction.chunk(2) if guided else (None, prediction)
                    weak = None
                    if autoguided:
                        weak = self._predict(self.guide, inputs[-batch_size:], denoiser_timesteps[i], image_embeds)
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

    def _predict(self, model: ModelMixin, inputs: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """What a denoiser predicts `(B, L, h, w)` from scaled latents of that shape, under tokens `(B, S, D)`."""

        def predict(inputs: Tensor, tokens: Tensor) -> Tensor:
            return family_of(model).predict(
                model,
                inputs,
                t.expand(len(inputs)),  # one each, as FasterCache splits the batch
                fuse(self.fusion, tokens),
                guidance=self._embed_guidance(len(inputs)),
                attention_kwargs=self.cross_attention_kwargs,
            )

        return in_batches(predict, self._fixed_batch, inputs, tokens)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, L, h, w)` to pixels `(B, C, H, W)` float32 of nominal range [-1, 1]."""
        latents = latents.to(self.vae.dtype)
        pixels = in_batches(partial(decode_latents, self.vae), self._fixed_batch, latents).float()
        check_finite(pixels, "generated images")
        return pixels

    def _default_steps(self, num_inference_steps: int | None) -> int:
        return default_steps(self.scheduler) if num_inference_steps is None else num_inference_steps

    def _embed_guidance(self, batch_size: int) -> Tensor | None:
        """The guidance scale as an input `(B, width)` of a distilled UNet, None for others."""
        width = guidance_width(self.denoiser)
        if width is None:
            return None
        scales = torch.full((batch_size,), float(self.guidance_scale), device=self._execution_device)
        return embed_guidance(scales, width).to(self.denoiser.dtype)

    def _default_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Fill in the size that was not given: of `latents`, else of the denoiser's config."""
        if height is not None and width is not None:
            return height, width
        if self.denoiser is None:
            raise ValueError("This pipeline has no unet and no transformer; one of them is needed to generate.")
        size = self.denoiser.config.get("sample_size")
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise TypeError(f"`latents` must be a tensor (B * n, L, h, w), got {type(latents).__name__}.")
            size = tuple(latents.shape[-2:])
        if size is None:
            raise ValueError("The denoiser's config has no sample_size: give `height` and `width` in pixels.")
        rows, columns = (size, size) if isinstance(size, int) else size
        default_height, default_width = rows * self.vae_scale_factor, columns * self.vae_scale_factor
        return default_height if height is None else height, default_width if width is None else width
