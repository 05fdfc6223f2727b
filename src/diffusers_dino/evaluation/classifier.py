"""A multi-label classifier of images: any architecture of timm, trained for a fixed number of updates.

Source: DiNO-Diffusion (arXiv 2407.11594), section 2.5: DenseNet-121. All classifiers of an experiment make as many
updates, whatever the number of their images, so that more data is not more training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.images.augmentation import Augmentation
from ..data.order import GlobalBatchSampler
from ..files import sha256_of
from ..metrics.auroc import macro_auroc
from ..seeds import derive_seed, seeded
from .packed import PackedImages

__all__ = [
    "ClassifierSettings",
    "LabelledImages",
    "TrainedClassifier",
    "make_classifier",
    "predict",
    "train_classifier",
]

_PREDICTED_TOGETHER = 256


@dataclass(frozen=True)
class ClassifierSettings:
    """An architecture and how it is trained.

    Args:
        model: Name of an architecture of timm.
        options: JSON of its further options, such as `{"growth_rate": 8, "block_config": [2, 2, 2]}`.
        weights: A file of weights to start from (safetensors, or a checkpoint of only tensors); else from scratch.
        size: Side of the images in pixels.
        channels: 1 for gray, 3 for colour.
        batch_size: Images of an update.
        max_steps: Updates, the same whatever the number of images.
        validation_steps: Updates after which the weights are compared with the best so far.
        learning_rate: Peak of AdamW's, which a cosine rises to in a tenth of the updates and another leaves for zero.
        weight_decay: Of AdamW.
        shear, translation: Largest shear and shift of the augmentation, as fractions of the side.
        min_scale, max_scale: Range of its magnification.
    """

    model: str = "densenet121"
    options: str = "{}"
    weights: str | None = None
    size: int = 224
    channels: int = 1
    batch_size: int = 32
    max_steps: int = 2000
    validation_steps: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    shear: float = 0.05
    translation: float = 0.05
    min_scale: float = 0.9
    max_scale: float = 1.1

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "max_steps", "validation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: batch normalisation needs several images.")
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise ValueError(
                f"learning_rate must be positive and weight_decay not negative, got {self.learning_rate} and "
                f"{self.weight_decay}."
            )
        if self.channels not in (1, 3):
            raise ValueError(f"Images have 1 or 3 channels, got {self.channels}.")
        if not isinstance(json.loads(self.options), dict):
            raise ValueError(f"options are a JSON object, got {self.options}.")
        self.augmentation()  # checks its own

    @property
    def name(self) -> str:
        """The architecture and its options, for tables."""
        options = ", ".join(f"{name}={value}" for name, value in json.loads(self.options).items())
        return f"{self.model} ({options})" if options else self.model

    def facts(self) -> dict[str, Any]:
        """All that results follow from, by name: the weights to start from by their SHA-256, not by their path."""
        return asdict(self) | {"weights": self.weights and sha256_of(self.weights)}

    def augmentation(self) -> Augmentation:
        """Random views of training images: a light affine map, without a flip, which would move the heart."""
        return Augmentation(0.0, self.shear, self.translation, (self.min_scale, self.max_scale))


class LabelledImages(NamedTuple):
    """Some of a file's images: their numbers `(N,)` int64, and their targets `(N, L)`.

    Targets are bool, or float32 in [0, 1] for soft labels, which only training takes.
    """

    images: PackedImages
    rows: np.ndarray
    targets: np.ndarray

    def select(self, chosen: np.ndarray) -> LabelledImages:
        """Some of them, by their places `(n,)` or `(N,)` bool."""
        return self._replace(rows=self.rows[chosen], targets=self.targets[chosen])


class TrainedClassifier(NamedTuple):
    """A classifier in evaluation mode, the update that its weights are of, and its macro AUROC on validation images.

    The model takes images `(B, C, size, size)` in [0, 1] to logits `(B, L)`; the AUROC is NaN without such images.
    """

    model: nn.Module
    best_step: int
    validation_auroc: float


def make_classifier(settings: ClassifierSettings, num_labels: int, seed: int = 0) -> nn.Module:
    """Build a classifier of images in [0, 1]; the same seed gives the same weights.

    ValueError if timm does not make the architecture with these options and weights.
    """
    import timm
    from torchvision.transforms import Normalize

    options = {"num_classes": num_labels, "in_chans": settings.channels, **json.loads(settings.options)}
    if settings.weights is not None:
        if not Path(settings.weights).is_file():
            raise FileNotFoundError(f"There is no file of weights {settings.weights!r}.")
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": settings.weights}}
    try:
        with seeded(seed):
            return nn.Sequential(Normalize([0.5], [0.25]), timm.create_model(settings.model, **options))
    except (AssertionError, KeyError, RuntimeError, SafetensorError, TypeError, UnpicklingError) as error:
        close = timm.list_models(f"*{settings.model.rstrip('0123456789')}*")[:5]
        raise ValueError(
            f"timm does not make {settings.model!r} with {settings.options} and weights {settings.weights}: {error}. "
            f"Similar architectures: {', '.join(close) or 'none'}."
        ) from error


def train_classifier(
    train: Sequence[LabelledImages],
    validation: LabelledImages | None,
    settings: ClassifierSettings,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TrainedClassifier:
    """Train a classifier with binary cross-entropy on each label, hard or soft; the same arguments, the same weights.

    All images are shown equally often, whichever part they are in. Validation images choose the weights with the
    highest macro AUROC, the earliest of equals; without them, or if no label has both classes among them, the last
    weights are taken. The weights at the start depend on nothing of the data but the number of labels.

    ValueError if there is no image, a target is not in [0, 1], or validation images have soft labels.
    """
    targets = torch.from_numpy(np.concatenate([part.targets for part in train])).float()  # (N, L)
    if not len(targets):
        raise ValueError("There is no image to train a classifier on.")
    if not ((targets >= 0) & (targets <= 1)).all():  # written so that a NaN does not pass
        raise ValueError("Targets are probabilities in [0, 1]; some are outside, or not a number.")
    if validation is not None and validation.targets.dtype != bool:
        raise ValueError("Validation images have hard labels (bool): there is no AUROC of soft ones.")
    model = make_classifier(settings, targets.shape[1], derive_seed(seed, "weights")).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = 0.2 if settings.max_steps == 10 else 0.1  # torch divides by zero where the warm-up is one update
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.max_steps, pct_start=warmup, cycle_momentum=False
    )
    images, augmentation = _Joined(train), settings.augmentation()
    batches = iter(GlobalBatchSampler(len(targets), settings.batch_size, derive_seed(seed, "order")))
    best = TrainedClassifier(model, settings.max_steps, float("nan"))
    best_weights: dict[str, Tensor] | None = None
    model.train()
    for step in range(1, settings.max_steps + 1):
        slots = next(batches)
        keys, batch = images.load([slot.index for slot in slots], device)
        batch = augmentation(batch, keys, derive_seed(seed, "views"), [slot.epoch for slot in slots])
        with seeded(derive_seed(seed, "dropout", step), batch.device):
            logits = model(batch)
        loss = F.binary_cross_entropy_with_logits(logits, targets[[slot.index for slot in slots]].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if validation is not None and (step % settings.validation_steps == 0 or step == settings.max_steps):
            auroc = macro_auroc(predict(model, validation, device), validation.targets)
            if auroc > best.validation_auroc or (best_weights is None and auroc == auroc):
                best = TrainedClassifier(model, step, auroc)
                best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if best_weights is not None:
        model.load_state_dict(best_weights)
    model.eval()
    return best


def predict(model: nn.Module, images: LabelledImages, device: torch.device | str = "cpu") -> np.ndarray:
    """Probabilities `(N, L)` float32 of the labels; the model is left in the mode it was in."""
    joined, numbers, was_training = _Joined([images]), range(len(images.rows)), model.training
    found = [torch.empty(0, images.targets.shape[1])]
    with torch.inference_mode():
        model.eval()
        for first in numbers[::_PREDICTED_TOGETHER]:
            _, batch = joined.load(numbers[first : first + _PREDICTED_TOGETHER], device)
            found.append(model(batch).sigmoid().float().cpu())
        model.train(was_training)
    return torch.cat(found).numpy()


class _Joined:
    """Images of several files, numbered consecutively, as batches."""

    def __init__(self, parts: Sequence[LabelledImages]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part.rows) for part in parts])

    def load(self, indices: Sequence[int], device: torch.device | str) -> tuple[list[str], Tensor]:
        """The keys, and the images `(B, C, size, size)` in [0, 1]."""
        keys, arrays = [], []
        for index in indices:
            number = int(np.searchsorted(self._ends, index, side="right"))
            part = self._parts[number]
            row = int(part.rows[index - int(self._ends[number])])  # from the end of the part
            keys.append(part.images.keys[row])
            arrays.append(part.images.array[row])
        stacked = torch.from_numpy(np.stack(arrays)).to(device)
        layout = stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)
        return keys, layout.float() / 255
