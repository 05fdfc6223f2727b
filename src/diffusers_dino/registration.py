"""Make this package known to diffusers' pipeline loader; importing the module does it.

A pipeline's `model_index.json` names the library of each component. diffusers downloads a component only if that
library is one of its `LOADABLE_CLASSES`, and records a component of any other library under its full module path.
Registered, a conditioner is `["diffusers_dino", "DinoImageConditioner"]`: loadable from the Hub, wherever the class
moves within the package.
"""

from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

__all__ = ["ModelMixin", "register"]


def register() -> None:
    """Add the package's base class to diffusers' table; doing it again changes nothing."""
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault(__name__.split(".")[0], {"ModelMixin": methods})


register()
