"""Segment a data set with a model at every setting of a sweep, once, and keep the segments on disk.

Masks are not looked at here: whatever is chosen or scored afterwards starts from what this leaves. Attention maps are
computed once for each (layers, timestep) and reused for all thresholds. A unit of work is a few images at one (layers,
timestep); a file holds it, so a run that was killed continues with the unit it was at.
"""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...data import Preprocessing
from ...data.sources.masks import MaskedImages
from ...diffseg.clusters import FeatureClusters
from ...diffseg.lungs import fit_lung_clusters
from ...diffseg.settings import ALL_LAYERS
from ...files import atomic_write, make_writable_folder, remove_partials
from ...fingerprints import fingerprint_pipeline, hash_of
from ...frozen import freeze
from ...pipelines import DiffSegPipeline
from ...pipelines.checks import image_size
from ...pixels import with_channels
from ...seeds import generator_for
from ..controls import split_in_halves
from .sweep import Setting, Sweep

__all__ = ["SweptSegments", "segment_images"]


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
        sweep = self.sweep
        return [Setting(self.checkpoint, *view, t, sweep.title) for view in sweep.views for t in sweep.thresholds]

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
        first = index - index % self.chunk
        parts = (self._load(view, first, "segments") for view in range(len(self.sweep.views)))
        return torch.cat([torch.from_numpy(segments[:, index - first].astype(np.int64)) for segments in parts])

    def read_lungs(self, index: int) -> Tensor | None:
        """Of clusters, the masks `(views, mask_size, mask_size)` bool of those that were named lungs; else None."""
        if self.sweep.method != "clusters":
            return None
        first = index - index % self.chunk
        masks = [self._load(view, first, "lungs")[0, index - first] for view in range(len(self.sweep.views))]
        return torch.from_numpy(np.stack(masks).astype(bool))

    @property
    def seconds(self) -> float | None:
        """Mean seconds that an image took at one setting; None if they are from before these were noted."""
        return self._mean("seconds")

    @property
    def seconds_of_all(self) -> float | None:
        """Mean seconds that an image took at all settings, whose thresholds share a pass of the model; or None."""
        seconds = self._mean("seconds_of_all")
        return None if seconds is None else seconds * len(self.sweep.views)

    def _mean(self, name: str) -> float | None:
        found = []
        for view, members in self.units():
            arrays = self._arrays(view, members.start)
            found += [arrays[name].item()] * len(members) if name in arrays else []
        return float(np.mean(found)) if found else None

    def _load(self, view: int, first: int, name: str) -> np.ndarray:
        side, arrays = self.sweep.mask_size, self._arrays(view, first)
        shape = (len(self.sweep.thresholds), min(self.chunk, self.num_images - first), side, side)
        values = arrays.get(name, np.empty(0))
        if values.shape != shape or values.dtype != np.uint16:
            raise ValueError(
                f"{self.path(view, first)} is damaged ({name}: {values.dtype} {values.shape}, not uint16 {shape}): "
                "delete it and run again."
            )
        return values

    def _arrays(self, view: int, first: int) -> dict[str, np.ndarray]:
        path = self.path(view, first)
        status = path.stat()
        return _read_file(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)  # images are asked for one by one, of several sweeps in turn
def _read_file(path: Path, *version: int) -> dict[str, np.ndarray]:
    """All that a file holds, so that damage is found wherever it is."""
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as file:
            return dict(file)
    except (BadZipFile, EOFError, OSError, RuntimeError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again.") from error


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
        **sweep.identity,
        "chunk": chunk,
        "images": hash_of("\n".join(images.keys))[:16],
        "images are prepared by": _told(images.preprocessing),
        "model": fingerprint_pipeline(pipe),
    }
    remove_partials(folder)
    freeze(folder / "sweep.json", identity)
    todo = [unit for unit in swept.units() if not swept.path(unit[0], unit[1].start).is_file()]
    shown = images.resized(_shown_size(pipe, sweep))
    units = tqdm(todo, desc=checkpoint or folder.name, unit="unit", disable=not progress)
    if sweep.method == "clusters":
        _segment_by_clusters(pipe, shown, swept, units)
        return swept
    for view, members in units:
        clock = _Clock(len(members))
        segments = _segment_unit(pipe, shown, sweep, view, members, clock)
        with atomic_write(swept.path(view, members.start)) as file:
            seconds, of_all = clock.seconds(len(sweep.thresholds)), clock.seconds(1)
            np.savez_compressed(file, segments=segments, seconds=seconds, seconds_of_all=of_all)
    return swept


