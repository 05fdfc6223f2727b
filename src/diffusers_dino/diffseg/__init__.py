"""DiffSeg (Tian et al., CVPR 2024): self-attention maps of a UNet, merged to segments; lungs named among segments.

`DiffSegPipeline` puts the steps together; these are the parts, as functions of tensors.
"""

from .attention import capture_self_attention, self_attention_layers
from .lungs import EllipsePrior, NamedSegments, lung_prior, most_agreed, name_lungs
from .merging import (
    aggregate_attention,
    anchor_divergence,
    merge_attention,
    refine_segments,
    relative_thresholds,
    suppress,
)
from .settings import DiffSegSettings, note_settings, noted_settings

__all__ = [
    "DiffSegSettings",
    "EllipsePrior",
    "NamedSegments",
    "aggregate_attention",
    "anchor_divergence",
    "capture_self_attention",
    "lung_prior",
    "merge_attention",
    "most_agreed",
    "name_lungs",
    "note_settings",
    "noted_settings",
    "refine_segments",
    "relative_thresholds",
    "self_attention_layers",
    "suppress",
]
