"""Denoisers: diffusers' UNet and its transformers behind one face, a class of `Family` for each kind of model.

A new family is a module with such a class, and a place in `FAMILIES`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import Family, unwrapped
from .pixart import PixArt
from .sana import Sana
from .sd3 import SD3
from .unet import UNet

__all__ = ["FAMILIES", "Family", "family_named", "family_of", "title_of", "unwrapped"]

FAMILIES: tuple[Family, ...] = (UNet(), SD3(), PixArt(), Sana())


def family_of(model: nn.Module) -> Family:
    """The family that a model is of; a ValueError names those that there are."""
    model = unwrapped(model)
    for family in FAMILIES:
        if isinstance(model, family.kind):
            return family
    raise ValueError(_unknown(type(model).__name__))


def family_named(class_name: str) -> Family:
    """The family by the name of diffusers' class, such as a config's `_class_name`; a ValueError as `family_of`."""
    for family in FAMILIES:
        if family.kind.__name__ == class_name:
            return family
    raise ValueError(_unknown(class_name))


def title_of(model: nn.Module) -> str:
    """What messages call a model: "UNet", also one of a kind that is not a family, or "transformer"."""
    return "UNet" if "UNet" in type(unwrapped(model)).__name__ else "transformer"


def _unknown(class_name: Any) -> str:
    *first, last = (family.kind.__name__ for family in FAMILIES)
    return f"{class_name} cannot be used as a denoiser here: it must be a {', a '.join(first)} or a {last}."
