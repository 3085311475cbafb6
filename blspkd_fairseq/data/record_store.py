"""Records by id in a file that only grows: what long steps keep, so that a killed run goes on where it was.

A store is a file of JSON lines, ``PATH``, and beside it ``PATH.settings.json``: what made the records. Records made
with other settings are refused, not mixed in. A line counts when its line break is there; half a line, left by a kill
or a full disk, is cut off when the store is opened again.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from blspkd_fairseq.files import write_whole

Record = dict[str, Any]


class StoreError(ValueError):
    """A store that cannot be used; the message names the file and the remedy."""


class RecordStore:
    """The records of one step. In memory it keeps where they are, about 150 bytes a record, not what they say.

    Args:
        path: file of the records; made if it does not exist.
        settings: what makes the records (JSON values): another store at this path must have been made with the same.
        read_only: records are only read, and another process may be writing; nothing is repaired or locked.

    Raises:
        StoreError: made with other settings, in use by another process, damaged, or not writable.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], read_only: bool = False) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self._offsets: dict[str, int] = {}
        try:
            self._appended = None if read_only else _open_locked(path)
            self._reader: BinaryIO = open(path, "rb")  # noqa: SIM115  (until close)
        except OSError as error:
            raise StoreError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self._check_settings()
            self._end = self._scan()
            if self._appended:
                self._appended.truncate(self._end)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes open the store."""
        self._reader.close()
        if self._appended:
            self._appended.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, record_id: object) -> bool:
        return record_id in self._offsets

    def __getitem__(self, record_id: str) -> Record:
        self._reader.seek(self._offsets[record_id])
        record: Record = json.loads(self._reader.readline())
        return record

    def ids(self) -> Iterator[str]:
        """Ids in the order of the file."""
        return iter(self._offsets)

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records, each with a text ``id``: all of them or, on an error, none.

        Raises:
            StoreError: an id that is there already, or a file that cannot be written (disk full).
        """
        ids = [str(record["id"]) for record in records]
        repeated = [i for i in ids if i in self._offsets] or [i for i in set(ids) if ids.count(i) > 1]
        if repeated:
            raise StoreError(f"{self.path} already has a record with the id {repeated[0]!r}: give every row its own")
        lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records]
        self._append(b"".join(lines))
        for record_id, line in zip(ids, lines, strict=True):
            self._offsets[record_id] = self._end
            self._end += len(line)

    def _append(self, data: bytes) -> None:
        if self._appended is None:
            raise StoreError(f"{self.path} was opened for reading only")
        self._appended.seek(self._end)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._appended.write(rest) :]  # a full disk takes a part first
        except OSError as error:
            self._appended.truncate(self._end)
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}; what was there before is kept, so make room and "
                "start again"
            ) from error

    # ---- opening -----------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        path = self.path.with_name(self.path.name + ".settings.json")
        is_empty = self.path.stat().st_size == 0
        if self._appended and is_empty:  # nothing has been made with whatever settings there are
            write_whole(path, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")
        elif not path.exists():
            raise StoreError(f"{self.path} has no {path.name} beside it, so what made it is unknown: move it away")
        else:
            self._compare(_read_settings(path))

    def _compare(self, found: dict[str, Any]) -> None:
        names = [name for name in {**found, **self.settings} if found.get(name) != self.settings.get(name)]
        if names:
            changes = ", ".join(f"{n} was {found.get(n)!r} and is {self.settings.get(n)!r}" for n in names)
            raise StoreError(
                f"{self.path} was made with other settings ({changes}): choose another output, or delete this one"
            )

    def _scan(self) -> int:
        """Finds all records; returns the end of the last whole line."""
        end = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record_id = json.loads(line)["id"]
                    if not isinstance(record_id, str):
                        raise TypeError("the id is no text")
                except (ValueError, KeyError, TypeError) as error:
                    raise StoreError(f"{self.path} line {number} is no record: remove this line") from error
                if record_id in self._offsets:
                    raise StoreError(f"{self.path} line {number} repeats the id {record_id!r}: remove this line")
                self._offsets[record_id] = end
                end += len(line)
        return end


def _read_settings(path: Path) -> dict[str, Any]:
    """What a store was made with.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise StoreError(f"{path} is damaged, so what made the records beside it is unknown: move both away")
    return settings


def _open_locked(path: Path) -> io.FileIO:
    """Without a buffer: what an interrupted write leaves in one would be written later, behind our back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StoreError(f"another process is writing {path}: wait until it ends, or choose another output") from None
    return file
