"""The label-preservation report as a table: Markdown, LaTeX or CSV. Results are shown, not computed."""

from __future__ import annotations

from ...files import csv_text
from ..table_text import latex_float, latex_table, markdown_table, require_table_format
from .result import Agreement, LabelPreservationResult, Part

__all__ = ["format_preservation_table"]

_FIGURES = ["synthetic", "their sources", "difference", "shuffled labels"]
_HEADER = ["set", "ratio", "|fraction - 0.5|", "images (patients)", *_FIGURES]


def format_preservation_table(result: LabelPreservationResult, style: str = "markdown") -> str:
    """Sets, ratios and bins of the fraction as rows: AUROC of the labels that were given, and what to compare it with.

    Styles: `"markdown"` (macro, and below it each label of whole sets), `"latex"` (macro, a float with caption; needs
    booktabs), or `"csv"`, which has a line for each part and label, with all figures.
    """
    require_table_format(style)
    if style == "csv":
        places = ["name", "strategy", "ratio", "near", "far", "num_images", "num_patients"]
        names = list(Agreement.__dataclass_fields__)
        rows = [(part, figures) for part in result.parts for figures in (part.macro, *part.labels)]
        body = [[*(getattr(p, n) for n in places), *(getattr(f, n) for n in names)] for p, f in rows]
        return csv_text([*places, *names], body)
    body = [[*_names(part), *_figures(part.macro, part)] for part in result.parts]
    if style == "latex":
        tabular = latex_table(_HEADER, body, f"lll{'c' * (len(_HEADER) - 3)}")
        return latex_float(" ".join(_note(result)), tabular, "footnotesize", 2)
    labels = [[part.name, x.label, x.num_positive, *_figures(x, part)] for part in result.wholes for x in part.labels]
    parts = [markdown_table(_HEADER, body), "", *_note(result), ""]
    parts.append(markdown_table(["set", "label", "images with it", *_FIGURES], labels))
    real = [
        [x.label, "" if x.label == "macro" else x.num_positive, _bounded(x.auroc, x.low, x.high)] for x in result.real
    ]
    parts += ["", markdown_table(["held-out real images", "images with it", "AUROC"], real), ""]
    return "\n".join(parts)


def _names(part: Part) -> list[str]:
    bounds = "all" if part.near is None else f"{part.near:g} to {part.far:g}"
    if not part.ratio:
        return [part.name, "no source", bounds, str(part.num_images)]
    return [part.name, f"1:{part.ratio:g}", bounds, f"{part.num_images} ({part.num_patients})"]


def _figures(figures: Agreement, part: Part) -> list[str]:
    shuffled = "" if figures.shuffled_low is None else f"{figures.shuffled_low:.3f} to {figures.shuffled_high:.3f}"
    compared = ["no source", ""]
    if part.ratio:
        compared = [_bounded(*figures.bounded("sources")), _bounded(*figures.bounded("difference"), "+")]
    return [_bounded(*figures.bounded("synthetic")), *compared, shuffled]


def _bounded(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    if value is None:
        return "one class"
    interval = "" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{value:{sign}.3f}{interval}"


def _note(result: LabelPreservationResult) -> list[str]:
    macro = result.real[0]
    unable = (
        "They are no better than chance there, so what they say of synthetic images and of their sources says nothing."
    )
    sourceless = (
        "The images of a prior have no source: it can be measured whether they show the labels that were asked for, "
        "and how well the same classifiers tell held-out real images; not how much of a source's finding is lost. One "
        "classifier is drawn for each image, and may have been trained on images that the prior has seen. Intervals "
        "are over images."
    )
    return [
        f"Macro AUROC, over {len(result.labels)} labels ({', '.join(result.labels)}), of the labels that synthetic "
        f"images were given, by classifiers ({result.model}, seed {result.judges_seed}) trained on real images of "
        "other patients than those of their sources; 95 % bootstrap intervals over patients.",
        "Beside it the same classifiers on the real images that the labels are of, and the middle 95 % of shuffles of "
        "the labels.",
        f"The classifiers reach {_bounded(macro.auroc, macro.low, macro.high)} on held-out images of the "
        f"{result.num_real} real ones ({result.num_real_patients} patients, {result.num_folds} folds, two held out).",
        *([] if result.judges_see else [unable]),
        *([] if all(part.ratio for part in result.parts) else [sourceless]),
    ]
