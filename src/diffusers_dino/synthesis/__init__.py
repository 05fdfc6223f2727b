"""Data sets of synthetic images: what to generate, from which images, under which labels; and how they are made.

plan = plan_interpolation(images.keys, labels, ratio=5)
made = synthesise(plan, load_generator("my-model").to("cuda"), images, "synthetic")
"""

from .dataset import SyntheticSet, draw_examples
from .pairs import Pair, interpolated_labels, sample_pairs
from .plan import (
    Plan,
    PlannedImage,
    SynthesisError,
    SynthesisSettings,
    begun_threads,
    load_plan,
    plan_interpolation,
    plan_reconstruction,
    save_plan,
)
from .ray_engine import RayResources, synthesise_with_ray
from .run import bind, load_generator, open_gate, prepare_folder, synthesise
from .shards import Gate

__all__ = [
    "Gate",
    "Pair",
    "Plan",
    "PlannedImage",
    "RayResources",
    "SynthesisError",
    "SynthesisSettings",
    "SyntheticSet",
    "begun_threads",
    "bind",
    "draw_examples",
    "interpolated_labels",
    "load_generator",
    "load_plan",
    "open_gate",
    "plan_interpolation",
    "plan_reconstruction",
    "prepare_folder",
    "sample_pairs",
    "save_plan",
    "synthesise",
    "synthesise_with_ray",
]
