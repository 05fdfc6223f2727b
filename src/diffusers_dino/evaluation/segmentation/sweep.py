"""Segment a data set with a model at every setting of a sweep, once, and keep the segments on disk.

Masks are not looked at here: whatever is chosen or scored afterwards starts from what this leaves. Attention maps are
computed once for each (layers, timestep) and reused for all thresholds. A unit of work is a few images at one (layers,
timestep); a file holds it, so a run that was killed continues with the unit it was at.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...data import Preprocessing
from ...data.sources.masks import MaskedImages
from ...diffseg.settings import ALL_LAYERS, DiffSegSettings
from ...files import atomic_write, make_writable_folder, remove_partials
from ...fingerprints import fingerprint_pipeline, hash_of
from ...frozen import freeze
from ...pipelines import DiffSegPipeline
from ...pipelines.checks import image_size
from ...seeds import generator_for

__all__ = ["Setting", "Sweep", "SweptSegments", "segment_images"]


@dataclass(frozen=True)
class Sweep:
    """The settings that a model is tried with: every combination of layers, timestep and threshold.

    Attributes:
        timesteps: Of the denoising step whose attention is read.
        thresholds: Of merging, each used in all passes.
        layers: `"all"`, or names of attention layers or blocks joined by `+`, such as `"up_blocks.1.attentions.0"`.
        relative: Whether thresholds are in units of the mean divergence between an image's maps.
        refine: Whether to refine segments by k-means.
        num_merges: Passes of merging.
        anchors_per_side: Of the grid of maps that merging starts from; None: 16, or as many as there are.
        add_noise: Whether the model sees noised latents in place of clean ones.
        size: Side in pixels that the model sees images at; None: the UNet's own.
        mask_size: Side of the segments in pixels.
        seed: Of the noise.

    Raises:
        ValueError: If there is no timestep, threshold or choice of layers.
    """

    timesteps: tuple[int, ...] = (1, 50, 100, 300)
    thresholds: tuple[float, ...] = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
    layers: tuple[str, ...] = (ALL_LAYERS,)
    relative: bool = True
    refine: bool = True
    num_merges: int = 3
    anchors_per_side: int | None = None
    add_noise: bool = False
    size: int | None = None
    mask_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("timesteps", "thresholds", "layers"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"A sweep needs one or more {name}, all different, got {list(values)}.")
            object.__setattr__(self, name, tuple(values))  # lists, as JSON gives them, are welcome

    def at(self, settings: DiffSegSettings) -> Sweep:
        """A sweep of only these settings, such as those that were noted with a model; all else is as here."""
        timesteps, thresholds = (settings.timestep,), (settings.merge_threshold,)
        layers = (settings.joined_layers,)
        return replace(self, timesteps=timesteps, thresholds=thresholds, layers=layers, relative=True)

    @property
    def views(self) -> list[tuple[str, int]]:
        """All (layers, timestep): what attention maps are computed for."""
        return [(layers, timestep) for layers in self.layers for timestep in self.timesteps]


@dataclass(frozen=True)
class Setting:
    """One point of a sweep over the checkpoints of a model."""

    checkpoint: str
    layers: str
    timestep: int
    threshold: float

    def __str__(self) -> str:
        parts = [self.checkpoint] if self.checkpoint else []
        parts += [self.layers] if self.layers != ALL_LAYERS else []
        return ", ".join([*parts, f"t {self.timestep}", f"threshold {self.threshold:g}"])


@dataclass(frozen=True)
class SweptSegments:
    """The segments of all images at all settings of one checkpoint, on disk, `chunk` images in a file."""

    folder: Path
    checkpoint: str
    sweep: Sweep
    num_images: int
    chunk: int

    @property
    def settings(self) -> list[Setting]:
        """All settings, in the order of `read`."""
        return [Setting(self.checkpoint, *view, t) for view in self.sweep.views for t in self.sweep.thresholds]

    def units(self) -> list[tuple[int, range]]:
        """All (view, images) that are a file each."""
        numbers = range(self.num_images)
        chunks = [numbers[first : first + self.chunk] for first in numbers[:: self.chunk]]
        return [(view, images) for view in range(len(self.sweep.views)) for images in chunks]

    def path(self, view: int, first: int) -> Path:
        """The file of a unit."""
        layers, timestep = self.sweep.views[view]
        return self.folder / f"{layers.replace('/', '_')}-t{timestep:04d}-{first:06d}.npz"

    def read(self, index: int) -> Tensor:
        """Segments `(settings, mask_size, mask_size)` int64 of one image; ValueError if a file is damaged."""
        first, side = index - index % self.chunk, self.sweep.mask_size
        shape = (len(self.sweep.thresholds), min(self.chunk, self.num_images - first), side, side)
        parts = []
        for view in range(len(self.sweep.views)):
            path = self.path(view, first)
            try:
                with np.load(path, allow_pickle=False) as file:
                    segments = file["segments"]
                if segments.shape != shape or segments.dtype != np.uint16:
                    raise ValueError(f"it holds {segments.dtype} {segments.shape}, not uint16 {shape}")
            except (BadZipFile, EOFError, KeyError, ValueError, zlib.error) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it and run again.") from error
            parts.append(torch.from_numpy(segments[:, index - first].astype(np.int64)))
        return torch.cat(parts)


def segment_images(
    pipe: DiffSegPipeline,
    images: MaskedImages,
    sweep: Sweep,
    folder: str | Path,
    *,
    checkpoint: str = "",
    chunk: int = 8,
    progress: bool = True,
) -> SweptSegments:
    """Segment all images at all settings, `chunk` images at once; files that are there already are not made again.

    Masks are not read. `checkpoint` is the name of the model's state, for the table. ValueError if `folder` holds the
    segments of another model, of other images or of other settings.
    """
    folder = make_writable_folder(folder)
    swept = SweptSegments(folder, checkpoint, sweep, len(images), chunk)
    identity = {
        **asdict(sweep),
        "chunk": chunk,
        "images": hash_of("\n".join(images.keys))[:16],
        "images are prepared by": _told(images.preprocessing),
        "model": fingerprint_pipeline(pipe),
    }
    remove_partials(folder)
    freeze(folder / "sweep.json", identity)
    todo = [unit for unit in swept.units() if not swept.path(unit[0], unit[1].start).is_file()]
    shown = images.resized(sweep.size or image_size(pipe))
    for view, members in tqdm(todo, desc=checkpoint or folder.name, unit="unit", disable=not progress):
        segments = np.stack(list(_segment_unit(pipe, shown, sweep, view, members)), axis=1)
        with atomic_write(swept.path(view, members.start)) as file:
            np.savez_compressed(file, segments=segments)
    return swept


def _told(preprocessing: Preprocessing) -> dict[str, Any] | None:
    """How images are prepared, apart from their size; None for images whose borders stay on, as they once all did."""
    told = {name: value for name, value in asdict(preprocessing).items() if name != "size"}
    return None if preprocessing == Preprocessing(preprocessing.size, remove_borders=False) else told


def _segment_unit(
    pipe: DiffSegPipeline, images: MaskedImages, sweep: Sweep, view: int, members: range
) -> Iterator[np.ndarray]:
    """Segments `(thresholds, mask_size, mask_size)` of each image of a unit."""
    layers, timestep = sweep.views[view]
    generators = [generator_for(sweep.seed, "segmentation", timestep, i) for i in members] if sweep.add_noise else None
    maps = pipe.attention_maps(
        [images.image(i) for i in members],
        timestep,
        size=images.size,
        layers=ALL_LAYERS if layers == ALL_LAYERS else layers.split("+"),
        add_noise=sweep.add_noise,
        generator=generators,
    )
    merging = {"num_merges": sweep.num_merges, "anchors_per_side": sweep.anchors_per_side, "refine": sweep.refine}
    merging |= {"relative_threshold": sweep.relative, "output_size": sweep.mask_size}
    for image_maps in maps:
        results = [pipe.segment(image_maps[None], t, **merging).masks[0] for t in sweep.thresholds]
        yield torch.stack(results).cpu().numpy().astype(np.uint16)
