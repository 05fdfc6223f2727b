"""For a script that trains to import first: what holds from its first moment on, while large libraries are imported.

A signal of a batch system leaves with a word, and a reader that goes away (`... | head -n 1`) ends no training.
Threads that wait sleep: those that spin stand still where other processes have the cores.
"""

import os

from ..training.interruption import Interruption
from .console import outlive_reader

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch reads it when it is loaded
outlive_reader()
Interruption(starting=True)
