"""A Space of the Hugging Face Hub that serves the demo: `python app.py` is what the Hub runs.

The model is the one that the variable MODEL of the Space names (a Hub id), else the folder `model` beside this file,
else, in a clone of the repository, the bundled one.
"""

from __future__ import annotations

import os
from pathlib import Path

from diffusers_dino.demo import launch

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parent / "data"


def find(name: str, bundled: str) -> str | None:
    """What a variable of the Space names, else a folder beside this file, else what is bundled."""
    places = (path for path in (HERE / name, BUNDLED / bundled) if path.exists())
    return os.environ.get(name.upper()) or next(map(str, places), None)


def main() -> None:
    model = find("model", "showcase")
    if model is None:
        raise SystemExit(
            "There is no model: set the variable MODEL of the Space to a Hub id, or add the folder `model`."
        )
    is_bundled = Path(model) == BUNDLED / "showcase"
    launch(
        model,
        prior=find("prior", "showcase-prior") if is_bundled else os.environ.get("PRIOR"),
        examples=str(BUNDLED / "kermany") if is_bundled else os.environ.get("EXAMPLES"),
        server_name="0.0.0.0",  # the Hub's proxy is another machine
    )


if __name__ == "__main__":
    main()
