"""How far a linear probe on an encoder's own tokens gets with the few labels that Table 1 gives its classifiers.

    python benchmarks/linear_probe.py --shards shards --conditioners examples/data/showcase/conditioner \
        --labels "Bacterial Pneumonia" "Viral Pneumonia" --keep kermany

Folds by patient, nested balanced regimes and their seeds are those of `diffusers-dino evaluate augmentation`; the
strength of the regularisation is chosen on the fold's validation patients. Gray pixels, 16 x 16, are the control.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from diffusers_dino import DinoImageConditioner
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import LabelTable, stored_labels
from diffusers_dino.evaluation.augmentation.plans import FoldSplit, split_folds
from diffusers_dino.evaluation.folds import assign_folds
from diffusers_dino.evaluation.generation import embed_images, stack_images
from diffusers_dino.evaluation.table_text import markdown_table, with_interval
from diffusers_dino.metrics import pixel_features
from diffusers_dino.metrics.auroc import corrected_t_test, macro_auroc

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Arguments:
    shards: str | None = flag(None, "Folder of shards with labels and patients.")
    split: str = flag("train", "Which split of them.")
    conditioners: list[str] = flag([], "Saved conditioners, or encoders in transformers' format.")
    size: int | None = flag(None, "Side in pixels of the images that encoders see, in place of their own.")
    resolution: int = flag(128, "Side of the images in pixels.")
    labels: list[str] = flag([], "What is asked; by default all labels.")
    keep: str = flag("", "Only keys that contain this.")
    regimes: list[int] = flag([50, 100, 500, 1000], "Numbers of labelled images.")
    num_folds: int = flag(5, "Folds by patient.")
    seed: int = flag(0, "Of folds and regimes.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.shards is None:
        raise ValueError("Give the shards of labelled images as --shards.")
    images = open_images(args.shards, Preprocessing(args.resolution, remove_borders=False), split=args.split)
    images = images.select([key for key in images.keys if args.keep in key])
    table = stored_labels(images)
    labels = args.labels or sorted(table.counts())
    folds = assign_folds(table.targets(labels), table.patients, args.num_folds, args.seed)
    splits = split_folds(table, labels, folds, args.regimes, seed=args.seed)
    spaces = {"gray pixels": pixel_features(stack_images(images))}
    for path in args.conditioners:
        spaces[path] = embed_images(open_conditioner(path, args.size), images).flatten(1)
    rows = [
        [name, *(tell(scores, args.num_folds) for scores in probe(tokens, table, labels, splits, args.regimes))]
        for name, tokens in spaces.items()
    ]
    print(f"{len(images)} images, macro AUROC over {', '.join(labels)}, {args.num_folds} folds, mean [95 %]")
    print(markdown_table(["logistic regression on", *(f"{n} labelled" for n in args.regimes)], rows))


def open_conditioner(path: str, size: int | None) -> DinoImageConditioner:
    try:
        return DinoImageConditioner.from_pretrained(path)
    except (OSError, TypeError, ValueError):
        return DinoImageConditioner.from_encoder(path, size=size)


def probe(
    tokens: Tensor, table: LabelTable, labels: list[str], splits: list[FoldSplit], regimes: list[int]
) -> list[list[float]]:
    """Macro AUROC on each fold's test patients, for each regime."""
    features, targets = tokens.double().numpy(), table.targets(labels)
    found: list[list[float]] = []
    for regime in regimes:
        found.append([])
        for split in splits:
            rows = split.ordered[:regime]
            mean, std = features[rows].mean(0), features[rows].std(0) + 1e-6
            scaled = (features - mean) / std
            fitted = [fit(scaled[rows], targets[rows], strength) for strength in STRENGTHS]
            best = max(fitted, key=lambda models: score(models, scaled, targets, split.validation))
            found[-1].append(score(best, scaled, targets, split.test))
    return found


def fit(features: np.ndarray, targets: np.ndarray, strength: float) -> list[LogisticRegression]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations: the strength is chosen by what comes out
        return [LogisticRegression(C=strength, max_iter=300).fit(features, target) for target in targets.T]


def score(models: list[LogisticRegression], features: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> float:
    scores = np.stack([model.decision_function(features[rows]) for model in models], axis=1)
    return macro_auroc(scores, targets[rows])


def tell(scores: list[float], num_folds: int) -> str:
    test = corrected_t_test(scores, num_folds)
    return with_interval(test.mean, test.low, test.high, ".3f")


if __name__ == "__main__":
    main()
