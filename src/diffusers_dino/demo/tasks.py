"""What the demo makes of images, without its page: variations, drawings and blends, and files of them."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import diffusers
import torch
from PIL import Image
from torch import Tensor

from .. import DinoDiffusionPipeline, DinoInterpolationPipeline, DinoPriorPipeline
from ..familiarity import UNLIKE
from ..pipelines.preparation import cut_as_in_training
from ..schedules import scheduler_like
from ..seeds import generator_for
from .reading import SEEN, fitted

__all__ = [
    "MOST_STEPS",
    "MOST_VARIATIONS",
    "SCHEDULERS",
    "OnStep",
    "SamplerSettings",
    "archive",
    "blend",
    "draw",
    "png",
    "release_memory",
    "unlike",
    "vary",
]

# Of diffusers, by the names that a list shows; None is the scheduler that the model came with.
SCHEDULERS = {
    "the model's own": None,
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler, stochastic": "EulerAncestralDiscreteScheduler",
}
MOST_STEPS, MOST_VARIATIONS = 100, 16
_BATCH = 4  # images that are generated at a time

OnStep = Callable[[float], None]  # is told the fraction that is done
Pipeline = TypeVar("Pipeline", DinoDiffusionPipeline, DinoInterpolationPipeline)


@dataclass(frozen=True)
class SamplerSettings:
    """How images are sampled, by a scheduler of `SCHEDULERS`; a guidance of 1 is none."""

    steps: int = 20
    guidance: float = 2.0
    seed: int = 0
    scheduler: str = "the model's own"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"There are 1 to {MOST_STEPS} steps, not {self.steps}.")
        if not 0 <= self.guidance <= 100:
            raise ValueError(f"The guidance is a number from 0 to 100, not {self.guidance}.")
        if self.seed is None or not 0 <= self.seed <= 2**31:
            raise ValueError(f"The seed is a whole number from 0 to 2147483648, not {self.seed}.")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"There is no scheduler {self.scheduler!r}: choose one of the list.")


def _seen(pipe: DinoDiffusionPipeline, image: Image.Image) -> Image.Image:
    """What the model is given of an image: without its borders, if it was trained so."""
    return fitted(cut_as_in_training(pipe, image), SEEN)


def vary(
    pipe: DinoDiffusionPipeline,
    image: Image.Image,
    count: int,
    sampling: SamplerSettings,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Variations of an image. Number i has the seed `sampling.seed + i` and does not depend on how many there are."""
    if not 1 <= count <= MOST_VARIATIONS:
        raise ValueError(f"There are 1 to {MOST_VARIATIONS} variations, not {count}.")
    return _generate(pipe, pipe.encode_image(_seen(pipe, image)).expand(count, -1, -1), sampling, on_step)


def draw(
    pipe: DinoDiffusionPipeline,
    prior: DinoPriorPipeline,
    present: Sequence[str],
    absent: Sequence[str],
    strength: float,
    count: int,
    sampling: SamplerSettings,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Images of labels and of no image; `strength` is the prior's guidance. Number i has the seed `sampling.seed + i`.

    Without labels anything is drawn. A ValueError if labels contradict each other.
    """
    if not 1 <= count <= MOST_VARIATIONS:
        raise ValueError(f"There are 1 to {MOST_VARIATIONS} images, not {count}.")
    prior.set_progress_bar_config(disable=True)
    tokens = prior(
        labels=list(present) or None,
        absent_labels=list(absent) or None,
        num_images_per_prompt=count,
        guidance_scale=strength,
        generator=[generator_for(sampling.seed + number, "demo tokens") for number in range(count)],
    ).image_embeds
    return _generate(pipe, tokens, sampling, on_step)


def blend(
    pipe: DinoDiffusionPipeline,
    source: Image.Image,
    target: Image.Image,
    num_points: int,
    method: str,
    sampling: SamplerSettings,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Images on the path between two images, at `num_points` even fractions from 0 to 1, from one noise."""
    between = _made_of(pipe, DinoInterpolationPipeline, sampling.scheduler)
    return between(
        _seen(pipe, source),
        _seen(pipe, target),
        torch.linspace(0, 1, num_points),
        method=method,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=torch.Generator().manual_seed(sampling.seed),
        callback_on_step_end=_reporter(on_step, num_points),
    ).images


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def archive(pictures: Mapping[str, Image.Image], model: str, sampling: SamplerSettings, **facts: object) -> bytes:
    """A ZIP of pictures by name, as PNG at their own size, and of `settings.json`, which says how they were made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:  # PNG is compressed already
        for name, picture in pictures.items():
            file.writestr(f"{name}.png", png(picture))
        settings = {"synthetic": True, "model": model, **asdict(sampling), **facts}
        file.writestr("settings.json", json.dumps(settings, indent=2) + "\n")
    return buffer.getvalue()


def unlike(pipe: DinoDiffusionPipeline, image: Image.Image) -> float | None:
    """How familiar an image is if it is unlike the training images; None if it is like them, or nobody can tell."""
    if pipe.conditioner.token_statistics is None:
        return None
    found = pipe.conditioner.familiarity(_seen(pipe, image)).item()
    return found if found < UNLIKE else None


def release_memory() -> None:
    """Give the system back what a large image or many steps needed; the allocators would keep it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _generate(
    pipe: DinoDiffusionPipeline, embeds: Tensor, sampling: SamplerSettings, on_step: OnStep | None
) -> list[Image.Image]:
    """An image of each of `(count, S, D)` tokens; number i has the seed `sampling.seed + i`."""
    pipe, images = _made_of(pipe, DinoDiffusionPipeline, sampling.scheduler), []
    report = _reporter(on_step, -(-len(embeds) // _BATCH))
    for first in range(0, len(embeds), _BATCH):
        batch = embeds[first : first + _BATCH]
        seeds = range(sampling.seed + first, sampling.seed + first + len(batch))
        images += pipe(
            image_embeds=batch,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=report,
        ).images
    return images


def _made_of(pipe: DinoDiffusionPipeline, kind: type[Pipeline], scheduler: str) -> Pipeline:
    """A pipeline of the same components under a scheduler of its own, as schedulers keep the state of a call."""
    name = SCHEDULERS[scheduler]
    own = scheduler_like(pipe.scheduler, getattr(diffusers, name) if name else type(pipe.scheduler))
    made = kind.from_pipe(pipe, scheduler=own)
    made.set_progress_bar_config(disable=True)
    return made


def _reporter(on_step: OnStep | None, num_calls: int) -> Callable | None:
    """A callback of a pipeline that runs `num_calls` times over its steps."""
    if on_step is None:
        return None
    done = 0

    def report(pipe: DinoDiffusionPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        nonlocal done
        done += 1
        on_step(done / (num_calls * pipe.num_timesteps))
        return {}

    return report
