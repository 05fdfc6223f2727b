"""The table at the end of `gpu.py`, in Markdown."""

from __future__ import annotations

from typing import Any

from gpu_timing import SideBySide

__all__ = ["summary"]


def summary(results: dict[str, Any]) -> str:
    """What each part timed: images/s (of the small model updates/s), ratios, and shares of a product of matrices."""
    lines = [
        f"## {results['machine']['device']}, PyTorch {results['machine']['torch']}, {results['arguments']['dtype']}",
        "",
        "| part | way | per second | times the reference | of a matrix product |",
        "|---|---|---|---|---|",
    ]
    for part, found in results["parts"].items():
        for timings in (value for value in found.values() if isinstance(value, SideBySide)):
            figures = timings.figures()
            over = figures.get(f"speed_over_{timings.reference}", {})
            for way, rate in figures["images_per_s"].items():
                ratio = f"{over[way]:.2f} x" if way in over else ""
                operations = found.get("operations_per_image", {}).get(way)
                share = f"{operations * rate / found['matrix_product']:.0%}" if operations else ""
                lines.append(f"| {part} | {way} | {rate:.4g} | {ratio} | {share} |")
        if reason := found.get("error") or ("stopped_after_s" in found and "stopped: its time was over"):
            lines.append(f"| {part} | | {reason} | | |")
        if "passed" in found:
            lines.append(f"| {part} | against the CPU | {'passed' if found['passed'] else 'FAILED'} | | |")
    return "\n".join(lines) + "\n"
