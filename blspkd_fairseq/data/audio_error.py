"""What is wrong with audio: an error, and the reason in a word."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Why audio cannot be used."""

    MISSING = "no clip"
    OUTSIDE = "outside the root"
    EMPTY = "zero length"
    UNREADABLE = "unreadable"
    SHORTER = "shorter than declared"
    LONGER = "longer than declared"
    HOLE = "a hole in it"
    TOO_LONG = "too long"
    NO_NUMBERS = "NaN or infinite"
    OUT_OF_RANGE = "out of range"


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file and what to do.

    Attributes:
        reason: which of the things that can be wrong.
    """

    def __init__(self, message: str, reason: Reason = Reason.UNREADABLE) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process hands it over with its reason."""
        return type(self), (str(self), self.reason)
