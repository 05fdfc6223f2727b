"""From an image to semantic variations of it: latent diffusion under the tokens of a frozen DINO encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pixels import ImageInput
from .base import DinoPipeline, StepCallback, callback_inputs
from .pipeline_output import DinoDiffusionPipelineOutput
from .sampling import Generators

__all__ = ["DinoDiffusionPipeline"]


class DinoDiffusionPipeline(DinoPipeline):
    """Generate semantic variations of images, as in DiNO-Diffusion (arXiv 2407.11594, section 2.3, reconstruction).

    The image takes the place that the prompt has in Stable Diffusion: its DINO tokens are the UNet's condition.

    Args:
        vae: Autoencoder of images with 1 or 3 channels.
        conditioner: Images to condition tokens, and the null condition of guidance.
        unet: Denoiser of the VAE's latents; its `cross_attention_dim` is the conditioner's `token_dim`.
        scheduler: Any of diffusers' `KarrasDiffusionSchedulers`, with the noise schedule of the UNet's training.

    Raises:
        ValueError: If the components do not fit together. A component may be None, for a pipeline that does not need
            it: no `vae` for latents out, no `conditioner` for `image_embeds` in and no guidance.

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

    def check_inputs(
        self,
        image: ImageInput | None,
        image_embeds: Tensor | None,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> None:
        """Refuse what cannot work before any work is done; arguments as in `__call__`.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has the wrong value, or the components do not fit together or are missing.
        """
        self._check_components(guidance_scale, output_type)
        self._check_condition("image", image, image_embeds)
        self._check_sampling(
            height,
            width,
            num_inference_steps=num_inference_steps,
            guidance_rescale=guidance_rescale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        image_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.0,
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
            height: Of the generated images in pixels; by default what the UNet's config or `latents` say.
            width: As `height`.
            num_inference_steps: Denoising steps.
            timesteps: Timesteps of one's own in place of `num_inference_steps`, for schedulers that take them.
            sigmas: Noise levels of one's own, descending to 0, likewise.
            guidance_scale: Classifier-free guidance away from the null condition; 1 or less is none, at half the cost.
                A model that was trained without dropping its condition does not know the null condition: use 1.
            guidance_rescale: In [0, 1], against over-exposure by guidance; 0.7 with zero terminal SNR (Lin et al.,
                arXiv 2305.08891, section 3.4).
            num_images_per_prompt: Variations of each image, n.
            eta: Stochasticity of DDIM in [0, 1]; other schedulers ignore it.
            generator: One for the call, or a list of B * n: then each image depends on its own generator and source
                alone, not on the batch or its place there. CPU generators give the same noise on every device.
            latents: Initial noise of unit variance, `(B * n, L, h, w)`, in place of drawing it.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: False returns a tuple.
            cross_attention_kwargs: For the attention processors; `{"scale": s}` weighs a loaded LoRA.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after each step; returns a dict, by
                whose entries the tensors are replaced.
            callback_on_step_end_tensor_inputs: Which tensors it gets: `"latents"` (the default) and
                `"image_embeds"`, the condition tokens `(B * n, S, D)`.

        Returns:
            B * n images, those of one source together.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has the wrong value, or the components do not fit together or are missing.
            RuntimeError: If the images come out with NaN or infinity.
        """
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        height, width = self._default_size(height, width, latents)
        self.check_inputs(
            image,
            image_embeds,
            height,
            width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if image_embeds is None:
            image_embeds = self.encode_image(image)
        conditions = [image_embeds.repeat_interleave(num_images_per_prompt, dim=0)]  # (B * n, S, D)
        latents = self._sample(
            conditions,
            height,
            width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            generator=generator,
            latents=latents,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        images = self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return DinoDiffusionPipelineOutput(images=images) if return_dict else (images,)