def _told(preprocessing: Preprocessing) -> dict[str, Any] | None:
    """How images are prepared, apart from their size; None for images whose borders stay on, as they once all did."""
    told = {name: value for name, value in asdict(preprocessing).items() if name != "size"}
    return None if preprocessing == Preprocessing(preprocessing.size, remove_borders=False) else told


class _Clock:
    """Seconds an image: of what is done once for all settings, and the share of a setting in the rest.

    Of a CPU they are those of the processor, which do not depend on what else runs there.
    """

    def __init__(self, images: int) -> None:
        self.images, self.once = images, 0.0
        self._read = time.perf_counter if torch.cuda.is_available() else time.process_time
        self._start = self._read()

    def lap(self) -> None:
        """What comes from here on is done for each setting."""
        self.once = self._read() - self._start

    def seconds(self, settings: int) -> float:
        """For one image at one setting."""
        return (self.once + (self._read() - self._start - self.once) / settings) / self.images


def _shown_size(pipe: DiffSegPipeline, sweep: Sweep) -> int:
    """Side of the images that the pipeline is given: what the larger of the denoiser and the encoders sees."""
    sides = [sweep.size or image_size(pipe)] if sweep.reads_denoiser else []
    if sweep.method in ("cut", "clusters") and "encoder" in sweep.features:
        if pipe.conditioner is None:
            raise ValueError(f"{sweep.title} needs an encoder, and this pipeline has no conditioner.")
        sides.append(sweep.encoder_size or int(np.max(pipe.conditioner.image_size)))
    return max(sides)


def _features(pipe: DiffSegPipeline, images: MaskedImages, sweep: Sweep, view: int, members: range) -> Tensor:
    """Features `(B, D, h, w)` of the images of a unit."""
    layers, timestep = sweep.views[view]
    return pipe.patch_features([images.image(i) for i in members], **_feature_settings(sweep, layers, timestep))


def _attention(pipe: DiffSegPipeline, images: MaskedImages, sweep: Sweep, view: int, members: range) -> Tensor:
    """Attention maps of the images of a unit."""
    layers, timestep = sweep.views[view]
    generators = [generator_for(sweep.seed, "segmentation", timestep, i) for i in members] if sweep.add_noise else None
    return pipe.attention_maps(
        [images.image(i) for i in members],
        timestep,
        size=images.size,
        layers=ALL_LAYERS if layers == ALL_LAYERS else layers.split("+"),
        add_noise=sweep.add_noise,
        generator=generators,
    )


def _feature_settings(sweep: Sweep, layers: str, timestep: int) -> dict[str, object]:
    settings: dict[str, object] = {"features": list(sweep.features)}
    if "encoder" in sweep.features:
        settings |= {"encoder_size": sweep.encoder_size, "encoder_layer": sweep.encoder_layer}
    if "unet" in sweep.features:
        settings |= {"timestep": timestep, "size": sweep.size}
        settings |= {"layers": None if layers == ALL_LAYERS else layers.split("+")}
    return settings


