"""What the demo does, without its page: read, vary, draw, blend and segment images, and make files of the results."""

from __future__ import annotations

import colorsys
import contextlib
import ctypes
import hashlib
import io
import json
import logging
import math
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline, DinoPriorPipeline
from ..data import ImageDataset, Preprocessing, open_images, read_image
from ..diffseg.attention import self_attention_layers
from ..diffseg.merging import suppress
from ..diffseg.settings import ALL_LAYERS, DiffSegSettings, noted_settings
from ..familiarity import UNLIKE
from ..metrics.copy_gate import CopyGate
from ..metrics.registration import pictures_of
from ..pipelines.preparation import cut_as_in_training
from ..pixels import to_unit, unit_to_uint8, with_channels
from ..schedules import scheduler_like
from ..seeds import generator_for

# Of diffusers, by the names that a list shows; None is the scheduler that the model came with.
SCHEDULERS = {
    "the model's own": None,
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler, stochastic": "EulerAncestralDiscreteScheduler",
}
DISPLAY = 1024  # pixels: larger images are shown smaller, and kept and downloaded at their own size
MIN_SIDE = 32  # of an image in pixels: a smaller one has nothing to show
MOST_PIXELS = 2**26  # of a file
KEPT_PIXELS = 2**24  # larger images are shrunk to it; radiographs have fewer
MOST_STEPS, MOST_VARIATIONS = 100, 16
_SEEN = 4096  # longer side in pixels of what the model is given, which it shrinks to hundreds
_LABELLED = 2048  # longer side at which segments are drawn; larger images take the nearest number
_BATCH = 4  # images that are generated at a time
_MAX_RATIO = 8  # of an image's sides
_SAME = 8  # levels of 255 that small pictures of the same images differ by at most, prepared at different sizes

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


def open_image(path: str | Path, tell: Callable[[str], object] | None = None) -> Image.Image:
    """Read a file that somebody dropped: gray or RGB of 8 bits, from its darkest to its brightest value.

    Training stretches the range in the same way (`Preprocessing`), so the model sees what it knows. An image of more
    than `KEPT_PIXELS` is shrunk. `tell` hears of that, and of warnings. Neither they nor errors name a folder.
    """
    name = Path(path).name
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} is not on the server any more: drop it again.") from error
    with _warnings_to(tell or (lambda text: None)):
        pixels = read_image(content, name=name, max_pixels=MOST_PIXELS)  # (H, W) or (H, W, 3)
    if tell and _is_animated(content):
        tell(f"{name} holds several images: the first one is used.")
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > _MAX_RATIO * min(height, width):
        raise ValueError(
            f"{name} has {width} x {height} pixels: the shorter side must have {MIN_SIDE} at least, the longer one at "
            f"most {_MAX_RATIO} times as many."
        )
    least, most = int(pixels.min()), int(pixels.max())
    values = to_unit(np.arange(least, most + 1, dtype=np.uint16)[None])[0][0]  # (1, V) in [0, 1]; uint16 is stretched
    image = Image.fromarray(unit_to_uint8(values[0]).numpy()[pixels - least])
    if height * width > KEPT_PIXELS:
        image = fitted(image, int(max(width, height) * math.sqrt(KEPT_PIXELS / (height * width))))
        if tell:
            tell(f"{name} has {width} x {height} pixels: it is shown and used at {image.width} x {image.height}.")
    return image


def example_images(source: str | Path, size: int, count: int) -> list[Image.Image]:
    """A few images of a folder or of shards, evenly spread, prepared as for training: `size` x `size` pixels."""
    images = open_images(source, Preprocessing(size, remove_borders=False), local_files_only=True)
    count = min(count, len(images))
    places = [place * len(images) // count for place in range(count)]
    return [Image.fromarray(array) for _, array in images.read_many(places)]


def _seen(pipe: DinoDiffusionPipeline, image: Image.Image) -> Image.Image:
    """What the model is given of an image: without its borders, if it was trained so."""
    return fitted(cut_as_in_training(pipe, image), _SEEN)


def model_size(pipe: DinoDiffusionPipeline) -> int:
    """Side in pixels of the images that the model makes."""
    size = pipe.denoiser.config["sample_size"]
    return (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor


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


class Segmenter:
    """Segments of images, with the attention maps of the last few images and timesteps kept.

    Another threshold costs only the merging. Each of the maps `kept` takes s^4 numbers at attention of side s (67 MB
    for 64).

    Attributes:
        layers: All of the UNet's self-attention, then the names of its blocks, and what `settings` join by +.
        finest_layer: The last one of the decoder, which often segments better than all together.
        last_timestep: The largest one.
        settings: To begin with: those that were noted with the model, or the finest layer's at the first timestep.
        layer: Those layers, as one of `layers`.
    """

    def __init__(self, pipe: DinoDiffusionPipeline, kept: int = 8) -> None:
        blocks = list(dict.fromkeys(name.split(".transformer")[0] for name in self_attention_layers(pipe.denoiser)))
        self.layers = [ALL_LAYERS, *blocks]
        self.finest_layer = ([name for name in blocks if name.startswith("up_blocks")] or blocks)[-1]
        self.last_timestep = pipe.scheduler.config["num_train_timesteps"] - 1
        self.settings = noted_settings(pipe.denoiser) or DiffSegSettings(1, 0.2, (self.finest_layer,))
        self.layer = self.settings.joined_layers
        self.layers += [] if self.layer in self.layers else [self.layer]
        self._pipe = DiffSegPipeline.from_pipe(pipe)
        self._kept = kept
        self._maps: OrderedDict[tuple, Tensor] = OrderedDict()

    def segment(self, image: Image.Image, timestep: int, threshold: float, layer: str = ALL_LAYERS) -> Tensor:
        """`(K, s, s)`: a map of each segment of an image, that of the largest one first; see `labels_of`.

        The threshold is in units of the mean divergence of the image's maps; `layer` is one of `layers`.
        """
        key = hashlib.sha256(image.tobytes()).digest(), image.size, timestep, layer
        if key not in self._maps:
            layers = layer if layer == ALL_LAYERS else layer.split("+")
            self._maps[key] = self._pipe.attention_maps(fitted(image, _SEEN), timestep, layers=layers)
        self._maps.move_to_end(key)
        if len(self._maps) > self._kept:
            self._maps.popitem(last=False)
        maps = self._maps[key]
        width, height = fitted_size(image, DISPLAY)
        output = self._pipe.segment(maps, threshold, relative_threshold=True, refine=True, output_size=(height, width))
        areas = torch.bincount(output.masks[0].flatten(), minlength=len(output.maps[0]))
        order = areas.argsort(descending=True, stable=True)
        return output.maps[0][order[: output.num_segments[0]]]


def labels_of(segments: Tensor, image: Image.Image) -> np.ndarray:
    """Numbers `(H, W)` uint8 of segments at an image's size, from their maps `(K, s, s)`; K is at most 256."""
    width, height = fitted_size(image, _LABELLED)
    labels = suppress(segments, (height, width)).to(torch.uint8).cpu().numpy()
    if (width, height) == image.size:
        return labels
    return np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))


