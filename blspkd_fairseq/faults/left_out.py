"""Rows that --skip-bad-audio leaves out: each is said once, and they have a budget."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from blspkd_fairseq.faults.errors import TrainingError
from blspkd_fairseq.faults.limits import FaultLimits

logger = logging.getLogger(__name__)

_SHOWN = 3  # rows in the message that ends a training


class LeftOut(NamedTuple):
    """A row that cannot be trained on.

    Attributes:
        manifest: the file.
        place: the row's index there.
        seconds: of its audio, as the manifest has it.
        reason: names the row and what is wrong.
    """

    manifest: str
    place: int
    seconds: float
    reason: str


class LeftOutRows:
    """All rows that were left out in this training, in whatever epoch and process."""

    def __init__(self, limits: FaultLimits) -> None:
        self.limits = limits
        self._rows: dict[tuple[str, int], LeftOut] = {}
        self._sizes: dict[str, int] = {}  # rows of each manifest

    def __len__(self) -> int:
        return len(self._rows)

    def begin_epoch(self, manifest: str, size: int) -> None:
        """Says how many rows a manifest has, of which a share may be left out."""
        self._sizes[manifest] = size

    def note(self, rows: Iterable[LeftOut]) -> None:
        """Says what was not left out before.

        Raises:
            TrainingError: too much is left out by now.
        """
        for row in rows:
            if (row.manifest, row.place) not in self._rows:
                self._rows[row.manifest, row.place] = row
                logger.warning(f"left out: {row.reason}")
        self._check()

    def end_epoch(self, epoch: int, gather: Callable[[list[LeftOut]], Iterable[LeftOut]]) -> None:
        """Sums up, over all processes.

        Args:
            epoch: its number.
            gather: what all processes left out, from what this one did.

        Raises:
            TrainingError: too much was left out.
        """
        for row in gather(list(self._rows.values())):
            self._rows.setdefault((row.manifest, row.place), row)
        if self._rows:
            hours = sum(row.seconds for row in self._rows.values()) / 3600
            logger.warning(
                f"by the end of epoch {epoch}, --skip-bad-audio has left out {len(self)} of {self._total} rows "
                f"({hours:.2f} hours); each was named above"
            )
        self._check()

    @property
    def _total(self) -> int:
        return sum(self._sizes.values())

    def _check(self) -> None:
        allowed = min(self.limits.max_bad_audio, max(1, int(self.limits.max_bad_audio_share * self._total)))
        if len(self) > allowed:
            reasons = [row.reason for row in list(self._rows.values())[:_SHOWN]]
            more = f"; and {len(self) - _SHOWN} more, named above" if len(self) > _SHOWN else ""
            raise TrainingError(
                f"--skip-bad-audio has left out {len(self)} of the {self._total} rows of {', '.join(self._sizes)}, but "
                f"at most {allowed} may be: mend or remove them, or raise --max-bad-audio (now "
                f"{self.limits.max_bad_audio}) and --max-bad-audio-share (now {self.limits.max_bad_audio_share:g}); "
                f"{'; '.join(reasons)}{more}"
            )
