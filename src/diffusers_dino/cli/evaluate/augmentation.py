r"""Do synthetic images help a classifier? Table 1 and Fig. 4 of the paper, on your images and labels.

    diffusers-dino evaluate augmentation --data_dir /data/cxr --labels /data/cxr.csv --output_dir eval --write_folds
    diffusers-dino evaluate augmentation --data_dir /data/cxr --labels /data/cxr.csv --output_dir eval \
        --model "models/fold-{fold}" --training_keys "eval/fold-{fold}/training_keys.txt"

The first command writes the keys that the generator of each fold may be trained on. The second makes a synthetic set
for each fold and strategy, trains a classifier for each strategy, mode, ratio, regime and fold, and compares them.
Stopped at any moment, the same command goes on where it was. docs/augmentation.md says what is measured.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...data.labels import read_label_table, stored_labels
from ...evaluation.augmentation.cells import BALANCED, JUDGED, PRIOR, SOFT, STRATEGIES
from ...evaluation.augmentation.generators import FOLD, of_fold, write_folds
from ...evaluation.augmentation.plot import plot_augmentation, plot_differences
from ...evaluation.augmentation.protocol import UnfinishedGridError, evaluate_augmentation
from ...evaluation.augmentation.result import AugmentationResult
from ...evaluation.augmentation.sets import FoldPriors
from ...evaluation.augmentation.table import format_augmentation_table, format_label_table
from ...evaluation.table_text import write_tables
from ...files import lock_folder
from ...pipelines.preparation import preparation_for
from ...synthesis import SynthesisSettings
from ..arguments import flag, settings_of
from ..classifier_flags import ClassifierArguments, LabelledImageArguments, classifier_settings, open_labelled_images
from ..console import hold_output, show_messages
from ..image_flags import STORED
from ..sampling_flags import SamplingArguments


@dataclass
class Arguments(SamplingArguments, ClassifierArguments, LabelledImageArguments):
    regimes: list[int] = flag([10000, 5000, 1000, 500, 100, 50], "Numbers of real images.", group="Grid")
    ratios: list[int] = flag([1, 5, 10, 25, 50], "Synthetic images for each real one.")
    strategies: list[str] = flag(
        ["reconstruction", "interpolation"],
        f"How they are made: {', '.join(STRATEGIES)}; with {JUDGED} behind one, less what a judge contradicts.",
    )
    soft_labels: float = flag(1.0, f"Of {SOFT}: g in (1 - r^g) y1 + r^g y2; 1 mixes labels as tokens are mixed.")
    false_alarms: float = flag(0.05, f"Of {JUDGED}: share of correct labels of real images that it may contradict.")
    modes: list[str] = flag(["augmentation", "full-synthetic"], "Beside real images, or in place of them.")
    num_folds: int = flag(5, "Folds of cross-validation.")
    seed: int = flag(0, "Seed of folds, regimes, synthesis and training.")
    write_folds: bool = flag(False, "Write folds.csv and fold-K/training_keys.txt, and stop.")
    model: str = flag(
        "outputs/quickstart/model",
        f"DinoDiffusionPipeline; {FOLD} in it stands for the fold's number.",
        group="Generator",
    )
    prior: str | None = flag(None, f"DinoPriorPipeline of the strategies {PRIOR} and {BALANCED}, {FOLD} as above.")
    prior_guidance_scale: float = flag(1.0, "Its guidance; 1 is none.")
    prior_inference_steps: int = flag(50, "Its sampling steps.")
    training_keys: str | None = flag(
        None, f"File of the keys that the generator and the prior were trained on, {FOLD} as above."
    )
    sampling_batch_size: int = flag(16, "Images sampled together.")
    shard_size: int = flag(1000, "Synthetic images in a shard: what a kill loses, for each process.")
    gate: str | None = flag(None, f"File of a CopyGate, {FOLD} as above: near-copies are drawn again.")
    output_dir: str = flag("augmentation", "Where sets, cells, tables and figures go.", group="Work")
    num_workers: int | None = flag(None, "Processes at a time; by default one for each GPU, or core; 0: this one.")
    device: str | None = flag(None, "Where to compute; by default all GPUs, or else the CPU.")
    bootstrap_repeats: int = flag(1000, "Draws of the intervals over patients.")


def main(args: Arguments) -> None:
    show_messages("diffusers_dino.evaluation")
    with hold_output(args.output_dir, "result.json") as output:  # cells are computed under the folder's own lock
        measure(args, output)


def measure(args: Arguments, output: Path) -> None:
    models = [] if args.write_folds else [of_fold(args.model, fold) for fold in range(args.num_folds)]
    images, table, names = open_labelled_images(args, args.size, *models[:1])
    for model in models[1:]:
        with suppress(OSError):  # of one that cannot be loaded its own cells tell
            preparation_for(model, args.size, images.preprocessing.remove_borders)  # refuses one of other images
    if args.labels == STORED:
        known = stored_labels(images)
    else:  # training keys may be of images that --keys_file leaves out
        known = read_label_table(args.labels, args.key_column, args.label_column, args.patient_column)
    options = {"num_folds": args.num_folds, "training_keys": args.training_keys, "seed": args.seed}
    if args.write_folds:
        with lock_folder(output):
            write_folds(table, names, output, known=known, **options)
        patients = len(set(table.patients))
        print(f"{output}/folds.csv: {len(table)} images of {patients} patients in {args.num_folds} folds")
        return
    priors = args.prior and FoldPriors(args.prior, args.prior_guidance_scale, args.prior_inference_steps)
    try:
        result = evaluate_augmentation(
            images,
            known,
            args.model,
            output,
            labels=names,
            regimes=args.regimes,
            ratios=args.ratios,
            strategies=args.strategies,
            modes=args.modes,
            gates=args.gate,
            priors=priors,
            exponent=args.soft_labels,
            false_alarms=args.false_alarms,
            classifier=classifier_settings(args),
            validation_fraction=args.validation_fraction,
            synthesis=settings_of(SynthesisSettings, args, batch_size=args.sampling_batch_size),
            dtype=args.dtype,
            scheduler=args.scheduler,
            bootstrap_repeats=args.bootstrap_repeats,
            num_workers=args.num_workers,
            device=args.device,
            **options,
        )
    except UnfinishedGridError as error:
        report(error.result, output)
        raise
    report(result, output)


def report(result: AugmentationResult, output: Path) -> None:
    """Write tables and figures, and print the table."""
    result.save(output / "result.json")
    (output / "labels.md").write_text(format_label_table(result), encoding="utf-8")
    text = write_tables(output, lambda style: format_augmentation_table(result, style))
    drawn = {"augmentation": (plot_augmentation, "mean"), "differences": (plot_differences, "difference")}
    for name, (plot, figure) in drawn.items():
        if any(getattr(row, figure) is not None for row in result.configurations):
            plot(result).savefig(output / f"{name}.png", dpi=120, bbox_inches="tight")
    print(text)
