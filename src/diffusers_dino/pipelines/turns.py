"""One call at a time: some of what a pipeline works with keeps the state of a call, which a second one would change.

A scheduler counts its steps, a pipeline keeps the guidance, DiffSeg hangs hooks on the denoiser. Weights have no
state: a pipeline for each thread, with a scheduler of its own, may share them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from .guidance import skipped_layers

__all__ = ["CallStateMixin", "in_turn", "samples_in_turn", "takes_the_denoiser"]

_LOCK = threading.Lock()
_AT_WORK: list[tuple[int, int, int, bool]] = []  # process, thread, and of an object its id and whether it is alone


class CallStateMixin:
    """What pipelines that sample tell their callbacks of the current call."""

    _guidance_scale = 1.0
    _num_timesteps = 0
    _interrupt = False

    @property
    def guidance_scale(self) -> float:
        """The scale of the current call. A callback may set `_guidance_scale` to change it between steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the null or negative condition is evaluated beside the condition."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Model calls of the current sampling, for callbacks that work with a share of them."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback may set `_interrupt = True`: the remaining steps are skipped."""
        return self._interrupt


@contextmanager
def in_turn(pipe: Any, alone: Iterable[Any] = (), beside: Iterable[Any] = (), within: bool = False) -> Iterator[None]:
    """Work with a pipeline that no other call works with meanwhile, or raise a RuntimeError at once.

    The same holds for the objects in `alone`, and for models with hooks that move or change their weights (offloading,
    caches). Those in `beside` may be used by other calls that do not need them alone. `within` says whether a call of
    this thread may make this one, as its callback does.
    """
    process, thread = os.getpid(), threading.get_ident()
    with _LOCK:
        is_inner = any(claim[:3] == (process, thread, id(pipe)) for claim in _AT_WORK)
    models = [] if is_inner else [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    wanted = {id(each): (each, False) for each in beside if each is not None}
    wanted |= {id(each): (each, True) for each in (pipe, *alone, *filter(_has_hooks, models)) if each is not None}
    claims = [(process, thread, id(each), is_alone) for each, is_alone in wanted.values()]
    with _LOCK:
        for each, is_alone in wanted.values():
            for its_process, its_thread, busy, busy_alone in _AT_WORK:
                harmless = its_process != process or (within and its_thread == thread)
                if busy == id(each) and (is_alone or busy_alone) and not harmless:
                    raise RuntimeError(_refusal(pipe, each))
        _AT_WORK.extend(claims)
    try:
        yield
    finally:
        with _LOCK:
            for claim in claims:
                _AT_WORK.remove(claim)


def samples_in_turn(call: Callable) -> Callable:
    """Make the `__call__` of a pipeline that samples refuse to run beside another one, also from a callback."""

    @wraps(call)
    def in_its_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        guider, guide = getattr(self, "guider", None), getattr(self, "guide", None)
        alone, beside = [self.scheduler, guider], [getattr(self, "denoiser", None), guide]
        scaled = any(isinstance(value, dict) and "scale" in value for value in (*args, *kwargs.values()))
        if scaled or skipped_layers(guider):
            alone, beside = alone + beside, []  # whose LoRA layers are scaled for the call, or layers skipped
        with in_turn(self, alone, beside):
            return call(self, *args, **kwargs)

    return in_its_turn


def takes_the_denoiser(call: Callable) -> Callable:
    """Make a method that changes the denoiser, also for a while, refuse to run beside calls; their callbacks may."""

    @wraps(call)
    def in_its_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        with in_turn(self, [self.denoiser], within=True):
            return call(self, *args, **kwargs)

    return in_its_turn


def _has_hooks(model: nn.Module) -> bool:
    """Whether accelerate or diffusers change the model when it is called: offloading, caches, layerwise casting."""
    return any(
        "_hf_hook" in vars(module) or getattr(vars(module).get("_diffusers_hook"), "hooks", None)
        for module in model.modules()
    )


def _refusal(pipe: Any, busy: Any) -> str:
    name = type(pipe).__name__
    if isinstance(busy, nn.Module):
        return (
            f"The {type(busy).__name__} of this {name} is in use by another call, and one of the two needs it alone: "
            "DiffSeg, a cache, a LoRA, or offloading. Wait for that call, or load the model once more."
        )
    what = "This" if busy is pipe else f"The {type(busy).__name__} of this"
    copied = "scheduler=copy.deepcopy(pipe.scheduler)"
    copied += ", guider=copy.deepcopy(pipe.guider)" if getattr(pipe, "guider", None) is not None else ""
    return (
        f"{what} {name} is in use by another call, and serves one at a time. Wait for that call, or give each thread "
        f"a pipeline of its own, which shares the weights: {name}.from_pipe(pipe, {copied})."
    )
