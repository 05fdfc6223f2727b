"""All questions of a set of synthetic images, asked at once and answered in one line each.

Every question is a protocol of its own, and here it is only called. A question that cannot be asked, such as one of
patients who are not known, is named, with what to give. Answers are kept one by one: what was stopped goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ...files import work_folder
from ...fingerprints import as_json, fingerprint_pipeline, hash_of
from ...frozen import freeze
from ...metrics import FeatureExtractor, FeatureSet, FeatureSpec, extract_features, open_extractor
from ...pipelines.checks import image_size
from ..classifier import ClassifierSettings
from ..controls import rows_in
from ..fidelity.protocol import LabelledFeatures, compare_features
from ..fidelity.result import FidelityResult
from ..image_sets import ImageSet
from ..membership.protocol import MembershipResult, evaluate_membership
from ..memorization.protocol import MemorizationResult, evaluate_memorization
from ..reidentification.protocol import ReidentificationResult, evaluate_reidentification
from ..results import JsonResult
from ..transfer.protocol import TransferResult, evaluate_transfer
from .verdicts import Answer, answers_of

if TYPE_CHECKING:
    from ...pipelines import DinoDiffusionPipeline

__all__ = ["Answer", "SetFacts", "SuiteProgress", "SuiteResult", "SuiteSettings", "evaluate_suite"]

logger = logging.getLogger(__name__)

_CLASSIFIER = ClassifierSettings(
    options='{"growth_rate": 16, "block_config": [2, 2, 2]}', size=64, max_steps=300, learning_rate=3e-3
)


@dataclass(frozen=True)
class SuiteSettings:
    """What all questions are asked with; names are those of the protocols.

    Args:
        neighbors, fewest: Of fidelity.
        false_alarms: Of the search for copies.
        network_steps: Updates of each network of re-identification.
        timesteps, num_noises: Of membership inference.
        classifier: Of label agreement and utility; by default a small DenseNet at 64 px.
        bootstrap_repeats: Draws of all intervals.
        batch_size: Images at once.
        seed: Of everything.
        num_planted: Of the search for copies; None, as in folders from before it could be chosen, is 50.
    """

    neighbors: int = 5
    fewest: int = 50
    false_alarms: float = 0.01
    network_steps: int = 300
    timesteps: tuple[int, ...] = (50, 100, 200, 400)
    num_noises: int = 4
    classifier: ClassifierSettings = field(default=_CLASSIFIER)
    bootstrap_repeats: int = 200
    batch_size: int = 64
    seed: int = 0
    num_planted: int | None = None


@dataclass(frozen=True)
class SetFacts:
    """A set of images: its name, where it is, how many can be read and how many cannot.

    `num_patients` and `num_labels` are None where they are not known; `left_out` counts real images of patients (or
    real images themselves) that are among the training images.
    """

    name: str
    place: str
    num_images: int
    num_unreadable: int
    num_patients: int | None
    num_labels: int | None
    left_out: int = 0


@dataclass(frozen=True)
class SuiteResult(JsonResult):
    """The answers, and the results of the protocols that they sum up; None for what was not asked.

    Attributes:
        sets: Synthetic, real and, where they are given, training images.
        features: Extractor of fidelity.
        size: Side in pixels that images were prepared at.
        seed: Of everything.
        answers: One for each question, in the order of the page.
        transfer: Of both label agreement and utility.
    """

    sets: tuple[SetFacts, ...]
    features: FeatureSpec
    size: int
    seed: int
    answers: tuple[Answer, ...]
    fidelity: FidelityResult | None
    copies: MemorizationResult | None
    reidentification: ReidentificationResult | None
    membership: MembershipResult | None
    transfer: TransferResult | None

    def answer(self, question: str) -> Answer:
        """The answer to a question, such as `"copies"`."""
        return next(answer for answer in self.answers if answer.question == question)


class SuiteProgress(NamedTuple):
    """What `evaluate_suite` is about to ask, and how many of how many protocols are done; "" for none, at the end."""

    question: str
    done: int
    total: int


def evaluate_suite(
    synthetic: ImageSet,
    real: ImageSet,
    folder: str | Path,
    *,
    training: ImageSet | None = None,
    pipe: DinoDiffusionPipeline | None = None,
    sources: Mapping[str, str] | None = None,
    extractor: FeatureExtractor | None = None,
    settings: SuiteSettings | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[SuiteProgress], None] | None = None,
) -> SuiteResult:
    """Ask all questions of a synthetic set that what is given allows.

    Args:
        synthetic: Generated images, by whatever model.
        real: Real images that it was not trained on. Those of training patients are left out.
        folder: Where features and answers are kept: called again, what was stopped goes on.
        training: Images that it was trained on, for copies, re-identification and membership.
        pipe: The model, for membership.
        sources: The key of the training image that each synthetic one was made from, by its key.
        extractor: Feature space of fidelity, by default `tiny`.
        settings: Numbers of all protocols.
        device: Where networks compute; the extractor and the model have their own.
        progress: Called before each protocol and at the end.

    Raises:
        ValueError: If the synthetic images are the real ones, all real images are of training patients, no image of a
            set can be read, or the folder was begun with other sets or settings.
        RuntimeError: If another process is at work in the folder.
    """
    settings, extractor = settings or SuiteSettings(), extractor or open_extractor("tiny")
    report = progress or (lambda state: None)
    with work_folder(folder) as folder:
        given = {"synthetic": synthetic, "real": real, **({} if training is None else {"training": training})}
        freeze(folder / "settings.json", _describe(given, pipe, sources, extractor, settings))
        case = _Case(given, folder, pipe, sources, extractor, settings, device)
        results: dict[str, JsonResult | None] = {}
        reasons: dict[str, str] = {}
        for done, (name, (kind, ask)) in enumerate(_PROTOCOLS.items()):
            report(SuiteProgress(name, done, len(_PROTOCOLS)))
            path = folder / f"{name}.json"
            if path.is_file():
                results[name] = kind.load(path)
                continue
            try:
                results[name] = ask(case)
                results[name].save(path)
            except ValueError as error:  # what this question lacks; the others can be asked
                results[name], reasons[name] = None, str(error)
        result = SuiteResult(
            sets=case.facts,
            features=extractor.spec,
            size=synthetic.images.preprocessing.size,
            seed=settings.seed,
            answers=answers_of(**results, reasons=reasons),
            **results,
        )
        result.save(folder / "suite.json")
    report(SuiteProgress("", len(_PROTOCOLS), len(_PROTOCOLS)))
    return result


class _Case:
    """The sets without what cannot be read, and what the questions are asked with."""

    def __init__(
        self,
        given: Mapping[str, ImageSet],
        folder: Path,
        pipe: DinoDiffusionPipeline | None,
        sources: Mapping[str, str] | None,
        extractor: FeatureExtractor,
        settings: SuiteSettings,
        device: torch.device | str,
    ) -> None:
        self.folder, self.pipe, self.sources = folder, pipe, sources
        self.extractor, self.settings, self.device = extractor, settings, device
        self.features: dict[str, FeatureSet] = {}
        self.sets: dict[str, ImageSet] = {}
        for name, one in given.items():
            self.features[name] = self._extract(name, one)
            if not len(self.features[name]):
                raise ValueError(f"None of the {len(one.images)} {name} images can be read.")
            self.sets[name] = one.select(self.features[name].keys)
        same = rows_in(self.features["synthetic"].features, self.features["real"].features)
        if 2 * same.sum() >= len(same):
            raise ValueError(
                f"{int(same.sum())} of the {len(same)} synthetic images are images of {given['real'].place}: give the "
                "generated images as the synthetic ones, and other images as the real ones."
            )
        if same.any():
            logger.warning("%d of the %d synthetic images are among the real images.", int(same.sum()), len(same))
        left_out = self._leave_out_trained()
        self.facts = tuple(self._facts(name, one, left_out if name == "real" else 0) for name, one in given.items())
        self._take_patients_of_sources()

    @cached_property
    def training(self) -> ImageSet:
        """The training images; ValueError without them."""
        if "training" not in self.sets:
            raise ValueError("The training images are not given: it compares synthetic images with them.")
        return self.sets["training"]

    def _extract(self, name: str, one: ImageSet) -> FeatureSet:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            extract_features(self.extractor, one.images, self.settings.batch_size).save(path)
        return FeatureSet.load(path)

    def _leave_out_trained(self) -> int:
        """Keep real images only of patients, and only such images, as were not trained on; returns how many go."""
        if "training" not in self.sets:
            return 0
        real, training = self.sets["real"], self.sets["training"]
        trained = rows_in(self.features["real"].features, self.features["training"].features).numpy()
        if real.patients and training.patients:
            known = set(training.patient_list)
            trained = trained | np.array([patient in known for patient in real.patient_list])
        keys = [key for key, gone in zip(real.images.keys, trained.tolist(), strict=True) if not gone]
        if not keys:
            raise ValueError("All real images, or their patients, are among the training images: give other ones.")
        self.sets["real"], self.features["real"] = real.select(keys), self.features["real"].select(keys)
        return int(trained.sum())

    def _take_patients_of_sources(self) -> None:
        """Images that were made from one patient resemble each other: intervals draw them together."""
        synthetic, training = self.sets["synthetic"], self.sets.get("training")
        if synthetic.patients is None and self.sources and training is not None and training.patients:
            known = {key: training.patients.get(self.sources.get(key), key) for key in synthetic.images.keys}
            self.sets["synthetic"] = synthetic._replace(patients=known)

    def _facts(self, name: str, given: ImageSet, left_out: int) -> SetFacts:
        one = self.sets[name]
        return SetFacts(
            name,
            one.place,
            len(one.images),
            len(given.images) - len(one.images) - left_out,
            None if one.patients is None else len(set(one.patient_list)),
            None if one.labels is None else len(one.label_names),
            left_out,
        )


def _describe(
    given: Mapping[str, ImageSet],
    pipe: DinoDiffusionPipeline | None,
    sources: Mapping[str, str] | None,
    extractor: FeatureExtractor,
    settings: SuiteSettings,
) -> dict[str, object]:
    """All that answers depend on, for a folder to be begun with."""
    sets = {
        name: {
            "place": one.place,
            "images": hash_of(one.images.preprocessing.fingerprint(), *one.images.keys)[:16],
            "labels": _hash_of_all(one.labels and {key: sorted(own) for key, own in one.labels.items()}),
            "patients": _hash_of_all(one.patients),
        }
        for name, one in given.items()
    }
    return {
        **sets,
        "sources": _hash_of_all(sources),
        "model": None if pipe is None else fingerprint_pipeline(pipe),
        "features": extractor.spec.to_dict(),
        "settings": as_json(asdict(settings) | {"classifier": settings.classifier.facts()}),
    }


def _hash_of_all(known: Mapping[str, object] | None) -> str | None:
    return None if known is None else hash_of(*sorted(known.items()))[:16]


def _ask_fidelity(case: _Case) -> FidelityResult:
    labelled = {
        name: LabelledFeatures(case.features[name], one.labels, one.patients) for name, one in case.sets.items()
    }
    reference = labelled.pop("real")
    settings = case.settings
    options = {"neighbors": settings.neighbors, "fewest": settings.fewest, "seed": settings.seed}
    return compare_features(labelled, reference, bootstrap_repeats=settings.bootstrap_repeats, **options)


def _ask_copies(case: _Case) -> MemorizationResult:
    training, real = case.training, case.sets["real"]
    both = training.patients is not None and real.patients is not None
    study = evaluate_memorization(
        training.images,
        case.sets["synthetic"].images,
        real.images,
        training_groups=training.patient_list,
        held_out_groups=real.patient_list if both else None,
        false_alarms=case.settings.false_alarms,
        num_planted=case.settings.num_planted or 50,
        batch_size=case.settings.batch_size,
        progress=False,
    )
    study.gate.save(case.folder / "gate.safetensors")
    return study.result


def _ask_reidentification(case: _Case) -> ReidentificationResult:
    training, real = case.training, case.sets["real"]
    if missing := [name for name, one in (("training", training), ("real", real)) if one.patients is None]:
        raise ValueError(
            f"The patients of the {' and '.join(missing)} images are not known: give a table with the patient of each."
        )
    return evaluate_reidentification(
        training.images,
        case.sets["synthetic"].images,
        real.images,
        training.patient_list,
        real.patient_list,
        case.sources,
        max_steps=case.settings.network_steps,
        bootstrap_repeats=case.settings.bootstrap_repeats,
        seed=case.settings.seed,
        device=case.device,
        progress=False,
    )


def _ask_membership(case: _Case) -> MembershipResult:
    if case.pipe is None:
        raise ValueError("The model is not given: the attack is on its weights.")
    training, real = case.training, case.sets["real"]
    both = training.patients is not None and real.patients is not None
    size = image_size(case.pipe)
    return evaluate_membership(
        case.pipe,
        training.images.resized(size),
        real.images.resized(size),
        timesteps=case.settings.timesteps,
        num_noises=case.settings.num_noises,
        training_groups=training.patient_list if both else None,
        held_out_groups=real.patient_list if both else None,
        bootstrap_repeats=case.settings.bootstrap_repeats,
        batch_size=case.settings.batch_size,
        seed=case.settings.seed,
        progress=False,
    )


def _ask_transfer(case: _Case) -> TransferResult:
    return evaluate_transfer(
        case.sets["real"],
        case.sets["synthetic"],
        case.folder / "classifiers",
        classifier=case.settings.classifier,
        bootstrap_repeats=case.settings.bootstrap_repeats,
        seed=case.settings.seed,
        device=case.device,
    )


_PROTOCOLS: dict[str, tuple[type[JsonResult], Callable[[_Case], JsonResult]]] = {
    "fidelity": (FidelityResult, _ask_fidelity),
    "copies": (MemorizationResult, _ask_copies),
    "reidentification": (ReidentificationResult, _ask_reidentification),
    "membership": (MembershipResult, _ask_membership),
    "transfer": (TransferResult, _ask_transfer),
}
