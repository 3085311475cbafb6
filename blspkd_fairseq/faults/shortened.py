"""Responses longer than --max-response-tokens, of which the rest is cut off: each is said once."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

logger = logging.getLogger(__name__)

_NAMED = 10  # the others are counted


class Shortened(NamedTuple):
    """A response that was cut. Attributes: the manifest and the row's index there, and what is said of it."""

    manifest: str
    place: int
    text: str


class ShortenedResponses:
    """All responses that were cut in this training."""

    def __init__(self) -> None:
        self._rows: set[tuple[str, int]] = set()

    def note(self, rows: Iterable[Shortened]) -> None:
        """Says what was not cut before; of many, the first."""
        for row in rows:
            if (row.manifest, row.place) not in self._rows:
                self._rows.add((row.manifest, row.place))
                if len(self._rows) <= _NAMED:
                    logger.warning(row.text)

    def end_epoch(self, epoch: int) -> None:
        """Sums up."""
        if self._rows:
            logger.warning(
                f"by the end of epoch {epoch}, --max-response-tokens has cut {len(self._rows)} responses here"
            )
