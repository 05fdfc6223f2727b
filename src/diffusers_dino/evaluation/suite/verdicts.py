"""A word and a line for each question, from the results of its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...metrics.copy_gate import SPOILED
from ..fidelity.result import FidelityResult
from ..membership.protocol import MembershipResult
from ..memorization.protocol import MemorizationResult
from ..reidentification.protocol import ReidentificationResult
from ..table_text import with_interval
from ..transfer.protocol import TransferResult

__all__ = ["FOUND", "NOT_ASKED", "PASSED", "UNCLEAR", "Answer", "Figure", "answers_of"]

PASSED, FOUND, UNCLEAR, NOT_ASKED = "passed", "found", "unclear", "not asked"


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval, what it is compared with, and of how many images or pairs it is."""

    name: str
    value: float
    low: float
    high: float
    control: str
    number: str


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        question: `fidelity`, `copies`, `reidentification`, `membership`, `labels` or `utility`.
        asks: The question in words.
        verdict: `passed`, `found` (the fault that the question asks for), `unclear` where the control fails, or `not
            asked`.
        line: A sentence with the figure, its interval and N; or why it was not asked, and what to give.
        figures: For tables.
    """

    question: str
    asks: str
    verdict: str
    line: str
    figures: tuple[Figure, ...] = ()


_ASKS = {
    "fidelity": "Can synthetic images be told from real ones?",
    "copies": "Are synthetic images copies of training images?",
    "reidentification": "Can the patient of a synthetic image be told?",
    "membership": "Does the model tell which images it was trained on?",
    "labels": "Are labels harder to see than in real images?",
    "utility": "Do synthetic images train a worse classifier than real ones?",
}


def answers_of(
    fidelity: FidelityResult | None,
    copies: MemorizationResult | None,
    reidentification: ReidentificationResult | None,
    membership: MembershipResult | None,
    transfer: TransferResult | None,
    reasons: Mapping[str, str],
) -> tuple[Answer, ...]:
    """An answer to each question, from what its protocol found, or from the reason why it was not asked."""
    found = {
        "fidelity": fidelity and _fidelity(fidelity),
        "copies": copies and _copies(copies),
        "reidentification": reidentification and _reidentification(reidentification),
        "membership": membership and _membership(membership),
        "labels": transfer and _labels(transfer),
        "utility": transfer and _utility(transfer),
    }
    return tuple(
        Answer(question, _ASKS[question], *(answer or (NOT_ASKED, reasons.get(question, reasons.get("transfer", "")))))
        for question, answer in found.items()
    )


_Found = tuple[str, str, tuple[Figure, ...]]


def _fidelity(result: FidelityResult) -> _Found:
    row, control = result.row("synthetic"), result.row("training")
    reached = 0.0 if control is None else max(0.0, control.kernel.high)
    number = f"{row.num_images} against {row.num_reference}"
    line = f"Kernel distance {_bounded(row.kernel)} of {number} real images ({row.features.extractor})"
    line += f", Fréchet distance {_bounded(row.frechet)}"
    line += "." if control is None else f"; real images of the training set reach {_bounded(control.kernel)}."
    names = {"kernel distance (KID)": "kernel", "Fréchet distance": "frechet"}
    names |= {name: name for name in ("precision", "recall", "density", "coverage")}
    figures = []
    for label, field in names.items():
        estimate = getattr(row, field)
        other = "" if control is None else f"real, N = {control.num_images}: {_bounded(getattr(control, field))}"
        figures.append(Figure(label, estimate.value, estimate.low, estimate.high, other, number))
    return (PASSED if row.kernel.low <= reached else FOUND), line, tuple(figures)


def _copies(result: MemorizationResult) -> _Found:
    one, real = result.synthetic, result.held_out
    certain = sum(pair.relative_distance < SPOILED * result.training.median for pair in result.closest)
    is_found = one.low > result.false_alarms or certain > 0
    share = with_interval(one.share, one.low, one.high, ".1%")
    line = (
        f"{one.copies} of {one.num_images} images are near-copies, {share}; so are {real.share:.1%} of "
        f"{real.num_images} real images that were not trained on."
    )
    if certain:
        line += f" At least {certain} are nearer than real images of two people are."
    number = f"{one.num_images} against {result.training.num_images}"
    figures = (
        Figure("near-copies", one.share, one.low, one.high, f"real: {real.share:.3f}", number),
        Figure("AuthPct", one.authentic, one.authentic_low, one.authentic_high, f"real: {real.authentic:.3f}", number),
    )
    return (FOUND if is_found else PASSED), line, figures


def _reidentification(result: ReidentificationResult) -> _Found:
    pairs, real = result.synthetic, result.real
    line = (
        f"AUROC {_bounded(pairs, 'auroc')} of {pairs.num_pairs} pairs ({pairs.pairs}) against "
        f"{'unseen real people' if result.stands_in else 'strangers'}; real pairs of one patient reach "
        f"{_bounded(real, 'auroc')}. {pairs.found:.0%} are found at 1 % false alarms."
    )
    if result.stands_in:
        line += " Sources are not known: the nearest training image stands in."
    control = f"real pairs: {_bounded(real, 'auroc')}"
    rows = [row for row in (pairs, result.others) if row is not None]
    figures = tuple(
        Figure(f"AUROC, {row.pairs}", row.auroc, row.low, row.high, control, f"{row.num_pairs} pairs") for row in rows
    )
    if not result.knows_patients:
        return UNCLEAR, f"The networks do not tell real patients apart, so nothing follows. {line}", figures
    return (FOUND if result.reidentifies else PASSED), line, figures


def _membership(result: MembershipResult) -> _Found:
    attack = result.combined
    number = f"{result.num_training} and {result.num_held_out}"
    blind = with_interval(result.blind, result.blind_low, result.blind_high, ".3f")
    line = (
        f"AUROC {_bounded(attack, 'auroc')} of {result.num_training} training against {result.num_held_out} held-out "
        f"images; a blind guess reaches {blind}. {attack.found:.0%} are found at 1 % false alarms."
    )
    figures = (Figure("AUROC, denoising error", attack.auroc, attack.low, attack.high, f"blind: {blind}", number),)
    if result.leaks:
        return FOUND, line, figures
    if not result.is_comparable:
        return UNCLEAR, f"The sets differ by themselves, so nothing follows. {line}", figures
    return PASSED, line, figures


def _labels(result: TransferResult) -> _Found:
    macro = result.macro
    line = (
        f"AUROC {_bounded(macro.synthetic)} of {len(result.rows) - 1} labels of {result.num_synthetic} synthetic "
        f"images, {_bounded(macro.real)} of {result.num_real} real ones; shuffled labels reach up to "
        f"{macro.shuffled.high:.3f}."
    )
    if result.left_out:
        line += f" Left out: {', '.join(result.left_out)}."
    figures = _by_label(result, "synthetic")
    if not result.judges_see:
        return UNCLEAR, f"Classifiers do not see the labels of real images, so nothing follows. {line}", figures
    return (PASSED if result.labels_agree else FOUND), line, figures


def _utility(result: TransferResult) -> _Found:
    macro = result.macro
    line = (
        f"AUROC {_bounded(macro.student)} on {result.num_real} real images after training on {result.num_synthetic} "
        f"synthetic ones, {_bounded(macro.real)} after training on half of the real ones; difference "
        f"{_bounded(macro.utility)}."
    )
    figures = _by_label(result, "student")
    if not result.judges_see:
        return UNCLEAR, f"Classifiers of real images learn nothing either, so nothing follows. {line}", figures
    return (PASSED if result.is_useful else FOUND), line, figures


def _by_label(result: TransferResult, trained_or_tested: str) -> tuple[Figure, ...]:
    """The AUROC of each label where one kind of images is synthetic, beside that of real images only."""
    number, figures = f"{result.num_synthetic} and {result.num_real}", []
    for row in result.rows:
        auroc = getattr(row, trained_or_tested)
        real = f"real: {_bounded(row.real)}"
        figures.append(Figure(f"AUROC, {row.label}", auroc.value, auroc.low, auroc.high, real, number))
    return tuple(figures)


def _bounded(figure: object, value: str = "value") -> str:
    return with_interval(getattr(figure, value), figure.low, figure.high)
