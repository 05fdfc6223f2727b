"""Can it be told of which patient a generated image is? An attack by a network that knows patients apart.

The attack is that of Packhäuser et al. 2022 (Scientific Reports 12:14851): a Siamese network, trained on real pairs of
other patients, scores whether two images are of one patient. It scores each generated image with its source, and with
images of strangers. The control are real pairs: other images of one patient. Networks are trained in a
cross-validation by patient, so that no network has seen a patient whose images it compares.

A set without sources, such as that of a prior, is compared with whatever training image resembles each image most. So
are real images of patients who were not trained on, by the same networks, which then learn from training images only.
These take the place of strangers: 0.5 says that a generated image is no more like a training patient than an unseen
person is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...data import ImageDataset
from ...metrics.auroc import draw_weights, stratified_auroc
from ...metrics.bootstrap import percentile_interval
from ...seeds import derive_seed, generator_for
from ..controls import rows_in
from ..folds import assign_folds
from ..generation import stack_readable
from ..results import JsonResult
from .network import SiameseNetwork, prepare, train_siamese

__all__ = ["FEWEST_PATIENTS", "PairFigures", "PairScore", "ReidentificationResult", "evaluate_reidentification"]

FEWEST_PATIENTS = 30
_FALSE_ALARMS = 0.01
_BATCH = 256

Images = ImageDataset | Tensor
_Draw = Callable[[str], np.ndarray]  # of numbers of images of others than a patient


@dataclass(frozen=True)
class PairFigures:
    """How well scores tell pairs of one kind from pairs of strangers.

    Attributes:
        pairs: What the pairs are.
        num_pairs, num_patients: How many, and of how many patients; of stand-ins, of how many images.
        auroc, low, high: Chance that such a pair has the higher score, with a 95 % interval over patients.
        found: Share of the pairs with a higher score than 99 % of the strangers.
    """

    pairs: str
    num_pairs: int
    num_patients: int
    auroc: float
    low: float
    high: float
    found: float


@dataclass(frozen=True)
class PairScore:
    """Keys of a generated and of a training image, and a score that they are of one patient.

    It is the network's log odds; of stand-ins these, standardised by those of strangers.
    """

    key: str
    training_key: str
    score: float


@dataclass(frozen=True)
class ReidentificationResult(JsonResult):
    """All figures of one set.

    Attributes:
        num_training, num_held_out, num_synthetic: Images, without those that cannot be read.
        num_known: Patients with two different images or more, whom networks learn from.
        num_without_source: Generated images whose source is not among the training images; they are left out.
        stands_in: Whether the nearest training image stands in for a source.
        num_folds, max_steps, seed, repeats: Of the networks and the bootstrap.
        real: Other images of one patient: what can be told at all.
        synthetic: A generated image and its source.
        others: A generated image and the other images of its source's patient; None where there is none.
        closest: The pairs with the highest scores.
    """

    num_training: int
    num_held_out: int
    num_synthetic: int
    num_known: int
    num_without_source: int
    stands_in: bool
    num_folds: int
    max_steps: int
    seed: int
    repeats: int
    real: PairFigures
    synthetic: PairFigures
    others: PairFigures | None
    closest: tuple[PairScore, ...]

    @property
    def knows_patients(self) -> bool:
        """Whether the networks tell real patients apart: the whole interval lies above 0.5."""
        return self.real.low > 0.5

    @property
    def reidentifies(self) -> bool:
        """Whether generated images are nearer to their sources than strangers are: likewise."""
        return self.synthetic.low > 0.5


def evaluate_reidentification(
    training: Images,
    synthetic: Images,
    held_out: Images,
    training_patients: Sequence[str],
    held_out_patients: Sequence[str],
    sources: Mapping[str, str] | None = None,
    *,
    num_folds: int = 3,
    max_steps: int = 300,
    num_strangers: int = 10,
    num_pairs: int = 12,
    bootstrap_repeats: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> ReidentificationResult:
    """Try to tell the patients of generated images.

    Args:
        training: Images that the generator was trained on or that it varies, or `(M, C, H, H)` in [0, 1].
        synthetic: What it generated.
        held_out: Real images of other patients.
        training_patients, held_out_patients: The patient of each image. Pairs of both sets train the networks; only
            those of the training set where no source is known.
        sources: The key of the training image that each generated one was made from, by its key (a number as text for
            tensors). None: the nearest training image stands in.
        num_folds: Folds of the patients, and networks.
        max_steps: Updates of each network.
        num_strangers: Strangers that each image is compared with.
        num_pairs: Closest pairs to keep.
        seed: Of folds, networks, strangers and bootstrap: the result is a function of the arguments.

    ValueError if patients do not fit, fewer than 30 have two images, no image has its source among the training
    images, or a set is empty.
    """
    _check_patients("training", training, training_patients)
    _check_patients("held-out", held_out, held_out_patients)
    known, unseen, made = map(stack_readable, (training, held_out, synthetic))
    if not min(len(known.rows), len(unseen.rows), len(made.rows)):
        raise ValueError("Re-identification compares training, held-out and generated images, and one set is empty.")
    pixels = [prepare(stack.images) for stack in (known, unseen, made)]
    fresh = ~rows_in(pixels[1], pixels[0])
    real = torch.cat([pixels[0], pixels[1][fresh]])
    owners = [training_patients[row] for row in known.rows]
    owners += [held_out_patients[row] for row, new in zip(unseen.rows, fresh.tolist(), strict=True) if new]
    people = np.array(owners)
    is_training = np.arange(len(real)) < len(known.rows)
    learnt_from = is_training if sources is None else np.ones(len(real), dtype=bool)
    images = zip(people[learnt_from].tolist(), real[learnt_from].numpy(), strict=True)
    distinct = {(patient, hash(image.tobytes())) for patient, image in images}
    several = {patient for patient, count in Counter(patient for patient, _ in distinct).items() if count > 1}
    if len(several) < FEWEST_PATIENTS:
        raise ValueError(
            f"Re-identification is learned from patients with two images or more: there are {len(several)}, and it "
            f"takes {FEWEST_PATIENTS}. Give more images of each patient, and a table with the patient of each image."
        )
    rows_of_sources = None
    if sources is not None:
        places = {key: row for row, key in enumerate(known.keys)}
        rows_of_sources = np.array([places.get(sources.get(key), -1) for key in made.keys])
        if (rows_of_sources < 0).all():
            raise ValueError(
                f"None of {len(made.keys)} generated images has its source among the training images: give the images "
                "that the set was made from as the training images."
            )
    folds = assign_folds(np.array([[owner in several] for owner in owners]), owners, num_folds, seed)
    tables: dict[str, list[_Pairs]] = {"real": [], "synthetic": [], "others": []}
    closest: list[PairScore] = []
    stand_ins = _StandIns(made.keys, known.keys, people, is_training)
    for fold in tqdm(range(num_folds), desc="networks", leave=False, disable=not progress):
        others, rows = np.flatnonzero((folds != fold) & learnt_from), np.flatnonzero(folds == fold)
        own_seed = derive_seed(seed, "network", fold)
        network = train_siamese(real[others], people[others].tolist(), max_steps, own_seed, device)
        own, generated = (_embed(network, images, device) for images in (real[rows], pixels[2]))
        draw = partial(_draw_strangers, people[rows], num_strangers, generator_for(seed, "strangers", fold))
        scores = _scores(network, own, own)
        tables["real"].append(_real_pairs(scores, real[rows], people[rows], draw))
        if rows_of_sources is None:
            near = real[rows[is_training[rows]]]
            searched = torch.cat([generated, _embed(network, real[~is_training], device)])
            stand_ins.add(_scores(network, searched, _embed(network, near, device)), rows[is_training[rows]])
            continue
        place_of = {row: place for place, row in enumerate(rows.tolist())}
        chosen = [i for i, row in enumerate(rows_of_sources.tolist()) if row in place_of]
        found = _scores(network, generated[chosen], own)
        partners = np.array([place_of[rows_of_sources[i]] for i in chosen], dtype=np.int64)
        for name, pairs in _variations(found, partners, people[rows], real[rows], draw).items():
            tables[name].append(pairs)
        closest += [
            PairScore(made.keys[i], known.keys[rows_of_sources[i]], float(found[n, partners[n]]))
            for n, i in enumerate(chosen)
        ]
    if rows_of_sources is None:
        tables["synthetic"], closest = [stand_ins.pairs()], stand_ins.closest()
    label = "generated and nearest training image" if rows_of_sources is None else "generated image and its source"
    options = {"repeats": bootstrap_repeats, "seed": seed}
    has_others = any(pairs.near for pairs in tables["others"])
    closest.sort(key=lambda pair: -pair.score)
    return ReidentificationResult(
        num_training=len(known.rows),
        num_held_out=int(fresh.sum()),
        num_synthetic=len(made.rows),
        num_known=len(several),
        num_without_source=0 if rows_of_sources is None else int((rows_of_sources < 0).sum()),
        stands_in=rows_of_sources is None,
        num_folds=num_folds,
        max_steps=max_steps,
        seed=seed,
        repeats=bootstrap_repeats,
        real=_figures("other images of one patient", tables["real"], **options),
        synthetic=_figures(label, tables["synthetic"], **options),
        others=_figures("generated and other image of its patient", tables["others"], **options)
        if has_others
        else None,
        closest=tuple(closest[:num_pairs]),
    )


def _check_patients(name: str, images: Images, patients: Sequence[str]) -> None:
    if len(images) != len(patients):
        raise ValueError(f"Give one patient an image: {len(patients)} for {len(images)} {name} images.")


class _Pairs:
    """Scores of pairs of one patient and of pairs of strangers, each with whose it is: whom the bootstrap draws."""

    def __init__(self) -> None:
        self.near: list[tuple[float, Hashable]] = []
        self.strangers: list[tuple[float, Hashable]] = []

    def add(self, near: np.ndarray, strangers: np.ndarray, owner: str) -> None:
        """Scores `(n,)` and `(m,)` of an image of a patient."""
        self.near += [(score, owner) for score in near.tolist()]
        self.strangers += [(score, owner) for score in strangers.tolist()]


def _draw_strangers(people: np.ndarray, count: int, random: torch.Generator, patient: str) -> np.ndarray:
    """Numbers `(count,)` of images of other patients."""
    others = np.flatnonzero(people != patient)
    return others[torch.randint(len(others), (count,), generator=random).numpy()]


def _embed(network: SiameseNetwork, images: Tensor, device: torch.device | str) -> Tensor:
    return torch.cat([network(batch.to(device)) for batch in images.split(_BATCH)])


def _scores(network: SiameseNetwork, first: Tensor, second: Tensor) -> np.ndarray:
    parts = [network.score(rows, second).cpu().numpy() for rows in first.split(_BATCH)]
    return np.concatenate([np.empty((0, len(second)), np.float32), *parts])


def _real_pairs(scores: np.ndarray, images: Tensor, people: np.ndarray, draw: _Draw) -> _Pairs:
    """Each pair of different images of one patient, and strangers of each image that has a partner."""
    pairs = _Pairs()
    for row, patient in enumerate(people.tolist()):
        if partners := _others_of(row, images, people):
            later = [partner for partner in partners if partner > row]
            pairs.add(scores[row, later], scores[row, draw(patient)], patient)
    return pairs


def _variations(
    scores: np.ndarray, partners: np.ndarray, people: np.ndarray, images: Tensor, draw: _Draw
) -> dict[str, _Pairs]:
    """Generated images with their sources, and with other images of their patients; with the same strangers."""
    found = {"synthetic": _Pairs(), "others": _Pairs()}
    for row, partner in enumerate(partners.tolist()):
        patient = people[partner]
        strangers = scores[row, draw(patient)]
        found["synthetic"].add(scores[row, [partner]], strangers, patient)
        found["others"].add(scores[row, _others_of(partner, images, people)], strangers, patient)
    return found


def _others_of(row: int, images: Tensor, people: np.ndarray) -> list[int]:
    """Numbers of the other images of a patient."""
    return [j for j in np.flatnonzero(people == people[row]).tolist() if not torch.equal(images[j], images[row])]


class _StandIns:
    """The training image that resembles each generated and each held-out image most, over the networks of all folds.

    Scores of a network are standardised by those of held-out images, of whom none is a training patient.
    """

    def __init__(
        self, keys: Sequence[str], training_keys: Sequence[str], people: np.ndarray, is_training: np.ndarray
    ) -> None:
        self.keys, self.training_keys, self.people = keys, training_keys, people
        self.unseen = people[~is_training]
        self.best = np.full(len(keys) + len(self.unseen), -np.inf)
        self.nearest = np.zeros(len(self.best), dtype=np.int64)

    def add(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Scores `(N + M, n)` of generated and held-out images with the training images of a fold."""
        others = scores[len(self.keys) :]
        scores = (scores - others.mean()) / max(float(others.std()), 1e-12)
        scores[len(self.keys) :][self.unseen[:, None] == self.people[rows][None]] = -np.inf
        best, place = scores.max(axis=1), scores.argmax(axis=1)
        self.nearest = np.where(best > self.best, rows[place], self.nearest)
        self.best = np.maximum(best, self.best)

    def pairs(self) -> _Pairs:
        """Generated images against held-out ones."""
        pairs, scores = _Pairs(), self.best.tolist()
        pairs.near = list(zip(scores, (("generated", key) for key in self.keys), strict=False))
        of_unseen = (("real", str(patient)) for patient in self.unseen)
        pairs.strangers = list(zip(scores[len(self.keys) :], of_unseen, strict=True))
        return pairs

    def closest(self) -> list[PairScore]:
        """Each generated image and the training image that it resembles most."""
        found = zip(self.keys, self.nearest.tolist(), self.best.tolist(), strict=False)
        return [PairScore(key, self.training_keys[row], score) for key, row, score in found]


