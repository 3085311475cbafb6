"""What is to be shown, written down before a run: ``contrasts.toml``.

seeds = [1, 2, 3, 4, 5, 6, 7, 8]               # of every system that is trained
exclusions = "rows whose transcript is empty after normalising"

[systems.x_opd]
[systems.longer]
[systems.cascade]
fixed = true                                   # no training seeds: what is shown holds for this very system

[tasks.asr]
answers = "answers/{system}-{seed}.jsonl"      # relative to this file; a fixed system's without {seed}
metric = "WER"
smallest_effect = 2.0
clusters = ["speaker"]                         # two are crossed
language = "en"
reference = "transcript"                       # the field that holds it

[[primary]]                                    # four at most
name = "X-OPD beats as much more of BLSP-KD"
task = "asr"
better = "x_opd"
worse = "longer"
shared_start = true                            # the same seed starts both
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

MAX_PRIMARY = 4
OBRIEN_FLEMING = (0.005, 0.048)  # two-sided levels of two equally spaced looks that keep 5 % together
LEVEL = 0.05


class ContrastError(ValueError):
    """A plan that cannot be used; one sentence that names the file and what to write."""


@dataclass(frozen=True)
class SystemPlan:
    """One system.

    Attributes:
        name: in contrasts.
        fixed: it has no training seeds.
        seeds: of its own, in place of the plan's.
        answers: pattern by task, in place of the task's.
    """

    name: str
    fixed: bool = False
    seeds: tuple[int, ...] = ()
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskPlan:
    """One test set with its primary metric.

    Attributes:
        name: in contrasts.
        metric: of the primary contrasts.
        smallest_effect: the smallest difference of interest, in the metric's units.
        answers: pattern of files, JSON lines or (another ending than .jsonl) a line per row; ``{system}``, ``{seed}``.
        clusters: columns; no two rows of one cluster are independent. None: every row is a cluster.
        language: code of the answers' language.
        reference: field of the JSON lines that holds the reference.
        reference_system: its answers are the references ("corpus BLEU against the text answers"), or "".
        references: file with a reference per line, for files of lines.
        columns: files with a cluster per line.
        table: tab-separated file with ``id`` and the columns (a manifest).
        row_scores: pattern of files by metric, see :mod:`~blspkd_fairseq.evaluation.row_scores`.
    """

    name: str
    metric: str
    smallest_effect: float
    clusters: tuple[str, ...]
    answers: str = ""
    language: str = ""
    reference: str = "reference"
    reference_system: str = ""
    references: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    table: str = ""
    row_scores: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contrast:
    """``better`` is said to be better than ``worse``.

    Attributes:
        name, task, better, worse: names.
        metric: "" for the task's.
        shared_start: with each seed both were trained from the same start.
    """

    name: str
    task: str
    better: str
    worse: str
    metric: str = ""
    shared_start: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that the file says.

    Attributes:
        path: of the file. sha256: of its bytes.
        seeds: of systems that are trained. looks: numbers of seeds at which verdicts are given, or none.
        exclusions: in words.
        systems, tasks: by name. primary, secondary: contrasts.
    """

    path: Path
    sha256: str
    seeds: tuple[int, ...]
    looks: tuple[int, ...]
    exclusions: str
    systems: Mapping[str, SystemPlan]
    tasks: Mapping[str, TaskPlan]
    primary: tuple[Contrast, ...]
    secondary: tuple[Contrast, ...]

    def seeds_at(self, look: int) -> tuple[int, ...]:
        """The seeds that count; ``look`` 0: there is only one.

        Raises:
            ContrastError: the plan has looks and none is chosen, or the other way round.
        """
        if bool(self.looks) != bool(look) or look > len(self.looks):
            options = " or ".join(f"--look {i + 1}" for i in range(len(self.looks))) or "no --look"
            raise ContrastError(f"{self.path} plans {len(self.looks) or 'no'} looks: give {options}")
        return self.seeds[: self.looks[look - 1]] if look else self.seeds

    def level_at(self, look: int) -> float:
        """The level at which a corrected p counts."""
        return OBRIEN_FLEMING[look - 1] if look else LEVEL

    def seeds_of(self, system: str, look: int) -> tuple[int | None, ...]:
        """Of one system; (None,) if it has none."""
        plan = self.systems[system]
        return (None,) if plan.fixed else plan.seeds or self.seeds_at(look)

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        return (*self.primary, *self.secondary)

    def metric_of(self, contrast: Contrast) -> str:
        return contrast.metric or self.tasks[contrast.task].metric


