"""What a search for copies found, as a table and as a page."""

from __future__ import annotations

from ...report import Report
from ..table_text import with_interval
from .protocol import MemorizationResult

__all__ = ["make_report", "table_of_sets"]


def table_of_sets(result: MemorizationResult) -> tuple[list[str], list[list[object]]]:
    """Header and rows: one for the synthetic, the held-out and the training images, and for their tokens."""
    header = ["images", "N", "copies", "share [95 %]", "AuthPct [95 %]", "nearest", "median"]
    names = {"synthetic": result.synthetic, "held out (false alarms)": result.held_out, "training": result.training}
    if (tokens := result.tokens) is not None:
        names["tokens, drawn" if tokens.drawn else "tokens, synthetic"] = tokens.synthetic
        names |= {"tokens, held out (false alarms)": tokens.held_out, "tokens, training": tokens.training}
    rows = [
        [
            name,
            x.num_images,
            x.copies,
            with_interval(x.share, x.low, x.high, ".2%"),
            with_interval(x.authentic, x.authentic_low, x.authentic_high, ".1%"),
            x.nearest,
            x.median,
        ]
        for name, x in names.items()
        if x is not None
    ]
    return header, rows


def make_report(result: MemorizationResult) -> Report:
    """A page of all figures and of the closest pairs, which names images by their keys and nothing else."""
    spec, training = result.spec, result.training
    report = Report("Memorization")
    report.add_text(
        f"Each image is compared, itself and mirrored, with {training.num_images} training images by the extractor "
        f"{spec.extractor} ({spec.layer}; {spec.dim} features of {spec.input_size} px, {spec.pixel_range}; weights "
        f"{spec.weights_sha256 or 'none'}). The relative distance is that to the nearest one in units of the distance "
        f"to the nearest tenth of them. Below {result.threshold:.3f} an image counts as a copy: "
        f"of real images ({result.calibrated_on}), which are not copies, at most {result.false_alarms:.2%} do (with "
        "95 % confidence)."
    )
    report.add_text(
        "That no copy is found does not prove privacy: the search sees pictures that resemble each other as a whole. "
        "It sees neither a detail by which a person could be known, nor what can be learned from the weights."
    )
    report.add_heading("What is near")
    report.add_table(*table_of_sets(result))
    if result.held_out_in_training:
        report.add_text(
            f"{result.held_out_in_training} of the held-out images are training images, pixel by pixel. Figures of "
            "held-out images are not those of unseen ones: leave them out and search again."
        )
    report.add_text(
        "AuthPct is the share of images that are farther from their nearest training image than that is from its own "
        "nearest. Compare it with that of held-out images; it is not a verdict on an image."
    )
    if (tokens := result.tokens) is not None:
        whose = "that the prior drew" if tokens.drawn else "of the synthetic images"
        report.add_text(
            f"Rows of tokens compare the {tokens.num_tokens} x {tokens.token_dim} condition tokens {whose} with those "
            f"of training images in the same way; below {tokens.threshold:.3f} they count as copies. Tokens of a "
            "variation are meant to be near those of its source."
        )
    report.add_heading("What the search finds")
    header = [f"copies of {result.planted[0].num_images} training images that were planted", "share found"]
    report.add_table(header, [(planted.change, planted.found) for planted in result.planted])
    if result.tokens is not None:
        header = [f"copies of the tokens of {result.tokens.planted[0].num_images} training images", "share found"]
        report.add_table(header, [(planted.change, planted.found) for planted in result.tokens.planted])
    if result.closest:
        report.add_heading("Closest pairs")
        header = ["synthetic image", "training image", "relative distance", "mirrored", "copy"]
        rows = [
            (x.key, x.training_key, x.relative_distance, *("yes" if flag else "no" for flag in (x.mirrored, x.copy)))
            for x in result.closest
        ]
        report.add_table(header, rows)
    return report
