"""Files that are there whole or not at all."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
_LONGEST_NAME = 255  # bytes, on the usual file systems


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the end; on an error ``path`` stays as it was.

    It is beside ``path``, so that no disk is in between, and of this thread alone: a worker of a killed run may still
    be at the same file.

    Args:
        path: of the file.
        durable: wait until it is on the disk, so that it is whole after a loss of power, too (10 ms, and more on a
            busy disk).
    """
    ending = f".{os.getpid()}-{threading.get_native_id()}{PARTIAL}"
    name = os.fsencode(path.name)[: _LONGEST_NAME - len(ending) - 1]
    partial = path.with_name(f".{os.fsdecode(name)}{ending}")
    try:
        yield partial
        if durable:
            _sync(partial)
        os.replace(partial, path)
        if durable:
            with contextlib.suppress(OSError):  # some network disks cannot do that with a folder
                _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            partial.unlink()


def write_whole(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Writes ``content`` (text as UTF-8) to ``path``."""
    with whole_file(path, durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
