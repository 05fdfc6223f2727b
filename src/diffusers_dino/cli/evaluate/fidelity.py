r"""Fréchet and kernel distance, precision, recall, density, coverage and Vendi score of a model or of all checkpoints.

    diffusers-dino evaluate fidelity --run my-model --data_dir /data/cxr --training_keys training_keys.txt \
        --table labels.csv --features xrv --weights xrv.safetensors --output_dir outputs/fid

One image is generated from each source and the set is compared with a reference of real images of other patients:
those that `--training_keys` lists against all others, or `--reference_dir` against `--data_dir`, or two halves of the
patients. Beside the models stand the untrained UNet and the sources themselves. Features are kept in `--output_dir`,
under a name that follows from weights, images and settings: the same command continues after a kill, and what is done
is not done again. With `--run`, the checkpoint with the lowest `--metric` is kept as the pipeline `best`; its curve
needs the extra `eval`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from ...data.keys import read_keys
from ...data.labels import read_label_table
from ...devices import device_of
from ...evaluation.fidelity.plot import plot_fidelity
from ...evaluation.fidelity.protocol import evaluate_fidelity, keep_best
from ...evaluation.fidelity.sets import FidelitySets, choose_sets
from ...evaluation.fidelity.table import format_fidelity_table
from ...evaluation.generation import Model, load_models
from ...evaluation.table_text import write_tables
from ...hub.record import TrainingRecord
from ...metrics import open_extractor
from ...pipelines.checks import image_size
from ...pipelines.preparation import open_images_for, preparation_for
from ...training.checkpoints import complete_checkpoints
from ..arguments import flag
from ..console import hold_output, show_messages
from ..image_flags import BORDERS


@dataclass
class Arguments:
    run: str | None = flag(None, "Folder of a training run: measure all its complete checkpoints.", group="Models")
    steps: list[int] = flag([], "Of these, only the checkpoints after so many updates.")
    model: list[str] = flag([], "Pipelines or checkpoints, in place of a run.")
    untrained: bool = flag(True, "Show the UNet before training beside them.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights.")
    data_dir: str | None = flag(None, "Images: a folder, webdataset tars, or a URL.", group="Images")
    training_keys: str | None = flag(None, "Text file of keys: these are the reference, all others are sources.")
    reference_dir: str | None = flag(None, "Other images to take as the reference.")
    table: str | None = flag(None, "CSV file that names the patient of each image.")
    key_column: str = flag("file", "Its column of file names or keys.")
    patient_column: str = flag("patient", "Its column of patients.")
    label_column: str | None = flag(None, "Its column of labels, joined by |: score each label by itself, too.")
    fewest: int = flag(50, "Images of a label that sources and reference must have for that.")
    num_images: int | None = flag(None, "Take only so many of the sources, drawn at random.")
    num_reference: int | None = flag(None, "Take only so many images of the reference, drawn at random.")
    remove_borders: bool | None = flag(None, BORDERS)
    features: str = flag(
        "pixels", "Feature extractor: pixels, tiny, xrv, rad-dino, dinov2, inception, timm/NAME ...", group="Figures"
    )
    weights: str | None = flag(None, "Its weights: a local file or folder.")
    neighbors: int = flag(5, "Balls of precision, recall, density and coverage reach to this neighbour.")
    bootstrap_repeats: int = flag(200, "Draws of the intervals.")
    metric: Literal["frechet", "kernel"] = flag("frechet", "Distance that chooses the best checkpoint.")
    num_inference_steps: int = flag(25, "Sampling steps.", group="Sampling")
    guidance_scale: float = flag(1.0, "Guidance; 1 is none.")
    batch_size: int = flag(64, "Images at once.")
    seed: int = flag(0, "Of noise, of what is drawn at random, of the halves and of the bootstrap.")
    output_dir: str = flag(
        "outputs/fid", "Where features, figures, tables and the best checkpoint go.", group="Output"
    )


def main(args: Arguments) -> None:
    show_messages("diffusers_dino.evaluation")
    check_arguments(args)
    paths, steps = list_models(args)
    with hold_output(args.output_dir) as output_dir:
        device = torch.device(device_of(0, args.device))
        dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
        models = load_models(paths.items(), steps, device, dtype)
        first = next(models)
        sets = open_sets(args, first.pipe)
        result = evaluate_fidelity(
            chain([first], (checked(model, sets) for model in models)),
            sets,
            labels=read_labels(args, [*sets.sources.keys, *sets.reference.keys]) if args.label_column else None,
            fewest=args.fewest,
            extractor=open_extractor(args.features, args.weights, device),
            folder=output_dir / "features",
            untrained=args.untrained,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            neighbors=args.neighbors,
            bootstrap_repeats=args.bootstrap_repeats,
            batch_size=args.batch_size,
            seed=args.seed,
        )
        result.save(output_dir / "result.json")
        print(write_tables(output_dir, lambda style: format_fidelity_table(result, style)))
        if args.run:
            keep_best(result, paths, output_dir / "best", args.metric)
            if (record := TrainingRecord.load(args.run)).facts:  # for `publish`
                updates = result.best_checkpoint(args.metric).step
                replace(record, facts={**record.facts, "updates": updates}).save(output_dir / "best")
        if result.checkpoints:
            plot_fidelity(result).savefig(output_dir / "fidelity.png", dpi=150, bbox_inches="tight")


def checked(model: Model, sets: FidelitySets) -> Model:
    """Refuse a model that was trained on images prepared in another way than the first one's."""
    preparation_for(model.pipe, image_size(model.pipe), sets.sources.preprocessing.remove_borders)
    return model


