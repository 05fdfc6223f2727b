"""From an image to semantic variations of it: latent diffusion under the tokens of a frozen DINO encoder."""

from __future__ import annotations

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
from ..denoisers import family_of, with_lora_methods
from ..fusion import TokenFusion, fuse
from ..latents import decode_latents, vae_scale_factor
from ..pixels import ImageInput
from ..schedules import note_flow
from .batches import in_batches
from .caching import UNetCacheMixin, cache_context, emptied_cache
from .checks import (
    Generators,
    StepCallback,
    check_components,
    check_descent,
    check_finite,
    default_steps,
    guidance_width,
    seen_by,
)
from .guidance import check_guide, check_guider, guidance_input, guided_prediction, predict_with_guider
from .loading import ComponentLoadingMixin
from .lora import DenoiserMixin
from .pipeline_output import DinoDiffusionPipelineOutput
from .sampling_inputs import SamplingInputsMixin
from .turns import CallStateMixin, in_turn, samples_in_turn

__all__ = ["DinoDiffusionPipeline"]


class DinoDiffusionPipeline(
    ComponentLoadingMixin, DiffusionPipeline, DenoiserMixin, UNetCacheMixin, CallStateMixin, SamplingInputsMixin
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
            num_inference_steps: Denoising steps; by default 50, and 4 with `LCMScheduler` and `TCDScheduler`.
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
            eta: Stochasticity of DDIM and TCD in [0, 1]; other schedulers ignore it.
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
                inputs.to(model.dtype),  # a guide may be of another type
                tokens.to(model.dtype),
            ).to(dtype)

        times = timesteps.tolist()
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, _: sample)  # flows have none
        with emptied_cache(denoiser) as cached, self.progress_bar(total=len(timesteps)) as progress_bar:
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
