"""Make this package known to diffusers' pipeline loader; importing the module does it.

diffusers downloads a component only if its library in `model_index.json` is one of `LOADABLE_CLASSES`. Registered, a
conditioner is saved as `["diffusers_dino", "DinoImageConditioner"]`, wherever the class moves within the package.
"""

from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

__all__ = ["ModelMixin", "register"]


def register() -> None:
    """Add the package's base class to diffusers' table; doing it again changes nothing."""
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault(__name__.split(".")[0], {"ModelMixin": methods})


register()
