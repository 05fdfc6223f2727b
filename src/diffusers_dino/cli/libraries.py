"""For a program to import before large libraries: what they read, or would say, as they are loaded."""

import logging
import os

# PyTorch's threads that wait sleep: those that spin stand still where other processes have the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On some processors it warns at each start that a kernel for 4 bits is missing, without which it works.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
