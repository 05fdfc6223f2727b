"""Experiments that answer one question each: a function that takes a model and images, and returns a frozen result.

| question | call | result |
| --- | --- | --- |
| does the model follow its condition? | `evaluate_reconstruction` | `ReconstructionResult` |
| do images on a path leave one image and approach the other? | `evaluate_interpolation` | `InterpolationResult` |
| how far are generated images from real ones? | `evaluate_fidelity` | `FidelityResult` |
| are generated images copies of training images? | `evaluate_memorization` | `MemorizationResult`, and a gate |
| can it be told which images a model was trained on? | `evaluate_membership` | `MembershipResult` |
| can it be told of which patient a generated image is? | `evaluate_reidentification` | `ReidentificationResult` |
| do synthetic images show what their labels say? | `evaluate_labels` | `LabelPreservationResult` |
| which synthetic images does no judge contradict? | `filter_by_judge` | `FilterResult`, and the rows that stay |
| do classifiers of real images tell synthetic labels, and the reverse? | `evaluate_transfer` | `TransferResult` |
| do synthetic images help a classifier? | `evaluate_augmentation` | `AugmentationResult` |
| are a prior's tokens like real ones, and not copies of training tokens? | `evaluate_prior` | `PriorResult` |
| does the model's attention find anatomy? | `evaluate_segmentation` | `SegmentationResult`, and the segments |
| all of these that a folder of images allows, in one report | `evaluate_suite` | `SuiteResult` |

Each question is a folder: `protocol` measures, `table` and `plot` show a result. Results go to JSON and back
(`result.save(path)`, `type(result).load(path)`).

Arguments of one name are one thing everywhere: `batch_size` images are computed at once, intervals are of
`bootstrap_repeats` draws, networks compute on `device`, and `progress` shows bars.
"""

from .augmentation.protocol import evaluate_augmentation
from .augmentation.result import AugmentationResult
from .augmentation.sets import FoldPriors
from .fidelity.protocol import evaluate_fidelity
from .fidelity.result import FidelityResult, FidelityScores, Sampling
from .fidelity.sets import FidelitySets, choose_sets
from .generation import Model, load_models
from .image_sets import ImageSet, open_image_set
from .interpolation.protocol import InterpolationResult, PathFigures, PathSpace, evaluate_interpolation
from .labels.contradictions import FilterResult, filter_by_judge
from .labels.protocol import evaluate_labels
from .labels.result import LabelPreservationResult
from .membership.protocol import MembershipResult, evaluate_membership
from .memorization.protocol import MemorizationResult, evaluate_memorization
from .prior.protocol import PriorResult, TokenFigures, evaluate_prior
from .reconstruction.protocol import ReconstructionResult, RetrievalFigures, evaluate_reconstruction
from .reidentification.protocol import ReidentificationResult, evaluate_reidentification
from .segmentation.protocol import (
    MethodScores,
    SegmentationResult,
    SegmentationStudy,
    SweepScores,
    evaluate_segmentation,
)
from .segmentation.sweep import Setting, Sweep
from .suite.protocol import Answer, SuiteResult, SuiteSettings, evaluate_suite
from .transfer.protocol import TransferResult, evaluate_transfer

__all__ = [
    "Answer",
    "AugmentationResult",
    "FidelityResult",
    "FidelityScores",
    "FidelitySets",
    "FilterResult",
    "FoldPriors",
    "ImageSet",
    "InterpolationResult",
    "LabelPreservationResult",
    "MembershipResult",
    "MemorizationResult",
    "MethodScores",
    "Model",
    "PathFigures",
    "PathSpace",
    "PriorResult",
    "ReconstructionResult",
    "ReidentificationResult",
    "RetrievalFigures",
    "Sampling",
    "SegmentationResult",
    "SegmentationStudy",
    "Setting",
    "SuiteResult",
    "SuiteSettings",
    "Sweep",
    "SweepScores",
    "TokenFigures",
    "TransferResult",
    "choose_sets",
    "evaluate_augmentation",
    "evaluate_fidelity",
    "evaluate_interpolation",
    "evaluate_labels",
    "evaluate_membership",
    "evaluate_memorization",
    "evaluate_prior",
    "evaluate_reconstruction",
    "evaluate_reidentification",
    "evaluate_segmentation",
    "evaluate_suite",
    "evaluate_transfer",
    "filter_by_judge",
    "load_models",
    "open_image_set",
]