def check_arguments(args: Arguments) -> None:
    if bool(args.run) == bool(args.model):
        raise ValueError("Give --run (the folder of a training run) or --model.")
    if not args.data_dir:
        raise ValueError("Give --data_dir: images that the model has not seen, and real ones to compare with.")
    if args.training_keys and args.reference_dir:
        raise ValueError(
            "The reference is what --training_keys lists or what is in --reference_dir: give one of them."
        )
    if args.label_column and not args.table:
        raise ValueError("--label_column names a column of --table: give the table.")
    names = [Path(path).name for path in args.model]
    if len(set(names)) < len(names):
        raise ValueError(f"The last parts of --model name the rows and must differ, got {names}.")


def list_models(args: Arguments) -> tuple[dict[str, str], dict[str, int]]:
    """Paths and updates, by name: of the models that were named, or of the complete checkpoints of a run."""
    if args.model:
        return {Path(path).name or path: path for path in args.model}, {}
    found = complete_checkpoints(args.run)
    if missing := set(args.steps) - {checkpoint.step for checkpoint in found}:
        there = ", ".join(str(checkpoint.step) for checkpoint in found)
        raise ValueError(f"{args.run} has no checkpoint after {min(missing)} updates; there are those after {there}.")
    chosen = [c for c in found if not args.steps or c.step in args.steps]
    return {c.path.name: str(c.path) for c in chosen}, {c.path.name: c.step for c in chosen}


def open_sets(args: Arguments, pipe: DiffusionPipeline) -> FidelitySets:
    """Sources, reference and patients, as the flags name them."""
    images, reference = (
        open_images_for(pipe, source, image_size(pipe), args.remove_borders) if source else None
        for source in (args.data_dir, args.reference_dir)
    )
    patients = None
    if args.table:
        table = read_label_table(args.table, args.key_column, None, args.patient_column)
        table = table.select(list(dict.fromkeys([*images.keys, *(reference or images).keys])))
        patients = dict(zip(table.keys, table.patients, strict=True))
    return choose_sets(
        images,
        reference,
        reference_keys=read_keys(args.training_keys) if args.training_keys else None,
        patients=patients,
        num_sources=args.num_images,
        num_reference=args.num_reference,
        seed=args.seed,
        places=(args.data_dir, args.reference_dir or args.data_dir),
    )


def read_labels(args: Arguments, keys: list[str]) -> dict[str, frozenset[str]]:
    table = read_label_table(args.table, args.key_column, args.label_column, None).select(list(dict.fromkeys(keys)))
    return dict(zip(table.keys, table.labels, strict=True))
