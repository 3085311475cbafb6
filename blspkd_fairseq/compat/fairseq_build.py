"""Finds the installed build of fairseq, checks that it can be used, and silences what it says of itself."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from blspkd_fairseq.requirements import FAIRSEQ_NAME, FAIRSEQ_VERSION

INSTALL_FAIRSEQ = f"pip install {FAIRSEQ_NAME}=={FAIRSEQ_VERSION}"


class FairseqError(ImportError):
    """fairseq is missing, cannot be imported, or was overwritten; the message says what to do."""


class Problem(NamedTuple):
    """A fault, and what the user can do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


class FairseqDistribution(NamedTuple):
    """A distribution that provides `import fairseq`."""

    name: str
    version: str
    folder: Path | None  # where it put its files; None: an editable install, which puts none

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def is_pinned(self) -> bool:
        return (self.name, self.version) == (FAIRSEQ_NAME, FAIRSEQ_VERSION)


def fairseq_distributions() -> list[FairseqDistribution]:
    """All installed distributions that provide `import fairseq`, whatever their names, sorted by name."""
    names = {one.metadata["Name"] for one in importlib.metadata.distributions() if _provides_fairseq(one)}
    return [_describe(importlib.metadata.distribution(name)) for name in sorted(names)]


def _provides_fairseq(distribution: importlib.metadata.Distribution) -> bool:
    """As ``importlib.metadata.packages_distributions`` finds it, which takes a second to look at all packages."""
    declared = (distribution.read_text("top_level.txt") or "").split()
    if declared:
        return "fairseq" in declared
    files = distribution.read_text("RECORD") or distribution.read_text("SOURCES.txt") or ""
    return any(line.startswith(("fairseq/", "fairseq.py")) for line in files.splitlines())


def _describe(distribution: importlib.metadata.Distribution) -> FairseqDistribution:
    name = str(distribution.metadata["Name"]).lower().replace("_", "-")
    owns_files = any(file.parts[:1] == ("fairseq",) for file in distribution.files or ())
    folder = Path(str(distribution.locate_file("fairseq"))).resolve() if owns_files else None
    return FairseqDistribution(name, distribution.version, folder)


def fairseq_problem() -> Problem | None:
    """Finds what keeps fairseq from being used here, or None. Imports fairseq."""
    installed = fairseq_distributions()
    problem = _overwritten(installed)
    if problem is not None or "fairseq" in sys.modules:
        return problem
    if importlib.util.find_spec("fairseq") is None:
        return Problem("fairseq is not installed", f"run `{INSTALL_FAIRSEQ}`, a build for Python 3.11 and 3.12")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        importlib.import_module("fairseq")
    except Exception as error:
        return _unimportable(installed, error)
    finally:
        # Importing fairseq makes every library print its debugging messages, unless the program set up logging before.
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        root.setLevel(level)
    return None


def _overwritten(installed: list[FairseqDistribution]) -> Problem | None:
    folders = [one.folder for one in installed if one.folder is not None]
    shared = [one for one in installed if one.folder is not None and folders.count(one.folder) > 1]
    if not shared:
        return None
    return Problem(
        f"{' and '.join(map(str, shared))} have written into the same folder {shared[0].folder}, "
        "so that one has overwritten the other",
        f"run `pip uninstall -y {' '.join(one.name for one in shared)}` and then `{INSTALL_FAIRSEQ}`, "
        "or give this project a virtual environment of its own (scripts/venv.sh)",
    )


def _unimportable(installed: list[FairseqDistribution], error: Exception) -> Problem:
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "fairseq":
        missing = error.name.split(".")[0]
        return Problem(f"fairseq needs the Python package {missing}, which is missing", f"install {missing}")
    who = " and ".join(map(str, installed)) or "the fairseq on your Python path"
    reason = (str(error).strip() or "no message").splitlines()[0]
    uninstall = "".join(f"`pip uninstall -y {one.name}` and then " for one in installed)
    return Problem(
        f"{who} cannot be imported by Python {sys.version_info.major}.{sys.version_info.minor} "
        f"({type(error).__name__}: {reason})",
        f"run {uninstall}`{INSTALL_FAIRSEQ}`",
    )


def fairseq_warning() -> Problem | None:
    """Warns if another build than the tested one provides fairseq, or several do; else None."""
    installed = fairseq_distributions()
    if len(installed) == 1 and installed[0].is_pinned:
        return None
    who = " and ".join(map(str, installed)) or "a source folder on your Python path"
    return Problem(
        f"fairseq comes from {who}, and only {FAIRSEQ_NAME} {FAIRSEQ_VERSION} is tested",
        f"if something fails, `{INSTALL_FAIRSEQ}` in a virtual environment of its own (scripts/venv.sh)",
    )


@functools.cache  # what was found out; an error is looked for again
def require_fairseq() -> None:
    """Raises unless fairseq can be used.

    Raises:
        FairseqError: one sentence that says what is wrong and what to do.
    """
    problem = fairseq_problem()
    if problem is not None:
        raise FairseqError(str(problem))


# What fairseq says to hydra and torch of today, in every command, and what nobody but its authors could act upon.
_FAIRSEQ_WARNINGS = (
    r"hydra\.experimental\.\w+\(\) is no longer experimental",
    r"\s*The version_base parameter is not specified",
    r"In '.*': Usage of deprecated keyword in package header",
    r"\s*'config' is validated against ConfigStore schema",
    r"\s*The strict flag in the compose API is deprecated",
    r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated",
    r"`torch\.jit\.script` is deprecated",
    r"'pin_memory' argument is set as true but no accelerator is found",
)

# What the trainer and the task of fairseq log at each epoch, and at each buffer of lines, whatever happens.
_FAIRSEQ_LOGS = (
    "detected shared parameter",
    "can_reuse_epoch_itr = ",
    "reuse_dataloader = ",
    "rebuild_batches = ",
    "creating new batches for epoch",
)


def silence_fairseq() -> None:
    """Hides what fairseq says of itself: hundreds of lines before anything happens.

    Those are warnings about its use of deprecated interfaces; hydra's debugging messages, as one of its models makes
    all libraries print theirs; how it makes batches; and a line for each bias that an LLM does not have, since its
    trainer takes all that are None for one shared parameter.
    """
    for message in _FAIRSEQ_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("hydra").setLevel(logging.INFO)
    for name in ("fairseq.trainer", "fairseq.tasks.fairseq_task"):
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_FAIRSEQ_LOGS)
