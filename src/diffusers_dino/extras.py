"""Optional packages, imported where they are used. If one is missing, the error names the extra to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Its dotted name, such as `"sklearn.cluster"`.
        extra: The extra of this package that installs it.
        purpose: What needs it, and its name on PyPI, such as `"k-means needs scikit-learn"`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose}: pip install diffusers-dino[{extra}]") from error