def _segment_unit(
    pipe: DiffSegPipeline, images: MaskedImages, sweep: Sweep, view: int, members: range, clock: _Clock
) -> np.ndarray:
    """Segments `(thresholds, B, mask_size, mask_size)` of the images of a unit, by its features or its attention."""
    if sweep.method == "cut":
        found = _features(pipe, images, sweep, view, members)
        segment = partial(pipe.segment_features, cut_power=sweep.cut_power)
    else:
        found = _attention(pipe, images, sweep, view, members)
        merging = {"num_merges": sweep.num_merges, "anchors_per_side": sweep.anchors_per_side, "refine": sweep.refine}
        merging["relative_threshold"] = sweep.relative
        cutting = {"merging": "ncut", "walk_steps": sweep.walk_steps}
        segment = partial(pipe.segment, **(cutting if sweep.method == "walk" else merging))
    clock.lap()
    kind = "merge_threshold" if sweep.method == "diffseg" else "cut_threshold"
    masks = [
        [segment(each[None], **{kind: t}, output_size=sweep.mask_size).masks[0] for t in sweep.thresholds]
        for each in found
    ]
    segments = torch.stack([torch.stack(of_image) for of_image in masks], dim=1)
    return segments.cpu().numpy().astype(np.uint16)


def _segment_by_clusters(
    pipe: DiffSegPipeline, images: MaskedImages, swept: SweptSegments, units: Iterable[tuple[int, range]]
) -> None:
    """Segments of each unit by clusters that were fitted, and named, on the other half of the patients."""
    sweep, halves = swept.sweep, split_in_halves(images.patients, swept.sweep.seed).tolist()
    fitted: dict[int, tuple[list[FeatureClusters], dict[int, Tensor], float]] = {}
    for view, members in units:
        if view not in fitted:
            fitted = {view: _fit_halves(pipe, images, swept, view, halves)}
        clusters, features, seconds = fitted[view]
        segments, lungs = [], []
        clock = _Clock(len(members))
        for index in members:
            own = clusters[0] if halves[index] else clusters[1]  # fitted on the others
            output = pipe.segment_features(features[index].float(), clusters=own, output_size=sweep.mask_size)
            segments.append(output.masks[0].cpu())
            lungs.append(torch.isin(segments[-1], torch.tensor(own.names["lungs"])))
        arrays = {"segments": torch.stack(segments)[None], "lungs": torch.stack(lungs)[None]}
        arrays = {name: values.numpy().astype(np.uint16) for name, values in arrays.items()}
        with atomic_write(swept.path(view, members.start)) as file:
            seconds += clock.seconds(1)
            np.savez_compressed(file, **arrays, seconds=seconds, seconds_of_all=seconds)


def _fit_halves(
    pipe: DiffSegPipeline, images: MaskedImages, swept: SweptSegments, view: int, halves: list[bool]
) -> tuple[list[FeatureClusters], dict[int, Tensor], float]:
    """Clusters of the second and of the first half, the features of all images, and the seconds an image.

    Features are in memory in half precision: half a megabyte an image of 28 x 28 patches and a small encoder.
    """
    sweep, features, gray = swept.sweep, {}, {}
    settings = _feature_settings(sweep, *sweep.views[view])
    clock = _Clock(len(images))
    starts = range(0, len(images), swept.chunk)
    for start in tqdm(starts, desc="features", unit="unit", disable=len(images) < 2 * swept.chunk):
        members = range(start, min(start + swept.chunk, len(images)))
        made = _features(pipe, images, sweep, view, members).half()
        features |= {index: made[i : i + 1] for i, index in enumerate(members)}
        gray |= {index: with_channels(images.image(index), 1)[0] for index in members}
    clusters = []
    for half in (False, True):
        members = [index for index in range(len(images)) if halves[index] == half]
        shown = torch.stack([gray[i] for i in members])
        own = fit_lung_clusters(
            [features[i] for i in members], shown, sweep.num_clusters, settings=settings, seed=sweep.seed
        )
        own.save(swept.folder / f"clusters-view-{view}-of-half-{int(half)}.safetensors")
        clusters.append(own)
    return clusters, features, clock.seconds(1)
