"""Answers of fairseq's commands by row, with which a run that was cut goes on, and why others are missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blspkd_fairseq.data.record_store import RecordStore, StoreError
from blspkd_fairseq.files import write_whole
from blspkd_fairseq.generation.decoding import Hypothesis


class UnansweredError(ValueError):
    """Rows have no answer; raised when all others have theirs."""


@dataclass(frozen=True)
class Asked:
    """A row as it is answered.

    Attributes:
        id: the manifest's, or the number of a line.
        audio: what tells its audio from another at the same place (size and time of change).
        cells: further columns of the JSON lines, such as ``speaker`` and ``prompt``.
    """

    id: str
    audio: str
    cells: Mapping[str, str]

    @property
    def source(self) -> str:
        """Tells whether a row is still what was answered."""
        content = json.dumps([self.audio, sorted(self.cells.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Results:
    """Answers and failures of one command; on disk they are JSON lines if there is a ``path``.

    The file appears when the command ends, with a record for each row in order: an answer, or an ``error``. Until then,
    and as long as rows have no answer, the answers are kept in a store beside it, ``path.partial``.

    Args:
        path: of the JSON lines; None: nothing is kept.
        settings: what answers depend on besides their rows. A store of others is refused.

    Raises:
        StoreError: the store is of other settings, in use, or cannot be written.
    """

    def __init__(self, path: Path | None, settings: Callable[[], Mapping[str, Any]]) -> None:
        self.path = path
        self.failures: dict[str, str] = {}
        self._store = None if path is None else RecordStore(path.with_name(path.name + ".partial"), settings())

    @property
    def known(self) -> frozenset[str]:
        """Ids of rows that have an answer already."""
        return frozenset() if self._store is None else frozenset(self._store.ids())

    def find(self, asked: Asked) -> list[Hypothesis]:
        """The stored answers of a row, best first.

        Raises:
            StoreError: they are to something else.
        """
        assert self._store is not None
        record = self._store[asked.id]
        if record["source"] != asked.source:
            raise StoreError(
                f"row {asked.id} is not what was answered in {self._store.path} (a text, the prompt or the audio has "
                "changed): delete this file, or choose another output"
            )
        return [Hypothesis(*values) for values in record["answers"]]

    def add(self, answers: Sequence[tuple[Asked, Sequence[Hypothesis]]]) -> None:
        """Keeps the answers of a batch: all of them or, on an error, none."""
        if self._store is not None:
            self._store.add([{"id": a.id, "source": a.source, "answers": group} for a, group in answers])

    def fail(self, row_id: str, reason: str) -> None:
        """Notes why a row has no answer."""
        self.failures[row_id] = reason

    def close(self) -> None:
        """Lets another command have the store."""
        if self._store is not None:
            self._store.close()

    def finish(self, rows: Iterable[tuple[str, Mapping[str, str]]]) -> None:
        """Writes the file, with a record for each of the rows (id, cells).

        Raises:
            UnansweredError: rows have no answer; the store stays, for a run when they are mended.
        """
        lines = [self._line(*row) for row in rows]
        if self._store is not None and self.path is not None:
            write_whole(self.path, "".join(lines))
            self.close()
            if not self.failures:
                for name in (self._store.path, self._store.path.with_name(self._store.path.name + ".settings.json")):
                    name.unlink()
        if self.failures:
            raise UnansweredError(self._summary(len(lines)))

    def _line(self, row_id: str, cells: Mapping[str, str]) -> str:
        if self._store is None:
            return ""
        record: dict[str, Any] = {"id": row_id, **cells}
        if row_id in self.failures:
            record["error"] = self.failures[row_id]
        else:
            first, *others = group = [Hypothesis(*values) for values in self._store[row_id]["answers"]]
            record |= {"hypothesis": first.text, "score": first.score, "finished": first.finished}
            if others:
                record["n_best"] = [{"hypothesis": h.text, "score": h.score} for h in group]
        return json.dumps(record, ensure_ascii=False) + "\n"

    def _summary(self, count: int) -> str:
        row_id, reason = next(iter(self.failures.items()))
        where = f"{self.path} says which and why" if self.path else "the messages above say which and why"
        again = "; mend them and give the same command again, which answers only these" if self.path else ""
        return (
            f"{len(self.failures)} of {count} rows have no answer, so that there is no score ({where}; the first is "
            f"row {row_id}: {reason}){again}"
        )
