"""Answers of several systems to figures with intervals, and tests of their differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from blspkd_fairseq.evaluation.error_detail import error_detail
from blspkd_fairseq.evaluation.metrics import (
    Measurement,
    answer_metrics,
    mean_of,
    transcription_metrics,
    translation_metrics,
)
from blspkd_fairseq.evaluation.significance import (
    SAMPLES,
    TRIALS,
    Difference,
    Interval,
    SacrebleuTest,
    compare_with_baseline,
    interval_of,
    sacrebleu_test,
)

TEXT = "text"  # the system that reads the reference transcript
CLEAN = "clean"
_ERROR_BINS = ((0.0, 0.0), (0.0, 10.0), (10.0, 30.0), (30.0, math.inf))


@dataclass(frozen=True)
class Answered:
    """A row of a test set and what a system answered.

    Attributes:
        id, speaker, prompt, transcript, reference: of the row; ``heard``: a cascade's transcript, None of others.
    """

    id: str
    speaker: str
    prompt: str
    transcript: str
    hypothesis: str
    reference: str
    heard: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Answered:
        """From a line of a file of answers."""
        return cls(**{one.name: record[one.name] for one in fields(cls) if one.name in record})


Answers = Sequence[Answered]
# [system][condition]: answers to all rows, once for each draw of the noise.
AnswersOfSystems = Mapping[str, Mapping[str, Sequence[Answers]]]


@dataclass(frozen=True)
class ScoringOptions:
    """How figures are computed.

    Attributes:
        language: of the answers: of the target in translation, else of the speech.
        baseline: the system that the others are compared with.
        samples, trials: of the bootstrap and of the randomisation; ``seed`` of both.
        spelling: British to American words for Whisper's English normaliser.
        speech_language: of what is said, for the transcripts of cascades.
        blocks: a cluster per row (a talk); None: the speakers of the answers.
        unit: what blocks are called.
    """

    language: str = ""
    baseline: str = ""
    samples: int = SAMPLES
    trials: int = TRIALS
    seed: int = 12345
    spelling: Mapping[str, str] = field(default_factory=dict)
    speech_language: str = ""
    blocks: Sequence[str] | None = None
    unit: str = "speaker"


@dataclass(frozen=True)
class ErrorRow:
    """One system's errors in detail, see :class:`~blspkd_fairseq.evaluation.error_detail.ErrorDetail`."""

    signature: str
    substitutions: float
    deletions: float
    insertions: float
    median: float
    capped: Interval
    above_100: Interval


@dataclass
class TaskReport:
    """Everything about one task.

    Attributes:
        kind: "asr", "translation" or "qa".
        rows, speakers: how many; ``unit``: what the speakers are, if not that.
        scores: ``[system][metric]`` on clean speech.
        robustness: ``[system][condition]`` of the main metric, mean over the draws of the noise.
        noise_seeds: how many draws.
        main: the main metric's name.
        signatures: of every metric.
        differences: every system against the baseline, on every metric.
        sacrebleu: its own paired tests, by kind of test ("bs", "ar").
        errors: of speech recognition, kinds of errors of each system.
        by_speaker: ``[system][speaker]`` of the main metric, without intervals.
        heard: of each cascade and condition, the error rate of its transcript; ``heard_metric``: which.
        by_error: rows by the error rate of the cascade's transcript: ``[bin][system]`` of the main metric.
        bins: rows in each of them; ``binned_by``: the cascade.
    """

    kind: str
    rows: int
    speakers: int
    unit: str = "speaker"
    main: str = ""
    scores: dict[str, dict[str, Interval]] = field(default_factory=dict)
    robustness: dict[str, dict[str, Interval]] = field(default_factory=dict)
    noise_seeds: int = 1
    signatures: dict[str, str] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    sacrebleu: dict[str, SacrebleuTest] = field(default_factory=dict)
    errors: dict[str, ErrorRow] = field(default_factory=dict)
    by_speaker: dict[str, dict[str, float]] = field(default_factory=dict)
    heard: dict[str, dict[str, Interval]] = field(default_factory=dict)
    heard_metric: str = ""
    by_error: dict[str, dict[str, Interval]] = field(default_factory=dict)
    bins: dict[str, int] = field(default_factory=dict)
    binned_by: str = ""


