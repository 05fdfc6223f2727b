"""Between images: latent diffusion under mixtures of their DINO tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from ..embeddings import lerp, mix, slerp
from ..pixels import ImageInput
from .checks import Generators, StepCallback, check_choice, default_steps
from .pipeline_dino_diffusion import DinoDiffusionPipeline
from .pipeline_output import DinoInterpolationPipelineOutput
from .turns import samples_in_turn

__all__ = ["DinoInterpolationPipeline"]

METHODS = ("lerp", "slerp")
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


class DinoInterpolationPipeline(DinoDiffusionPipeline):
    """Generate images on paths between pairs of images (DiNO-Diffusion, arXiv 2407.11594, section 2.3).

    Every point of a path starts from the same noise, and sees the same noise in the steps of stochastic schedulers:
    along a path, only the condition changes. Each point is a call of `DinoDiffusionPipeline` with its tokens: at
    fractions 0 and 1 both give the same images from the same generator, bit for bit. It has the same components.

    Example:
        ```python
        from diffusers.utils import load_image
        from diffusers_dino import DinoInterpolationPipeline

        pipe = DinoInterpolationPipeline.from_pretrained("outputs/quickstart/model")  # or an id on the Hub
        path = pipe(load_image("radiograph.png"), load_image("other.png")).images
        ```
    """

    _bar: Any = None  # the progress bar of a call, which all its points share, with offloaded models left in place

    def interpolate(
        self,
        source_embeds: Tensor,
        target_embeds: Tensor,
        fractions: Numbers = QUARTERS,
        method: Literal["lerp", "slerp"] = "lerp",
        restore_norm: bool = False,
    ) -> Tensor:
        """Condition tokens on the paths between P pairs of images.

        Args:
            source_embeds: `(P, S, D)`.
            target_embeds: `(P, S, D)`.

        `fractions`, `method` and `restore_norm` are as in `__call__`.

        Returns:
            `(P, F, S, D)`; at fractions 0 and 1 the source's and the target's tokens, bit for bit.
        """
        check_choice(METHODS, method=method)
        if source_embeds.shape != target_embeds.shape:
            raise ValueError(
                f"Each source needs its target: got tokens of shape {tuple(source_embeds.shape)} and "
                f"{tuple(target_embeds.shape)}. Repeat the image that is to meet several others."
            )
        pairs, table = len(source_embeds), torch.as_tensor(fractions, dtype=torch.float32)
        if table.ndim < 2:
            table = table.reshape(1, -1).expand(pairs, -1)
        if table.ndim != 2 or len(table) != pairs or not table.shape[1]:
            raise ValueError(
                f"`fractions` must be F numbers, or (P, F) with P = {pairs} pairs, got {tuple(table.shape)}."
            )
        target_embeds = target_embeds.to(source_embeds.device)
        source, target = (
            # (P, F, S, D); float32 holds half precision exactly, and mixes it without further rounding
            embeds.float()[:, None].expand(-1, table.shape[1], -1, -1)
            for embeds in (source_embeds, target_embeds)
        )
        mixed = slerp(source, target, table) if method == "slerp" else lerp(source, target, table, restore_norm)
        return mixed.to(source_embeds.dtype)

    def mix(self, image_embeds: Tensor, weights: Numbers, restore_norm: bool = False) -> Tensor:
        """Condition tokens of M mixtures of K images, for the `image_embeds` of a `DinoDiffusionPipeline`.

        Args:
            image_embeds: `(K, S, D)`.
            weights: `(K,)` for one mixture, or `(M, K)`; none negative, those of a mixture sum to 1.
            restore_norm: Whether to give tokens the weighted mean of the norms of their parts.

        Returns:
            `(M, S, D)`; of a mixture with one weight of 1, that image's tokens, bit for bit.
        """
        rows = torch.atleast_2d(torch.as_tensor(weights, dtype=torch.float32))  # (M, K)
        if rows.ndim != 2 or not len(rows):
            raise ValueError(f"`weights` must be (K,) or (M, K), got shape {tuple(rows.shape)}.")
        return torch.stack([mix(image_embeds.float(), row, restore_norm) for row in rows]).to(image_embeds.dtype)

    @samples_in_turn
    @torch.no_grad()
    def __call__(
        self,
        source: ImageInput | None = None,
        target: ImageInput | None = None,
        fractions: Numbers = QUARTERS,
        source_embeds: Tensor | None = None,
        target_embeds: Tensor | None = None,
        method: Literal["lerp", "slerp"] = "lerp",
        restore_norm: bool = False,
        same_noise: bool = True,
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
    ) -> DinoInterpolationPipelineOutput | tuple:
        """Generate images at F points between each of P pairs of images.

        The points are generated one after the other, each in a batch of P * n: to fill a large device, give several
        pairs. `height`, `width`, `num_inference_steps`, `timesteps`, `sigmas`, `guidance_scale`, `guidance_rescale`,
        `guidance_start`, `guidance_end`, `autoguidance_scale`, `eta`, `output_type`, `return_dict`,
        `cross_attention_kwargs` and errors are as in `DinoDiffusionPipeline.__call__`.

        Args:
            source: P images of any type that `diffusers_dino.pixels.to_unit` reads, sizes may differ.
            target: As many images, where the paths end.
            fractions: Where on the paths, in [0, 1]: F for all pairs, or `(P, F)`.
            source_embeds: In place of `source`: tokens `(P, S, D)` from `encode_image`.
            target_embeds: In place of `target`, likewise.
            method: `"lerp"`, as in the paper, or `"slerp"`, on great circles.
            restore_norm: Whether to give tokens back the norm that `"lerp"` takes from them, and `"slerp"` does not.
            same_noise: False continues with the generator from point to point: other noise at each.
            num_images_per_prompt: Paths of each pair, n, each with noise of its own.
            generator: One for the call, or a list of P * n, one for each path.
            latents: Initial noise of unit variance, `(P * n, L, h, w)`, in place of drawing it.
            callback_on_step_end: As in `DinoDiffusionPipeline`, for each point anew; `_interrupt` skips the remaining
                steps of the current one.
            callback_on_step_end_tensor_inputs: Tensors that the callback gets: `"latents"`, `"image_embeds"`.

        Returns:
            P * n * F images: path after path, each from its first fraction to its last.
        """
        # 1. Check
        check_choice(METHODS, method=method)
        height, width = self._default_size(height, width, latents)
        num_inference_steps = default_steps(self.scheduler, num_inference_steps)
        sampling = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_start": guidance_start,
            "guidance_end": guidance_end,
            "autoguidance_scale": autoguidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            "eta": eta,
            "cross_attention_kwargs": cross_attention_kwargs,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        checked = {**sampling, "generator": generator, "output_type": output_type}
        self.check_inputs(source, source_embeds, **checked, name="source")
        self.check_inputs(target, target_embeds, **checked, name="target")

        # 2. Encode, and mix
        source_embeds = self.encode_image(source) if source_embeds is None else source_embeds
        target_embeds = self.encode_image(target) if target_embeds is None else target_embeds
        points = self.interpolate(source_embeds, target_embeds, fractions, method, restore_norm).unbind(1)

        # 3. Prepare the noise, which is the same at each point
        if generator is None:  # one that can be rewound, seeded by the global one, which `torch.manual_seed` sets
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        generators = generator if isinstance(generator, list) else [generator]
        states = [each.get_state() for each in generators]

        # 4. Denoise, point after point
        schedule, _ = retrieve_timesteps(self.scheduler, num_inference_steps, None, timesteps, sigmas)
        denoised = []
        with self.progress_bar(total=len(points) * len(schedule)) as self._bar:
            try:
                for image_embeds in points:  # F times (P, S, D)
                    if same_noise:
                        for each, state in zip(generators, states, strict=True):
                            each.set_state(state)
                    output = DinoDiffusionPipeline.__call__.__wrapped__(  # within the turn of this call
                        self,
                        image_embeds=image_embeds,
                        generator=generator,
                        latents=latents,
                        output_type="latent",
                        callback_on_step_end=callback_on_step_end,
                        **sampling,
                    )
                    denoised.append(output.images)  # (P * n, L, h, w)
            finally:
                self._bar = None

        # 5. Decode each batch as it was made, so that its images do not depend on the other points by a bit
        batches = denoised if output_type == "latent" else [self._decode(batch) for batch in denoised]
        images = torch.stack(batches, dim=1).flatten(0, 1)  # P * n * F
        images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return DinoInterpolationPipelineOutput(images=images) if return_dict else (images,)

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> AbstractContextManager[Any]:
        """As in diffusers, but for the points of a path, which share one."""
        return super().progress_bar(iterable, total) if self._bar is None else nullcontext(self._bar)

    def maybe_free_model_hooks(self) -> None:
        """As in diffusers, but after the last point of a path."""
        if self._bar is None:
            super().maybe_free_model_hooks()
