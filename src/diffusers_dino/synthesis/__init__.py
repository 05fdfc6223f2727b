"""Data sets of synthetic images: what to generate, from what, under which labels, and the making of it."""

from .finish import SyntheticSet
from .pairs import Pair, interpolated_labels, sample_pairs
from .plan import Plan, PlannedImage, plan_interpolation, plan_reconstruction
from .plan_files import load_plan, save_plan
from .run import bind, load_generator, synthesise
from .settings import SynthesisError, SynthesisSettings

__all__ = [
    "Pair",
    "Plan",
    "PlannedImage",
    "SynthesisError",
    "SynthesisSettings",
    "SyntheticSet",
    "bind",
    "interpolated_labels",
    "load_generator",
    "load_plan",
    "plan_interpolation",
    "plan_reconstruction",
    "sample_pairs",
    "save_plan",
    "synthesise",
]
