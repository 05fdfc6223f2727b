"""Looks at a model while it trains: a grid of variations with fixed seeds, and a distance to real images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..data import collate
from ..files import read_json, save_atomically, write_json
from ..fingerprints import hash_of
from ..metrics import FeatureSpec, frechet_distance, kernel_distance, open_extractor
from ..pipelines import DinoDiffusionPipeline
from ..seeds import generator_for
from ..sheets import contact_sheet
from .checkpoints import saying_what_is_full
from .models import on_device
from .state import TrainingState

__all__ = ["DISTANCES", "FeatureMetric", "Validator", "generate_for_validation", "measure", "open_metric"]


@dataclass(frozen=True)
class FeatureMetric:
    """A distance between generated and real images (lower is better), split where processes can share the work.

    `features` maps images `(N, C, H, W)` in [0, 1] to `(N, D)`, `distance` features of the generated and of the real
    images to a number; `spec` says what the features are, for the record.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], float]
    spec: FeatureSpec | None = None


DISTANCES = {"frechet": frechet_distance, "kernel": kernel_distance}


def open_metric(
    distance: str = "frechet",
    extractor: str = "pixels",
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> FeatureMetric:
    """A distance (one of `DISTANCES`) in the space of a feature extractor of `metrics.open_extractor`.

    With fewer images than dimensions, `"kernel"` says more. ValueError if there is no such distance or extractor, or
    the weights, a local file or folder, are not what they should be.
    """
    if distance not in DISTANCES:
        raise ValueError(f"A distance is one of {', '.join(DISTANCES)}, not {distance!r}.")
    features = open_extractor(extractor, weights, device)
    name = f"{distance}_{features.spec.extractor}"  # of a folder not the path, as trackers tell it
    return FeatureMetric(name, features, DISTANCES[distance], features.spec)


def generate_for_validation(
    pipe: DinoDiffusionPipeline,
    sources: Tensor,
    indices: Sequence[int],
    num_variations: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    **call: Any,
) -> Tensor:
    """Generate V variations of images `(N, C, H, W)` in [0, 1]: `(N, V, C, H, W)` in [0, 1] on the CPU.

    The noise depends only on (seed, the source's index in its data set, the variation). `batch_size` images are
    generated at once; `call` are further arguments of the pipeline, such as `guidance_scale`.
    """
    height, width = sources.shape[-2:]
    per_batch = max(1, batch_size // num_variations)
    batches = []
    for first in range(0, len(sources), per_batch):
        numbers = indices[first : first + per_batch]
        generators = [generator_for(seed, "validation", n, v) for n in numbers for v in range(num_variations)]
        images = pipe(
            sources[first : first + per_batch],
            num_images_per_prompt=num_variations,
            generator=generators,
            height=height,
            width=width,
            output_type="pt",
            **call,
        ).images
        batches.append(images.float().cpu().unflatten(0, (-1, num_variations)))
    return torch.cat(batches)


def measure(
    metric: FeatureMetric,
    pipe: DinoDiffusionPipeline,
    real: Sequence[Tensor],
    accelerator: Accelerator,
    batch_size: int = 16,
    seed: int = 0,
    **call: Any,
) -> float:
    """Generate one image from each real one, `(C, H, W)` in [0, 1], and measure how far the two sets are apart.

    The processes share the images; each must call this, and each gets the result. It is not a number if a feature is
    not finite. `call` are further arguments of the pipeline.
    """
    mine = list(range(accelerator.process_index, len(real), accelerator.num_processes))
    generated, reference = torch.empty(0), torch.empty(0)
    if mine:
        sources = collate([{"key": "", "image": real[i]} for i in mine])["image"]
        images = generate_for_validation(pipe, sources, mine, batch_size=batch_size, seed=seed, **call)
        generated, reference = (
            torch.cat([metric.features(batch) for batch in part.split(batch_size)]) for part in (images[:, 0], sources)
        )
    both = [generated, reference]
    if accelerator.num_processes > 1:  # the numbers of their rows may differ
        both = [torch.cat([part.cpu() for part in gather_object([rows]) if len(part)]) for rows in both]
    if not all(torch.isfinite(features).all() for features in both):
        return math.nan
    return metric.distance(*both)


class Validator:
    """Looks at the averaged weights every so many updates, and keeps the best ones.

    Pictures go to `output_dir/validation/STEP.png`; the best weights, as `TrainingState.save_for_use` writes them, to
    `output_dir/best` with `metric.json`. Every process must call `run`.

    Args:
        pipe: The pipeline in training, with its `state`.
        output_dir: Folder of the run.
        images: Data set of `{"key", "image"}`; its first images are used.
        grid_steps: Updates between pictures of `num_variations` of `num_sources` images; 0 draws none.
        metric: What to measure, without guidance.
        metric_steps: Updates between measurements on `num_metric_images`; 0 measures nothing.
        batch_size: Images generated at once.
        seed: Seed of the noise, the same at every look.
        guidance_scale: Guidance of the pictures.
        num_inference_steps: Sampling steps.
    """

    def __init__(
        self,
        pipe: DinoDiffusionPipeline,
        state: TrainingState,
        output_dir: str | Path,
        images: Any,
        *,
        metric: FeatureMetric,
        grid_steps: int = 500,
        num_sources: int = 4,
        num_variations: int = 3,
        metric_steps: int = 0,
        num_metric_images: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 25,
    ) -> None:
        if (grid_steps and min(num_sources, num_variations) < 1) or (metric_steps and num_metric_images < 1):
            raise ValueError(
                f"A validation needs sources, variations and images to measure on, got {num_sources}, "
                f"{num_variations} and {num_metric_images}."
            )
        self.pipe, self.state, self.accelerator, self.images = pipe, state, state.accelerator, images
        self.output_dir = Path(output_dir)
        self.grid_steps, self.num_sources, self.num_variations = grid_steps, num_sources, num_variations
        self.metric, self.metric_steps, self.num_metric_images = metric, metric_steps, num_metric_images
        self.guidance_scale = guidance_scale
        self.sampling = {"batch_size": batch_size, "seed": seed, "num_inference_steps": num_inference_steps}

    def is_due(self, step: int) -> bool:
        """Whether there is something to do after this update."""
        return any(steps and step % steps == 0 for steps in (self.grid_steps, self.metric_steps))

    def run(self, step: int, say: Callable[[str], None] = print) -> None:
        """Do what is due after this update."""
        draw = bool(self.grid_steps) and step % self.grid_steps == 0 and self.accelerator.is_main_process
        judge = bool(self.metric_steps) and step % self.metric_steps == 0
        if draw or judge:
            frozen = (self.pipe.vae, self.pipe.conditioner)
            with on_device(frozen, self.accelerator.device), self.state.averaged_weights():
                if draw:
                    self._draw(step)
                if judge:
                    self._judge(step, say)

    def _draw(self, step: int) -> None:
        sources = collate(self._first(self.num_sources))["image"]
        variations = generate_for_validation(
            self.pipe,
            sources,
            range(len(sources)),
            self.num_variations,
            guidance_scale=self.guidance_scale,
            **self.sampling,
        )
        picture = contact_sheet(sources, variations.flatten(0, 1))
        folder = self.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":  # others may store pictures of patients elsewhere
                shown = {"source | variations": np.asarray(picture)[None]}
                tracker.log_images(shown, step, dataformats="NHWC")

    def _judge(self, step: int, say: Callable[[str], None]) -> None:
        metric = self.metric
        real = [sample["image"] for sample in self._first(self.num_metric_images)]
        value = measure(metric, self.pipe, real, self.accelerator, guidance_scale=1.0, **self.sampling)
        self.accelerator.log({metric.name: value}, step=step)
        if not self.accelerator.is_main_process:
            return
        best = self.output_dir / "best"
        facts = {
            "metric": metric.name,
            "value": value,
            "step": step,
            "num_images": len(real),
            "images": hash_of(*real[:16])[:16],
            "features": metric.spec and metric.spec.to_dict(),
        }
        known = _best_value(best, facts)
        note = f"{metric.name} after {step} updates: {value:.4g} ({len(real)} images"
        if not value < known:  # also where it is not a number
            say(f"{note}; best so far {known:.4g})")
            return
        with saying_what_is_full(best), save_atomically(best) as folder:
            self.state.save_for_use(folder)
            write_json(folder / "metric.json", facts)
        say(f"{note}; the best so far)")

    def _first(self, count: int) -> list[dict[str, Any]]:
        return [self.images[i] for i in range(min(count, len(self.images)))]


def _best_value(folder: Path, now: dict[str, Any]) -> float:
    """The lowest value so far, infinite before the first one of this metric on these features and images."""
    try:
        facts = read_json(folder / "metric.json")
        facts = {"images": now["images"], "features": None, **facts}  # of an older version
        same = all(facts[name] == now[name] for name in ("num_images", "images", "features"))
        distances = [each["metric"].partition("_")[0] for each in (facts, now)]  # the rest is in `features`
        return float(facts["value"]) if same and distances[0] == distances[1] else math.inf
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or damaged
        return math.inf
