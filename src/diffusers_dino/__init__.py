"""Latent diffusion models of medical images, trained without annotations: a plugin for Hugging Face diffusers.

Public names are imported when they are first used, so that `import diffusers_dino` costs no more than
`import diffusers`; using any of them registers this package with diffusers' pipeline loader (`registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ELSEWHERE = {  # than in `pipelines`
    "DinoImageConditioner": ".conditioner",
    "DinoPrior": ".prior",
    # diffusers' loader looks for the base class of a component in the library that the component is from
    "ModelMixin": ".registration",
    "TokenFusion": ".fusion",
}

__all__ = [
    "DiffSegPipeline",
    "DiffSegPipelineOutput",
    "DinoDiffusionPipeline",
    "DinoDiffusionPipelineOutput",
    "DinoImageConditioner",
    "DinoInterpolationPipeline",
    "DinoInterpolationPipelineOutput",
    "DinoPrior",
    "DinoPriorPipeline",
    "DinoPriorPipelineOutput",
    "ModelMixin",
    "TokenFusion",
    "__version__",
]

if TYPE_CHECKING:
    from .conditioner import DinoImageConditioner
    from .fusion import TokenFusion
    from .pipelines import (
        DiffSegPipeline,
        DiffSegPipelineOutput,
        DinoDiffusionPipeline,
        DinoDiffusionPipelineOutput,
        DinoInterpolationPipeline,
        DinoInterpolationPipelineOutput,
        DinoPriorPipeline,
        DinoPriorPipelineOutput,
    )
    from .prior import DinoPrior
    from .registration import ModelMixin


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".registration", __name__)
    value = getattr(import_module(_ELSEWHERE.get(name, ".pipelines"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
