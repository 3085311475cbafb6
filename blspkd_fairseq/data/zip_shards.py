"""Uncompressed zip archives that grow, and that a killed run goes on with.

Members are appended to ``NAME.zip.partial``; the archive's directory comes at the end, and then the file gets its name.
Whoever writes keeps the :class:`Member` of everything appended; what lies behind the last known member is cut off.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_SHARD_BYTES = 2_000_000_000  # no zip64 below this
_MAX_MEMBERS = 65_000
_UTF8_NAMES = 0x800
_DATE_1980 = 0x21


class Member(NamedTuple):
    """A file in a shard; ``offset`` is where its bytes begin."""

    shard: int
    name: str
    offset: int
    length: int
    crc: int

    @property
    def header_offset(self) -> int:
        return self.offset - 30 - len(self.name.encode())

    @property
    def end(self) -> int:
        return self.offset + self.length


class ShardError(ValueError):
    """Shards that do not fit what is known of them; the message names the file and the remedy."""


class ShardWriter:
    """Appends files to ``<stem>-00000.zip``, ``<stem>-00001.zip``, ...

    Args:
        folder: made if it does not exist.
        stem: first part of the names.
        max_bytes: a shard that has reached this is closed (its directory not counted).
        known: members of an earlier run, in the order in which they were appended.

    Raises:
        ShardError: a file that earlier members are in is missing or too short.
    """

    def __init__(self, folder: Path, stem: str, max_bytes: int, known: Iterable[Member] = ()) -> None:
        self.folder, self.stem = folder, stem
        self.max_bytes = min(max_bytes, MAX_SHARD_BYTES)
        folder.mkdir(parents=True, exist_ok=True)
        self._members: list[Member] = []
        self._shard = 0
        self._file: BinaryIO | None = None
        for member in known:
            if member.shard != self._shard:
                self._shard, self._members = member.shard, []
            self._members.append(member)
        if self._members:
            self._continue()

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.stem}-{shard:05d}.zip"

    def append(self, name: str, data: bytes) -> Member:
        """Writes a file; it counts when the caller has kept the member.

        Raises:
            OSError: of writing; nothing of this file is kept.
        """
        end = self._members[-1].end if self._members else 0
        if self._members and (end + len(data) > self.max_bytes or len(self._members) >= _MAX_MEMBERS):
            self.finish()
            end = 0
        if self._file is None:
            self._file = open(self._partial(), "wb", buffering=0)  # noqa: SIM115, it stays open
        member = Member(self._shard, name, end + 30 + len(name.encode()), len(data), zlib.crc32(data))
        content = _local_header(member) + data
        self._file.seek(end)
        try:
            _write_all(self._file, content)
        except OSError:
            self._file.truncate(end)
            raise
        self._members.append(member)
        return member

    def finish(self) -> None:
        """Closes the current shard, if anything is in it; the next file begins another."""
        if self._file is None:
            return
        end = self._members[-1].end if self._members else 0
        directory = b"".join(map(_directory_entry, self._members))
        count = len(self._members)
        self._file.seek(end)
        _write_all(
            self._file, directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), end, 0)
        )
        self._file.truncate()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial(), self.path(self._shard))
        self._file, self._members, self._shard = None, [], self._shard + 1

    def close(self) -> None:
        """Leaves an unfinished shard for the next run."""
        if self._file is not None:
            self._file.close()

    def _partial(self) -> Path:
        path = self.path(self._shard)
        return path.with_name(path.name + ".partial")

    def _continue(self) -> None:
        final, partial, end = self.path(self._shard), self._partial(), self._members[-1].end
        if final.is_file() and final.stat().st_size > end:
            if _directory_begins(final) == end:
                self._members, self._shard = [], self._shard + 1
                return
            # Closed, but a kill came before the last of its members were kept: these are written again.
            os.replace(final, partial)
        if not partial.is_file() or partial.stat().st_size < end:
            raise ShardError(f"{final} lacks audio that was written to it: delete the whole output and start again")
        self._file = open(partial, "r+b", buffering=0)  # noqa: SIM115, it stays open
        self._file.truncate(end)


def _directory_begins(path: Path) -> int:
    """The byte at which a finished shard's directory begins, behind its last member; -1 if there is none."""
    with open(path, "rb") as file:
        file.seek(-22, os.SEEK_END)
        signature, *_, begins, _ = struct.unpack("<4s4H2IH", file.read(22))
    return int(begins) if signature == b"PK\5\6" else -1


def member_of(record: Mapping[str, Any]) -> Member:
    """The member that a record with these keys describes."""
    return Member(record["shard"], record["name"], record["offset"], record["length"], record["crc"])


def _write_all(file: BinaryIO, content: bytes) -> None:
    """An unbuffered file writes a part, and no error, when the disk fills."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _local_header(member: Member) -> bytes:
    name = member.name.encode()
    fields = (20, _UTF8_NAMES, 0, 0, _DATE_1980, member.crc, member.length, member.length, len(name), 0)
    return struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + name


def _directory_entry(member: Member) -> bytes:
    name = member.name.encode()
    head = (3 << 8 | 20, 20, _UTF8_NAMES, 0, 0, _DATE_1980, member.crc, member.length, member.length, len(name))
    tail = (0, 0, 0, 0, 0o644 << 16, member.header_offset)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *head, *tail) + name
