"""Run the README's Python code with the `diffusers_dino` that is installed: `python tests/run_readme.py`.

For an environment that holds a wheel and nothing else, so it needs no pytest.
"""

from __future__ import annotations

import os
from pathlib import Path

import diffusers_dino
from pages import REPOSITORY, blocks


def main() -> None:
    os.chdir(REPOSITORY)
    names = {"__name__": "__main__"}
    for block in blocks(REPOSITORY / "README.md", "python"):
        exec(compile(block.code, str(block), "exec"), names)
    print(f"The README's code runs with diffusers_dino {diffusers_dino.__version__}")
    print(Path(diffusers_dino.__file__).parent)


if __name__ == "__main__":
    main()
