"""What to generate: from which images, how far between them, and under which labels."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..data.images.encoding import Encoding
from ..data.stores.archives import PackedKeys
from ..seeds import derive_seed
from .pairs import Pair, check_exponent, interpolated_labels, permute, sample_pairs, sample_places, soft_labels

__all__ = [
    "LABEL_SEPARATOR",
    "Plan",
    "PlannedImage",
    "SynthesisError",
    "SynthesisSettings",
    "plan_interpolation",
    "plan_prior",
    "plan_reconstruction",
]

LABEL_SEPARATOR = "|"

Labels = Sequence[Collection[str]]
Strategy = Literal["reconstruction", "interpolation", "prior"]


class SynthesisError(ValueError):
    """The images cannot be made as planned. The message says why, and what to do."""


@dataclass(frozen=True)
class SynthesisSettings:
    """How the images of a plan are sampled, checked and stored.

    Floating-point sums depend on how many images are computed together and how many threads share the work. With
    `batch_size` and `threads` in the settings, a plan gives the same bytes on every machine of one kind.

    Args:
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none, at half the cost.
        guidance_rescale: In [0, 1]; corrects the over-exposure that guidance causes.
        eta: Stochasticity of DDIM in [0, 1]; other schedulers ignore it.
        restore_norm: Whether to restore the norm of interpolated tokens, which linear mixing reduces.
        batch_size: Images sampled together, and sources encoded together.
        threads: CPU threads of each process; by default as many as PyTorch uses now.
        shard_size: Images in a shard, rounded down to whole batches. A process that is killed loses one shard.
        format: `"png"`, or `"jpg"`, which is lossy and needs a third of the space.
        quality: Of JPEG, in 1..100.
        grayscale: Whether to store the mean of a model's three colour channels.
        max_attempts: How often an image is drawn before the gate's refusal is final.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    guidance_rescale: float = 0.0
    eta: float = 0.0
    restore_norm: bool = False
    batch_size: int = 16
    threads: int = field(default_factory=torch.get_num_threads)
    shard_size: int = 1000
    format: Literal["png", "jpg"] = "png"
    quality: int = 95
    grayscale: bool = False
    max_attempts: int = 5

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "batch_size", "threads", "shard_size", "max_attempts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number of at least 0, got {self.guidance_scale}.")
        Encoding(format=self.format, quality=self.quality)  # checks both

    @property
    def images_per_shard(self) -> int:
        """`shard_size` in whole batches, at least one."""
        return max(1, self.shard_size // self.batch_size) * self.batch_size


class PlannedImage(NamedTuple):
    """One image of a plan.

    Attributes:
        index: Its number; with the plan it determines every pixel.
        key: Its name in the shards.
        sources: Key of the image that it varies, or keys of the two images that it lies between; none of a prior's.
        fraction: How far it is from the first source to the second, in [0, 1]; 0 for variations.
        labels: Sorted; None if the sources' labels are not known, and in a plan of soft labels.
        probabilities: Of each label in a plan of soft labels; one that is not named has 0. None in other plans.
    """

    index: int
    key: str
    sources: tuple[str, ...]
    fraction: float
    labels: tuple[str, ...] | None
    probabilities: dict[str, float] | None = None

    @property
    def given(self) -> dict[str, float] | None:
        """The probability of each label that it has, which is 1 in a plan of hard labels; None if unknown."""
        hard = None if self.labels is None else dict.fromkeys(self.labels, 1.0)
        return hard if self.probabilities is None else self.probabilities


@dataclass(frozen=True, eq=False)
class Plan:
    """N images to generate, as columns, and how: see `plan_reconstruction`, `plan_interpolation`, `plan_prior`.

    Shard k holds `images_per_shard` images from number `k * images_per_shard` on, in batches of `batch_size`.

    Attributes:
        seed: Of the choice of sources and of all noise.
        keys: The U source images, each once.
        label_sets: The combinations of labels that occur, each sorted.
        sources: `(N, 1)`, `(N, 2)` or, of a prior's images, `(N, 0)` int64, numbers of keys.
        fractions: `(N,)` float64.
        labels: `(N,)` int32, the number of each image's combination of labels; -1 if unknown. Of soft labels `(N, 2)`,
            the combinations of both sources.
        made_with: Fingerprints of the model, the source images and the gate, and the sources' preprocessing, once the
            plan is bound to them (see `diffusers_dino.synthesis.bind`); empty before.
        exponent: Of soft labels (see `soft_labels`); None for hard ones.
    """

    strategy: Strategy
    seed: int
    settings: SynthesisSettings
    keys: PackedKeys
    label_sets: tuple[tuple[str, ...], ...]
    sources: np.ndarray
    fractions: np.ndarray
    labels: np.ndarray
    made_with: Mapping[str, Any] = field(default_factory=dict)
    exponent: float | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> PlannedImage:
        index = range(len(self))[index]
        fraction = float(self.fractions[index])
        labels = probabilities = None
        if self.exponent is not None:
            ends = (self.label_sets[number] for number in self.labels[index].tolist())
            probabilities = soft_labels(*ends, fraction, self.exponent)
        elif (number := int(self.labels[index])) >= 0:
            labels = self.label_sets[number]
        sources = tuple(self.keys[number] for number in self.sources[index].tolist())
        return PlannedImage(index, f"synthetic-{index:09d}", sources, fraction, labels, probabilities)

    def __iter__(self) -> Iterator[PlannedImage]:
        return (self[index] for index in range(len(self)))

    @property
    def num_shards(self) -> int:
        """How many shards there are. A shard is the unit of work."""
        return -(-len(self) // self.settings.images_per_shard)

    def shard(self, number: int) -> range:
        """The images of a shard."""
        if not 0 <= number < self.num_shards:
            raise IndexError(f"shard {number} is out of range for a plan of {self.num_shards} shards")
        size = self.settings.images_per_shard
        return range(len(self))[number * size : (number + 1) * size]

    def describe(self) -> dict[str, Any]:
        """Everything but the rows, for JSON."""
        return {
            "strategy": self.strategy,
            "seed": self.seed,
            "num_images": len(self),
            "num_sources": len(self.keys),
            "settings": asdict(self.settings),
            "label_sets": [list(labels) for labels in self.label_sets],
            "made_with": dict(self.made_with),
            **({} if self.exponent is None else {"exponent": self.exponent}),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything: plans have the same digest only if their images are the same."""
        facts = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(f"{facts}\n{self.rows_digest}".encode()).hexdigest()

    @cached_property
    def rows_digest(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256()
        for column in self.columns().values():
            digest.update(f"{column.dtype.str}{column.shape}".encode())
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()

    def columns(self) -> dict[str, np.ndarray]:
        """The rows as arrays of fixed types, keys included."""
        return {
            "sources": self.sources.astype("<i8"),
            "fractions": self.fractions.astype("<f8"),
            "labels": self.labels.astype("<i4"),
            "keys": np.frombuffer(self.keys.to_bytes(), np.uint8),
        }

    def bound_to(self, **made_with: Any) -> Plan:
        """The same plan, for a model and images of these fingerprints."""
        return replace(self, made_with=json.loads(json.dumps(made_with)))


def plan_reconstruction(
    keys: Sequence[str],
    labels: Labels | None = None,
    *,
    ratio: float | None = None,
    num_images: int | None = None,
    seed: int = 0,
    settings: SynthesisSettings | None = None,
) -> Plan:
    """Plan variations of images (DiNO-Diffusion, section 2.4). Each has the labels of its source.

    Sources come once each, in random order, before any comes again: a plan begins with the plans of smaller ratios.

    Args:
        keys: Of the N source images, each once.
        labels: Labels of each, in the same order; None if they are not known.
        ratio: Synthetic images for each source; may be a fraction.
        num_images: How many images, in place of `ratio`.
        seed: Of the order and of the noise.
        settings: How images are computed and stored.

    Raises:
        SynthesisError: If there is no key, a key comes twice, the ratio or the number is not positive, or the labels
            do not fit.
    """
    count, total = _count(keys, labels, ratio, num_images), len(keys)
    rounds = [permute(np.arange(total), total, derive_seed(seed, "sources", r)) for r in range(-(-count // total))]
    sources = np.concatenate(rounds)[:count, None]  # (N, 1)
    given = None if labels is None else [labels[source] for source in sources[:, 0].tolist()]
    return _assemble("reconstruction", seed, settings, keys, sources, np.zeros(count), given)


def plan_interpolation(
    keys: Sequence[str],
    labels: Labels | None,
    *,
    ratio: float | None = None,
    num_images: int | None = None,
    pairs: Sequence[Pair] | None = None,
    identical: bool = False,
    exponent: float | None = None,
    seed: int = 0,
    settings: SynthesisSettings | None = None,
) -> Plan:
    """Plan images between two that share a label (DiNO-Diffusion, section 2.4). Each has the labels of the nearer one.

    With an exponent each has probabilities of the labels of both in their place: see `soft_labels`.

    A longer plan of the same seed begins with the same images.

    Args:
        keys, labels, settings: As for `plan_reconstruction`; labels must be known.
        ratio, num_images: As for `plan_reconstruction`; the pairs are then those of `sample_pairs`.
        pairs: Numbers of keys, and how far to go from one to the other, in place of `ratio` and `num_images`.
        identical: Pair only images of the very same labels; the paper's rule is that they share one.
        exponent: Of soft labels; 1 mixes labels as tokens are mixed. By default labels are hard.
        seed: Of pairs, fractions and noise.

    Raises:
        SynthesisError: As for `plan_reconstruction`, and if there are no labels or no two images share one.
        ValueError: If two images of given pairs do not share a label, or the exponent is not positive.
    """
    if exponent is not None:
        check_exponent(exponent)
    if labels is None:
        raise SynthesisError(
            "Interpolation goes between images that share a label: give the labels of the sources, or plan a "
            "reconstruction, which does not need any."
        )
    count = _count(keys, labels, ratio, num_images if pairs is None else len(pairs))
    if pairs is None:
        try:
            alike = [{tuple(sorted(own))} if own else set() for own in labels] if identical else labels
            pairs = list(itertools.islice(sample_pairs(alike, seed), count))
        except ValueError as error:
            raise SynthesisError(f"{error} Give more images or coarser labels, or plan a reconstruction.") from error
    sources = np.array([(pair.source, pair.target) for pair in pairs], dtype=np.int64)  # (N, 2)
    fractions = np.array([pair.fraction for pair in pairs])
    given = [interpolated_labels(labels[pair.source], labels[pair.target], pair.fraction) for pair in pairs]
    if exponent is not None:
        given = [labels[end] for pair in pairs for end in (pair.source, pair.target)]
        exponent = float(exponent)
    return _assemble("interpolation", seed, settings, keys, sources, fractions, given, exponent)


def plan_prior(
    keys: Sequence[str],
    labels: Labels | None = None,
    *,
    ratio: float | None = None,
    num_images: int | None = None,
    balanced: bool = False,
    asked: Labels | None = None,
    seed: int = 0,
    settings: SynthesisSettings | None = None,
) -> Plan:
    """Plan images of no source: a prior draws their tokens, by label or, where there are no labels, of anything.

    Labels come as in the regime: each image's set of labels once, in random order, before any comes again. A longer
    plan of the same seed begins with the same images.

    Args:
        keys, labels, settings: As for `plan_reconstruction`; the images only say how many there are, and which
            labels come together. Without any, `num_images` must be given.
        ratio, num_images: As for `plan_reconstruction`.
        balanced: Every label equally often: labels take turns, each with the label sets that have it.
        asked: The labels of every single image, in place of `keys`, `labels`, `ratio` and `num_images`.
        seed: Of the order, the tokens and the noise.

    Raises:
        SynthesisError: As for `plan_reconstruction`, and if labels are to be balanced and there are none.
    """
    if asked is not None:
        if keys or not asked:
            raise SynthesisError("Give either images whose labels are drawn, or the labels asked for of each image.")
        count, labels = _count(range(len(asked)), asked, None, len(asked)), None
    elif keys:
        count = _count(keys, labels, ratio, num_images)
    else:  # nothing that a ratio could be of
        count = _count(range(1), None, None, num_images)
    names = sorted({name for own in labels or () for name in own}) if balanced else None
    if names == []:
        raise SynthesisError("There are no labels to balance: give those of the images.")
    if labels is not None:
        asked = [labels[place] for place in itertools.islice(sample_places(labels, names, seed), count)]
    return _assemble("prior", seed, settings, (), np.zeros((count, 0), np.int64), np.zeros(count), asked)


def _count(keys: Sequence[Any], labels: Labels | None, ratio: float | None, num_images: int | None) -> int:
    """Check what was asked for, and return how many images that is."""
    if not len(keys):
        raise SynthesisError("There is no source image to plan with.")
    if len(set(keys)) < len(keys):
        raise SynthesisError(f"{len(keys) - len(set(keys))} source keys come more than once: give each image once.")
    if any(isinstance(own, str) for own in labels or ()):
        raise SynthesisError("The labels of an image are a collection of names, got a single name.")
    if labels is not None and len(labels) != len(keys):
        raise SynthesisError(f"Each source needs its labels, got {len(keys)} keys and {len(labels)} sets of labels.")
    if (ratio is None) == (num_images is None):
        raise SynthesisError("Say how many images to make: either a ratio to the number of sources, or num_images.")
    if ratio is not None and not 0 < ratio < math.inf:
        raise SynthesisError(f"The ratio of synthetic to source images must be above 0, got {ratio}.")
    if num_images is not None and not (isinstance(num_images, Integral) and num_images > 0):
        raise SynthesisError(f"num_images must be a whole number of at least 1, got {num_images!r}.")
    return max(1, round(ratio * len(keys))) if num_images is None else int(num_images)


def _assemble(
    strategy: Strategy,
    seed: int,
    settings: SynthesisSettings | None,
    keys: Sequence[str],
    sources: np.ndarray,
    fractions: np.ndarray,
    labels: Labels | None,
    exponent: float | None = None,
) -> Plan:
    """Put a plan together. Keys that no image is made from are left out: they need not be encoded.

    With an exponent, labels are those of both sources of an image, one after the other.
    """
    used, places = np.unique(sources, return_inverse=True)
    names = [keys[number] for number in used.tolist()]
    sets: dict[tuple[str, ...], int] = {}
    if labels is None:
        numbers = np.full(len(sources), -1, np.int32)
    else:
        numbers = np.array([sets.setdefault(tuple(sorted(own)), len(sets)) for own in labels], np.int32)
    for name in itertools.chain(names, *sets):
        if LABEL_SEPARATOR in name or "\n" in name:
            raise SynthesisError(
                f"{name!r} holds a line break or {LABEL_SEPARATOR!r}, which separates names in the table of labels: "
                "rename it."
            )
    return Plan(
        strategy,
        seed,
        settings or SynthesisSettings(),
        PackedKeys(names),
        tuple(sets),
        places.reshape(sources.shape).astype(np.int64),
        fractions.astype(np.float64),
        numbers if exponent is None else numbers.reshape(-1, 2),
        exponent=exponent,
    )