def score_task(
    kind: str,
    answers: AnswersOfSystems,
    options: ScoringOptions,
    extra: Mapping[str, Sequence[Measurement]] | None = None,
) -> TaskReport:
    """All figures of a task.

    Args:
        kind: "asr", "translation" or "qa".
        answers: the same rows in the same order everywhere; "clean" is there for each system. For "qa", the system
            "text" is what the others are compared with.
        options: how.
        extra: metrics that other programs computed, by system, tested as the others are.

    Raises:
        ValueError: systems with other rows, no text answers for "qa", or no references for "translation".
    """
    first = next(iter(answers.values()))[CLEAN][0]
    _check_rows(answers, first)
    blocks = [row.speaker for row in first] if options.blocks is None else list(options.blocks)
    report = TaskReport(kind, len(first), len({one for one in blocks if one}), options.unit)

    def interval(one: Measurement) -> Interval:
        return interval_of(one, options.samples, options.seed, blocks)

    clean: dict[str, list[Measurement]] = {}
    for system, conditions in answers.items():
        measured = {c: _mean_over_draws(kind, drawn, answers, options) for c, drawn in conditions.items()}
        own = [m for m in measured[CLEAN] if not (kind == "qa" and system == TEXT and "Self" in m.name)]
        clean[system] = [*own, *(extra or {}).get(system, [])]
        report.scores[system] = {m.name: interval(m) for m in clean[system]}
        report.signatures |= {m.name: m.signature for m in (*measured[CLEAN], *clean[system])}
        report.main = report.main or main_metric(measured[CLEAN]).name
        report.noise_seeds = max(report.noise_seeds, *(len(drawn) for drawn in conditions.values()))
        if system != TEXT or kind != "qa":
            report.robustness[system] = {c: interval(main_metric(m)) for c, m in measured.items()}
            report.by_speaker[system] = _by_block(main_metric(measured[CLEAN]), blocks)
        if kind == "asr":
            whole = main_metric(measured[CLEAN])
            report.errors[system] = _errors(whole, conditions[CLEAN][0], options, interval)
        elif conditions[CLEAN][0][0].heard is not None:  # of asr, the transcript is the answer
            heard = {c: mean_of([heard_errors(rows, options) for rows in drawn]) for c, drawn in conditions.items()}
            report.heard[system] = {c: interval(one) for c, one in heard.items()}
            report.heard_metric = heard[CLEAN].name
    report.differences = _differences(clean, options, blocks)
    if kind == "translation" and options.baseline in answers and len(answers) > 1:
        report.sacrebleu = _sacrebleu_tests(answers, options)
    _by_transcript_error(report, answers, options)
    return report


def measure(kind: str, rows: Answers, answers: AnswersOfSystems, options: ScoringOptions) -> list[Measurement]:
    """The metrics of one system under one condition."""
    said = [row.hypothesis for row in rows]
    references = [row.reference for row in rows]
    if kind == "asr":
        transcripts = [row.transcript for row in rows]
        return transcription_metrics(said, transcripts, options.language, options.spelling)
    if kind == "translation":
        if not all(references):
            raise ValueError(f"row {rows[references.index('')].id!r} has no reference translation in tgt_text")
        return translation_metrics(said, references, options.language)
    if TEXT not in answers:
        raise ValueError("spoken question answering is measured against the LLM's answers to the text: add --text")
    text_answers = [row.hypothesis for row in answers[TEXT][CLEAN][0]]
    return answer_metrics(said, text_answers, references if all(references) else None, options.language)


def main_metric(measurements: Sequence[Measurement]) -> Measurement:
    """The one of curves: BLEU, Self-BLEU, the normalised error rate in words (in letters where there are no words)."""
    normalized = [m for m in measurements if "normalized" in m.name]
    return (normalized or list(measurements))[0]


