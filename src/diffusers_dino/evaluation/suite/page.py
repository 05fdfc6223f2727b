"""The answers of a suite as one page with pictures."""

from __future__ import annotations

from torch import Tensor

from ...data import ImageDataset
from ...metrics.neighbours import evenly_spread
from ...report import Report
from ...sheets import contact_sheet
from ..fidelity.table import note_on_fidelity, table_of_fidelity
from ..figures import new_figure
from ..image_sets import ImageSet
from ..membership.table import note_on_membership, table_of_attacks
from ..memorization.plot import draw_closest_pairs, plot_memorization
from ..memorization.table import table_of_sets
from ..table_text import with_interval
from .protocol import SuiteResult
from .verdicts import FOUND, NOT_ASKED, PASSED, UNCLEAR

__all__ = ["make_page"]

_WORDS = {PASSED: "✓ No.", FOUND: "✗ Yes.", UNCLEAR: "? Unclear.", NOT_ASKED: "Not asked."}
_SHOWN = 8


def make_page(
    result: SuiteResult, synthetic: ImageSet, real: ImageSet, training: ImageSet | None = None, draw: bool = True
) -> Report:
    """A page of all answers and their figures.

    The sets are those of `evaluate_suite`. With `draw`, real and synthetic images are shown: leave it out where a page
    must not show patients.
    """
    page = Report("Evaluation of synthetic images")
    page.add_answers([(x.asks, _WORDS[x.verdict], x.line) for x in result.answers])
    page.add_heading("What was compared")
    header = ["images", "from", "N", "cannot be read", "patients", "labels", "of training patients, left out"]
    rows = [
        [x.name, x.place, x.num_images, x.num_unreadable, _known(x.num_patients), _known(x.num_labels), x.left_out]
        for x in result.sets
    ]
    page.add_table(header, rows)
    page.add_text(
        f"Prepared at {result.size} px; seed {result.seed}. Intervals hold 95 %, over patients where these are known."
    )
    if draw:
        shown = [_first(one.images, _SHOWN) for one in (synthetic, real)]
        page.add_image(
            contact_sheet(*map(list, zip(*shown, strict=False))), "Synthetic images above, real ones below."
        )
    if result.fidelity is not None:
        _add_fidelity(page, result)
    if result.copies is not None:
        page.add_heading("Copies")
        page.add_table(*table_of_sets(result.copies))
        page.add_figure(plot_memorization(result.copies), "Relative distance to the nearest training image.")
        if draw and training is not None and result.copies.closest:
            pairs = draw_closest_pairs(result.copies, synthetic.images, training.images)
            page.add_image(pairs, "Closest pairs, nearest first: synthetic image, and its nearest training image.")
    if result.reidentification is not None:
        _add_reidentification(page, result, synthetic, training if draw else None)
    if result.membership is not None:
        page.add_heading("Membership")
        page.add_table(*table_of_attacks(result.membership))
        page.add_text(note_on_membership(result.membership))
    if result.transfer is not None:
        _add_transfer(page, result)
    return page


def _add_fidelity(page: Report, result: SuiteResult) -> None:
    page.add_heading("Fidelity")
    page.add_table(*table_of_fidelity(result.fidelity))
    page.add_text(note_on_fidelity(result.fidelity))
    own = [row for row in (*result.fidelity.rows, *result.fidelity.by_label) if row.images == "synthetic"]
    figure = new_figure(8, 0.7 + 0.35 * len(own))
    axes = figure.subplots()
    values = [row.kernel for row in own]
    errors = [[max(0.0, x.value - x.low) for x in values], [max(0.0, x.high - x.value) for x in values]]
    places = range(len(own))
    axes.errorbar([x.value for x in values], places, xerr=errors, fmt="o", capsize=3)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set(yticks=list(places), yticklabels=[row.label or "all" for row in own], xlabel="kernel distance (KID)")
    axes.invert_yaxis()
    page.add_figure(figure, "Kernel distance of synthetic images, of all and of each label; 0: as near as real ones.")


def _add_reidentification(page: Report, result: SuiteResult, synthetic: ImageSet, training: ImageSet | None) -> None:
    found = result.reidentification
    page.add_heading("Re-identification")
    rows = [row for row in (found.real, found.synthetic, found.others) if row is not None]
    table = [[x.pairs, x.num_pairs, x.num_patients, x.auroc, x.low, x.high, x.found] for x in rows]
    page.add_table(["what", "pairs", "patients or images", "AUROC", "low", "high", "found at 1 % false alarms"], table)
    page.add_text(
        f"{found.num_folds} Siamese networks of {found.max_steps} updates, each trained without the patients that it "
        f"compares; {found.num_known} patients have two images or more."
    )
    if training is not None and found.closest:
        pairs = found.closest[:_SHOWN]
        groups = [
            [one.images.select([key])[0]["image"]]
            for pair in pairs
            for one, key in ((synthetic, pair.key), (training, pair.training_key))
        ]
        page.add_image(contact_sheet(*groups), "Highest scores: synthetic image, and the training image beside it.")


def _add_transfer(page: Report, result: SuiteResult) -> None:
    page.add_heading("Labels and utility")
    names = {"real": "real on real", "synthetic": "real on synthetic", "shuffled": "the same, labels shuffled"}
    names["student"] = "synthetic on real"
    header = ["label", "real with it", "synthetic with it", *names.values()]
    table = []
    for row in result.transfer.rows:
        figures = [getattr(row, name) for name in names]
        texts = [with_interval(x.value, x.low, x.high, ".3f") for x in figures]
        table.append([row.label, row.num_real, row.num_synthetic, *texts])
    page.add_table(header, table)
    page.add_text(
        f"AUROC of classifiers ({result.transfer.model}): trained on one kind of images and tested on the other. Real "
        "on real is the control."
    )


def _first(images: ImageDataset, count: int) -> list[Tensor]:
    return [images[place]["image"] for place in evenly_spread(len(images), count).tolist()]


def _known(number: int | None) -> object:
    return "not known" if number is None else number
