"""Make this package known to diffusers' pipeline loader; importing the module does it.

A pipeline's `model_index.json` names the library of each component. diffusers downloads a component only if that
library is one of its `LOADABLE_CLASSES`, and records a component of any other library under its full module path.
Registered, a conditioner is `["diffusers_dino", "DinoImageConditioner"]`: loadable from the Hub, wherever the class
moves within the package.
"""

from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

__all__ = ["ModelMixin", "register"]

_LIBRARY = __name__.split(".")[0]
_SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]


def register() -> None:
    """Add the package's base classes to diffusers' tables; doing it again changes nothing."""
    classes = {"ModelMixin": _SAVE_AND_LOAD}
    LOADABLE_CLASSES.setdefault(_LIBRARY, classes)
    for name, methods in classes.items():
        ALL_IMPORTABLE_CLASSES.setdefault(name, methods)


register()