def _figures(name: str, tables: Sequence[_Pairs], repeats: int, seed: int) -> PairFigures:
    rows = [
        (fold, is_near, *pair)
        for fold, one in enumerate(tables)
        for is_near, pairs in ((True, one.near), (False, one.strangers))
        for pair in pairs
    ]
    folds, positive, scores = (np.array(column) for column in list(zip(*rows, strict=True))[:3])
    owners = [owner for *_, owner in rows]
    names = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    codes = np.array([names[owner] for owner in owners])
    kinds = np.array([owner[0] == "real" if isinstance(owner, tuple) else False for owner in names]).astype(int)
    weights = draw_weights(range(len(names)), kinds.tolist(), repeats, seed)[:, codes]
    columns = scores[:, None], positive[:, None], folds
    auroc = stratified_auroc(*columns)[0, 0]
    strangers = [[score for score, _ in one.strangers] for one in tables]
    bounds = [np.quantile(own, 1 - _FALSE_ALARMS, method="higher") if own else np.inf for own in strangers]
    return PairFigures(
        name,
        int(positive.sum()),
        len({owner for owner, inside in zip(owners, positive.tolist(), strict=True) if inside}),
        float(auroc),
        *percentile_interval(stratified_auroc(*columns, weights)[:, 0]),
        float((scores > np.array(bounds)[folds])[positive].mean()),
    )
