"""Pipelines: siblings on the same components, each with the public life-cycle steps of a diffusers pipeline."""

from .caching import deep_cache
from .compilation import compile_pipeline
from .pipeline_diffseg import DiffSegPipeline
from .pipeline_dino_diffusion import DinoDiffusionPipeline
from .pipeline_dino_interpolation import DinoInterpolationPipeline
from .pipeline_dino_prior import DinoPriorPipeline
from .pipeline_output import (
    DiffSegPipelineOutput,
    DinoDiffusionPipelineOutput,
    DinoInterpolationPipelineOutput,
    DinoPriorPipelineOutput,
)

__all__ = [
    "DiffSegPipeline",
    "DiffSegPipelineOutput",
    "DinoDiffusionPipeline",
    "DinoDiffusionPipelineOutput",
    "DinoInterpolationPipeline",
    "DinoInterpolationPipelineOutput",
    "DinoPriorPipeline",
    "DinoPriorPipelineOutput",
    "compile_pipeline",
    "deep_cache",
]
