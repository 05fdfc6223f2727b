"""What was read of a source, and what did not fit."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Named", "SourceReport"]

_EXAMPLES = 10


@dataclass
class Named:
    """A count, and the first few of what was counted."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more; only the first few names are kept."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(name)


@dataclass
class SourceReport:
    """What was read of a source, and what did not fit. Complete once its records have been iterated over.

    Attributes:
        records: Records that were given.
        missing: Rows whose image is not there, by the path that was expected.
        unlisted: Images that no row belongs to, by path.
        repeated: Rows of an image that had one before, by image id.
        no_patient: Images without a patient id though the source has them; each is taken as its own patient.
        left_out: Rows that the description's `where` leaves out.
        no_sidecar: Images without their JSON file.
        unjoined: Rows without a counterpart in a joined table, by their key.
        absent: Optional files that were not there.
    """

    records: int = 0
    missing: Named = field(default_factory=Named)
    unlisted: Named = field(default_factory=Named)
    repeated: Named = field(default_factory=Named)
    no_patient: Named = field(default_factory=Named)
    left_out: int = 0
    no_sidecar: Named = field(default_factory=Named)
    unjoined: Named = field(default_factory=Named)
    absent: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What did not fit, a sentence each; empty if all did."""
        sentences = {
            "rows have no image": self.missing,
            "images have no row, and were left out": self.unlisted,
            "rows repeat an image, and only its first was kept": self.repeated,
            "images have no patient id, and count as a patient each": self.no_patient,
            "images have no JSON file beside them": self.no_sidecar,
            "rows have no counterpart in a joined table": self.unjoined,
        }
        lines = [f"{n.count} {text}, such as {', '.join(n.examples[:3])}" for text, n in sentences.items() if n.count]
        return lines + [f"{name!r} is not there; what it says is unknown" for name in self.absent]
