"""What a prior can be asked for, in words and in numbers: labels, numbers and categories of one's own table, text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..devices import send

__all__ = ["ABSENT", "PRESENT", "UNKNOWN", "Condition", "PriorConditions", "as_sets"]

PRESENT, UNKNOWN, ABSENT = 1.0, 0.0, -1.0


class Condition(NamedTuple):
    """What is known of B images; an unknown thing is different from one that is absent.

    Attributes:
        labels: `(B, L)` float32: 1 present, -1 absent, 0 unknown.
        numbers: `(B, M)` float32, standardised; NaN is unknown.
        categories: `(B, C)` int64, counted from 1; 0 is unknown.
        text: `(B, T, Dt)` tokens of a text encoder, or None.
        text_mask: `(B, T)` bool, the tokens that are there; none of them for an image without a text. None as `text`.
    """

    labels: Tensor
    numbers: Tensor
    categories: Tensor
    text: Tensor | None = None
    text_mask: Tensor | None = None

    def to(self, device: torch.device | str | None) -> Condition:
        """The same on a device, which the host does not wait for; accelerate also asks for None, to leave it."""
        return Condition(*(None if part is None else send(part, device) for part in self))

    def rows(self, numbers: Tensor | slice) -> Condition:
        """The condition of some of the images."""
        return Condition(*(None if part is None else part[numbers] for part in self))

    def drop(self, chosen: Tensor, labels: Tensor | None = None) -> Condition:
        """Everything unknown where `chosen`, `(B,)` bool; and further labels where `labels`, `(B, L)` bool."""
        chosen = chosen[:, None]
        hidden = chosen if labels is None else chosen | labels
        return Condition(
            self.labels.masked_fill(hidden, UNKNOWN),
            self.numbers.masked_fill(chosen, math.nan),
            self.categories.masked_fill(chosen, 0),
            self.text,
            None if self.text_mask is None else self.text_mask & ~chosen,
        )


@dataclass(frozen=True)
class PriorConditions:
    """The words of a prior, as its config keeps them.

    Attributes:
        labels: Names of labels, L.
        exclusive: Those of them that no other label may come with, such as "No Finding".
        numbers: Mean and standard deviation of each number of the metadata, by name, M.
        categories: Values of each category of the metadata, by name, C.
        text_dim: Width of the text encoder's tokens; None if there is no text.
    """

    labels: Sequence[str] = ()
    exclusive: Sequence[str] = ()
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    text_dim: int | None = None

    def __post_init__(self) -> None:
        for what, names in (("label", self.labels), ("metadata", [*self.numbers, *self.categories])):
            if len(set(names)) < len(names) or not all(names):
                raise ValueError(f"Each {what} needs a name of its own, got {', '.join(map(repr, names))}.")
        if strangers := set(self.exclusive) - set(self.labels):
            raise ValueError(f"Exclusive labels must be among the labels, which {sorted(strangers)[0]!r} is not.")
        for name, (mean, std) in self.numbers.items():
            if not (math.isfinite(mean) and 0 < std < math.inf):
                raise ValueError(f"{name!r} needs a finite mean and a positive standard deviation, got {mean}, {std}.")
        for name, values in self.categories.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name!r} needs different values, got {', '.join(map(repr, values)) or 'none'}.")

    def unknown(self, count: int) -> Condition:
        """Nothing is known of `count` images: the condition that guidance leads away from."""
        return Condition(
            torch.full((count, len(self.labels)), UNKNOWN),
            torch.full((count, len(self.numbers)), math.nan),
            torch.zeros(count, len(self.categories), dtype=torch.int64),
            None if self.text_dim is None else torch.zeros(count, 1, self.text_dim),
            None if self.text_dim is None else torch.zeros(count, 1, dtype=torch.bool),
        )

    def encode(
        self, present: Iterable[str] = (), absent: Iterable[str] = (), metadata: Mapping[str, Any] | None = None
    ) -> Condition:
        """The condition of one image, `B = 1`, without text. What is not named is unknown.

        Args:
            present: Labels that it has.
            absent: Labels that it has not.
            metadata: A number or a value for some of the prior's numbers and categories.

        Raises:
            ValueError: If a name or a value is not the prior's (the nearest one is named), or labels contradict.
        """
        present, absent = list(present), list(absent)
        for name in (*present, *absent):
            self._require(name, self.labels, "label")
        if both := set(present) & set(absent):
            raise ValueError(f"{sorted(both)[0]!r} cannot be present and absent at once.")
        alone = [name for name in self.labels if name in present and name in self.exclusive]
        if alone and len(set(present)) > 1:
            others = ", ".join(repr(name) for name in sorted(set(present) - {alone[0]}))
            raise ValueError(f"{alone[0]!r} comes without any other label, so it contradicts {others}.")
        condition = self.unknown(1)
        for names, value in ((present, PRESENT), (absent, ABSENT)):
            for name in names:
                condition.labels[0, list(self.labels).index(name)] = value
        for name, value in (metadata or {}).items():
            self._require(name, [*self.numbers, *self.categories], "metadata")
            if value is None:
                continue
            if name in self.numbers:
                condition.numbers[0, list(self.numbers).index(name)] = self._standardised(name, value)
            else:
                self._require(value, self.categories[name], f"value of {name!r}")
                place = list(self.categories[name]).index(value)
                condition.categories[0, list(self.categories).index(name)] = place + 1
        return condition

    def _standardised(self, name: str, value: Any) -> float:
        mean, std = self.numbers[name]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name!r} must be a finite number, got {value!r}. Leave it out where it is unknown.")
        return (number - mean) / std

    def _require(self, name: Any, known: Sequence[str], what: str) -> None:
        if name in known:
            return
        if not known:
            raise ValueError(f"This prior was trained without any {what}, so {name!r} says nothing to it.")
        lower = {each.lower(): each for each in known}
        close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.0)
        raise ValueError(
            f"{name!r} is not a {what} of this prior. The nearest one is {lower[close[0]]!r}; there are "
            f"{', '.join(map(repr, known))}."
        )


def as_sets(names: str | Sequence[Any] | None, what: str = "labels") -> list[list[str] | None] | None:
    """Labels as a user gives them: a name, the names of one image, or a list of those of each of B images.

    None stays None, also within such a list: nothing is known.

    Raises:
        ValueError: If a set is empty, which could mean "none of them" or "any".
        TypeError: If there is something else than names.
    """
    if names is None:
        return None
    if isinstance(names, str):
        return [[names]]
    if not isinstance(names, Iterable):
        raise TypeError(f"`{what}` are names, or a list of names for each image, got {names!r}.")
    sets = list(names)
    if all(isinstance(each, str) for each in sets):
        sets = [sets]
    for own in sets:
        listed = isinstance(own, Iterable) and not isinstance(own, str)
        if own is not None and not (listed and all(isinstance(name, str) for name in own)):
            raise TypeError(f"`{what}` are names, or a list of names for each image, got {names!r}.")
        if own is not None and not len(own):
            raise ValueError(
                f"An empty set in `{what}` does not say whether nothing is known or nothing is there. Leave it out, "
                "or give None, where nothing is known, and name what is not there as `absent_labels`."
            )
    return [None if own is None else list(own) for own in sets]
