r"""Keep the synthetic images whose labels a judge does not contradict: a classifier that has not seen their sources.

    diffusers-dino filter --data_dir /data/cxr --labels /data/cxr.csv --synthetic drawn --test_keys test.txt \
        --output_dir filtered

Writes kept.csv, the rows of the set's labels.csv that stay; dropped.csv, with the reason for each image; and
filter.json, with the counts of each label. Judges are those of `evaluate labels`: in its --output_dir they need not be
trained again, unless --test_keys keeps patients from them. docs/labels.md says what they have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.keys import read_keys
from ..evaluation.labels.contradictions import filter_by_judge, format_filter_table
from .arguments import flag
from .classifier_flags import ClassifierArguments, LabelledImageArguments, classifier_settings, open_labelled_images
from .image_flags import prepared_as_sources


@dataclass
class Arguments(ClassifierArguments, LabelledImageArguments):
    synthetic: str = flag("synthetic", "Folder of the set.", group="Set")
    false_alarms: float = flag(0.05, "Share of correct labels of real images that a judge may contradict, a label.")
    num_folds: int = flag(5, "Folds of patients; each judge is trained without two of them.", group="Judges")
    test_keys: str | None = flag(None, "File of keys of real images, whose patients no judge may see.")
    seed: int = flag(0, "Seed of folds and training.")
    output_dir: str = flag("filtered", "Where judges, lists and counts go.", group="Work")
    num_workers: int | None = flag(None, "Processes at a time; by default one for each GPU, or core; 0: this one.")
    device: str | None = flag(None, "Where to compute; by default all GPUs, or else the CPU.")


def main(args: Arguments) -> None:
    images, table, names = open_labelled_images(args, args.size, prepared_as_sources([args.synthetic]))
    result = filter_by_judge(
        images,
        table,
        args.synthetic,
        args.output_dir,
        labels=names,
        false_alarms=args.false_alarms,
        test_keys=read_keys(args.test_keys) if args.test_keys else (),
        num_folds=args.num_folds,
        classifier=classifier_settings(args),
        validation_fraction=args.validation_fraction,
        seed=args.seed,
        num_workers=args.num_workers,
        device=args.device,
    )
    print(format_filter_table(result))
