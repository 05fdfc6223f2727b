"""Between images: latent diffusion under mixtures of their DINO tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..embeddings import lerp, mix, slerp
from ..pixels import ImageInput
from .base import DinoPipeline, StepCallback, callback_inputs
from .pipeline_output import DinoInterpolationPipelineOutput
from .sampling import Generators

__all__ = ["DinoInterpolationPipeline"]

METHODS = ("lerp", "slerp")
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


class DinoInterpolationPipeline(DinoPipeline):
    """Generate images on paths between pairs of images (DiNO-Diffusion, arXiv 2407.11594, section 2.3), or mixtures.

    Every point of a path starts from the same noise, and sees the same noise in the steps of stochastic schedulers:
    along a path, the condition is all that changes. A point is generated exactly as `DinoDiffusionPipeline` does from
    its tokens: at fractions 0 and 1 both give the same images from the same generator, bit for bit.

    Args:
        vae: Autoencoder of images with 1 or 3 channels.
        conditioner: Images to condition tokens, and the null condition of guidance.
        unet: Denoiser of the VAE's latents; its `cross_attention_dim` is the conditioner's `token_dim`.
        scheduler: Any of diffusers' `KarrasDiffusionSchedulers`, with the noise schedule of the UNet's training.

    Raises:
        ValueError: If the components do not fit together.

    Example:
        ```python
        import torch
        from diffusers.utils import load_image
        from diffusers_dino import DinoInterpolationPipeline

        pipe = DinoInterpolationPipeline.from_pretrained("outputs/quickstart/model")  # or an id on the Hub
        source, target = load_image("radiograph.png"), load_image("other.png")
        path = pipe(source, target, generator=torch.Generator().manual_seed(0)).images
        ```
    """

    def interpolate(
        self,
        source_embeds: Tensor,
        target_embeds: Tensor,
        fractions: Numbers = QUARTERS,
        method: Literal["lerp", "slerp"] = "lerp",
        restore_norm: bool = False,
    ) -> Tensor:
        """Condition tokens on the paths between P pairs of images, see `diffusers_dino.embeddings`.

        Args:
            source_embeds: `(P, S, D)`.
            target_embeds: `(P, S, D)`.
            fractions: In [0, 1]: F for all pairs, or `(P, F)`, for each pair its own.
            method: `"lerp"` or `"slerp"`.
            restore_norm: Whether `"lerp"` gives tokens the norm between those of the ends, as `"slerp"` does anyway.

        Returns:
            `(P, F, S, D)`; at fractions 0 and 1 the source's and the target's tokens, bit for bit.

        Raises:
            ValueError: If a fraction is outside [0, 1], the shapes do not fit, or the method is unknown.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
        if source_embeds.shape != target_embeds.shape:
            raise ValueError(
                f"Each source needs its target: got tokens of shape {tuple(source_embeds.shape)} and "
                f"{tuple(target_embeds.shape)}. Repeat the image that is to meet several others."
            )
        table = _table(fractions, len(source_embeds))  # (P, F)
        source, target = (
            # (P, F, S, D); float32 holds half precision exactly, and mixes it without further rounding
            embeds.float()[:, None].expand(-1, table.shape[1], -1, -1)
            for embeds in (source_embeds, target_embeds)
        )
        mixed = slerp(source, target, table) if method == "slerp" else lerp(source, target, table, restore_norm)
        return mixed.to(source_embeds.dtype)

    def mix(self, image_embeds: Tensor, weights: Numbers, restore_norm: bool = False) -> Tensor:
        """Condition tokens of M mixtures of K images.

        Args:
            image_embeds: `(K, S, D)`.
            weights: `(K,)` for one mixture, or `(M, K)`; none negative, those of a mixture sum to 1.
            restore_norm: Whether to give tokens the weighted mean of the norms of their parts.

        Returns:
            `(1, M, S, D)`; of a mixture with one weight of 1, that image's tokens, bit for bit.

        Raises:
            ValueError: If there is not one weight for each image, one is negative, or they do not sum to 1.
        """
        rows = torch.atleast_2d(torch.as_tensor(weights, dtype=torch.float32))  # (M, K)
        if rows.ndim != 2 or not len(rows):
            raise ValueError(f"`weights` must be (K,) or (M, K), got shape {tuple(rows.shape)}.")
        mixtures = [mix(image_embeds.float(), row, restore_norm) for row in rows]
        return torch.stack(mixtures)[None].to(image_embeds.dtype)

    def check_inputs(
        self,
        source: ImageInput | None,
        target: ImageInput | None,
        fractions: Numbers | None,
        source_embeds: Tensor | None,
        target_embeds: Tensor | None,
        image: ImageInput | None,
        image_embeds: Tensor | None,
        weights: Numbers | None,
        height: int,
        width: int,
        *,
        method: str = "lerp",
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
        pair = {"source": source, "target": target, "source_embeds": source_embeds, "target_embeds": target_embeds}
        if weights is None:
            if image is not None or image_embeds is not None:
                raise ValueError("A mixture of images needs their `weights`, which sum to 1.")
            self._check_condition("source", source, source_embeds)
            self._check_condition("target", target, target_embeds)
        else:
            given = [name for name, value in {**pair, "fractions": fractions}.items() if value is not None]
            if given:
                raise ValueError(
                    f"`weights` mix the images of `image` or `image_embeds`, but `{given[0]}` was given too: ask for "
                    "paths between pairs and for mixtures in two calls."
                )
            self._check_condition("image", image, image_embeds)
        if method not in METHODS or (weights is not None and method == "slerp"):
            choice = "'lerp' for mixtures" if weights is not None else f"one of {METHODS}"
            raise ValueError(f"`method` must be {choice}, got {method!r}.")
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
        source: ImageInput | None = None,
        target: ImageInput | None = None,
        fractions: Numbers | None = None,
        source_embeds: Tensor | None = None,
        target_embeds: Tensor | None = None,
        image: ImageInput | None = None,
        image_embeds: Tensor | None = None,
        weights: Numbers | None = None,
        method: Literal["lerp", "slerp"] = "lerp",
        restore_norm: bool = False,
        same_noise: bool = True,
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
    ) -> DinoInterpolationPipelineOutput | tuple:
        """Generate images at F points between each of P pairs of images, or M mixtures of K images.

        The points are generated one after the other, each in a batch of P * n: to fill a large device, give several
        pairs.

        Args:
            source: P images of any type that `diffusers_dino.pixels.to_unit` reads, sizes may differ.
            target: As many images, where the paths end.
            fractions: Where on the paths, in [0, 1]: F for all pairs, or `(P, F)`; by default 0, 0.25, 0.5, 0.75, 1.
            source_embeds: In place of `source`: tokens `(P, S, D)` from `encode_image`.
            target_embeds: In place of `target`, likewise.
            image: In place of pairs, K images to be mixed by `weights`.
            image_embeds: In place of `image`: their tokens `(K, S, D)`.
            weights: `(K,)`, or `(M, K)` for M mixtures; those of a mixture sum to 1. F is M and P is 1.
            method: `"lerp"`, as in the paper, or `"slerp"`, on great circles; mixtures have `"lerp"` alone.
            restore_norm: Whether to give tokens back the norm that linear mixing takes from them.
            height: Of the images in pixels, by default the model's.
            width: Likewise.
            num_inference_steps: Denoising steps of each point.
            timesteps: Timesteps of one's own in place of `num_inference_steps`, for schedulers that take them.
            sigmas: Noise levels of one's own, descending to 0, likewise.
            guidance_scale: Classifier-free guidance away from the null condition; 1 or less is none, at half the cost.
            guidance_rescale: In [0, 1], against over-exposure by guidance (arXiv 2305.08891, section 3.4).
            eta: Stochasticity of DDIM in [0, 1]; other schedulers ignore it.
            same_noise: False continues with the generator from point to point: other noise at each.
            num_images_per_prompt: Paths (or sets of mixtures) of each pair, n, each with noise of its own.
            generator: One for the call, or a list of P * n, one for each path.
            latents: Initial noise of unit variance, `(P * n, L, h, w)`, in place of drawing it.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: False returns a tuple.
            cross_attention_kwargs: For the attention processors; `{"scale": s}` weighs a loaded LoRA.
            callback_on_step_end: As in `DinoDiffusionPipeline`, for each point anew; `_interrupt` skips the remaining
                steps of the current one.
            callback_on_step_end_tensor_inputs: Tensors that the callback gets: `"latents"`, `"image_embeds"`.

        Returns:
            P * n * F images: path after path, each from its first fraction to its last.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument has the wrong value, or the components do not fit together or are missing.
            RuntimeError: If the images come out with NaN or infinity.
        """
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        height, width = self._default_size(height, width, latents)
        self.check_inputs(
            source,
            target,
            fractions,
            source_embeds,
            target_embeds,
            image,
            image_embeds,
            weights,
            height,
            width,
            method=method,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if weights is None:
            source_embeds = self.encode_image(source) if source_embeds is None else source_embeds
            target_embeds = self.encode_image(target) if target_embeds is None else target_embeds
            fractions = QUARTERS if fractions is None else fractions
            points = self.interpolate(source_embeds, target_embeds, fractions, method, restore_norm)
        else:
            image_embeds = self.encode_image(image) if image_embeds is None else image_embeds
            points = self.mix(image_embeds, weights, restore_norm)
        conditions = points.repeat_interleave(num_images_per_prompt, dim=0).unbind(1)  # F times (P * n, S, D)
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
            generator=_own_generator() if generator is None else generator,
            latents=latents,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            same_noise=same_noise,
        )
        images = self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return DinoInterpolationPipelineOutput(images=images) if return_dict else (images,)


def _table(fractions: Numbers, pairs: int) -> Tensor:
    """Fractions as `(P, F)`, from one number, F of them, or a table."""
    table = torch.as_tensor(fractions, dtype=torch.float32)
    if table.ndim < 2:
        table = table.reshape(1, -1).expand(pairs, -1)
    if table.ndim != 2 or len(table) != pairs or not table.shape[1]:
        raise ValueError(f"`fractions` must be F numbers, or (P, F) with P = {pairs} pairs, got {tuple(table.shape)}.")
    return table


def _own_generator() -> torch.Generator:
    """A generator that can be rewound, seeded by the global one, which `torch.manual_seed` sets."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
