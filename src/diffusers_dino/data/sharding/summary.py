"""The page that shows what a folder of shards holds: counts, damage, duplicates, pictures, sources."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...report import Report
from ...sheets import contact_sheet
from ..splits import SPLITS
from .parts import Sample, Unreadable, read_contents
from .plan import ShardPlan

__all__ = ["write_summary"]

_EXAMPLES = 8
_CELL = 128


def write_summary(
    path: Path,
    lineage: dict[str, Any],
    plan: ShardPlan,
    samples: Sequence[Sample],
    unreadable: Sequence[Unreadable],
    parts: Path,
) -> None:
    """Write the page. It holds no id, name or header of an original."""
    split_of = plan.split_of()
    report = Report("Shards")
    report.add_text(f"{len(split_of)} samples in {len(plan.shards)} shards, by diffusers-dino {lineage['version']}.")
    _add_sources(report, lineage, _count(split_of, samples, lambda sample: [sample.source]))
    report.add_heading("Examples")
    for source in lineage["sources"]:
        _add_examples(
            report, source["name"], [n for n in split_of if samples[n].source == source["name"]], samples, parts
        )
    report.add_heading("Contents")
    contents: dict[str, Callable[[Sample], Iterable[str]]] = {
        "label": lambda sample: ["(unlabelled)"] if sample.labels is None else sample.labels or ["(no finding)"],
        "view": lambda sample: [sample.view or "(unknown)"],
        "modality": lambda sample: [sample.modality or "(unknown)"],
    }
    for title, values in contents.items():
        counts = _count(split_of, samples, values)
        rows = [[value, *(count[split] for split in SPLITS), count.total()] for value, count in counts.items()]
        report.add_table([title, *SPLITS, "all"], rows)
    _add_sizes(report, [samples[number].size for number in split_of])
    _add_duplicates(report, lineage, len(samples))
    report.add_heading("Images that cannot be read")
    reasons = Counter((one.source, one.reason) for one in unreadable)
    rows = [[*key, count] for key, count in sorted(reasons.items())]
    report.add_table(["source", "reason", "images"], rows or [["none", "", 0]])
    report.add_heading("Configuration")
    report.add_table(["", ""], list(lineage["configuration"].items()))
    report.save(path)


def _count(
    split_of: dict[int, str], samples: Sequence[Sample], values: Callable[[Sample], Iterable[str]]
) -> dict[str, Counter[str]]:
    """For each value how many samples of each split have it, the most frequent first."""
    counts: dict[str, Counter[str]] = {}
    for number, split in split_of.items():
        for value in values(samples[number]):
            counts.setdefault(value, Counter())[split] += 1
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1].total(), entry[0])))


def _add_sources(report: Report, lineage: dict[str, Any], counts: dict[str, Counter[str]]) -> None:
    rows = []
    for source in lineage["sources"]:
        count = counts.get(source["name"], Counter())
        left_out = source["unreadable"], source["copies_left_out"]
        rows.append([source["name"], source["images"], *left_out, *(count[split] for split in SPLITS)])
    report.add_heading("Sources")
    report.add_table(["source", "images", "unreadable", "copies left out", *SPLITS], rows)
    for source in lineage["sources"]:
        licence = source["licence"] and f"Licence: {source['licence']}"
        contains = source["contains"] and f"Holds images of {', '.join(source['contains'])}"
        facts = filter(None, [source["title"], licence, source["citation"], source["url"], contains])
        report.add_text(f"{source['name']}: {'. '.join(facts)}.")
    for overlap in lineage["overlaps"]:
        report.add_text(f"{overlap}.")


def _add_examples(report: Report, name: str, numbers: Sequence[int], samples: Sequence[Sample], parts: Path) -> None:
    chosen = list(numbers[:_EXAMPLES])
    if chosen:
        cells = [_picture(samples[number], parts) for number in chosen]
        cells += [Image.new("RGB", (_CELL, _CELL), "white")] * (_EXAMPLES - len(cells))
        sheet = contact_sheet(cells[:1], cells[1:], size=(_CELL, _CELL))
        report.add_image(sheet, f"{name}: the first {len(chosen)} of {len(numbers)}")


def _picture(sample: Sample, parts: Path) -> Image.Image:
    contents = read_contents(sample, parts)
    image = next(content for extension, content in contents.items() if extension != "mask.png")
    return Image.open(io.BytesIO(image)).convert("RGB").resize((_CELL, _CELL), Image.Resampling.LANCZOS)


def _add_sizes(report: Report, sizes: Sequence[tuple[int, int]]) -> None:
    if sizes:
        at = [0, 5, 50, 95, 100]
        rows = zip(("height", "width"), np.percentile(np.asarray(sizes), at, axis=0).T, strict=True)
        header = ["pixels of the originals", "least", "5 %", "median", "95 %", "most"]
        report.add_table(header, [[side, *(f"{value:.0f}" for value in values)] for side, values in rows])


def _add_duplicates(report: Report, lineage: dict[str, Any], count: int) -> None:
    report.add_heading("Duplicates")
    report.add_table(["kind", "source", "and source", "pairs"], lineage["duplicates"] or [["none", "", "", 0]])
    largest = lineage["largest_group"]
    text = f"The largest group of one patient, or of patients who share a picture, has {largest} of {count} images."
    if largest > 100 and largest > 0.05 * count:
        text += " That is much: are patient ids missing, or are many images alike?"
    report.add_text(text)
