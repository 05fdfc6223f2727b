"""Optional packages, imported where they are used. If one is missing, the error names the extra to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module by its dotted name; ImportError says what needs it (`"k-means needs scikit-learn"`)."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose}: pip install diffusers-dino[{extra}]") from error
