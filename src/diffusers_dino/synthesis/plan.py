"""What to generate: from which images, how far between them, and what the result is to be called."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from ..data.stores.archives import PackedKeys
from ..seeds import derive_seed
from .pairs import Pair, interpolated_labels, permute, sample_pairs
from .settings import SynthesisError, SynthesisSettings

__all__ = ["LABEL_SEPARATOR", "Plan", "PlannedImage", "plan_interpolation", "plan_pairs", "plan_reconstruction"]

LABEL_SEPARATOR = "|"

Labels = Sequence[Collection[str]]


class PlannedImage(NamedTuple):
    """One image of a plan.

    Attributes:
        index: Its number; with the plan it determines every pixel.
        key: Its name in the shards.
        sources: Key of the image that it varies, or keys of the two that it lies between.
        fraction: How far from the first source to the second, in [0, 1]; 0 for variations.
        labels: Sorted; None if the sources' labels are not known.
    """

    index: int
    key: str
    sources: tuple[str, ...]
    fraction: float
    labels: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Plan:
    """A frozen list of N images to generate, in columns, and how. Make one with `plan_reconstruction` or the like.

    Images `k * images_per_shard` to `(k + 1) * images_per_shard` are shard k, and each `batch_size` of them a batch.

    Attributes:
        strategy: `"reconstruction"` or `"interpolation"`.
        seed: Of the choice of sources and of all noise.
        settings: How images are computed and stored.
        keys: The U source images, each once.
        label_sets: The combinations of labels that occur.
        sources: `(N, 1)` or `(N, 2)` int64, numbers of keys.
        fractions: `(N,)` float64.
        labels: `(N,)` int32, the number of each image's combination of labels; -1 if unknown.
        made_with: Fingerprints of the model, the source images and the gate, and the sources' preprocessing, once the
            plan is bound to them (see `diffusers_dino.synthesis.bind`); empty before.
    """

    strategy: Literal["reconstruction", "interpolation"]
    seed: int
    settings: SynthesisSettings
    keys: PackedKeys
    label_sets: tuple[tuple[str, ...], ...]
    sources: np.ndarray
    fractions: np.ndarray
    labels: np.ndarray
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> PlannedImage:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a plan of {len(self)} images")
        index %= len(self)
        labels = int(self.labels[index])
        return PlannedImage(
            index,
            f"synthetic-{index:09d}",
            tuple(self.keys[number] for number in self.sources[index].tolist()),
            float(self.fractions[index]),
            None if labels < 0 else self.label_sets[labels],
        )

    def __iter__(self) -> Iterator[PlannedImage]:
        return (self[index] for index in range(len(self)))

    @property
    def num_shards(self) -> int:
        """How many shards, the units of work, there are."""
        return -(-len(self) // self.settings.images_per_shard)

    def shard(self, number: int) -> range:
        """The images of a shard."""
        if not 0 <= number < self.num_shards:
            raise IndexError(f"shard {number} is out of range for a plan of {self.num_shards} shards")
        size = self.settings.images_per_shard
        return range(number * size, min((number + 1) * size, len(self)))

    def describe(self) -> dict[str, Any]:
        """All but the rows, for JSON."""
        return {
            "strategy": self.strategy,
            "seed": self.seed,
            "num_images": len(self),
            "num_sources": len(self.keys),
            "settings": asdict(self.settings),
            "label_sets": [list(labels) for labels in self.label_sets],
            "made_with": dict(self.made_with),
        }

    @cached_property
    def rows_digest(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256()
        for column in self.columns().values():
            digest.update(f"{column.dtype.str}{column.shape}".encode())
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything: equal for plans of equal images alone."""
        facts = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(f"{facts}\n{self.rows_digest}".encode()).hexdigest()

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
    """Plan variations of images (DiNO-Diffusion, section 2.4): each gets its source's labels.

    All sources come once, in random order, before any comes again: a plan begins with the plans of smaller ratios.

    Args:
        keys: Of the N source images, each once.
        labels: Labels of each, in the same order; None if they are not known.
        ratio: Synthetic images for each source; may be a fraction.
        num_images: In place of `ratio`, how many images.
        seed: Of the order and of the noise.
        settings: How images are computed and stored.

    Raises:
        SynthesisError: If there is no key, a key comes twice, the ratio or the number is not positive, or labels do
            not fit.
    """
    count = _count(keys, labels, ratio, num_images)
    total = len(keys)
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
    seed: int = 0,
    settings: SynthesisSettings | None = None,
) -> Plan:
    """Plan images between pairs that share a label, labelled as the nearer one (DiNO-Diffusion, section 2.4).

    Pairs and fractions are those of `sample_pairs`; a longer plan of the same seed begins with the same images.

    Args:
        keys: Of the N source images, each once.
        labels: Labels of each, in the same order.
        ratio: Synthetic images for each source; may be a fraction.
        num_images: In place of `ratio`, how many images.
        seed: Of pairs, fractions and noise.
        settings: How images are computed and stored.

    Raises:
        SynthesisError: As for `plan_reconstruction`, and if there are no labels or no two images share one.
    """
    if labels is None:
        raise SynthesisError(
            "Interpolation goes between images that share a label: give the labels of the sources, or plan a "
            "reconstruction, which needs none."
        )
    count = _count(keys, labels, ratio, num_images)
    try:
        pairs = list(itertools.islice(sample_pairs(labels, seed), count))
    except ValueError as error:
        raise SynthesisError(f"{error} Give more images or coarser labels, or plan a reconstruction.") from error
    return plan_pairs(keys, labels, pairs, seed=seed, settings=settings)


