"""`torch.compile` on denoisers and on what encodes and decodes: which parts of them, and what without a compiler.

Modules are compiled in place, so that their class and the names of their weights stay.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .caching import has_cache

__all__ = ["compile_models", "compile_pipeline", "compiler_problem", "is_compiled"]

logger = logging.getLogger(__name__)

_LARGE = 200_000_000  # weights: from here on, compiling a whole model takes many minutes
_MOST_SHAPES = 64  # that one block is compiled for: a UNet's have several widths and sides, with gradients and without


def compile_models(*models: nn.Module, whole: bool | None = None, **options: Any) -> bool:
    """Compile models in place, when they are where they will run.

    Args:
        models: A denoiser, a conditioner, or a half of an autoencoder (`vae.encoder`).
        whole: Whether to compile all of each, rather than only its repeated blocks (diffusers'
            `compile_repeated_blocks`), which takes a fraction of the time. By default models of under 200 M weights
            are compiled whole, and those of a class that names no repeated blocks.
        options: For `torch.compile`, such as `mode`, `fullgraph` or `dynamic`.

    Returns:
        Whether they are compiled. Without a working compiler a warning says why, and the models stay as they are.

    Raises:
        ValueError: If one of diffusers' caches is on a model.
    """
    if any(map(has_cache, models)):
        raise ValueError(
            "A cache is on the denoiser (enable_cache), and its hooks cannot be compiled: call disable_cache() first."
        )
    device = next(models[0].parameters()).device
    if problem := compiler_problem(device, options.get("backend", "inductor")):
        logger.warning("The models are not compiled, and run as without: %s", problem)
        return False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for model in models:
        small = sum(parameter.numel() for parameter in model.parameters()) < _LARGE
        if (small if whole is None else whole) or not getattr(model, "_repeated_blocks", None):
            model.compile(**options)
        else:
            model.compile_repeated_blocks(**options)
    return True


def compile_pipeline(pipe: DiffusionPipeline, whole: bool | None = None, **options: Any) -> bool:
    """Compile the denoiser and the VAE's decoder of a pipeline in place, for arguments and errors as above.

    Each shape of a batch is compiled by itself, at its first call: an image then depends on the shape of its batch,
    and not on which shapes came before.
    """
    models = [pipe.denoiser] if pipe.vae is None else [pipe.denoiser, pipe.vae.decoder]
    return compile_models(*models, whole=whole, **{"dynamic": False, **options})


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or one of its blocks is compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def compiler_problem(device: torch.device | str, backend: str = "inductor") -> str | None:
    """Why `torch.compile` does not work on a device, such as for want of a C++ compiler or of Triton; None if it does.

    It is tried on a small function, which takes seconds.
    """
    try:
        torch.compile(_trial, backend=backend, dynamic=False)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).partition("\n\n")[0]  # after which PyTorch gives hints for its developers
        return f"{type(error).__name__}: {' '.join(reason.split())}"
    return None


def _trial(values: Tensor) -> Tensor:
    return (values + 1).sin()
