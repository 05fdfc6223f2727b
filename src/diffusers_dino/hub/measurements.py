"""What the protocols have measured of a model, as its card tells it: text for people, metrics for the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.augmentation.result import AugmentationResult
from ..evaluation.augmentation.table import format_augmentation_table
from ..evaluation.fidelity.protocol import REAL, UNTRAINED, FidelityResult
from ..evaluation.fidelity.table import format_fidelity_table
from ..evaluation.interpolation.protocol import InterpolationResult
from ..evaluation.labels.protocol import LabelPreservationResult
from ..evaluation.labels.table import format_preservation_table
from ..evaluation.memorization.protocol import MemorizationResult
from ..evaluation.reconstruction.protocol import ReconstructionResult
from ..evaluation.results import JsonResult
from ..evaluation.segmentation.protocol import SegmentationResult
from ..evaluation.segmentation.table import format_segmentation_table
from ..evaluation.table_text import markdown_line
from .cards import fact_table, privacy_facts, table_cell
from .model_card import Measurement

__all__ = ["describe_result", "read_result", "read_results"]

_CONTROLS = ("generated", "shuffled", "untrained", "nearest_training_image", "pixel_blend")


def read_result(path: str | Path) -> JsonResult | None:
    """The result of a protocol in a JSON file, known by its fields; None if it is something else."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
    names = set(content) if isinstance(content, dict) else set()
    kind = next((kind for kind in _DESCRIBE if {field.name for field in fields(kind)} == names), None)
    try:
        return None if kind is None else kind.load(path)
    except (KeyError, TypeError):  # the names are right, what is in them is not
        return None


