"""For a script that trains to import first: what holds from its first moment on, while large libraries are imported.

A signal of a batch system leaves with a word, and a reader that goes away (`... | head -n 1`) ends no training.
"""

from ..training.interruption import Interruption
from . import libraries  # noqa: F401
from .console import outlive_reader

outlive_reader()
Interruption(starting=True)
