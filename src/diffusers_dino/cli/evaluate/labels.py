r"""Do synthetic images show what their labels say? A classifier that has not seen their sources is asked.

    diffusers-dino evaluate labels --data_dir /data/cxr --labels /data/cxr.csv \
        --synthetic reconstruction=sets/reconstruction interpolation=sets/interpolation --output_dir labels

`--synthetic` takes folders that `generate_dataset.py` or `eval_augmentation.py` made from these images, as
NAME=FOLDER; folders of one name are taken together. Classifiers are trained on the real images, each without two folds
of patients, and kept: the same command goes on where it was stopped, and other sets are judged by the same ones.
docs/labels.md says what is measured.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data import Preprocessing, open_images
from ...devices import count_workers, device_of
from ...evaluation.classifier import make_classifier
from ...evaluation.folds import assign_folds
from ...evaluation.labels.judges import Judges, SyntheticImages
from ...evaluation.labels.plot import plot_label_preservation
from ...evaluation.labels.protocol import LabelPreservationResult, RealScores, evaluate_labels, score_real
from ...evaluation.labels.table import write_preservation_tables
from ...evaluation.packed import pack_images
from ...files import lock_folder, make_writable_folder
from ...metrics.auroc import check_classes
from ...synthesis import SyntheticSet
from ...workers import progress_bar, run_apart
from ..arguments import flag
from ..classifier_flags import ClassifierArguments, LabelledImageArguments, classifier_settings, open_labelled_images

logger = logging.getLogger("eval_labels")


@dataclass
class Arguments(ClassifierArguments, LabelledImageArguments):
    synthetic: list[str] = flag([], "Sets to judge, as FOLDER or NAME=FOLDER.", group="Sets")  # noqa: RUF009
    ratios: list[int] = flag([], "Smaller ratios to show apart.")  # noqa: RUF009
    num_folds: int = flag(5, "Folds of patients; each classifier is trained without two of them.", group="Judges")
    seed: int = flag(0, "Seed of folds, training, bootstrap and shuffles.")
    output_dir: str = flag("labels", "Where classifiers, tables and figures go.", group="Work")
    num_workers: int | None = flag(None, "Processes at a time; by default one for each GPU, or core; 0: this one.")
    device: str | None = flag(None, "Where to compute; by default all GPUs, or else the CPU.")
    bootstrap_repeats: int = flag(1000, "Draws of the intervals over patients.")


def main(args: Arguments) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    if not args.synthetic:
        raise ValueError("Give the sets to judge: --synthetic FOLDER, or NAME=FOLDER.")
    output = make_writable_folder(args.output_dir)
    with lock_folder(output):
        judges = open_judges(args, output)
        sets = [
            (name, open_set(args, place, folder, output)) for place, (name, folder) in enumerate(named_folders(args))
        ]
        train_judges(args, judges, judges.pairs_for([one for _, one in sets]))
        result = judge(args, judges, sets)
        write_preservation_tables(result, output)
        plot_label_preservation(result).savefig(output / "labels.png", dpi=120, bbox_inches="tight")
        print((output / "table.md").read_text())


def named_folders(args: Arguments) -> list[tuple[str, str]]:
    """`NAME=FOLDER`, or `FOLDER`, which is called as its last part."""
    named = []
    for text in args.synthetic:
        name, sign, folder = text.partition("=")
        named.append((name, folder) if sign else (Path(text).resolve().name, text))
    return named


def open_judges(args: Arguments, output: Path) -> Judges:
    """The real images, in folds of patients."""
    settings = classifier_settings(args)
    images, table, names = open_labelled_images(args, args.size)
    make_classifier(settings, len(names))  # refuses what timm does not make before images are read
    real = pack_images(images, output / "real.npy", channels=args.channels)
    if len(real) < len(table):
        logger.warning(f"{len(table) - len(real)} of {len(table)} images cannot be read and are left out.")
    table = table.select(real.keys)
    targets = table.targets(names)
    check_classes(targets, names, "the real data")
    folds = assign_folds(targets, table.patients, args.num_folds, args.seed)
    folder = make_writable_folder(output / "judges")
    return Judges(real, table, names, folds, settings, folder, args.validation_fraction, args.seed)


def open_set(args: Arguments, place: int, folder: str, output: Path) -> SyntheticImages:
    """A set, packed; its images as they are stored, at the size that classifiers see."""
    made = SyntheticSet.open(folder)
    images = open_images(folder, Preprocessing(args.size, remove_borders=False))
    name = re.sub(r"[^\w.-]+", "_", f"{place}-{Path(folder).resolve().name}")
    packed = pack_images(images, output / f"set-{name}.npy", made.plan.digest, args.channels)
    planned = [image for image in made.planned() if image.key in packed.places]
    return SyntheticImages(made.plan.strategy, packed, planned, len(made.plan.keys))


def train_judges(args: Arguments, judges: Judges, pairs: list[tuple[int, int]]) -> None:
    jobs, problems = [(judges, pair, args.device) for pair in pairs], []
    with progress_bar("Classifiers", "classifier", len(pairs)) as bar:
        for outcome in run_apart(train_judge, jobs, count_workers(args.num_workers, args.device)):
            if outcome.error:
                problems.append(f"the classifier without folds {pairs[outcome.number]}: {outcome.error}")
            bar.update()
    if problems:
        raise RuntimeError(f"{len(problems)} classifiers were not trained: {'; '.join(problems)}")


def train_judge(place: int, judges: Judges, pair: tuple[int, int], device: str | None) -> None:
    judges.train(pair, device_of(place, device))


def judge(args: Arguments, judges: Judges, sets: list[tuple[str, SyntheticImages]]) -> LabelPreservationResult:
    device = device_of(0, args.device)
    options = {"repeats": args.bootstrap_repeats, "seed": args.seed}
    judged = {}
    for name, images in sets:
        judged.setdefault(name, []).append(judges.judge(images, device))
    real = judge_real(judges, judges.pairs_for([images for _, images in sets]), device, options)
    return LabelPreservationResult(
        labels=judges.labels,
        num_folds=args.num_folds,
        num_real=len(judges.table),
        num_real_patients=len(set(judges.table.patients)),
        model=judges.settings.name,
        judges_seed=args.seed,
        real=real,
        parts=evaluate_labels(judged, judges.labels, ratios=args.ratios, **options),
        **options,
    )


def judge_real(
    judges: Judges, pairs: list[tuple[int, int]], device: str, options: dict[str, int]
) -> tuple[RealScores, ...]:
    """How good the classifiers are on real images that they have not seen."""
    found = [judges.judge_real(pair, device) for pair in pairs]
    rows = np.concatenate([rows for rows, _ in found])
    numbers = np.repeat(np.arange(len(found)), [len(rows) for rows, _ in found])
    patients = [judges.table.patients[row] for row in rows.tolist()]
    targets = judges.table.targets(judges.labels)[rows]
    probabilities = np.concatenate([values for _, values in found])
    return score_real(probabilities, targets, numbers, rows, patients, judges.labels, **options)