def palette() -> np.ndarray:
    """256 colours `(256, 3)` uint8, neighbours far apart: hues at steps of the golden ratio."""
    hues = (0.58 + 0.618034 * np.arange(256)) % 1
    return np.array([[round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.7, 1.0)] for hue in hues], np.uint8)


def overlay(image: Image.Image, labels: np.ndarray, opacity: float) -> Image.Image:
    """Segments `(H, W)` in colour over an image of their size, RGB."""
    return Image.blend(image.convert("RGB"), Image.fromarray(palette()[labels]), opacity)


def fitted(image: Image.Image, max_side: int) -> Image.Image:
    """An image whose longer side is at most `max_side` pixels; smaller ones as they are."""
    size = fitted_size(image, max_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def fitted_size(image: Image.Image, max_side: int) -> tuple[int, int]:
    """Width and height that `fitted` gives an image."""
    scale = min(1, max_side / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return width, height


def mask_image(labels: np.ndarray) -> Image.Image:
    """Segments as a picture with a palette: its pixels are their numbers, and a viewer shows their colours."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette().tobytes())
    return picture


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


class Nearest(NamedTuple):
    """The training image that is nearest to a picture.

    Attributes:
        picture: How it looks, mirrored if that is nearer; None if nothing is there to show.
        distance: Relative distance in [0, 1] that a gate decides by.
        is_copy: Whether the gate takes the picture for a copy.
    """

    picture: Image.Image | None
    distance: float
    is_copy: bool


class TrainingImages:
    """What a gate knows of training images, and those images themselves where they are at hand.

    A ValueError if the images are not those that the gate was calibrated on, in the same order.
    """

    def __init__(self, gate: CopyGate, images: ImageDataset | None = None) -> None:
        self.gate, self.images = gate, images
        if images is not None and not self._are_known(images):
            raise ValueError(
                f"The {len(images)} training images are not the {len(gate)} that the gate was calibrated on: give "
                "both of the same training, or only one of them."
            )

    def _are_known(self, images: ImageDataset) -> bool:
        if len(images) != len(self.gate) or self.gate.pictures is None:
            return len(images) == len(self.gate)
        probe = list(range(0, len(images), max(1, len(images) // 8)))
        here = torch.cat([pictures_of(images[number]["image"][None]) for number in probe])
        return bool((here.float() - self.gate.pictures[probe].float()).abs().mean() < _SAME)

    def nearest(self, pictures: Sequence[Image.Image]) -> list[Nearest]:
        """The nearest training image to each of some pictures of one size."""
        units = torch.stack(to_unit(list(pictures)))  # (N, 3, S, S)
        found = self.gate.search(with_channels(units, 1) if pictures[0].mode == "L" else units)
        distances = found.smallest.tolist()
        return [
            Nearest(self._show(number, mirrored), distance, distance < self.gate.threshold)
            for number, mirrored, distance in zip(*(part.tolist() for part in found.nearest), distances, strict=True)
        ]

    def _show(self, number: int, mirrored: bool) -> Image.Image | None:
        if self.images is not None:
            ((_, pixels),) = self.images.read_many([number])
        elif self.gate.pictures is not None:
            pixels = self.gate.pictures[number].numpy()
        else:
            return None
        picture = Image.fromarray(pixels)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


def unlike(pipe: DinoDiffusionPipeline, image: Image.Image) -> float | None:
    """How familiar an image is if it is unlike the training images; None if it is like them, or nobody can tell."""
    if pipe.conditioner.token_statistics is None:
        return None
    found = pipe.conditioner.familiarity(fitted(image, _SEEN)).item()
    return found if found < UNLIKE else None


def release_memory() -> None:
    """Give the system back what a large image or many steps needed; the allocators would keep it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _warnings_to(tell: Callable[[str], object]) -> Iterator[None]:
    """Call `tell` with what this thread's code logs as a warning."""
    logger, thread = logging.getLogger("diffusers_dino"), threading.get_ident()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and record.thread == thread:
                tell(record.getMessage())

    handler = Handler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _is_animated(content: bytes) -> bool:
    """Whether a file is one of several pages or frames, as far as PIL knows its format."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as file:
        return getattr(file, "is_animated", False)
    return False


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