def plan_pairs(
    keys: Sequence[str],
    labels: Labels,
    pairs: Sequence[Pair],
    *,
    seed: int = 0,
    settings: SynthesisSettings | None = None,
) -> Plan:
    """Plan images between given pairs, labelled as the nearer one.

    Args:
        keys: Of the N source images, each once.
        labels: Labels of each, in the same order.
        pairs: Numbers of keys, and how far to go from one to the other.
        seed: Of the noise.
        settings: How images are computed and stored.

    Raises:
        SynthesisError: As for `plan_reconstruction`.
        ValueError: If two images of a pair share no label.
    """
    _count(keys, labels, None, len(pairs))
    sources = np.array([(pair.source, pair.target) for pair in pairs], dtype=np.int64)  # (N, 2)
    fractions = np.array([pair.fraction for pair in pairs])
    given = [interpolated_labels(labels[pair.source], labels[pair.target], pair.fraction) for pair in pairs]
    return _assemble("interpolation", seed, settings, keys, sources, fractions, given)


def _count(keys: Sequence[str], labels: Labels | None, ratio: float | None, num_images: int | None) -> int:
    """How many images are asked for, after checks."""
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
    if num_images is not None and num_images < 1:
        raise SynthesisError(f"num_images must be at least 1, got {num_images}.")
    return max(1, round(ratio * len(keys))) if num_images is None else num_images


def _assemble(
    strategy: Literal["reconstruction", "interpolation"],
    seed: int,
    settings: SynthesisSettings | None,
    keys: Sequence[str],
    sources: np.ndarray,
    fractions: np.ndarray,
    labels: Labels | None,
) -> Plan:
    """Put a plan together. Keys that no image is made from are left out, so that they are not encoded."""
    used, places = np.unique(sources, return_inverse=True)
    names = [keys[number] for number in used.tolist()]
    sets: dict[tuple[str, ...], int] = {}
    if labels is None:
        numbers = np.full(len(sources), -1, np.int32)
    else:
        numbers = np.array([sets.setdefault(tuple(sorted(own)), len(sets)) for own in labels], np.int32)
    joined = LABEL_SEPARATOR.join
    for name in itertools.chain(names, *sets):
        if LABEL_SEPARATOR in name or "\n" in name:
            raise SynthesisError(
                f"{name!r} holds a line break or {LABEL_SEPARATOR!r}, which parts names in {joined(['a', 'table'])}: "
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
        numbers,
    )
