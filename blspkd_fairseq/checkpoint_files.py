"""Checkpoint files: written whole, checked when they are read, and found again when the last one is damaged.

A checkpoint is a zip archive, in which torch stores a CRC-32 of every record and never compares it: a flipped bit loads
as another weight. Here it is compared, also in files of earlier releases and in copies.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blspkd_fairseq.files import PARTIAL, whole_file

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"
# What fairseq names the checkpoints of a training.
_NAMES = re.compile(r"checkpoint(\d+|_\d+_\d+|_best|_last|\.best_.+)\.pt")
_PROBE_BYTES = 1 << 16


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message is one sentence."""


class DamagedCheckpointError(CheckpointError):
    """What a file holds is not what was written to it."""


class Progress(NamedTuple):
    """Where a training was when it wrote a checkpoint."""

    path: Path
    updates: int


# ---- writing -------------------------------------------------------------------------------------------------------


def write_checkpoint(state: Any, path: Path) -> None:
    """Writes a checkpoint as `torch.save` does; the file that was there stays until the new one is on the disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    import torch

    try:
        with whole_file(path) as partial, open(partial, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer hides the one behind the other
        raise _not_written(path, error) from error


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies the bytes: a hard link would share the damage.

    Raises:
        CheckpointError: it cannot be written.
    """
    import shutil

    try:
        with whole_file(target) as partial:
            shutil.copyfile(source, partial)
    except OSError as error:
        raise _not_written(target, error) from error


def prepare_folder(folder: Path) -> None:
    """Makes a folder for checkpoints, tries to write in it, and removes what killed trainings left half-written.

    Raises:
        CheckpointError: nothing can be written there.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*.pt.*{PARTIAL}"):
            left.unlink(missing_ok=True)
        with whole_file(probe) as partial:
            partial.write_bytes(bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint can be written to {folder} ({_reason(error)}): give --save-dir a folder that can be written"
        ) from error


def _not_written(path: Path, error: Exception) -> CheckpointError:
    causes = (one for one in (error, error.__cause__, error.__context__) if isinstance(one, OSError))
    return CheckpointError(
        f"{path} could not be written ({_reason(next(causes, error))}): the checkpoints that were there are as they "
        "were; when there is room to write again, the same command goes on from the last of them"
    )


# ---- reading -------------------------------------------------------------------------------------------------------


def check_whole(path: Path) -> None:
    """Compares the records of a checkpoint with their checksums.

    Raises:
        DamagedCheckpointError: its content is not what was written.
        CheckpointError: there is no file, or it cannot be opened.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise CheckpointError(f"no checkpoint at {path} ({_reason(error)})") from error
    except Exception as error:  # of zipfile, which says the same in a dozen ways
        raise DamagedCheckpointError(f"{path} is damaged: it is cut, overwritten or no checkpoint") from error
    if wrong is not None:
        raise DamagedCheckpointError(f"{path} is damaged: the content of {wrong} is not what was written")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, running no code of it.

    Raises:
        DamagedCheckpointError, CheckpointError: as :func:`check_whole`.
    """
    check_whole(path)
    return _load(path)


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    import torch

    from blspkd_fairseq import compat

    compat.allow_safe_checkpoint_globals()
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        state["cfg"], state["model"]
    except Exception as error:
        raise DamagedCheckpointError(
            f"{path} is no checkpoint of this project, or is damaged ({type(error).__name__})"
        ) from error
    return state


def updates_of(path: Path) -> int | None:
    """The number of updates after which a checkpoint was written; None if it is none to go on from.

    Reads no weights, and does not check the file.
    """
    try:
        state = _load(path, mmap=True)
        if "train_iterator" in state["extra_state"] and "last_optimizer_state" in state:
            return int(state["optimizer_history"][-1]["num_updates"])
    except Exception:
        return None
    return None


# ---- which one to go on from ---------------------------------------------------------------------------------------


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The checkpoint in a training's folder to go on from: the last one, or if it is damaged or missing, the newest
    whole one beside it, with a warning that says what is lost.

    Returns:
        None if there is none at all.

    Raises:
        CheckpointError: all of them are damaged, or the last one is there and cannot be opened.
    """
    last = folder / LAST
    others = [path for path in _checkpoints(folder) if path != last]
    if not os.path.lexists(last):
        if not others:
            return None
        trouble = f"{last} is missing"
    else:
        try:
            check_whole(last)
            _load(last, mmap=True)
            return last
        except DamagedCheckpointError as error:
            trouble = str(error)
    newest = next(_whole(others), None)
    if newest is None:
        raise CheckpointError(
            f"{trouble}, and no whole checkpoint is beside it to go on from: begin anew with an empty --save-dir, or "
            "bring back a copy"
        )
    reached = updates_of(last)
    lost = "all updates after it" if reached is None else f"the {reached - newest.updates} updates after it"
    logger.warning(
        f"{trouble}: going on from {newest.path.name} at {newest.updates} updates; {lost} are lost and made again"
    )
    return newest.path


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint*.pt") if _NAMES.fullmatch(path.name) and path.is_file())


def _whole(paths: list[Path]) -> Iterator[Progress]:
    """Those that are whole, with the most updates first; a damaged one is said."""
    reached = [Progress(path, updates) for path in paths if (updates := updates_of(path)) is not None]
    for one in sorted(reached, key=lambda one: (one.updates, one.path.stat().st_mtime), reverse=True):
        try:
            check_whole(one.path)
        except CheckpointError as error:
            logger.warning(str(error))
            continue
        yield one


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
