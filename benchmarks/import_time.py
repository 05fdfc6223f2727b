"""How long this package takes to import, beside what of diffusers one would import in its place.

    python benchmarks/import_time.py --output outputs/import_time.json

Each import runs in an interpreter of its own, ours and diffusers' in turn; the ratio is the median of those of
neighbours in time, and must be at most 1.15.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_dino.cli.arguments import flag, parse_arguments

BAR = 1.15
PAIRS = {  # ours, and diffusers'
    "package": ("import diffusers_dino", "import diffusers"),
    "pipeline": (
        "from diffusers_dino import DinoDiffusionPipeline",
        "from diffusers import StableDiffusionPipeline",
    ),
    "all pipelines": (
        "from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline",
        "from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableUnCLIPPipeline",
    ),
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


@dataclass
class Arguments:
    repeats: int = flag(11, "Timings of each import, after one that fills the file cache.")
    output: str | None = flag(None, "JSON file of the figures.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    figures = {name: compare(*pair, args.repeats) for name, pair in PAIRS.items()}
    print(json.dumps(figures, indent=1))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")
    if slow := [name for name, found in figures.items() if found["ratio"] > BAR]:
        sys.exit(f"Importing takes more than {BAR} of diffusers' time: {', '.join(slow)}.")


def compare(ours: str, theirs: str, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for number in range(repeats + 1):
        for name, statement in (("ours", ours), ("diffusers", theirs)):
            taken = seconds_of(statement)
            if number:
                seconds[name].append(taken)
    ratios = [o / t for o, t in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    return {
        "statements": [ours, theirs],
        "ratio": round(statistics.median(ratios), 3),
        "median_s": {name: round(statistics.median(taken), 3) for name, taken in seconds.items()},
        "seconds": {name: [round(value, 3) for value in taken] for name, taken in seconds.items()},
    }


def seconds_of(statement: str) -> float:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TIMED.format(statement)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
