"""How fast the package trains, samples and segments on one GPU, beside diffusers, in how much memory.

    python benchmarks/gpu.py --output gpu.json

Needs no network, no data and at most 8 minutes. The models have Stable Diffusion 1.5's shapes (a UNet of 860 M
weights, its VAE, a text encoder of CLIP ViT-L's for diffusers' side) and DINO ViT-B/16's. Their weights are random:
speed and memory do not depend on them. Each part gets its share of what time is left and is stopped when it is over;
what it has measured by then is kept. A part that fails is reported with its error, and the next goes on.

It ends with a table in Markdown. `--size tiny --device cpu` runs all of it in minutes; its figures mean nothing.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging

from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.devices import device_of
from gpu_bench import Bench
from gpu_models import SIZES
from gpu_parts import PARTS
from gpu_summary import summary
from gpu_timing import TimeUp, free_memory, stop_after

HERE = Path(__file__).resolve().parent

PACKAGES = ("diffusers-dino", "diffusers", "transformers", "accelerate", "bitsandbytes", "xformers")


@dataclass
class Arguments:
    output: str = flag("outputs/gpu.json", "JSON file of the figures, written anew after each part.")
    size: Literal["sd15", "tiny"] = flag("sd15", "Of the models.")
    parts: list[str] = flag(list(PARTS), "What to measure.")
    minutes: float = flag(7.5, "When to be done.")
    repeats: int = flag(5, "Timings of each, after a warm-up.")
    device: str | None = flag(None, "Where to compute; the GPU by default.")
    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "Of autocast, of frozen models, and of sampling.")
    tf32: bool = flag(True, "TF32 products, outside the check.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if unknown := set(args.parts) - set(PARTS):
        sys.exit(f"--parts are among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}.")
    if args.device is None and args.size != "tiny" and not torch.cuda.is_available():
        sys.exit("There is no GPU here. To try the script: --size tiny; to wait for a CPU: --device cpu.")
    logging.set_verbosity_error()
    end = time.monotonic() + 60 * args.minutes
    device = torch.device(device_of(0, args.device))
    dtype = getattr(torch, args.dtype)
    bench = Bench(SIZES[args.size], device, dtype, args.tf32, args.repeats)
    results: dict[str, Any] = {"arguments": asdict(args), "machine": describe_machine(device), "parts": {}}
    names = [name for name in PARTS if name in args.parts]  # in the order that they are written for
    for number, name in enumerate(names):
        shares = [PARTS[other][1] for other in names[number:]]
        seconds = max(0.0, end - time.monotonic()) * shares[0] / sum(shares)
        results["parts"][name] = run_part(name, bench, seconds)
        write(results, Path(args.output))
    print(f"{summary(results)}\nThe figures are in {args.output}")
    if failed := [name for name, part in results["parts"].items() if "error" in part or part.get("passed") is False]:
        sys.exit(f"Failed: {', '.join(failed)}.")


def run_part(name: str, bench: Bench, seconds: float) -> dict[str, Any]:
    """What a part has measured, and how it ended."""
    result: dict[str, Any] = {}
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    try:
        with stop_after(seconds):
            PARTS[name][0](bench, result)
    except TimeUp:
        result["stopped_after_s"] = round(seconds, 1)
    except Exception as error:  # a part that fails must not cost the figures of the others
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    result["wall_s"] = round(time.monotonic() - start, 1)
    free_memory(bench.device)
    print(json.dumps(result, indent=1, default=plain), flush=True)
    return result


def describe_machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": output_of("git", "-C", str(HERE), "rev-parse", "HEAD"),
        "changed_files": output_of("git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no"),
        **{package: installed(package) for package in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=plain) + "\n")


def plain(value: Any) -> Any:
    """For JSON: timings as their figures, paths as text."""
    return value.figures() if hasattr(value, "figures") else str(value)


if __name__ == "__main__":
    main()
