"""What the attack found, as a table: Markdown, LaTeX or CSV."""

from __future__ import annotations

from ...files import csv_text
from ..table_text import noted_table, require_table_format
from .protocol import AttackFigures, MembershipResult

__all__ = ["format_membership_table", "note_on_membership", "table_of_attacks"]


def format_membership_table(result: MembershipResult, style: str = "markdown") -> str:
    """The attack at each timestep, by all of them, and the blind guess that it must beat.

    `style` is `"markdown"`, `"latex"` or `"csv"`.
    """
    require_table_format(style)
    if style == "csv":
        body = [[_name(x), x.auroc, x.low, x.high, x.found] for x in (*result.attacks, result.combined)]
        body.append(["blind guess", result.blind, result.blind_low, result.blind_high, ""])
        return csv_text(["timestep", "auroc", "low", "high", "found"], body)
    return noted_table(style, *table_of_attacks(result), note_on_membership(result))


def table_of_attacks(result: MembershipResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one for each timestep, for all of them, and for the blind guess."""
    attacks = (*result.attacks, result.combined)
    body = [[_name(x), f"{x.auroc:.3f}", f"[{x.low:.3f}, {x.high:.3f}]", f"{x.found:.1%}"] for x in attacks]
    body.append(["blind guess", f"{result.blind:.3f}", f"[{result.blind_low:.3f}, {result.blind_high:.3f}]", ""])
    return ["timestep", "AUROC", "95 %", "found at 1 % false alarms"], body


def note_on_membership(result: MembershipResult) -> str:
    """Numbers of images and draws, and whether the sets can be compared."""
    unit = "patients" if result.by_patient else "images"
    note = (
        f"{result.num_training} training and {result.num_held_out} held-out images, {result.num_noises} draws of "
        f"noise at each timestep, seed {result.seed}; intervals over {unit}, {result.repeats} draws."
    )
    if not result.is_comparable:
        note += " The blind guess tells the sets apart: they differ by themselves, whatever the model knows."
    return note


def _name(attack: AttackFigures) -> str:
    return "all" if attack.timestep is None else str(attack.timestep)