def load_plan(path: str | Path) -> Plan:
    """Reads and checks a plan.

    Raises:
        ContrastError: the first thing that is wrong.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        given = tomllib.loads(content.decode())
    except OSError as error:
        raise ContrastError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ContrastError(f"{path} is no TOML: {error}") from error
    allowed = {"seeds", "looks", "exclusions", "systems", "tasks", "primary", "secondary"}
    _refuse_unknown(given, allowed, str(path))
    plan = Plan(
        path,
        hashlib.sha256(content).hexdigest(),
        _whole_numbers(given.get("seeds", []), f"{path}: seeds"),
        _whole_numbers(given.get("looks", []), f"{path}: looks"),
        str(given.get("exclusions", "")),
        {name: _read(SystemPlan, {"name": name, **one}, f"{path}: systems.{name}")
         for name, one in _tables(given, "systems", path).items()},
        {name: _read(TaskPlan, {"name": name, **one}, f"{path}: tasks.{name}")
         for name, one in _tables(given, "tasks", path).items()},
        tuple(_read(Contrast, one, f"{path}: a primary contrast") for one in given.get("primary", [])),
        tuple(_read(Contrast, one, f"{path}: a secondary contrast") for one in given.get("secondary", [])),
    )  # fmt: skip
    _check(plan)
    return plan


# --- its checks -------------------------------------------------------------------------------------


def _tables(given: Mapping[str, Any], key: str, path: Path) -> dict[str, dict[str, Any]]:
    tables = given.get(key, {})
    if not isinstance(tables, dict) or not tables or not all(isinstance(one, dict) for one in tables.values()):
        raise ContrastError(f"{path} names no {key}: write a section [{key}.NAME] for each")
    return tables


_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str, "bool": bool, "float": (int, float), "tuple[int, ...]": list, "tuple[str, ...]": list,
    "Mapping[str, str]": dict,
}  # fmt: skip


def _read(kind: Any, given: Any, where: str) -> Any:
    """A data class from a table, with the types that its fields have."""
    if not isinstance(given, dict):
        raise ContrastError(f"{where} is no table of keys and values")
    known = {one.name: one for one in fields(kind)}
    _refuse_unknown(given, set(known), where)
    for name, one in known.items():
        if name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise ContrastError(f"{where} has no {name}: write {name} = ...")
        if name in given and (
            not isinstance(given[name], _TYPES[str(one.type)]) or isinstance(given[name], bool) != (one.type == "bool")
        ):
            raise ContrastError(f"{where} has {name} = {given[name]!r}, which is no {one.type}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return kind(**values)


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(given) - known):
        raise ContrastError(f"{where} has {unknown[0]!r}, which is unknown: choose among {', '.join(sorted(known))}")


def _whole_numbers(given: Any, where: str) -> tuple[int, ...]:
    numbers = given if isinstance(given, list) else None
    if numbers is None or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ContrastError(f"{where} = {given!r} is no list of whole numbers")
    if len(set(numbers)) != len(numbers):
        raise ContrastError(f"{where} has a number twice")
    return tuple(numbers)


def _check(plan: Plan) -> None:
    if not plan.primary and not plan.secondary:
        raise ContrastError(f"{plan.path} has no contrast: write [[primary]] (what is to be shown) or [[secondary]]")
    if len(plan.primary) > MAX_PRIMARY:
        raise ContrastError(
            f"{plan.path} has {len(plan.primary)} primary contrasts: choose {MAX_PRIMARY}, the others are secondary"
        )
    names = [contrast.name for contrast in plan.contrasts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ContrastError(f"{plan.path} has two contrasts of the name {twice[0]!r}")
    if plan.looks and (len(plan.looks) != 2 or plan.looks[1] != len(plan.seeds) or plan.looks[0] >= plan.looks[1]):
        raise ContrastError(
            f"{plan.path}: looks = {list(plan.looks)} should be two numbers of seeds, the second all {len(plan.seeds)}"
        )
    for task in plan.tasks.values():
        _check_task(plan, task)
    for system in plan.systems.values():
        _whole_numbers(list(system.seeds), f"{plan.path}: systems.{system.name}.seeds")
        if not (system.fixed or system.seeds or plan.seeds):
            raise ContrastError(f"{plan.path}: {system.name} has no seeds: write seeds = [...], or fixed = true")
        if system.seeds and (system.fixed or plan.looks):
            raise ContrastError(f"{plan.path}: {system.name} has seeds of its own, and is fixed or there are looks")
    for contrast in plan.contrasts:
        _check_contrast(plan, contrast)


def _check_task(plan: Plan, task: TaskPlan) -> None:
    where = f"{plan.path}: tasks.{task.name}"
    if not task.smallest_effect > 0:
        raise ContrastError(f"{where} has smallest_effect = {task.smallest_effect}: it should be above 0")
    if len(task.clusters) > 2 or not all(isinstance(one, str) for one in task.clusters):
        raise ContrastError(f"{where} has clusters = {list(task.clusters)}: write none, one or two names of columns")
    if task.reference_system and task.reference_system not in plan.systems:
        raise ContrastError(f"{where} has reference_system = {task.reference_system!r}, which is no system")


def _check_contrast(plan: Plan, contrast: Contrast) -> None:
    where = f"{plan.path}: {contrast.name!r}"
    if contrast.task not in plan.tasks:
        raise ContrastError(f"{where} is of the task {contrast.task!r}: choose among {', '.join(plan.tasks)}")
    for system in (contrast.better, contrast.worse):
        if system not in plan.systems:
            raise ContrastError(f"{where} names {system!r}, which is no system: choose among {', '.join(plan.systems)}")
    if contrast.better == contrast.worse:
        raise ContrastError(f"{where} compares {contrast.better} with itself")
    if contrast in plan.primary and contrast.metric not in ("", plan.tasks[contrast.task].metric):
        raise ContrastError(f"{where} is primary on another metric than its task's: make it secondary")
    pair = [plan.systems[name] for name in (contrast.better, contrast.worse)]
    if contrast.shared_start and any(one.fixed for one in pair):
        raise ContrastError(f"{where} has a shared start, but one of its systems has no seeds")
    if contrast.shared_start and pair[0].seeds != pair[1].seeds:
        raise ContrastError(f"{where} has a shared start, but its systems have other seeds")


# --- registration -----------------------------------------------------------------------------------


def registration_path(plan: Plan) -> Path:
    return plan.path.with_name(plan.path.name + ".sha256")


def register(plan: Plan) -> Path:
    """Writes the plan's hash beside it, as ``sha256sum`` does; commit both before the runs.

    Raises:
        ContrastError: another version was registered.
    """
    path = registration_path(plan)
    if path.exists() and path.read_text(encoding="utf-8").split()[:1] != [plan.sha256]:
        raise ContrastError(f"{path} is of another version of {plan.path.name}: a plan is registered once")
    path.write_text(f"{plan.sha256}  {plan.path.name}\n", encoding="utf-8")
    return path


def registration(plan: Plan) -> str:
    """What a report says of it."""
    path = registration_path(plan)
    if not path.exists():
        return "**It was not registered before the runs: nothing shows that it was written before the answers.**"
    if path.read_text(encoding="utf-8").split()[:1] != [plan.sha256]:
        return "**It was changed after it was registered: what follows was not planned.**"
    return "It is as it was registered."
