"""Data sets of synthetic images: what to generate, from which images, under which labels; and how they are made.

plan = plan_interpolation(images.keys, labels, ratio=5)
made = synthesise(plan, load_generator("my-model").to("cuda"), images, "synthetic")
"""

from .dataset import SyntheticSet, draw_examples
from .exports import XRV_PATHOLOGIES, XrvStyleDataset, as_datasets, export
from .pairs import Pair, interpolated_labels, sample_pairs, sample_places, soft_labels
from .plan import (
    Plan,
    PlannedImage,
    SynthesisError,
    SynthesisSettings,
    plan_interpolation,
    plan_prior,
    plan_reconstruction,
)
from .plan_file import begun_threads, load_plan, save_plan
from .ray_engine import RayResources, synthesise_with_ray
from .run import bind, compile_generator, load_generator, only_run, open_gate, prepare_folder, synthesise
from .shards import Gate
from .tokens import PriorTokens

__all__ = [
    "XRV_PATHOLOGIES",
    "Gate",
    "Pair",
    "Plan",
    "PlannedImage",
    "PriorTokens",
    "RayResources",
    "SynthesisError",
    "SynthesisSettings",
    "SyntheticSet",
    "XrvStyleDataset",
    "as_datasets",
    "begun_threads",
    "bind",
    "compile_generator",
    "draw_examples",
    "export",
    "interpolated_labels",
    "load_generator",
    "load_plan",
    "only_run",
    "open_gate",
    "plan_interpolation",
    "plan_prior",
    "plan_reconstruction",
    "prepare_folder",
    "sample_pairs",
    "sample_places",
    "save_plan",
    "soft_labels",
    "synthesise",
    "synthesise_with_ray",
]
