"""Condition tokens from no image: flow matching on the tokens of a frozen DINO encoder, by label, text, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conditioner import DinoImageConditioner
from ..prior import Condition, DinoPrior, require_conditioner
from ..prior.conditions import as_sets
from ..prior.flow import add_noise
from .batches import in_batches
from .checks import (
    Generators,
    check_callback,
    check_choice,
    check_embeds,
    check_number,
    check_numbers,
    check_schedule,
    initial_noise,
    seen_by,
)
from .loading import ComponentLoadingMixin
from .pipeline_output import DinoPriorPipelineOutput
from .turns import CallStateMixin, samples_in_turn

__all__ = ["DinoPriorPipeline"]

Names = str | Sequence[str] | Sequence[Sequence[str] | None] | None
Metadata = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None

# Images that the prior sees together, always: sums depend on the size of a batch, so a draw does not on the others
_TOGETHER = 16
_FAR = 4.0  # root mean square of standardised tokens, which is about 1 for tokens of the prior's own conditioner


class DinoPriorPipeline(ComponentLoadingMixin, DiffusionPipeline, CallStateMixin):
    """Draw condition tokens for a `DinoDiffusionPipeline`, so that it needs no input image (RCG, arXiv 2312.03701).

    Each draw depends only on its own condition and its own generator, to the bit on a CPU, whatever the batch.

    Args:
        prior: The model. It knows which conditioner its tokens are of: see `check_conditioner`.
        scheduler: diffusers' flow matching schedule.
        text_encoder: Frozen encoder of a prior that was trained with text; None without.
        tokenizer: Its tokenizer.

    Example:
        ```python
        import torch
        from diffusers_dino import DinoDiffusionPipeline, DinoPriorPipeline

        prior = DinoPriorPipeline.from_pretrained("examples/data/tiny-prior")  # or an id on the Hub
        pipe = DinoDiffusionPipeline.from_pretrained("examples/data/tiny-diffusion")
        generator = torch.Generator().manual_seed(0)
        tokens = prior(labels=["Effusion"], num_images_per_prompt=4, generator=generator).image_embeds
        images = pipe(image_embeds=tokens, generator=generator).images
        ```
    """

    model_cpu_offload_seq = "text_encoder->prior"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - the base class's form
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 - the base class's form

    def __init__(
        self,
        prior: DinoPrior,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("A text encoder and its tokenizer belong together: give both or none.")
        if text_encoder is not None and prior is not None:
            width, wanted = text_encoder.config.hidden_size, prior.config["text_dim"]
            if width != wanted:
                raise ValueError(
                    f"The prior takes text tokens of width {wanted}, the text encoder makes tokens of width {width}. "
                    f"It was trained with {prior.config['text_encoder']}."
                )
        self.register_modules(prior=prior, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that may be asked for."""
        return self.prior.conditions.labels

    def check_conditioner(self, conditioner: DinoImageConditioner) -> None:
        """Refuse a `conditioner` other than the one that the prior was trained for, with what differs.

        Encoder, choice of tokens and normalisation are compared; weights in half precision are accepted.

        Raises:
            ValueError: If it is another one.
        """
        require_conditioner(self.prior.config["conditioner"], conditioner)

    def encode_condition(
        self,
        labels: Names = None,
        absent_labels: Names = None,
        metadata: Metadata = None,
        text: str | Sequence[str | None] | None = None,
        batch_size: int | None = None,
    ) -> Condition:
        """What is asked for, arguments and errors as in `__call__`, of B images.

        `batch_size` is how many images there must be; one description then serves for all of them.
        """
        rows: dict[str, list[Any] | None] = {
            "labels": as_sets(labels),
            "absent_labels": as_sets(absent_labels, "absent_labels"),
            "metadata": [metadata] if isinstance(metadata, Mapping) else metadata and list(metadata),
            "text": [text] if isinstance(text, str) else text and list(text),
        }
        counts = {name: len(value) for name, value in rows.items() if value is not None}
        count = batch_size or max([1, *counts.values()])
        for name, number in counts.items():
            if number not in (1, count):
                raise ValueError(f"`{name}` describes {number} images, but {count} are asked for.")
        own = [{name: value and value[i % len(value)] for name, value in rows.items()} for i in range(count)]
        conditions = [
            self.prior.conditions.encode(each["labels"] or (), each["absent_labels"] or (), each["metadata"])
            for each in own
        ]
        condition = Condition(*(torch.cat([part[i] for part in conditions]) for i in range(3)))
        texts = [each["text"] for each in own]
        if any(text is not None for text in texts) or self.prior.config["text_dim"] is not None:
            tokens, mask = self.encode_text(texts)
            condition = condition._replace(text=tokens, text_mask=mask)
        return condition

    def encode_text(self, text: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Tokens `(B, T, Dt)` of a `text` each by the frozen text encoder, and `(B, T)` bool, which of them are there.

        They are encoded one by one at one length, so that none depends on the others. None is no text.

        Raises:
            ValueError: If there is a text, and the prior or this pipeline has no text encoder.
        """
        given = [each for each in text if each is not None]
        width = self.prior.config["text_dim"]
        if given and width is None:
            raise ValueError("This prior was trained without text: ask for labels, or train one with --text_column.")
        if given and self.text_encoder is None:
            raise ValueError(
                f"There is no text encoder to read `text` with. Load the pipeline with text_encoder and tokenizer: "
                f"{self.prior.config['text_encoder']}, revision {self.prior.config['text_revision']}."
            )
        length = self.prior.config["text_length"]  # also without a text, so that no image depends on the others
        tokens, mask = torch.zeros(len(text), length, width), torch.zeros(len(text), length, dtype=torch.bool)
        for row, each in enumerate(text):
            if each is None:
                continue
            words = self.tokenizer(each, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            device = self._execution_device
            seen = words["attention_mask"].to(device)
            encoded = self.text_encoder(input_ids=words["input_ids"].to(device), attention_mask=seen)
            tokens[row], mask[row] = encoded.last_hidden_state[0].float().cpu(), seen[0].bool().cpu()
        return tokens, mask

    def renoise(self, tokens: Tensor, strength: float, **call: Any) -> Tensor:
        """Vary given tokens: add noise, then denoise, as unCLIP's dial of variation.

        The dial says how far tokens move, as a share of the distance between two unrelated images: at 0.5 they move
        half of it, as a root mean square over images. How much noise that takes is worked out for normally distributed
        tokens of the prior's mean and covariance (`DinoPrior.noise_level`), so it holds nearly.

        Args:
            tokens: `(B, S, D)` of `DinoDiffusionPipeline.encode_image`.
            strength: From 0, the tokens themselves to the bit, to 1, any tokens of the condition. Among some dozens of
                images, tokens up to 0.5 are still nearest to their own image, and few are from 0.8 on.
            call: Further arguments of `__call__`, such as the `labels` of each image, and `generator`.

        Returns:
            `(B * n, S, D)`, those of one image together.

        Raises:
            ValueError: As `__call__`; also if the strength is outside [0, 1], or the tokens are not those of the
                prior's conditioner.
        """
        return self(image_embeds=tokens, strength=strength, **call).image_embeds

    def check_inputs(
        self,
        image_embeds: Tensor | None = None,
        strength: float = 1.0,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        output_type: str = "pt",
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> None:
        """Refuse what cannot work before any work is done; arguments and errors as in `__call__`."""
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"A prior is sampled by FlowMatchEulerDiscreteScheduler, and not by {type(self.scheduler).__name__}."
            )
        check_schedule(self.scheduler, flow_matching=True)
        check_choice(("pt", "np"), output_type=output_type)
        check_numbers(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_number(0, guidance_scale=guidance_scale)
        check_callback(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_number(0, 1, strength=strength)
        if image_embeds is None:
            if strength != 1:
                raise ValueError("`strength` says how much to vary `image_embeds`: give them, or leave it out.")
            return
        check_embeds(image_embeds, *self.prior.token_shape)
        spread = self.prior.standardise(image_embeds.to(self._execution_device)).square().mean().sqrt().item()
        if spread > _FAR:
            raise ValueError(
                f"These are not tokens of the prior's conditioner: standardised, their root mean square is "
                f"{spread:.1f}, and 1 is usual. Give what `encode_image` of its own model makes; `check_conditioner` "
                "says whether a model fits."
            )

    def prepare_latents(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Draw the initial noise of this `shape`, `(B * n, S, D)`, or take it from `latents`; float32 on `device`.

        `generator` is as in `__call__`.
        """
        return initial_noise(shape, device, generator, latents).float()

    @samples_in_turn
    @torch.no_grad()
    def __call__(
        self,
        labels: Names = None,
        absent_labels: Names = None,
        metadata: Metadata = None,
        text: str | Sequence[str | None] | None = None,
        negative_labels: Names = None,
        negative_text: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        image_embeds: Tensor | None = None,
        strength: float = 1.0,
        condition: Condition | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DinoPriorPipelineOutput | tuple:
        """Draw the condition tokens of images that do not exist.

        What is not named is unknown: `labels=["Edema"]` is any image with an edema, whatever else it shows.

        Args:
            labels: The labels of one image, or a list of those of each of B images. None asks for any image.
            absent_labels: Labels that the image must not have, likewise.
            metadata: Numbers and values by name, of one image or of each, such as `{"age": 60, "view": "PA"}`.
            text: A text, or one for each image; None for an image without one.
            negative_labels: Labels that guidance leads away from, in place of anything; needs guidance.
            negative_text: Likewise a text.
            num_images_per_prompt: Draws for each image, n.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance: 1 or less is none, and follows the training images most closely;
                more makes the condition plainer and the draws more alike.
            image_embeds: Tokens `(B, S, D)` to vary, of `DinoDiffusionPipeline.encode_image`.
            strength: How far to move them: from 0, not at all, to 1, which does not look at them; see `renoise`.
            condition: In place of `labels`, `absent_labels`, `metadata` and `text`: what `encode_condition` gave.
            generator: One for the call, or a list of B * n: then each draw depends only on its own.
            latents: Initial noise of unit variance, `(B * n, S, D)`, in place of drawing it.
            output_type: `"pt"` or `"np"`.
            return_dict: False returns a tuple.
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after each step; the `"latents"` of the
                dictionary that it returns replace those of the loop.
            callback_on_step_end_tensor_inputs: `"latents"`, as by default, or none.

        Returns:
            Tokens `(B * n, S, D)` float32 for the `image_embeds` of a `DinoDiffusionPipeline`, those of one condition
            together.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a name or a value is unknown to the prior (the nearest one is named), labels contradict, a
                set of labels is empty, a text has no encoder, or tokens do not fit.
            RuntimeError: If the tokens come out with NaN or infinity, or another call uses the pipeline meanwhile.
        """
        # 1. Check
        callback_on_step_end_tensor_inputs = seen_by(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            image_embeds,
            strength,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device

        # 2. Encode what is asked for
        description = (labels, absent_labels, metadata, text)
        if condition is not None and any(part is not None for part in description):
            raise ValueError("Give a `condition`, or what it is made of (labels, metadata, text), and not both.")
        if condition is None:
            condition = self.encode_condition(*description, None if image_embeds is None else len(image_embeds))
        away = self._encode_negative(condition, negative_labels, negative_text, guidance_scale)
        if image_embeds is not None and len(image_embeds) != len(condition.labels):
            raise ValueError(
                f"`condition` is of {len(condition.labels)} images, `image_embeds` of {len(image_embeds)}."
            )
        repeat = torch.arange(len(condition.labels)).repeat_interleave(num_images_per_prompt)
        condition, away = condition.rows(repeat).to(device), away.rows(repeat).to(device)  # B * n
        batch_size, (S, D) = len(repeat), self.prior.token_shape  # noqa: N806
        nothing = _says_nothing(condition) and _says_nothing(away)
        self._guidance_scale, self._interrupt = 1.0 if nothing else guidance_scale, False

        # 3. Prepare noise and times
        latents = self.prepare_latents((batch_size, S, D), device, generator, latents)
        steps, given, level = num_inference_steps, None, 1.0
        if image_embeds is not None:
            given = image_embeds.repeat_interleave(num_images_per_prompt, dim=0).to(device, torch.float32)
            level = self.prior.noise_level(strength)
            latents = add_noise(self.prior.standardise(given), latents, level)
            steps = math.ceil(num_inference_steps * level)
        start = level / (self.scheduler.shift - (self.scheduler.shift - 1) * level)  # which the scheduler shifts
        sigmas = np.linspace(start, start / max(steps, 1), steps).tolist()
        timesteps = retrieve_timesteps(self.scheduler, device=device, sigmas=sigmas)[0] if steps else []
        self._num_timesteps = steps

        # 4. Denoise
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                velocity = self._predict(latents, t, condition)
                if self.do_classifier_free_guidance:
                    other = self._predict(latents, t, away)
                    velocity = other + self.guidance_scale * (velocity - other)
                latents = self.scheduler.step(velocity, t, latents, generator=generator, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()

        # 5. To tokens
        tokens = self.prior.restore(latents) if steps else given
        if not torch.isfinite(tokens).all():
            raise RuntimeError("The tokens contain NaN or infinity. Give a lower guidance_scale, or load in float32.")
        tokens = tokens.cpu().numpy() if output_type == "np" else tokens
        self.maybe_free_model_hooks()
        return DinoPriorPipelineOutput(image_embeds=tokens) if return_dict else (tokens,)

    def _encode_negative(
        self, condition: Condition, labels: Names, text: str | Sequence[str | None] | None, guidance_scale: float
    ) -> Condition:
        """What guidance leads away from: by default from anything."""
        if (labels is not None or text is not None) and not guidance_scale > 1:
            raise ValueError(f"What is negative acts by guidance: give guidance_scale above 1, got {guidance_scale}.")
        away = self.encode_condition(labels, text=text, batch_size=len(condition.labels))
        clash = ((condition.labels > 0) & (away.labels > 0)).any(0).nonzero().flatten().tolist()
        if clash:
            raise ValueError(f"{self.labels[clash[0]]!r} is asked for and negative at once.")
        return away

    def _predict(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prior's velocity `(B * n, S, D)`, of draws that depend on no other."""
        return in_batches(
            lambda latents, rows: self.prior(latents, t.to(latents.device).expand(len(rows)), condition.rows(rows)),
            _TOGETHER,
            latents,
            torch.arange(len(latents), device=latents.device),
        )


def _says_nothing(condition: Condition) -> bool:
    texts = condition.text_mask is not None and bool(condition.text_mask.any())
    known = condition.labels.any() or condition.numbers.isfinite().any() or condition.categories.any()
    return not (texts or bool(known))
