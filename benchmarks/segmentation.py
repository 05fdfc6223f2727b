"""DiffSeg: how fast maps are captured, aggregated and merged, in how much memory, and how exact the masks are.

    python benchmarks/segmentation.py --output outputs/diffseg.json

Beside the published code, in the same run on the same maps (a checkout of github.com/google/diffseg, and a Python of
its own, made with `python -m venv tf && tf/bin/pip install tensorflow-cpu scikit-learn`; not a dependency of this
package):

    python benchmarks/segmentation.py --reference ../diffseg --reference_python tf/bin/python

Capture is measured on a UNet of Stable Diffusion 1.5's architecture with random weights (860 M parameters, 3.4 GB).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import HfArgumentParser

import published_diffseg as published
from diffusers_dino.diffseg.attention import capture_self_attention
from diffusers_dino.diffseg.merging import (
    aggregate_attention,
    anchor_divergence,
    merge_attention,
    refine_segments,
    suppress,
)
from resident import peak, start_peak

WORKER = Path(__file__).with_name("run_published_diffseg.py")
STRUCTURED = {"flat": {"contrast": 2.0}, "medium": {"contrast": 5.0}, "peaked": {"contrast": 10.0, "locality": 4.0}}


@dataclass
class Arguments:
    parts: list[str] = field(
        default_factory=lambda: ["aggregation", "merge", "exactness"], metadata={"help": "Which of the three to run."}
    )
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch and of TensorFlow."})
    repeats: int = field(default=5, metadata={"help": "The median of so many runs is reported."})
    thresholds: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9], metadata={"help": "Of the table of exactness."}
    )
    merge_threshold: float = field(default=0.5, metadata={"help": "At which merging is timed."})
    reference: Path | None = field(default=None, metadata={"help": "Checkout of the published code."})
    reference_python: Path = field(default=Path(sys.executable), metadata={"help": "A Python with TensorFlow."})
    reference_float64: bool = field(default=False, metadata={"help": "Also run the published code in float64."})
    output: Path | None = field(default=None, metadata={"help": "Write the results here as JSON, too."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(args.threads)
    measures = {"aggregation": aggregation, "merge": merging, "exactness": exactness}
    unknown = set(args.parts) - set(measures)
    if unknown:
        raise SystemExit(f"--parts are among {', '.join(measures)}, got {', '.join(sorted(unknown))}.")
    results = {"threads": args.threads} | {name: measures[name](args) for name in args.parts}
    print(json.dumps(results, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


@torch.no_grad()
def aggregation(args: Arguments) -> dict[str, Any]:
    """One 512 px pass of a UNet of Stable Diffusion 1.5's shape."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    inputs = (torch.randn(1, 4, 64, 64), 300, torch.randn(1, 77, 768))
    unet(*inputs)  # warm-up
    start = start_peak()
    alone_seconds, _ = timed(lambda: unet(*inputs), args.repeats)
    alone = (peak() - start) / 1e3

    def captured() -> dict[int, Tensor]:
        with capture_self_attention(unet) as maps:
            unet(*inputs)
        return maps

    start = start_peak()
    captured_seconds, maps = timed(captured, args.repeats)
    aggregation_seconds, _ = timed(lambda: aggregate_attention(maps), args.repeats)
    return {
        "sides": sorted(maps),
        "pass_s": alone_seconds,
        "pass_with_capture_s": captured_seconds,
        "aggregation_s": aggregation_seconds,
        "peak_gb_above_model_pass_alone": alone,
        "peak_gb_above_model_with_capture_and_aggregation": (peak() - start) / 1e3,
    }


def merging(args: Arguments) -> dict[str, Any]:
    """4096 maps, 16 x 16 anchors, 3 passes; a ratio to the published code where it is given."""
    results = {}
    for name, options in STRUCTURED.items():
        maps = aggregate_attention(published.structured_attention(**options))
        seconds, merged = timed(lambda: merge_attention(maps, [args.merge_threshold] * 3), args.repeats)  # noqa: B023
        results[name] = {"merge_s": seconds, "segments": len(merged)}
        if args.reference is None:
            continue
        for dtype in ["float16", "float64"][: 1 + args.reference_float64]:
            theirs = run_published(args, maps, dtype)
            results[name][f"published_{dtype}"] = {
                "merge_s": theirs["seconds"],
                "ratio": theirs["seconds"] / seconds,
                **agreement(merged, theirs["merged"]),
            }
    if args.reference is None:
        results["published"] = "skipped: give --reference and --reference_python"
    return results


def run_published(args: Arguments, maps: Tensor, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        saved, out = Path(folder, "maps.npy"), Path(folder, "out.npz")
        np.save(saved, maps.numpy())
        command = [args.reference_python, WORKER, saved, out, "--dtype", dtype]
        command += ["--thresholds", args.merge_threshold, "--threads", args.threads]
        environment = {**os.environ, "PYTHONPATH": str(args.reference)}
        done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"The published code failed; does its Python have TensorFlow?\n{done.stderr[-2000:]}")
        loaded, suffix = np.load(out), args.merge_threshold
        return {
            "seconds": float(loaded[f"seconds_{suffix}"]),
            "merged": torch.from_numpy(loaded[f"merged_{suffix}"]),
        }


def exactness(args: Arguments) -> list[dict[str, Any]]:
    """Masks of 512 px against the published algorithm in float64, from the same attention at sides 64 to 8."""
    rows = []
    for name, attention in sources():
        exact, maps = published.published_aggregate(attention), aggregate_attention(attention)
        flat = exact.flatten(1)
        exact_divergence = published.published_divergences(flat[published.published_anchors(64, 16)], flat)
        divergence = anchor_divergence(maps)
        for threshold in args.thresholds:
            expected = published.published_merge(exact, [threshold] * 3, divergences=exact_divergence)
            merged = merge_attention(maps, [threshold] * 3, divergence=divergence)
            rows.append({"maps": name, "threshold": threshold, "refined": False, **agreement(merged, expected)})
            expected, merged = published.published_refine(exact, expected), refine_segments(maps, merged)
            rows.append({"maps": name, "threshold": threshold, "refined": True, **agreement(merged, expected)})
            print(*rows[-2:], sep="\n", file=sys.stderr)
    return rows


def sources() -> Iterator[tuple[str, dict[int, Tensor]]]:
    """Structured attention of three contrasts, and that of a UNet with random weights, as they are and sharpened."""
    for name, options in STRUCTURED.items():
        yield name, published.structured_attention(**options)
    for name, sharpness in {"random UNet": 1.0, "random UNet, sharpened": 6.0}.items():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(32, 64, 128, 128), cross_attention_dim=32, attention_head_dim=8
        )
        for parameter_name, parameter in unet.named_parameters():
            if "attn1.to_q" in parameter_name or "attn1.to_k" in parameter_name:
                parameter.data *= sharpness
        with torch.no_grad(), capture_self_attention(unet) as maps:
            unet(torch.randn(1, 4, 64, 64), 300, torch.randn(1, 7, 32))
        yield name, maps


def agreement(merged: Tensor, expected: Tensor) -> dict[str, Any]:
    """How many segments each has, and the share of 512 x 512 pixels that are alike; float16 may leave no segment."""
    same = 0.0
    if len(expected):
        same = (suppress(merged, 512) == published.published_mask(expected, 512)).double().mean().item()
    return {"segments": len(merged), "segments_published": len(expected), "same_pixels": same}


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


if __name__ == "__main__":
    main()
