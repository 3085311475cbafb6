"""The files that a plan names, read and checked, and everything that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blspkd_fairseq.evaluation.answer_files import (
    AnswerFile,
    AnswerFileError,
    read_answer_file,
    read_columns,
    read_lines,
)
from blspkd_fairseq.evaluation.contrasts import Plan, TaskPlan
from blspkd_fairseq.evaluation.metrics import Measurement
from blspkd_fairseq.evaluation.named_metrics import METRICS, measure
from blspkd_fairseq.evaluation.row_scores import read_row_scores
from blspkd_fairseq.evaluation.variance import MIN_CLUSTERS, Estimate, VarianceError
from blspkd_fairseq.evaluation.verdicts import Runs, Seed, Verdict, compare_runs, correct

GivenScores = Mapping[tuple[str, Seed, str], Path]


class TaskData:
    """The files of one task; every problem with them is a ``ValueError`` of one sentence.

    Args:
        plan, task: what is compared.
        look: 0, or which of the planned looks.
        given: row scores by system, seed and metric, beside those that the plan names.
    """

    def __init__(self, plan: Plan, task: TaskPlan, look: int = 0, given: GivenScores | None = None) -> None:
        self.plan, self.task, self.look, self.given = plan, task, look, dict(given or {})
        self._files: dict[Path, AnswerFile] = {}
        self._measured: dict[tuple[str, str, Seed], Measurement] = {}

    def runs(self, metric: str, systems: Sequence[str]) -> Runs:
        """A metric of some systems, each seed of each."""
        of = {name: {seed: self._measurement(metric, name, seed) for seed in self._seeds(name)} for name in systems}
        return Runs(of, self.factors)

    def _measurement(self, *key: Any) -> Measurement:
        if key not in self._measured:
            self._measured[key] = self._measure(*key)
        return self._measured[key]

    @cached_property
    def ids(self) -> list[str]:
        """Of the rows, in the order of the first file."""
        system = next(c.better for c in self.plan.contrasts if c.task == self.task.name)
        if self._pattern(system):
            return list(self._answers(system, self._seeds(system)[0]).rows)
        patterns = list(self.task.row_scores.values())
        if not patterns and not self.given:
            raise AnswerFileError(f"{self.plan.path}: tasks.{self.task.name} names neither answers nor row_scores")
        path = self._fill(patterns[0], system, self._seeds(system)[0]) if patterns else next(iter(self.given.values()))
        return list(read_answer_file(path).rows)

    @cached_property
    def factors(self) -> list[list[str]]:
        """A cluster per row, for each column."""
        return [self._column(name) for name in self.task.clusters]

    def _column(self, name: str) -> list[str]:
        if name in self.task.columns:
            path = self._beside(self.task.columns[name])
            found = read_lines(path)
            if len(found) != len(self.ids):
                raise AnswerFileError(f"{path} has {len(found)} lines for {len(self.ids)} rows")
        elif self.task.table:
            found = read_columns(self._beside(self.task.table), [name], self.ids)[name]
        else:
            rows = self._first_file().rows
            found = [str(rows[one].get(name) or "") for one in self.ids]
        if "" in found:
            raise AnswerFileError(
                f"row {self.ids[found.index('')]!r} of {self.task.name} has no {name}: name a table or a file of lines "
                f"that has one, or leave {name} out of clusters"
            )
        count = len(set(found))
        if count < MIN_CLUSTERS:
            raise VarianceError(
                f"{self.task.name} has {count} different {name}: with fewer than {MIN_CLUSTERS} no interval holds what "
                "it promises, so there is no comparison"
            )
        return found

    def _first_file(self) -> AnswerFile:
        if self._files:
            return next(iter(self._files.values()))
        patterns = list(self.task.row_scores.values())
        system = next(iter(self.plan.systems))
        path = self._fill(patterns[0], system, self._seeds(system)[0]) if patterns else next(iter(self.given.values()))
        return read_answer_file(path)

    def _measure(self, metric: str, system: str, seed: Seed) -> Measurement:
        if (system, seed, metric) in self.given:
            return read_row_scores(self.given[system, seed, metric], metric, self.ids)
        if metric in self.task.row_scores:
            return read_row_scores(self._fill(self.task.row_scores[metric], system, seed), metric, self.ids)
        if metric not in METRICS:
            known = ", ".join([*METRICS, *self.task.row_scores])
            raise ValueError(
                f"metric {metric!r} of {self.task.name} is unknown, and there are no row scores of it for {system}: "
                f"choose among {known}"
            )
        answers = self._answers(system, seed)
        return measure(metric, answers.texts("hypothesis", self.ids), self._references(answers), self.task.language)

    def _references(self, answers: AnswerFile) -> list[str]:
        if self.task.reference_system:
            name = self.task.reference_system
            return self._answers(name, self._seeds(name)[0]).texts("hypothesis", self.ids)
        if self.task.references:
            path = self._beside(self.task.references)
            lines = read_lines(path)
            if len(lines) != len(self.ids):
                raise AnswerFileError(f"{path} has {len(lines)} lines for {len(self.ids)} rows")
            return lines
        if answers.path.suffix != ".jsonl":
            raise AnswerFileError(f"{self.plan.path}: tasks.{self.task.name} needs references = ... for {answers.path}")
        found = answers.texts(self.task.reference, self.ids, may_be_empty=False)
        first = self._first_file()
        if first is not answers and first.texts(self.task.reference, self.ids, may_be_empty=False) != found:
            raise AnswerFileError(f"{answers.path} has other references in {self.task.reference!r} than {first.path}")
        return found

    def _answers(self, system: str, seed: Seed) -> AnswerFile:
        pattern = self._pattern(system)
        if not pattern:
            raise AnswerFileError(f"{self.plan.path}: tasks.{self.task.name} has no answers of {system}")
        path = self._fill(pattern, system, seed)
        if path not in self._files:
            self._files[path] = read_answer_file(path)
        return self._files[path]

    def _pattern(self, system: str) -> str:
        return self.plan.systems[system].answers.get(self.task.name, self.task.answers)

    def _fill(self, pattern: str, system: str, seed: Seed) -> Path:
        if seed is not None and "{seed}" not in pattern:
            raise AnswerFileError(f"{self.plan.path}: {pattern!r} has no {{seed}}, but {system} has seeds")
        if seed is None and "{seed}" in pattern:
            raise AnswerFileError(
                f"{self.plan.path}: {system} has no seeds, so name its file: "
                f"systems.{system}.answers.{self.task.name} = ..."
            )
        return self._beside(pattern.replace("{system}", system).replace("{seed}", str(seed)))

    def _beside(self, path: str) -> Path:
        return self.plan.path.parent / path

    def _seeds(self, system: str) -> tuple[Seed, ...]:
        return self.plan.seeds_of(system, self.look)


@dataclass(frozen=True)
class Comparison:
    """Attributes: verdicts on primary contrasts, secondary ones, scores ``[task: metric][system]``, signatures."""

    primary: list[Verdict]
    secondary: list[Verdict]
    scores: dict[str, dict[str, Estimate | str]]
    signatures: dict[str, str]


def compare_plan(plan: Plan, look: int = 0, given: Mapping[str, GivenScores] | None = None) -> Comparison:
    """Everything that a plan asks for.

    Args:
        plan: of :func:`~blspkd_fairseq.evaluation.contrasts.load_plan`.
        look: which look, if there are looks.
        given: row scores by task.

    Raises:
        ValueError: a file that is missing or does not fit; one sentence.
    """
    data = {name: TaskData(plan, task, look, (given or {}).get(name)) for name, task in plan.tasks.items()}
    made: dict[str, list[Verdict]] = {}
    signatures: dict[str, str] = {}
    scores: dict[str, dict[str, Estimate | str]] = {}
    for kind, contrasts in (("primary", plan.primary), ("secondary", plan.secondary)):
        made[kind] = []
        for contrast in contrasts:
            metric = plan.metric_of(contrast)
            runs = data[contrast.task].runs(metric, (contrast.better, contrast.worse))
            effect = plan.tasks[contrast.task].smallest_effect if kind == "primary" else float("nan")
            made[kind].append(compare_runs(contrast, metric, runs, effect))
            title = f"{contrast.task}: {metric}"
            signatures[title] = next(iter(runs.of[contrast.better].values())).signature
            for system in (contrast.better, contrast.worse):
                scores.setdefault(title, {}).setdefault(system, _score(runs, system))
    return Comparison(correct(made["primary"], plan.level_at(look)), made["secondary"], scores, signatures)


def _score(runs: Runs, system: str) -> Estimate | str:
    try:
        return runs.score(system)
    except VarianceError as error:
        return str(error)