def read_results(paths: Iterable[str | Path], dataset: str = "held-out images") -> list[Measurement]:
    """All results in files and folders, in the order of the protocols.

    Args:
        paths: Files that the protocols wrote, or folders of them with their subfolders.
        dataset: Name of the images that the figures are of; a segmentation has its own.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a path holds no result, or figures of copies are of no synthetic images.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There are no results at {path}.")
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        results = [result for result in map(read_result, files) if result is not None]
        if not results:
            kinds = ", ".join(kind.__name__ for kind in _DESCRIBE)
            raise ValueError(f"{path} holds no result of a protocol ({kinds}), as the eval_*.py scripts write them.")
        found += results
    order = list(_DESCRIBE)
    return [describe_result(result, dataset) for result in sorted(found, key=lambda one: order.index(type(one)))]


def describe_result(result: JsonResult, dataset: str = "held-out images") -> Measurement:
    """What a card says of one result. Keys of images, which can name patients, are left out.

    Raises:
        ValueError: If figures of copies are of no synthetic images.
    """
    return _DESCRIBE[type(result)](result, dataset)


def _metric(
    dataset: str, task: str, kind: str, name: str, value: float, args: Mapping[str, Any], task_type: str | None = None
) -> EvalResult:
    return EvalResult(
        task_type=task_type or "image-to-image",
        task_name=task,
        dataset_type=dataset.lower().replace(" ", "-"),
        dataset_name=dataset,
        metric_type=kind,
        metric_name=name,
        metric_value=float(f"{value:.6g}"),
        metric_args=dict(args),
    )


def _reconstruction(result: ReconstructionResult, dataset: str) -> Measurement:
    n = result.num_images
    task = "semantic variations of unseen images"
    sampling = {
        "num_images": n,
        "seeds": list(result.seeds),
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
    }
    header = ["finds its source first", *(_control(name) for name in _CONTROLS[:4]), "chance"]
    rows = [
        [f"by {name}", *(f"{getattr(figures, control):.3f}" for control in _CONTROLS[:4]), f"{1 / n:.3f}"]
        for name, figures in (("the encoder", result.by_encoder), ("16 x 16 pixels", result.by_pixels))
    ]
    text = (
        f"One image is generated from each of N = {n} unseen ones; shares whose nearest neighbour among the {n} is "
        f"their own source. Mean of {len(result.seeds)} seeds, {result.num_inference_steps} steps, guidance "
        f"{result.guidance_scale:g}; {result.num_training_images} training images.\n\n{_table(header, rows)}"
    )
    metrics = [
        _metric(dataset, task, "accuracy", f"top-1 retrieval of the source by {name}, N = {n}", value, sampling)
        for name, value in (
            ("the encoder's tokens", result.by_encoder.generated),
            ("16 x 16 pixels", result.by_pixels.generated),
        )
    ]
    return Measurement("Variations of unseen images", text, tuple(metrics))


def _interpolation(result: InterpolationResult, dataset: str) -> Measurement:
    n, spaces = result.num_pairs, (("the encoder", result.by_encoder), ("16 x 16 pixels", result.by_pixels))
    controls = ("generated", "untrained", "nearest_training_image", "pixel_blend")
    header = ["monotone paths", *(_control(name) for name in controls)]
    rows = [
        [f"by {name}", *(f"{getattr(space, control).monotone_paths:.3f}" for control in controls)]
        for name, space in spaces
    ]
    text = (
        f"Share of paths between N = {n} pairs of unseen images on which each of {len(result.fractions) - 1} steps "
        f"leaves the source and approaches the target. {len(result.seeds)} seeds, {result.num_inference_steps} steps, "
        f"guidance {result.guidance_scale:g}, {result.method}.\n\n{_table(header, rows)}"
    )
    arguments = {"num_pairs": n, "seeds": list(result.seeds), "num_inference_steps": result.num_inference_steps}
    metrics = [
        _metric(
            dataset, "interpolation", "monotone_paths", f"monotone paths by {name}, N = {n} pairs", value, arguments
        )
        for name, value in ((name, space.generated.monotone_paths) for name, space in spaces)
    ]
    return Measurement("Paths between unseen images", text, tuple(metrics))


def _fidelity(result: FidelityResult, dataset: str) -> Measurement:
    metrics = []
    for row in result.rows:
        if row.images in (REAL, UNTRAINED):
            continue
        sizes = f"N = {row.num_images} against M = {row.num_reference}"
        arguments = {
            "images": table_cell(row.images),
            "num_images": row.num_images,
            "num_reference": row.num_reference,
            "features": row.features.to_dict(),
            "sampling": None if row.sampling is None else asdict(row.sampling),
        }
        for kind, name in (("fid", "Fréchet distance"), ("kid", "kernel distance")):
            figure = row.frechet if kind == "fid" else row.kernel
            full = f"{name}, {row.features.extractor} features, {sizes}, {table_cell(row.images)}"
            interval = {"low": figure.low, "high": figure.high, "level": row.level}
            metrics.append(_metric(dataset, "likeness to real images", kind, full, figure.value, arguments | interval))
    works = ("torchxrayvision",) if any(row.features.extractor.startswith("xrv") for row in result.rows) else ()
    return Measurement("Likeness to real images", format_fidelity_table(result).strip(), tuple(metrics), works)


def _segmentation(result: SegmentationResult, _: str) -> Measurement:
    n = len(result.keys)
    models = {sweep.method for sweep in result.sweeps if "untrained" not in sweep.method}
    metrics = [
        _metric(
            table_cell(result.dataset),
            "zero-shot segmentation",
            "dice",
            f"mean Dice, {table_cell(scores.method)}, {table_cell(scores.selection)}, N = {n}",
            scores.mean,
            {"num_images": n, "low": scores.low, "high": scores.high, "mask_size": result.mask_size},
            "image-segmentation",
        )
        for scores in result.methods
        if scores.method in models
    ]
    text = f"N = {n} images, Dice at {result.mask_size} px.\n\n{format_segmentation_table([result]).strip()}"
    return Measurement(f"Segmentation: {table_cell(result.dataset)}", text, tuple(metrics), ("diffseg",))


def _memorization(result: MemorizationResult, _: str) -> Measurement:
    facts = privacy_facts(asdict(result))
    found = result.synthetic
    planted = [(table_cell(one.change), one.num_images, f"{one.found:.3f}") for one in result.planted]
    text = fact_table(facts)
    if planted:
        text += "\n\nWhat the same search finds of planted copies:\n\n"
        text += _table(["change", "N", "share found"], planted)
    arguments = {
        "num_images": found.num_images,
        "copies": found.copies,
        "low": found.low,
        "high": found.high,
        "false_alarms": result.false_alarms,
        "features": result.spec.to_dict(),
    }
    name = f"share of near-copies of training images, N = {found.num_images}"
    metric = _metric("training images", "generated images against them", "near_copies", name, found.share, arguments)
    return Measurement("Copies of training images", text, (metric,), is_privacy=True)


def _labels(result: LabelPreservationResult, _: str) -> Measurement:
    return Measurement("Labels of synthetic images", format_preservation_table(result).strip(), ())


def _augmentation(result: AugmentationResult, _: str) -> Measurement:
    return Measurement("Training classifiers with synthetic images", format_augmentation_table(result).strip(), ())


# In the order in which a card tells of them.
_DESCRIBE: dict[type[JsonResult], Callable[[Any, str], Measurement]] = {
    ReconstructionResult: _reconstruction,
    InterpolationResult: _interpolation,
    FidelityResult: _fidelity,
    SegmentationResult: _segmentation,
    LabelPreservationResult: _labels,
    AugmentationResult: _augmentation,
    MemorizationResult: _memorization,
}


def _control(name: str) -> str:
    return name.replace("_", " ")


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join(markdown_line(line) for line in lines)
