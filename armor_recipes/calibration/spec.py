"""What this room needs of a recipe's `calibration` section; `CalibrationSpec` of the recipe room fits.

The two rooms do not import each other, so the shape is written down here as protocols.
"""

from __future__ import annotations

from typing import Protocol


class Limit(Protocol):
    """`samples: {at_most: N}`."""

    @property
    def at_most(self) -> int:
        """Take this many windows, or all there are."""


class MixPart(Protocol):
    """One dataset of a weighted mix; None means what the section around it says."""

    @property
    def dataset(self) -> str:
        """Hub id, local path or `builtin:NAME`."""

    @property
    def weight(self) -> float:
        """Share of the samples, relative to the other weights."""

    @property
    def split(self) -> str | None:
        """Split of a hub dataset."""

    @property
    def text_column(self) -> str | None:
        """Column that holds the text."""

    @property
    def messages_column(self) -> str | None:
        """Column that holds chat messages."""


class Spec(Protocol):
    """A `calibration` section, complete."""

    @property
    def dataset(self) -> str | tuple[MixPart, ...]:
        """One dataset, or a weighted mix."""

    @property
    def split(self) -> str:
        """Split of a hub dataset."""

    @property
    def text_column(self) -> str:
        """Column that holds the text."""

    @property
    def messages_column(self) -> str | None:
        """Column that holds chat messages; wins over `text_column`."""

    @property
    def samples(self) -> int | Limit:
        """Number of windows."""

    @property
    def sequence_length(self) -> int:
        """Tokens in a window."""

    @property
    def seed(self) -> int:
        """Seed of the choice of windows."""
