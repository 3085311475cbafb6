"""``blspkd check``: the versions found, the problems, and a remedy for each.

Exit status 0 when everything needed is there, 1 otherwise. Works, and says what to do, where anything is
missing or broken; hence every look at another package is guarded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from blspkd_fairseq import compat
from blspkd_fairseq.compat import Problem
from blspkd_fairseq.requirements import EXTRAS, FAIRSEQ_NAME, PYTHON, REQUIRED
from blspkd_fairseq.version import __version__

# Distributions whose import name is not their own name (with "-" as "_").
IMPORT_NAMES = {"hydra-core": "hydra", "piper-tts": "piper"}


class Row(NamedTuple):
    """One line of the table, with what is to be said about it below."""

    name: str
    found: str
    needed: str = ""
    note: str = "ok"
    problem: Problem | None = None
    warning: Problem | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    argparse.ArgumentParser(
        prog="blspkd check",
        description="Shows the versions found, the problems, and a remedy for each; status 1 if there is a problem.",
        epilog="example:\n  blspkd check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    rows = collect()
    warned = [row.warning for row in rows if row.warning is not None]
    problems = [row.problem for row in rows if row.problem is not None]
    parts = [f"blspkd_fairseq {__version__} in {Path(__file__).resolve().parent}", table(rows)]
    parts += [f"warning: {what}\n remedy: {remedy}" for what, remedy in warned]
    parts += [f"problem: {what}\n remedy: {remedy}" for what, remedy in problems]
    parts += [f"{len(problems)} problem(s) found" if problems else "everything needed is there"]
    print("\n\n".join(parts))  # at once, so that `| head` does not break the pipe half-way
    return 1 if problems else 0


def collect() -> list[Row]:
    """Looks at everything the package needs; never raises."""
    rows = [
        _guarded("python", check_python),
        _guarded("torch", check_torch),
        _guarded("fairseq", check_fairseq),
    ]
    others = [one for one in REQUIRED if split(one)[0] not in ("torch", FAIRSEQ_NAME)]
    rows += [_guarded(split(one)[0], partial(check_package, one)) for one in others]
    rows.append(_guarded("torchaudio", check_torchaudio))
    optional = [one for extra, needed in EXTRAS.items() if extra != "dev" for one in needed]
    return rows + [_guarded(split(one)[0], partial(check_optional, one)) for one in optional]


def table(rows: Iterable[Row]) -> str:
    """The rows as aligned text."""
    cells = [("package", "found", "needed", "")] + [(row.name, row.found, row.needed, row.note) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, line[:3], widths), line[3]]).rstrip() for line in cells)


def check_python() -> Row:
    """The interpreter's version."""
    found = platform.python_version()
    if satisfies(found, PYTHON):
        return Row("python", found, PYTHON)
    return Row("python", found, PYTHON, "wrong", Problem(f"Python {found} is not supported", "use 3.11 or 3.12"))


def check_torch() -> Row:
    """torch, and whether it can use the GPU that is there."""
    row = check_package(_requirement("torch"))
    if row.problem is not None:
        remedy = "run `bash scripts/venv.sh`, or choose a build at pytorch.org (the default one brings CUDA)"
        return row._replace(problem=row.problem._replace(remedy=remedy))
    import torch

    if torch.cuda.is_available():
        return row._replace(note=f"{row.note}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(0)}")
    if shutil.which("nvidia-smi") is None:
        return row._replace(note=f"{row.note}, no CUDA")
    what = f"this machine has nvidia-smi, but torch {row.found} cannot use an NVIDIA GPU"
    remedy = "to use it, install a CUDA build of torch that fits the driver (see pytorch.org)"
    return row._replace(note="ok, no CUDA", warning=Problem(what, remedy))


