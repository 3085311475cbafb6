"""Loader processes that hang or die: what each was reading is kept in memory that all processes share."""

import contextlib
import os
import re
import signal
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from blspkd_fairseq.faults.errors import TrainingError

_MOST_WORKERS = 256
_TIMED_OUT = re.compile(r"DataLoader timed out after (\S+) seconds")
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_records: "weakref.WeakSet[ReadingRecord]" = weakref.WeakSet()


class Reading(NamedTuple):
    """A row that a loader process is reading. Attributes: the process, the row, and since when (monotonic seconds)."""

    pid: int
    row: int
    since: float


class ReadingRecord:
    """The row that each loader process of a data set is reading.

    Args:
        describe: names a row, for messages.
    """

    def __init__(self, describe: Callable[[int], str]) -> None:
        self.describe = describe
        # A line for each worker: process, row + 1 (0: none), since when.
        self._cells = torch.zeros(_MOST_WORKERS, 3, dtype=torch.float64).share_memory_()
        _records.add(self)

    def begin(self, row: int) -> None:
        """Called in a loader process before it reads a row; elsewhere it does nothing."""
        self._write(row + 1)

    def end(self) -> None:
        """Called in a loader process when its batch is ready."""
        self._write(0)

    def _write(self, row: int) -> None:
        worker = get_worker_info()
        if worker is not None and worker.id < _MOST_WORKERS:
            self._cells[worker.id] = torch.tensor([os.getpid(), row, time.monotonic()], dtype=torch.float64)

    def now(self) -> list[Reading]:
        """Returns the rows that are being read, that which takes longest first."""
        lines = [(int(pid), int(row) - 1, since) for pid, row, since in self._cells.tolist() if row]
        return [Reading(*line) for line in sorted(lines, key=lambda line: line[2])]


def explain(error: BaseException) -> TrainingError | None:
    """Says which row a loader process was reading when it hung or died; ends those that hang.

    Args:
        error: what training ended with.

    Returns:
        An error that names the row, or None if ``error`` is not of a loader.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and (hang := _TIMED_OUT.search(text)):
        return _explain_hang(float(hang[1]))
    if isinstance(error, RuntimeError) and (dead := _DIED.search(text)):
        return _explain_death(text, [int(number) for number in re.findall(r"\d+", dead[1])])
    if isinstance(error, (OSError, EOFError)) and _comes_from_processes(error):  # of a batch that has lost its sender
        return _explain_death(f"{type(error).__name__}: {error}", None)
    return None


def _comes_from_processes(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).parent.name == "multiprocessing" for frame in frames)


def _explain_death(text: str, dead: list[int] | None) -> TrainingError:
    """Names what was being read by the processes ``dead``, or by any."""
    reading = [(record, one) for record in list(_records) for one in record.now()]
    rows = [record.describe(one.row) for record, one in reading if dead is None or one.pid in dead]
    return TrainingError(
        f"a loader process has died while it read {' or '.join(rows) or 'no row'} "
        f"({text.strip().splitlines()[0].strip()}): if the machine has no memory left, give fewer --num-workers; "
        "--num-workers 0 reads in the main process, whose error names the cause"
    )


def _explain_hang(seconds: float) -> TrainingError:
    reading = [(record, one) for record in list(_records) for one in record.now()]
    hanging = [(record, one) for record, one in reading if time.monotonic() - one.since > seconds / 2] or reading
    for _, one in hanging:  # which would keep this process from ending
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    rows = " and ".join(record.describe(one.row) for record, one in hanging) or "no row"
    return TrainingError(
        f"the loader processes have brought no batch for {seconds:g} s, the limit of --loader-timeout: one of them "
        f"hangs while it reads {rows}; look whether that file can be read, and whether the disk or network is slow"
    )
