"""How like the images that a model was trained on an image is, by statistics of their condition tokens."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from .encoders import LastingModelMixin
from .pixels import ImageInput
from .seeds import generator_for
from .tensor_files import read_tensors, refusing, write_tensors

__all__ = ["MIN_IMAGES", "STATISTICS", "UNLIKE", "FamiliarityMixin", "TokenStatistics", "fetch_statistics"]

STATISTICS = "familiarity.safetensors"  # in the folder of a conditioner
MIN_IMAGES = 50
UNLIKE = 0.01  # of images like the training images, a hundredth seem as unfamiliar

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_KIND = "a file of token statistics"
_FORMAT = 1
_MOST_DIRECTIONS = 64
_IMAGES_PER_DIRECTION = 10
_HELD_OUT = 5  # every fifth group calibrates
_MOST_DISTANCES = 1000
_TAIL = 0.1  # share of the held-out distances whose fall is continued beyond them


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """A normal distribution of training images' tokens, and how far from its centre others of these images are.

    The covariance is shrunk to a few directions, and one variance for all others (probabilistic principal components,
    Tipping and Bishop 1999). It holds the data of no patient: the mean and each direction are averages over at least
    ten images a direction, distances are single numbers, and neither image nor tokens are kept. Averages of few images
    still say a little about each of them, so there are none of fewer than `MIN_IMAGES`.

    Attributes:
        mean: `(F,)`, of the features: an image's global tokens, and the mean of its patch tokens.
        directions: `(K, F)`, orthonormal; those in which training images differ most.
        deviations: `(K + 1,)`, the standard deviation in each, and in any other direction.
        distances: `(H,)` ascending, of images that the distribution was not fitted to.
        num_images: How many it was fitted to.
        layout: Which tokens they are: `DinoImageConditioner.layout`.
    """

    mean: Tensor
    directions: Tensor
    deviations: Tensor
    distances: Tensor
    num_images: int
    layout: dict[str, Any]

    @classmethod
    def of(cls, features: Tensor, layout: dict[str, Any], groups: Sequence[Hashable] | None = None) -> TokenStatistics:
        """Fit the distribution to four fifths of the images, and measure how far from its centre the others are.

        Args:
            features: `(N, F)`.
            layout: Which tokens they are made of.
            groups: Of each image, such as its patient; all images of one are on one side. By default each is its own.

        Raises:
            ValueError: If there are fewer than `MIN_IMAGES` images or five groups, or a feature is not finite.
        """
        owners = list(range(len(features))) if groups is None else list(groups)
        if len(owners) != len(features):
            raise ValueError(f"Give one group an image: {len(owners)} groups for {len(features)} images.")
        names = list(dict.fromkeys(owners))
        if len(features) < MIN_IMAGES or len(names) < _HELD_OUT:
            raise ValueError(
                f"Statistics of tokens need at least {MIN_IMAGES} images of {_HELD_OUT} patients, got "
                f"{len(features)} of {len(names)}."
            )
        if not features.isfinite().all():
            raise ValueError("The tokens are not finite: check the encoder's weights, or use float32 or bfloat16.")
        shuffled = torch.randperm(len(names), generator=generator_for("familiarity")).tolist()
        unseen = {names[place] for place in shuffled[::_HELD_OUT]}
        held = torch.tensor([owner in unseen for owner in owners])
        if held.sum() < 2:
            raise ValueError("Statistics of tokens would be calibrated by one image: give images of more patients.")
        features = features.double().cpu()
        fitted = _fit(features[~held])
        distances = cls(*fitted, torch.empty(0), int((~held).sum()), layout).distance(features[held])
        if len(distances) > _MOST_DISTANCES:
            distances = distances.quantile(torch.linspace(0, 1, _MOST_DISTANCES, dtype=torch.float64))
        return cls(*fitted, distances.sort().values.float(), int((~held).sum()), layout)

    def distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance `(B,)` float64 of features `(B, F)` from the mean, over the root of F: about 1."""
        off = features.double().cpu() - self.mean.double()
        along = off @ self.directions.double().T  # (B, K)
        beside = (off.square().sum(1) - along.square().sum(1)).clamp(min=0)
        deviations = self.deviations.double()
        squares = (along / deviations[:-1]).square().sum(1) + beside / deviations[-1].square()
        return (squares / len(self.mean)).sqrt()

    def familiarity(self, features: Tensor) -> Tensor:
        """The share of training-like images that are as far from the mean or farther: `(B,)` float64 in [0, 1].

        It is that of the held-out images, where features `(B, F)` are within their range: a conformal p-value (Vovk et
        al. 2005). Beyond the farthest of them it falls on as a power of the distance (Hill 1975), so that what is
        farther is always less familiar.
        """
        known, distances = self.distances.double().numpy(), self.distance(features).numpy()
        count = len(known)
        shares = np.interp(distances, known, np.arange(count, 0, -1) / (count + 1))
        farthest = known[-1]
        tail = known[-max(2, round(_TAIL * count)) :]
        power = 1 / max(np.log(tail / tail[0])[1:].mean(), 1e-3)
        beyond = np.maximum(distances / farthest, 1.0) ** -power
        return torch.from_numpy(np.where(distances > farthest, beyond / (count + 1), shares))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `familiarity.safetensors` into the folder of a conditioner, which it makes if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name) for name in ("mean", "directions", "deviations", "distances")}
        described = {"format": _FORMAT, "num_images": self.num_images, "layout": self.layout}
        write_tensors(Path(folder) / STATISTICS, tensors, {"familiarity": described})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TokenStatistics | None:
        """Read what `save` wrote; None if the folder has none, a ValueError if it is damaged."""
        path = Path(folder) / STATISTICS
        if not path.exists():
            return None
        tensors, metadata = read_tensors(path, _KIND, "mean", "directions", "deviations", "distances")
        with refusing(path, _KIND):
            described = metadata["familiarity"]
            if described["format"] != _FORMAT:
                raise ValueError(f"its format is {described['format']}, and {_FORMAT} is read")
            return cls(**tensors, num_images=int(described["num_images"]), layout=dict(described["layout"]))


