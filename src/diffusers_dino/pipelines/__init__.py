"""Pipelines: siblings on the same four components, each with the public life-cycle steps of a diffusers pipeline."""

from .pipeline_dino_diffusion import DinoDiffusionPipeline
from .pipeline_output import DinoDiffusionPipelineOutput

__all__ = ["DinoDiffusionPipeline", "DinoDiffusionPipelineOutput"]
