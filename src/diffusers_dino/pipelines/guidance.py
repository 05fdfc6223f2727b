"""Guidance beside the classifier-free one: diffusers' guiders, and a weaker version of the denoiser (autoguidance)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from ..denoisers import family_of
from ..schedules import embed_guidance, is_flow_model
from .checks import check_number, guidance_width

if TYPE_CHECKING:
    from ..conditioner import DinoImageConditioner

__all__ = [
    "check_guidance",
    "check_guide",
    "check_guider",
    "guidance_input",
    "guided_prediction",
    "predict_with_guider",
    "skipped_layers",
]

_PREDICTIONS = {"pred_cond", "pred_uncond", "pred_cond_skip"}  # that this pipeline knows how to make
_BLOCKS = "transformer_blocks"  # what diffusers finds by itself in the transformers that are denoisers here


def check_guidance(pipe: Any, scale: float, rescale: float, start: float, end: float, autoguidance: float) -> None:
    """Refuse with a ValueError what a call asks of guidance if it is out of range, or the pipeline cannot do it."""
    check_number(0, guidance_scale=scale, autoguidance_scale=autoguidance)
    check_number(0, 1, guidance_rescale=rescale, guidance_start=start, guidance_end=end)
    if start > end:
        raise ValueError(f"`guidance_start` {start} must not be above `guidance_end` {end}.")
    if pipe.guider is not None and (scale, rescale, start, end, autoguidance) != (2.0, 0.0, 0.0, 1.0, 1.0):
        raise ValueError(
            f"The {type(pipe.guider).__name__} of this pipeline has settings of its own: leave those of the call at "
            "their defaults, or clear the guider by pipe.guider = None."
        )
    if autoguidance != 1 and pipe.guide is None:
        raise ValueError(
            f"autoguidance_scale={autoguidance} needs a weaker version of the denoiser: give the pipeline an earlier "
            "checkpoint as `guide`."
        )
    check_guider(pipe.guider, pipe.denoiser, pipe.conditioner)
    check_guide(pipe.guide, pipe.denoiser)
    if pipe.conditioner is None and scale > 1 and guidance_width(pipe.denoiser) is None:
        raise ValueError(
            f"guidance_scale={scale} needs the conditioner's null condition, and this pipeline has no conditioner. "
            "Give guidance_scale=1, or load the conditioner."
        )


def check_guider(guider: Any, denoiser: nn.Module | None, conditioner: DinoImageConditioner | None) -> None:
    """Refuse what is not a guider of diffusers with a TypeError, and with a ValueError one that does not fit."""
    if guider is None:
        return
    name = type(guider).__name__
    if not isinstance(guider, BaseGuidance):
        raise TypeError(f"`guider` must be one of diffusers' guiders, such as ClassifierFreeGuidance, got {name}.")
    if unknown := set(guider._input_predictions) - _PREDICTIONS:
        raise ValueError(
            f"{name} asks for predictions that this pipeline does not make ({', '.join(sorted(unknown))}). Use "
            "ClassifierFreeGuidance, AdaptiveProjectedGuidance or another that needs only the null condition."
        )
    if denoiser is None:
        return
    if conditioner is None:
        raise ValueError(f"{name} needs the conditioner's null condition, and this pipeline has no conditioner.")
    if guidance_width(denoiser) is not None:
        raise ValueError(f"This UNet takes the guidance scale as an input, and no {name}: leave `guider` out.")
    for config in skipped_layers(guider):
        _check_skipped(name, config, denoiser)


def _check_skipped(name: str, config: LayerSkipConfig, denoiser: nn.Module) -> None:
    """Refuse layers that the denoiser does not have, or in which diffusers would skip nothing."""
    path = _BLOCKS if config.fqn == "auto" else config.fqn
    blocks = dict(denoiser.named_modules()).get(path)
    listed = isinstance(config.indices, list) and isinstance(blocks, nn.ModuleList)
    if not listed or not config.indices or max(config.indices) >= len(blocks):
        stacks = [path for path, part in denoiser.named_modules() if path.endswith(_BLOCKS)]
        raise ValueError(
            f"{name} is to skip layers {config.indices} of {config.fqn!r}, and {type(denoiser).__name__} has no "
            f"such layers. Give a LayerSkipConfig with a list of them, and `fqn` one of {stacks}."
        )
    block = blocks[config.indices[0]]
    kind = type(block)
    if (config.skip_attention or config.skip_attention_scores) and kind is not BasicTransformerBlock:
        raise ValueError(
            f"{name} is to skip attention, which diffusers does not do in a {kind.__name__}. Give a "
            "LayerSkipConfig with skip_attention=False to SkipLayerGuidance, or use another guider."
        )
    if config.skip_ff and not any(isinstance(part, FeedForward) for part in block.modules()):
        raise ValueError(
            f"{name} is to skip the feed-forward part, which diffusers does not do in a {kind.__name__}: nothing "
            "would be skipped. Use another guider."
        )


def check_guide(guide: nn.Module | None, denoiser: nn.Module | None) -> None:
    """Refuse with a ValueError a guide that takes other inputs than the denoiser, or was trained to another end."""
    if guide is None or denoiser is None:
        return
    for what, of in (
        ("class", lambda model: family_of(model).kind.__name__),
        ("width of the condition", lambda model: family_of(model).token_width(model.config)),
        ("channels of the latents", lambda model: model.config["in_channels"]),
        ("flow matching", is_flow_model),
        ("condition tokens", lambda model: (model.config.get("_condition") or {}).get("settings")),
    ):
        theirs, ours = of(guide), of(denoiser)
        if theirs != ours and not (what == "condition tokens" and None in (theirs, ours)):
            raise ValueError(
                f"The guide and the denoiser differ in their {what}: {theirs} and {ours}. A guide is an earlier "
                "checkpoint of the same run, or a smaller model trained like it."
            )
    for model in (guide, denoiser):
        if guidance_width(model) is not None:
            raise ValueError("A distilled UNet takes the guidance scale as an input, and no guide: leave it out.")


def guidance_input(denoiser: nn.Module, scale: float, inputs: Tensor) -> Tensor | None:
    """The guidance scale as an input `(B, width)` of a distilled UNet beside its latents `inputs`; None for others."""
    width = guidance_width(denoiser)
    if width is None:
        return None
    return embed_guidance(torch.full((len(inputs),), float(scale), device=inputs.device), width).to(denoiser.dtype)


def guided_prediction(
    conditional: Tensor,
    null: Tensor | None,
    guidance_scale: float,
    weak: Tensor | None,
    autoguidance_scale: float,
    rescale: float,
) -> Tensor:
    """Move a prediction `(B, L, h, w)` away from what the null condition gives, and from what a weaker model gives.

    Either may be None. With the scales w and a it is `null + w (conditional - null) + (a - 1) (conditional - weak)`:
    classifier-free guidance as in Imagen (arXiv 2205.11487, eq. 2), autoguidance as in Karras et al. (arXiv
    2406.02507, eq. 3). `rescale` is of Lin et al. (arXiv 2305.08891, section 3.4).
    """
    if null is None and weak is None:
        return conditional
    prediction = conditional if null is None else null + guidance_scale * (conditional - null)
    if weak is not None:
        prediction = prediction + (autoguidance_scale - 1) * (conditional - weak)
    return rescale_noise_cfg(prediction, conditional, rescale) if rescale > 0 else prediction


def predict_with_guider(
    guider: BaseGuidance,
    denoiser: nn.Module,
    predict: Callable[[Tensor], Tensor],
    tokens: Tensor,
    null_tokens: Tensor,
    step: tuple[int, int, Tensor],
) -> Tensor:
    """What a guider makes of the denoiser's predictions, as diffusers' modular pipelines ask it.

    `predict` gives a prediction `(B, L, h, w)` under tokens `(B, S, D)` at a `step`: its number, how many there are,
    and its timestep. On the `denoiser` the guider may hang hooks.
    """
    number, count, timestep = step
    guider.set_state(step=number, num_inference_steps=count, timestep=timestep)
    batches = guider.prepare_inputs({"tokens": (tokens, null_tokens)})
    for batch in batches:
        guider.prepare_models(denoiser)
        try:
            batch.noise_pred = predict(batch.tokens)
        finally:
            guider.cleanup_models(denoiser)
    return guider(batches)[0]


def skipped_layers(guider: Any) -> list[Any]:
    """The `LayerSkipConfig`s of a guider that weakens the model itself, by hooks, while it asks it."""
    return getattr(guider, "auto_guidance_config", None) or getattr(guider, "skip_layer_config", None) or []