def heard_errors(rows: Answers, options: ScoringOptions) -> Measurement:
    """Error rate of the transcripts that a cascade made on its way, in the language of the speech."""
    heard, transcripts = [row.heard or "" for row in rows], [row.transcript for row in rows]
    language = options.speech_language or options.language
    return main_metric(transcription_metrics(heard, transcripts, language, options.spelling))


def _mean_over_draws(
    kind: str, drawn: Sequence[Answers], answers: AnswersOfSystems, options: ScoringOptions
) -> list[Measurement]:
    """Every metric, mean over the draws of the noise."""
    return [mean_of(same) for same in zip(*(measure(kind, rows, answers, options) for rows in drawn), strict=True)]


def _errors(
    whole: Measurement, rows: Answers, options: ScoringOptions, interval: Callable[[Measurement], Interval]
) -> ErrorRow:
    said, transcripts = [row.hypothesis for row in rows], [row.transcript for row in rows]
    unit = whole.name.partition(" ")[0]
    found = error_detail(whole, said, transcripts, unit, options.language, True, options.spelling)
    return ErrorRow(
        found.signature,
        found.substitutions,
        found.deletions,
        found.insertions,
        found.median,
        interval(found.capped),
        interval(found.above_100),
    )


def _by_block(measured: Measurement, blocks: Sequence[str]) -> dict[str, float]:
    """The score of each speaker's rows."""
    names = sorted({one for one in blocks if one})
    return {
        name: float(measured.score_of(measured.statistics[[one == name for one in blocks]].sum(axis=0)))
        for name in names
    }


def _differences(
    clean: Mapping[str, Sequence[Measurement]], options: ScoringOptions, blocks: Sequence[str]
) -> list[Difference]:
    if options.baseline not in clean:
        return []
    made: list[Difference] = []
    for metric in (m.name for m in clean[options.baseline]):
        systems = {s: m for s, measured in clean.items() for m in measured if m.name == metric}
        if len(systems) > 1:
            made += compare_with_baseline(
                systems, options.baseline, options.samples, options.trials, options.seed, blocks
            )
    return made


def _sacrebleu_tests(answers: AnswersOfSystems, options: ScoringOptions) -> dict[str, SacrebleuTest]:
    names = [options.baseline, *(name for name in answers if name != options.baseline)]
    systems = {name: [row.hypothesis for row in answers[name][CLEAN][0]] for name in names}
    references = [row.reference for row in answers[options.baseline][CLEAN][0]]
    draws = {"bs": options.samples, "ar": options.trials}
    return {
        test: sacrebleu_test(systems, references, options.language, test, count, options.seed)
        for test, count in draws.items()
    }


def _by_transcript_error(report: TaskReport, answers: AnswersOfSystems, options: ScoringOptions) -> None:
    """How every system does on the rows that the (first) cascade heard well, badly, ...: clean speech."""
    if not report.heard:
        return
    report.binned_by = next(iter(report.heard))
    errors = heard_errors(answers[report.binned_by][CLEAN][0], options).statistics
    rates = 100 * errors[:, 0] / np.maximum(1, errors[:, 1])
    for low, high in _ERROR_BINS:
        places = np.flatnonzero(rates == 0 if high == 0 else (rates > low) & (rates <= high))
        name = "0 %" if high == 0 else f"{low:g} to {high:g} %" if high < math.inf else f"over {low:g} %"
        report.bins[name] = len(places)
        if not len(places):
            continue
        report.by_error[name] = {}
        for system, conditions in answers.items():
            if report.kind == "qa" and system == TEXT:
                continue
            chosen = main_metric(measure(report.kind, conditions[CLEAN][0], answers, options))
            report.by_error[name][system] = interval_of(
                replace(chosen, statistics=chosen.statistics[places]), options.samples, options.seed
            )


def _check_rows(answers: AnswersOfSystems, first: Answers) -> None:
    ids = [row.id for row in first]
    if not ids:
        raise ValueError("the manifest has no rows: there is nothing to score")
    for system, conditions in answers.items():
        for condition, drawn in conditions.items():
            if any([row.id for row in rows] != ids for rows in drawn):
                raise ValueError(f"{system} ({condition}) has other rows than the other systems: no score")
