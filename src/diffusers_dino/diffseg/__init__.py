"""Segments without training or labels: DiffSeg (Tian et al., CVPR 2024), other ways of merging, lungs among segments.

`DiffSegPipeline` puts the steps together; these are the parts, as functions of tensors.
"""

from .attention import capture_features, capture_self_attention, self_attention_layers
from .clusters import FeatureClusters, fit_clusters
from .cuts import cut_features, feature_affinity, mean_maps, recursive_cut, walk_affinity
from .features import centered, stack_features
from .lungs import NamedSegments, lung_prior, most_agreed, name_lung_clusters, name_lungs
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
    "FeatureClusters",
    "NamedSegments",
    "aggregate_attention",
    "anchor_divergence",
    "capture_features",
    "capture_self_attention",
    "centered",
    "cut_features",
    "feature_affinity",
    "fit_clusters",
    "lung_prior",
    "mean_maps",
    "merge_attention",
    "most_agreed",
    "name_lung_clusters",
    "name_lungs",
    "note_settings",
    "noted_settings",
    "recursive_cut",
    "refine_segments",
    "relative_thresholds",
    "self_attention_layers",
    "stack_features",
    "suppress",
    "walk_affinity",
]