def check_fairseq() -> Row:
    """Which distribution provides fairseq, and whether it imports."""
    found = ", ".join(map(str, compat.fairseq_distributions())) or "-"
    needed = _requirement(FAIRSEQ_NAME)
    with _quiet():
        problem = compat.fairseq_problem()
    if problem is not None:
        return Row("fairseq", found, needed, "missing" if found == "-" else "broken", problem)
    warning = compat.fairseq_warning()
    return Row("fairseq", found, needed, "ok" if warning is None else "untested", warning=warning)


def check_torchaudio() -> Row:
    """torchaudio: fairseq asks for it, nothing here uses it, and transformers fails where it is broken."""
    found = version_of("torchaudio")
    if found is None:
        return Row("torchaudio", "-", "", "not needed")
    with _quiet():
        compat.block_broken_torchaudio()
    if sys.modules.get("torchaudio") is not None:
        return Row("torchaudio", found, "", "not used")
    if "_blspkd_torchaudio" in sys.modules:  # what pip has put beside this package; see setup.py
        return Row("torchaudio", found, "", "cannot be loaded, hidden")
    what = (
        f"torchaudio {found}, which pip installed for fairseq, cannot be loaded beside this torch; it is hidden "
        "here, but transformers fails in programs that do not import blspkd_fairseq first"
    )
    warning = Problem(what, "run `pip uninstall -y torchaudio`, since nothing here needs it")
    return Row("torchaudio", found, "", "cannot be loaded", warning=warning)


def check_package(requirement: str) -> Row:
    """One required distribution: is it there, of a fitting version, and does it import?"""
    name, needed = split(requirement)
    found = version_of(name)
    remedy = f'run `pip install "{requirement}"`'
    if found is None:
        return Row(name, "-", needed, "missing", Problem(f"{name} is not installed", remedy))
    newer = is_newer(found, needed)
    if not (newer or satisfies(found, needed)):
        return Row(name, found, needed, "wrong", Problem(f"{name} {found} does not satisfy {needed}", remedy))
    try:
        with _quiet():
            importlib.import_module(IMPORT_NAMES.get(name, name.replace("-", "_")))
    except (Exception, SystemExit) as error:
        what = f"{name} {found} cannot be imported ({_first_line(error)})"
        remedy = f'run `pip install --force-reinstall --no-deps "{requirement}"`'
        return Row(name, found, needed, "broken", Problem(what, remedy))
    if newer:
        warning = Problem(f"{name} {found} is newer than tested ({needed})", f"if something fails, {remedy}")
        return Row(name, found, needed, "newer than tested", warning=warning)
    return Row(name, found, needed)


def check_optional(requirement: str) -> Row:
    """One distribution of an extra: its version, nothing imported."""
    name, needed = split(requirement)
    found = version_of(name.partition("[")[0])
    if found is None:
        return Row(name, "-", needed, "optional")
    return Row(name, found, needed, "ok" if satisfies(found, needed) else "optional, another version is tested")


def split(requirement: str) -> tuple[str, str]:
    """ "torch>=2.6" -> ("torch", ">=2.6")."""
    name = re.split(r"[<>=!~]", requirement, maxsplit=1)[0]
    return name, requirement[len(name) :]


def _requirement(name: str) -> str:
    return next(one for one in REQUIRED if split(one)[0] == name)


def version_of(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version fits a specifier such as ">=2.6,<3"; True where `packaging` is missing."""
    if importlib.util.find_spec("packaging") is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def is_newer(version: str, specifier: str) -> bool:
    """Whether nothing but the upper bound of a specifier such as ">=2.6,<3" keeps a version from fitting it."""
    others = ",".join(bound for bound in specifier.split(",") if not bound.startswith("<"))
    return not satisfies(version, specifier) and satisfies(version, others)


def _guarded(name: str, look: Callable[[], Row]) -> Row:
    try:
        return look()
    except (Exception, SystemExit) as error:
        problem = Problem(f"looking at {name} failed ({_first_line(error)})", f"reinstall {name}")
        return Row(name, "?", "", "broken", problem)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what packages print while they are imported out of the table."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