class FamiliarityMixin:
    """What a conditioner says of images by the statistics of its training images' tokens."""

    token_statistics: TokenStatistics | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote, from a folder or the Hub, as in `LastingModelMixin.from_pretrained`."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        conditioner = loaded[0] if isinstance(loaded, tuple) else loaded
        folder = fetch_statistics(pretrained_model_name_or_path, kwargs.get("subfolder"), kwargs)
        statistics = folder and TokenStatistics.load(folder)
        if statistics and statistics.layout["settings"] != conditioner.layout["settings"]:
            raise ValueError(f"The statistics in {folder} are of other tokens than the conditioner's: delete them.")
        conditioner.token_statistics = statistics
        return loaded

    @wraps(LastingModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        if self.token_statistics is not None:  # before what may upload the folder
            self.token_statistics.save(save_directory)
        else:
            Path(save_directory, STATISTICS).unlink(missing_ok=True)  # of what this folder held
        super().save_pretrained(save_directory, **kwargs)

    def fit_familiarity(self, tokens: Iterable[Tensor], groups: Sequence[Hashable] | None = None) -> None:
        """Note what the tokens of training images are like, for `familiarity`; saved with the conditioner.

            conditioner.fit_familiarity(conditioner.encode(image) for image in images)
            conditioner.token_statistics.save("my-model/conditioner")  # to add it to a model that lacks it

        Args:
            tokens: Of the images, batch by batch: `(B, num_tokens, token_dim)`.
            groups: Of each image, such as its patient, to keep those apart that the scale is taken from.

        Raises:
            ValueError: If there are fewer than 50 images, or a token is not finite.
        """
        features = torch.cat([self._features_of(batch) for batch in tokens] or [torch.empty(0, 1)])
        self.token_statistics = TokenStatistics.of(features, self.layout, groups)

    def familiarity(self, images: ImageInput) -> Tensor:
        """How like the training images each of B images is, as far as its tokens tell: `(B,)` float64 in [0, 1].

        It is the share of images like those of the training that are as unusual as it, or more: a training-like image
        is below 0.01 once in a hundred times. Images of another kind are far below. It says nothing of findings.

        Args:
            images: What `preprocess` takes.

        Raises:
            ValueError: If there are no statistics, as in models that were trained before there were such.
        """
        return self.familiarity_of(self.encode(images))

    def familiarity_of(self, tokens: Tensor) -> Tensor:
        """`familiarity` `(B,)` of images by their `tokens` `(B, num_tokens, token_dim)`; its errors."""
        if self.token_statistics is None:
            raise ValueError(
                "This model holds no statistics of its training images, so it cannot tell which images are like them. "
                "Add them: conditioner.fit_familiarity(conditioner.encode(image) for image in training_images)."
            )
        return self.token_statistics.familiarity(self._features_of(tokens))

    def _features_of(self, tokens: Tensor) -> Tensor:
        """`(B, F)` of tokens `(B, S, D)`: all global tokens, and the mean of each encoder's patches."""
        parts: list[Tensor] = []
        for head, own in zip(self.heads, tokens.float().split(self.tokens_per_encoder, 1), strict=True):
            parts.append(own[:, : head.num_global])
            if head.num_patches:
                parts.append(own[:, head.num_global :].mean(1, keepdim=True))
        return torch.cat(parts, dim=1).flatten(1).cpu()


def fetch_statistics(place: str | os.PathLike[str], subfolder: str | None, options: Mapping[str, Any]) -> Path | None:
    """The folder with a conditioner's statistics, from a repository in the Hub's cache; None if it has none.

    diffusers fetches only configs and weights. `options` are those of `from_pretrained`.
    """
    if os.path.isdir(place):
        return Path(place, subfolder or "")
    options = {name: options[name] for name in _HUB_OPTIONS if name in options}
    try:
        return Path(hf_hub_download(str(place), STATISTICS, subfolder=subfolder, **options)).parent
    except EntryNotFoundError:  # or offline and not in the cache
        return None


def _fit(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `(F,)`, directions `(K, F)` and deviations `(K + 1,)` of `(N, F)`, float32."""
    count, width = features.shape
    mean = features.mean(0)
    _, spread, directions = torch.linalg.svd(features - mean, full_matrices=False)
    variances = spread.square() / (count - 1)
    kept = max(1, min(_MOST_DIRECTIONS, count // _IMAGES_PER_DIRECTION, width - 1))
    rest = variances[kept:].sum() / (width - kept)
    floor = 1e-6 * variances.sum() / width  # of directions in which no training image differs
    deviations = torch.cat([variances[:kept], rest[None]]).clamp(min=floor.clamp(min=1e-12)).sqrt()
    return mean.float(), directions[:kept].float(), deviations.float()
