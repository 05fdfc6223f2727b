r"""Do synthetic images show what their labels say? A classifier that has not seen their sources is asked.

    diffusers-dino evaluate labels --data_dir /data/cxr --labels /data/cxr.csv \
        --synthetic reconstruction=sets/reconstruction interpolation=sets/interpolation --output_dir labels

`--synthetic` takes folders that `diffusers-dino synthesise` or `diffusers-dino evaluate augmentation` made from these
images, as NAME=FOLDER; folders of one name are taken together. Classifiers are trained on the real images, each
without two folds of patients, and kept: the same command goes on where it was stopped, and other sets are judged by
the same classifiers. docs/labels.md says what is measured.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

from ...evaluation.labels.plot import plot_label_preservation
from ...evaluation.labels.protocol import evaluate_labels
from ...evaluation.labels.table import format_preservation_table
from ...evaluation.table_text import write_tables
from ..arguments import flag, name_and_path
from ..classifier_flags import ClassifierArguments, LabelledImageArguments, classifier_settings, open_labelled_images
from ..console import hold_output
from ..image_flags import prepared_as_sources


@dataclass
class Arguments(ClassifierArguments, LabelledImageArguments):
    synthetic: list[str] = flag([], "Sets to judge, as FOLDER or NAME=FOLDER.", group="Sets")
    ratios: list[int] = flag([], "Smaller ratios to show as well.")
    num_folds: int = flag(5, "Folds of patients; each classifier is trained without two of them.", group="Judges")
    seed: int = flag(0, "Seed of folds, training, bootstrap and shuffles.")
    output_dir: str = flag("labels", "Where classifiers, tables and figures go.", group="Work")
    num_workers: int | None = flag(None, "Processes at a time; by default one for each GPU, or core; 0: this one.")
    device: str | None = flag(None, "Where to compute; by default all GPUs, or else the CPU.")
    bootstrap_repeats: int = flag(1000, "Draws of the intervals over patients.")


def main(args: Arguments) -> None:
    if not args.synthetic:
        raise ValueError("Give the sets to judge: --synthetic FOLDER, or NAME=FOLDER.")
    with hold_output(args.output_dir, "result.json") as output:
        sets: defaultdict[str, list[str]] = defaultdict(list)
        for name, folder in map(name_and_path, args.synthetic):
            sets[name].append(folder)
        images, table, names = open_labelled_images(args, args.size, prepared_as_sources(chain(*sets.values())))
        result = evaluate_labels(
            images,
            table,
            sets,
            output,
            labels=names,
            ratios=args.ratios,
            num_folds=args.num_folds,
            classifier=classifier_settings(args),
            validation_fraction=args.validation_fraction,
            seed=args.seed,
            bootstrap_repeats=args.bootstrap_repeats,
            num_workers=args.num_workers,
            device=args.device,
        )
        result.save(output / "result.json")
        text = write_tables(output, lambda style: format_preservation_table(result, style))
        plot_label_preservation(result).savefig(output / "labels.png", dpi=120, bbox_inches="tight")
        print(text)
