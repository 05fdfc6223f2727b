"""diffusers' caches on the denoiser: what one denoising step has computed is used again in the next ones.

diffusers offers them as methods of some of its transformers (`CacheMixin`), and not of UNets. Here the pipeline offers
three of them for a UNet, and one for every transformer. It tells them the timestep, and empties them between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from diffusers import CacheMixin, FasterCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, apply_faster_cache, apply_pyramid_attention_broadcast, apply_taylorseer_cache
from torch import nn

from .turns import takes_the_denoiser

__all__ = ["UNetCacheMixin", "cache_context", "deep_cache", "emptied_cache", "has_cache"]

CacheConfig = FasterCacheConfig | PyramidAttentionBroadcastConfig | TaylorSeerCacheConfig

_APPLY = {
    FasterCacheConfig: apply_faster_cache,
    PyramidAttentionBroadcastConfig: apply_pyramid_attention_broadcast,
    TaylorSeerCacheConfig: apply_taylorseer_cache,
}


class UNetCacheMixin:
    """`enable_cache` and `disable_cache` of diffusers' transformers, on a pipeline with a UNet or a transformer."""

    denoiser: nn.Module
    _current_timestep: float | None = None

    @property
    def current_timestep(self) -> float | None:
        """The timestep of the denoising step under way; None before the first. Caches skip work by it."""
        return self._current_timestep

    @property
    def is_cache_enabled(self) -> bool:
        """Whether the denoiser has a cache, also one that another pipeline with it has enabled."""
        return has_cache(self.denoiser)

    @takes_the_denoiser
    def enable_cache(self, config: CacheConfig) -> None:
        """Let the denoiser use again what earlier steps have computed; images change a little, see docs/speed.md.

        Args:
            config: `deep_cache(pipe.unet)`, or one of diffusers': `PyramidAttentionBroadcastConfig`,
                `FasterCacheConfig` (saves guidance's unconditional half, and of a UNet no more) or
                `TaylorSeerCacheConfig`. `current_timestep_callback` may be left out. A transformer takes only
                `PyramidAttentionBroadcastConfig`.
        """
        usable, also = list(_APPLY), "deep_cache(pipe.unet), or one of "
        if self.transformer is not None:  # FasterCache halves no pooled token, TaylorSeer finds no layers
            usable, also = [PyramidAttentionBroadcastConfig], ""
        if type(config) not in usable:
            raise TypeError(
                f"{type(config).__name__} cannot be used with a {type(self.denoiser).__name__}. Give {also}"
                f"{', '.join(kind.__name__ for kind in usable)}."
            )
        if self.is_cache_enabled:
            raise ValueError("The denoiser has a cache already: call disable_cache() first.")
        _APPLY[type(config)](self.denoiser, self._completed(config))
        _forget_children(self.denoiser)

    @takes_the_denoiser
    def disable_cache(self) -> None:
        """Compute every step in full again; nothing where no cache is enabled."""
        for registry in list(_registries(self.denoiser)):
            for name in [name for name, hook in registry.hooks.items() if hook._is_stateful]:
                registry.remove_hook(name, recurse=False)
        _forget_children(self.denoiser)

    def _completed(self, config: CacheConfig) -> CacheConfig:
        """The config with the timestep of the UNet, and for FasterCache the layout of images in place of videos'."""
        changes: dict[str, Any] = {}
        if getattr(config, "current_timestep_callback", 0) is None:
            denoiser = self.denoiser  # not this pipeline: another one may sample with the same UNet
            changes["current_timestep_callback"] = lambda: denoiser._cache_timestep
        if isinstance(config, FasterCacheConfig):
            changes["tensor_format"] = "BCHW"
        return replace(config, **changes)


def deep_cache(unet: nn.Module, every: int = 3, order: int = 0) -> TaylorSeerCacheConfig:
    """DeepCache (Ma et al., CVPR 2024) in the terms of diffusers' TaylorSeer cache.

    The UNet's outermost level is computed at each step, all that lies deeper at every `every`-th only: in between, the
    last up block is given what it was given before.

    Args:
        unet: The UNet, of at least two levels.
        every: Steps from one full pass to the next; 1 computes all.
        order: 0 repeats what the deep levels said; 1 continues it in a straight line (TaylorSeer, Liu et al. 2025).
    """
    if "up_block_types" not in unet.config:
        raise ValueError(
            f"DeepCache keeps the deep levels of a UNet, and {type(unet).__name__} has none: give "
            "PyramidAttentionBroadcastConfig() to enable_cache."
        )
    levels = len(unet.config["up_block_types"])
    if levels < 2:
        raise ValueError("A UNet of one level has nothing deeper to keep: deep_cache needs two.")
    if every < 1 or order < 0:
        raise ValueError(f"`every` must be at least 1 and `order` at least 0, got {every} and {order}.")
    deep = "|".join(str(level) for level in range(1, levels))
    shallower = "|".join(str(level) for level in range(levels - 2)) or "none"
    return TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=order + 1,
        max_order=order,
        taylor_factors_dtype=unet.dtype,
        cache_identifiers=[rf"up_blocks\.{levels - 2}"],
        skip_predict_identifiers=[
            # parts of the down blocks, as a hook on a whole one would have to return its residuals too
            rf"down_blocks\.({deep})\.(resnets\.\d+|attentions\.\d+\.transformer_blocks\.\d+)",
            "mid_block",
            rf"up_blocks\.({shallower})",
        ],
    )


def has_cache(unet: nn.Module) -> bool:
    """Whether one of diffusers' caches is on a model."""
    return any(hook._is_stateful for registry in _registries(unet) for hook in registry.hooks.values())


def _restart(unet: nn.Module) -> None:
    """Empty a model's cache."""
    unet._cache_guided = None
    for registry in _registries(unet):
        registry.reset_stateful_hooks(recurse=False)


@contextmanager
def emptied_cache(unet: nn.Module) -> Iterator[bool]:
    """Sample with a cache, if a model has one (which is yielded), that is empty before and keeps nothing in memory."""
    cached = has_cache(unet)
    if cached:
        _restart(unet)
    try:
        yield cached
    finally:
        if cached:
            _restart(unet)


def cache_context(unet: nn.Module, cached: bool, timestep: float, guided: bool) -> AbstractContextManager[Any]:
    """What diffusers' caches need around each call of a model that has one; empties it when guidance begins or ends.

    `guided` says whether the null condition is evaluated beside the condition; without it, FasterCache is refused.
    """
    if not cached:
        return nullcontext()
    if guided != unet._cache_guided:
        hooks = [hook for registry in _registries(unet) for hook in registry.hooks.values()]
        if not guided and any(getattr(hook, "is_guidance_distilled", None) is False for hook in hooks):
            raise ValueError(
                "FasterCache saves guidance's unconditional half, and this call has no guidance. Give guidance_scale "
                "above 1, or use another cache."
            )
        _restart(unet)
        unet._cache_guided = guided
    unet._cache_timestep = timestep
    return CacheMixin.cache_context(unet, "denoise")


def _registries(model: nn.Module) -> Iterator[HookRegistry]:
    return (module._diffusers_hook for module in model.modules() if "_diffusers_hook" in vars(module))


def _forget_children(model: nn.Module) -> None:
    """Make diffusers look anew for the layers with hooks; it keeps a list."""
    for registry in _registries(model):
        registry._child_registries_cache = None
