"""Answers of several systems to figures with intervals, tests of the differences, and one report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blspkd_fairseq.evaluation.alignment import BoundarySummary
from blspkd_fairseq.evaluation.metrics import (
    Measurement,
    answer_metrics,
    error_rate,
    transcription_metrics,
    translation_metrics,
)
from blspkd_fairseq.evaluation.plots import plot_robustness, plot_scores
from blspkd_fairseq.evaluation.significance import (
    Difference,
    Interval,
    SacrebleuTest,
    bootstrap_interval,
    compare_with_baseline,
    sacrebleu_test,
)
from blspkd_fairseq.evaluation.tables import difference_table, format_score, markdown_table, score_table
from blspkd_fairseq.files import write_whole

TITLES = {"asr": "Speech recognition", "translation": "Speech translation", "qa": "Spoken question answering"}
TEXT = "text"  # the system that reads the reference transcript
_CLEAN = "clean"
_ERROR_BINS = ((0.0, 0.0), (0.0, 10.0), (10.0, 30.0), (30.0, math.inf))
Answers = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ScoringOptions:
    """How figures are computed.

    Attributes:
        language: of the answers: of the target in translation, else of the speech.
        baseline: the system that the others are compared with.
        samples, trials: of the bootstrap and of the randomisation; ``seed`` of both.
        spelling: British to American words for Whisper's English normaliser.
    """

    language: str = ""
    baseline: str = ""
    samples: int = 1000
    trials: int = 10_000
    seed: int = 12345
    spelling: Mapping[str, str] = field(default_factory=dict)


@dataclass
class TaskReport:
    """Everything about one task.

    Attributes:
        kind: "asr", "translation" or "qa".
        rows, speakers: how many.
        scores: ``[system][metric]`` on clean speech.
        robustness: ``[system][condition]`` of the main metric.
        main: its name.
        signatures: of every metric.
        differences: every system against the baseline, on every metric.
        sacrebleu: its own paired tests, by kind of test ("bs", "ar").
        heard: of each cascade and condition, the error rate of its transcript.
        by_error: rows by the error rate of the cascade's transcript: ``[bin][system]`` of the main metric.
        bins: rows in each of them.
    """

    kind: str
    rows: int
    speakers: int
    main: str = ""
    scores: dict[str, dict[str, Interval]] = field(default_factory=dict)
    robustness: dict[str, dict[str, Interval]] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    sacrebleu: dict[str, SacrebleuTest] = field(default_factory=dict)
    heard: dict[str, dict[str, Interval]] = field(default_factory=dict)
    by_error: dict[str, dict[str, Interval]] = field(default_factory=dict)
    bins: dict[str, int] = field(default_factory=dict)


# ---- figures -------------------------------------------------------------------------------------------------------


def score_task(kind: str, answers: Mapping[str, Mapping[str, Answers]], options: ScoringOptions) -> TaskReport:
    """All figures of a task.

    Args:
        kind: "asr", "translation" or "qa".
        answers: ``answers[system][condition]``, the same rows in the same order everywhere; "clean" is there for each
            system. For "qa", the system "text" is what the others are compared with.
        options: how.

    Raises:
        ValueError: systems with other rows, no text answers for "qa", or no references for "translation".
    """
    first = next(iter(answers.values()))[_CLEAN]
    _check_rows(answers, first)
    speakers = [str(row["speaker"]) for row in first]
    report = TaskReport(kind, len(first), len({s for s in speakers if s}))
    blocks = speakers if kind == "asr" else None  # Bisani and Ney 2004

    def interval(one: Measurement) -> Interval:
        return bootstrap_interval(one.statistics, one.score_of, options.samples, options.seed, blocks)

    clean: dict[str, list[Measurement]] = {}
    for system, conditions in answers.items():
        measured = {c: measure(kind, rows, answers, options) for c, rows in conditions.items()}
        clean[system] = [m for m in measured[_CLEAN] if not (kind == "qa" and system == TEXT and "Self" in m.name)]
        report.scores[system] = {m.name: interval(m) for m in clean[system]}
        report.signatures |= {m.name: m.signature for m in measured[_CLEAN]}
        report.main = report.main or main_metric(measured[_CLEAN]).name
        if system != TEXT or kind != "qa":
            report.robustness[system] = {c: interval(main_metric(m)) for c, m in measured.items()}
        if kind != "asr" and "heard" in conditions[_CLEAN][0]:  # of asr, the transcript is the answer
            report.heard[system] = {c: interval(heard_errors(rows, options)) for c, rows in conditions.items()}
    report.differences = _differences(clean, options, blocks)
    if kind == "translation" and options.baseline in answers and len(answers) > 1:
        report.sacrebleu = _sacrebleu_tests(answers, options)
    _by_transcript_error(report, answers, options)
    return report


def measure(
    kind: str, rows: Answers, answers: Mapping[str, Mapping[str, Answers]], options: ScoringOptions
) -> list[Measurement]:
    """The metrics of one system under one condition."""
    said = [row["hypothesis"] for row in rows]
    references = [row["reference"] for row in rows]
    if kind == "asr":
        transcripts = [row["transcript"] for row in rows]
        return transcription_metrics(said, transcripts, options.language, options.spelling)
    if kind == "translation":
        if not all(references):
            raise ValueError(f"row {rows[references.index('')]['id']!r} has no reference translation in tgt_text")
        return translation_metrics(said, references, options.language)
    if TEXT not in answers:
        raise ValueError("spoken question answering is measured against the LLM's answers to the text: add --text")
    text_answers = [row["hypothesis"] for row in answers[TEXT][_CLEAN]]
    return answer_metrics(said, text_answers, references if all(references) else None, options.language)


def main_metric(measurements: Sequence[Measurement]) -> Measurement:
    """The one of curves: BLEU, Self-BLEU, the normalised error rate in words (in letters where there are no words)."""
    normalized = [m for m in measurements if "normalized" in m.name]
    return (normalized or list(measurements))[0]


def heard_errors(rows: Answers, options: ScoringOptions) -> Measurement:
    """Error rate of the transcripts that a cascade made on its way."""
    heard, transcripts = [row["heard"] for row in rows], [row["transcript"] for row in rows]
    # The speech's language, which is the answers' but in translation: there, the basic normaliser serves all.
    return error_rate(heard, transcripts, "WER", "", True)


def _differences(
    clean: Mapping[str, Sequence[Measurement]], options: ScoringOptions, blocks: Sequence[str] | None
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


def _sacrebleu_tests(answers: Mapping[str, Mapping[str, Answers]], options: ScoringOptions) -> dict[str, SacrebleuTest]:
    names = [options.baseline, *(name for name in answers if name != options.baseline)]
    systems = {name: [row["hypothesis"] for row in answers[name][_CLEAN]] for name in names}
    references = [row["reference"] for row in answers[options.baseline][_CLEAN]]
    draws = {"bs": options.samples, "ar": options.trials}
    return {
        test: sacrebleu_test(systems, references, options.language, test, count, options.seed)
        for test, count in draws.items()
    }


def _by_transcript_error(
    report: TaskReport, answers: Mapping[str, Mapping[str, Answers]], options: ScoringOptions
) -> None:
    """How every system does on the rows that the (first) cascade heard well, badly, ...: clean speech."""
    if not report.heard:
        return
    errors = heard_errors(answers[next(iter(report.heard))][_CLEAN], options).statistics
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
            chosen = main_metric(measure(report.kind, conditions[_CLEAN], answers, options))
            report.by_error[name][system] = bootstrap_interval(
                chosen.statistics[places], chosen.score_of, options.samples, options.seed
            )


def _check_rows(answers: Mapping[str, Mapping[str, Answers]], first: Answers) -> None:
    ids = [row["id"] for row in first]
    if not ids:
        raise ValueError("the manifest has no rows: there is nothing to score")
    for system, conditions in answers.items():
        for condition, rows in conditions.items():
            if [row["id"] for row in rows] != ids:
                raise ValueError(f"{system} ({condition}) has other rows than the other systems: no score")


# ---- report --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Attributes: tasks by their kind; boundary errors of systems with CIF; VoiceBench's judgements; settings."""

    tasks: dict[str, TaskReport] = field(default_factory=dict)
    alignment: dict[str, tuple[BoundarySummary, Interval]] = field(default_factory=dict)
    judgements: dict[str, dict[str, Interval]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def write_report(report: Report, folder: Path) -> None:
    """Writes ``report.md``, ``report.json`` and the pictures; each file appears when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, task in report.tasks.items():
        plot_scores(task.scores, folder / f"scores-{kind}.png")
        if _has_conditions(task):
            plot_robustness(task.robustness, task.main, folder / f"robustness-{kind}.png")
    write_whole(folder / "report.json", json.dumps(_plain(report), indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "report.md", markdown(report))


def markdown(report: Report) -> str:
    """The report as text."""
    parts = ["# Evaluation\n", "Figures are of the whole test set, with 95 % intervals.\n", _overview(report)]
    parts += [_task_section(task) for task in report.tasks.values()]
    if report.judgements:
        parts.append("## VoiceBench's judgements\n\n" + score_table(report.judgements, 2))
    if report.alignment:
        parts.append(_alignment_section(report.alignment))
    settings = "".join(f"- {name}: `{value}`\n" for name, value in report.settings.items())
    return "\n".join([*parts, "## Settings\n", settings])


def _overview(report: Report) -> str:
    """Systems x tasks, by their main metrics."""
    table: dict[str, dict[str, Interval]] = {}
    for kind, task in report.tasks.items():
        for system, scores in task.scores.items():
            if task.main in scores:
                table.setdefault(system, {})[f"{kind}: {task.main}"] = scores[task.main]
    return score_table(table)


def _task_section(task: TaskReport) -> str:
    speakers = f", {task.speakers} speaker{'s' * (task.speakers > 1)}" if task.speakers else ""
    parts = [f"## {TITLES[task.kind]} ({task.rows} utterances{speakers})\n", score_table(task.scores)]
    parts.append("".join(f"- {name}: `{signature}`\n" for name, signature in task.signatures.items()))
    parts.append(f"![scores](scores-{task.kind}.png)\n")
    if task.differences:
        drawn = "whole speakers" if task.kind == "asr" else "utterances"
        parts += [f"### Which differences hold\n\nDrawn and exchanged: {drawn}. Corrected: Holm.\n"]
        parts.append(difference_table(task.differences))
    for test, result in task.sacrebleu.items():
        name = {"bs": "paired bootstrap", "ar": "paired approximate randomisation"}[test]
        parts.append(f"sacreBLEU's own {name}, against {next(iter(result.results))}:\n")
        parts.append(_sacrebleu_table(result))
    if _has_conditions(task):
        parts += [f"### Degraded speech: {task.main}\n", score_table(task.robustness)]
        parts.append(f"![robustness](robustness-{task.kind}.png)\n")
    if task.heard:
        parts.append(_travel(task))
    return "\n".join(parts)


def _travel(task: TaskReport) -> str:
    """How an error in a cascade's transcript travels."""
    parts = ["### How an error in the cascade's transcript travels\n"]
    for system, heard in task.heard.items():
        rows = [[c, format_score(wer), format_score(task.robustness[system][c])] for c, wer in heard.items()]
        parts.append(markdown_table(["speech", f"WER of {system}'s transcript", f"{task.main} of its answers"], rows))
    if task.by_error:
        parts.append(
            f"{task.main} by the error rate of the transcript, clean speech (rows: utterances of that kind):\n"
        )
        systems = list(next(iter(task.by_error.values())))
        rows = [
            [name, str(task.bins[name]), *(format_score(scores[s]) for s in systems)]
            for name, scores in task.by_error.items()
        ]
        parts.append(markdown_table(["WER of the transcript", "rows", *systems], rows))
    return "\n".join(parts)


def _sacrebleu_table(test: SacrebleuTest) -> str:
    metrics = list(test.signatures)
    heading = ["system", *(cell for metric in metrics for cell in (metric, "p"))]
    rows = []
    for system, results in test.results.items():
        cells = [system]
        for metric in metrics:
            one = results[metric]
            margin = f" ({one.mean:.1f} ± {one.margin:.1f})" if one.mean is not None else ""
            cells += [f"{one.score:.1f}{margin}", "" if one.p is None else f"{one.p:.4f}"]
        rows.append(cells)
    signatures = "".join(f"- {name}: `{signature}`\n" for name, signature in test.signatures.items())
    return markdown_table(heading, rows) + "\n" + signatures


def _alignment_section(alignment: Mapping[str, tuple[BoundarySummary, Interval]]) -> str:
    rows = [
        [
            system,
            format_score(interval, 0),
            f"{summary.median_ms:.0f}",
            f"{summary.bias_ms:+.0f}",
            str(summary.matched),
            str(summary.unmatched),
        ]
        for system, (summary, interval) in alignment.items()
    ]
    heading = ["system", "mean absolute difference (ms)", "median (ms)", "bias (ms)", "words", "words not matched"]
    pictures = "".join(f"\n![boundaries of {system}](alignment-{system}.png)\n" for system in alignment)
    text = "CIF's token boundaries against the word ends of Whisper's cross-attention.\n\n"
    return "## Alignment\n\n" + text + markdown_table(heading, rows) + pictures


def _has_conditions(task: TaskReport) -> bool:
    return any(len(row) > 1 for row in task.robustness.values())


def _plain(value: Any) -> Any:
    """JSON has no NaN, no named tuples and no data classes."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
