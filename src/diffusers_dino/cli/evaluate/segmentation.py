r"""Zero-shot segmentation by DiffSeg, measured: the paper's Table 2 and Figs 9-12, on your images and masks.

    diffusers-dino evaluate segmentation --pipeline outputs/model --data /data/lungs --output_dir outputs/segmentation

`--data` takes folders with `images` and `masks`, webdataset tars, or `NAME=FOLDER`, where NAME may be a data set of
the catalogue (jsrt, montgomery, shenzhen). `--pipeline` takes pipelines, checkpoints of `train_dino.py`, or
`NAME=PATH`, where paths of one name are checkpoints of one model. Segments are kept in `--output_dir`: the same
command continues after a kill. What is chosen with the help of masks is chosen on other patients than it is scored on.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from ... import DiffSegPipeline
from ...data import sources
from ...data.sources.masks import MaskedImages, open_masked_images
from ...devices import device_of
from ...evaluation import SegmentationResult, Sweep, SweptSegments, evaluate_segmentation, segment_images
from ...evaluation.controls import with_fresh_unet
from ...evaluation.segmentation.plot import SWEEP_AXES, plot_segmentation_examples, plot_segmentation_sweep
from ...evaluation.segmentation.protocol import chosen_masks
from ...evaluation.segmentation.table import format_segmentation_table
from ...evaluation.table_text import TABLE_FORMATS
from ...files import make_writable_folder
from ...training.models import load_trained_pipeline
from ..arguments import flag

logger = logging.getLogger("eval_segmentation")


@dataclass
class Arguments:
    pipeline: list[str] = flag([], "DinoDiffusionPipelines or checkpoints, as PATH or NAME=PATH.", group="Models")  # noqa: RUF009
    stable_diffusion: str | None = flag(None, "A Stable Diffusion to show beside them, with the empty prompt.")
    untrained: bool = flag(True, "Show each model's UNet before training beside it.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights.")
    data: list[str] = flag([], "Images and masks, as FOLDER, TARS or NAME=FOLDER.", group="Data")  # noqa: RUF009
    max_samples: int | None = flag(None, "Use the first images of a data set alone.")
    mask_size: int = flag(256, "Side in pixels that Dice coefficients are taken at.")
    size: int | None = flag(None, "Side in pixels that the models see images at; by default their own.", group="Sweep")
    timesteps: list[int] = flag([1, 50, 100, 300], "Timesteps of the attention that is read.")  # noqa: RUF009
    thresholds: list[float] = flag([0.2, 0.25, 0.3, 0.35, 0.4, 0.5], "Merge thresholds.")  # noqa: RUF009
    absolute_thresholds: bool = flag(False, "Thresholds in nats, not in units of the mean divergence of an image.")
    layers: list[str] = flag(["all"], "Attention layers: `all`, or names of layers or blocks joined by +.")  # noqa: RUF009
    num_merges: int = flag(3, "Passes of merging.")
    refine: bool = flag(True, "Refine segments by k-means.")
    add_noise: bool = flag(False, "Show the model noised latents in place of clean ones.")
    seed: int = flag(0, "Of the split in halves, the bootstrap, k-means and noise.")
    batch_size: int = flag(8, "Images in a unit of work.")
    output_dir: str = flag("segmentation", "Where segments, results, tables and figures go.", group="Output")
    num_examples: int = flag(6, "Best and worst images to draw of each model; 0 draws no patient.")


def main(args: Arguments) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    output_dir = make_writable_folder(args.output_dir)
    if not args.data or not (args.pipeline or args.stable_diffusion):
        raise ValueError("Give --data, and --pipeline or --stable_diffusion.")
    data_sets = {name: open_data(name, path, args) for name, path in map(name_and_path, args.data)}
    if len(data_sets) < len(args.data):
        raise ValueError(f"Two of {args.data} have one name: give them as NAME=PATH.")
    swept: dict[str, dict[str, list[SweptSegments]]] = {name: {} for name in data_sets}
    for method, checkpoint, pipe in load_models(args):
        for name, images in data_sets.items():
            folder = output_dir / file_name(name) / "segments" / file_name(method) / (file_name(checkpoint) or "model")
            logger.info(f"{name}: {method} {checkpoint}")
            segments = segment_images(
                pipe, images, make_sweep(args), folder, checkpoint=checkpoint, chunk=args.batch_size
            )
            swept[name].setdefault(method, []).append(segments)
    results = []
    for name, images in data_sets.items():
        result = evaluate_segmentation(swept[name], images, dataset=name, seed=args.seed)
        result.save(output_dir / file_name(name) / "result.json")
        draw(args, result, swept[name], images, output_dir / file_name(name))
        results.append(result)
    for style, suffix in TABLE_FORMATS.items():
        (output_dir / f"table.{suffix}").write_text(format_segmentation_table(results, style))
    print((output_dir / "table.md").read_text())


def name_and_path(text: str) -> tuple[str, str]:
    """`NAME=PATH` or `PATH`, which is called as its last part."""
    name, sign, path = text.partition("=")
    return (name, path) if sign else (Path(text).name or text, text)


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def open_data(name: str, path: str, args: Arguments) -> MaskedImages:
    """A data set of the catalogue if the name is one of its, else a folder or tars."""
    known = name in sources.source_names() and Path(path).is_dir() and not (Path(path) / "images").is_dir()
    source = sources.open_source(name, path) if known else path
    return open_masked_images(source, args.mask_size, args.mask_size, args.max_samples)


def make_sweep(args: Arguments) -> Sweep:
    return Sweep(
        timesteps=tuple(args.timesteps),
        thresholds=tuple(args.thresholds),
        layers=tuple(args.layers),
        relative=not args.absolute_thresholds,
        refine=args.refine,
        num_merges=args.num_merges,
        add_noise=args.add_noise,
        size=args.size,
        mask_size=args.mask_size,
        seed=args.seed,
    )


def load_models(args: Arguments) -> Iterator[tuple[str, str, DiffSegPipeline]]:
    """Method, checkpoint and pipeline of all models, one in memory at a time."""
    device = torch.device(device_of(0, args.device))
    options = {} if args.dtype == "float32" else {"torch_dtype": getattr(torch, args.dtype)}
    named = [name_and_path(text) for text in args.pipeline]
    methods = [method for method, _ in named]
    for place, (method, path) in enumerate(named):
        pipe = DiffSegPipeline.from_pipe(load_trained_pipeline(path, **options)).to(device)
        yield method, Path(path).name if methods.count(method) > 1 else "", pipe
        if args.untrained and method not in methods[:place]:
            yield f"{method}, untrained", "", with_fresh_unet(pipe)
    if args.stable_diffusion:
        pipe = DiffusionPipeline.from_pretrained(args.stable_diffusion, use_safetensors=True, **options)
        yield "Stable Diffusion", "", DiffSegPipeline.from_pipe(pipe).to(device)


def draw(
    args: Arguments,
    result: SegmentationResult,
    swept: dict[str, list[SweptSegments]],
    images: MaskedImages,
    folder: Path,
) -> None:
    """Curves over each axis that has been swept, and each model's best and worst images."""
    for axis in SWEEP_AXES:
        if any(len({getattr(s, axis) for s in sweep.settings}) > 1 for sweep in result.sweeps):
            save_figure(plot_segmentation_sweep(result, axis), folder / f"{axis}.png")
    if not args.num_examples:
        return
    for scores in result.methods:
        if scores.method not in swept:
            continue
        order = sorted(range(len(images)), key=lambda i: scores.dice[i])
        for kind, chosen in (("failures", order[: args.num_examples]), ("examples", order[-args.num_examples :])):
            predictions = chosen_masks(result, scores, swept[scores.method], images, chosen)
            figure = plot_segmentation_examples(
                [images.image(i).mean(dim=0) for i in chosen],
                [images.mask(i) for i in chosen],
                predictions,
                [f"Dice {scores.dice[i]:.2f}" for i in chosen],
            )
            save_figure(figure, folder / f"{kind}-{file_name(scores.method)}-{file_name(scores.selection)}.png")


def save_figure(figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
