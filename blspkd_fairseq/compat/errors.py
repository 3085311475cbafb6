"""Errors of fairseq's commands as one sentence, as those of the scripts; ``BLSPKD_DEBUG=1`` shows where they arose.

What ends in a sentence is what the user can mend: errors that this package and fairseq's own checks raise about options
and files, and the system's about files. Anything else is a fault of a program, and keeps its traceback.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_COMMANDS = "fairseq_cli"
_CHECKING = ("blspkd_fairseq", "fairseq", _COMMANDS, "hydra", "omegaconf")
_LAST_LINE = re.compile(r"([A-Za-z_][\w.]*): (.+)")


def end_in_one_sentence() -> None:
    """Prints what ends fairseq's commands in one line; the exit code stays 1."""
    if not getattr(sys.excepthook, "_is_ours", False):
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            command = _command(trace)
            line = sentence(error) if command and os.environ.get("BLSPKD_DEBUG", "") in ("", "0") else None
            if line is None:
                before(kind, error, trace)
            else:
                sys.stdout.flush()
                print(f"{command}: {line}", file=sys.stderr)

        hook._is_ours = True  # type: ignore[attr-defined]
        sys.excepthook = hook
    if f"{_COMMANDS}.hydra_train" in sys.modules or _is_hydra_train(sys.modules.get("__main__")):
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise it prints a part of the traceback itself


def _is_hydra_train(main: object) -> bool:
    return Path(getattr(main, "__file__", None) or "").stem == "hydra_train"


def _command(trace: TracebackType | None) -> str:
    """The fairseq command that an error came through: ``fairseq-train``; "" if it is none's."""
    for frame, _ in traceback.walk_tb(trace):
        path = Path(frame.f_code.co_filename)
        if path.parent.name == _COMMANDS:
            return f"fairseq-{path.stem.replace('_', '-')}"
    return ""


def sentence(error: BaseException) -> str | None:
    """Puts an error into one line; None if it is not for the user to mend."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error).strip()
    remote = _remote(error, text)
    if remote is not None:
        return remote[1] if remote[0] else None
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if not text or not (
        _is_own(error) or (isinstance(error, (ValueError, OSError, AssertionError)) and _checks(error))
    ):
        return None
    return " ".join(text.split())


def _is_own(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "blspkd_fairseq" or isinstance(error, OSError)


def _checks(error: BaseException) -> bool:
    """Whether an error was raised by what checks options and data, and not deep in a library."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and _is_checking(frames[-1][0].f_code.co_filename)


def _is_checking(filename: str) -> bool:
    """By the package: the last folder on the path that is one of them, with no other package's after it."""
    parts = Path(filename).parts
    after = parts[max((i for i, part in enumerate(parts) if part == "site-packages"), default=-1) + 1 :]
    return any(part in _CHECKING for part in after[:-1])


def _remote(error: BaseException, text: str) -> tuple[bool, str] | None:
    """For an error that another process has had and that came here as text: whether the user can mend it, and it."""
    if "Traceback (most recent call last)" not in text:
        return None
    lines = text.splitlines()
    last = next((match for line in reversed(lines) if (match := _LAST_LINE.fullmatch(line))), None)
    if last is None:
        return False, text
    files = list(_files(lines))
    kind = last[1].split(".")
    expected = kind[0] == "blspkd_fairseq" or (
        kind[-1] in ("ValueError", "OSError", "AssertionError") and bool(files) and _is_checking(files[-1])
    )
    return expected, last[2]


def _files(lines: list[str]) -> Iterator[str]:
    for line in lines:
        match = re.match(r'\s*File "([^"]+)", line \d+', line)
        if match:
            yield match[1]
