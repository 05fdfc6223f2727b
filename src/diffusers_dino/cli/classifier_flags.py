"""Flags of scripts that classify images: which images and labels, and how a classifier is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..data import ImageDataset
from ..data.labels import LabelTable
from ..evaluation.classifier import ClassifierSettings
from ..pipelines.preparation import TrainedModel
from .arguments import flag, settings_of
from .image_flags import STORED, RealImageArguments, open_real_images

__all__ = ["ClassifierArguments", "LabelledImageArguments", "classifier_settings", "open_labelled_images"]


@dataclass
class LabelledImageArguments(RealImageArguments):
    labels: str = flag(STORED, f"CSV of labels and patients, or {STORED!r} for those beside images in shards.")
    label_names: list[str] | None = flag(None, "Labels to classify; by default the most frequent ones.")
    num_labels: int = flag(4, "How many of the most frequent findings, besides 'No Finding'.")


@dataclass
class ClassifierArguments:
    classifier: str = flag("densenet121", "Architecture of timm.", group="Classifier")
    classifier_options: list[str] | None = flag(None, "Its options, as NAME=VALUE in JSON.")
    classifier_weights: str | None = flag(None, "File of weights to start from; by default from scratch.")
    size: int = flag(224, "Side of the images in pixels that classifiers see.")
    channels: int = flag(1, "1 for gray, 3 for colour.")
    train_batch_size: int = flag(32, "Images of an update.")
    max_train_steps: int = flag(2000, "Updates of each classifier, however many images it has.")
    validation_fraction: float = flag(0.15, "Share of the training patients that chooses a classifier's weights.")
    validation_steps: int = flag(100, "Updates after which the weights are compared with the best so far.")
    learning_rate: float = flag(1e-3, "Peak of AdamW's.")
    weight_decay: float = flag(0.05, "Of AdamW.")


def classifier_settings(args: ClassifierArguments) -> ClassifierSettings:
    """What the flags say of a classifier; ValueError if an option is not NAME=VALUE, or a value is out of range."""
    options = {}
    for text in args.classifier_options or []:
        name, _, value = text.partition("=")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--classifier_options takes NAME=VALUE with a value in JSON, got {text!r}.") from error
    return settings_of(
        ClassifierSettings,
        args,
        model=args.classifier,
        options=json.dumps(options, sort_keys=True),
        weights=args.classifier_weights,
        batch_size=args.train_batch_size,
        max_steps=args.max_train_steps,
    )


def open_labelled_images(
    args: LabelledImageArguments, size: int, model: TrainedModel | None = None
) -> tuple[ImageDataset, LabelTable, tuple[str, ...]]:
    """The images, what is known of each in the same order, and the labels to classify; see `open_real_images`."""
    images, table = open_real_images(args, size, model=model)
    assert table is not None  # labels are not optional here
    names = tuple(args.label_names or table.most_frequent(args.num_labels))
    return images, table.restrict(names), names
