"""One report of everything that was measured: Markdown, JSON and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blspkd_fairseq.evaluation.alignment import BoundarySummary, Calibration
from blspkd_fairseq.evaluation.cost import Cost, cost_section
from blspkd_fairseq.evaluation.plain import plain
from blspkd_fairseq.evaluation.plots import plot_robustness, plot_scores
from blspkd_fairseq.evaluation.scoring import TaskReport
from blspkd_fairseq.evaluation.significance import MIN_BLOCKS, Interval, SacrebleuTest
from blspkd_fairseq.evaluation.tables import (
    difference_table,
    format_score,
    in_full,
    markdown_table,
    score_table,
)
from blspkd_fairseq.files import write_whole

BoundaryFigures = tuple[BoundarySummary, Interval, Calibration]
TITLES = {"asr": "Speech recognition", "translation": "Speech translation", "qa": "Spoken question answering"}


@dataclass
class Report:
    """Attributes: tasks by their kind; boundary errors of systems with CIF; costs by system; settings."""

    tasks: dict[str, TaskReport] = field(default_factory=dict)
    alignment: dict[str, BoundaryFigures] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def write_report(report: Report, folder: Path) -> None:
    """Writes ``report.md``, ``report.json`` and the pictures; each file appears when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, task in report.tasks.items():
        plot_scores(task.scores, folder / f"scores-{kind}.png")
        if _has_conditions(task):
            plot_robustness(task.robustness, task.main, folder / f"robustness-{kind}.png")
    write_whole(folder / "report.json", json.dumps(plain(report), indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "report.md", markdown(report))


def markdown(report: Report) -> str:
    """The report as text."""
    parts = ["# Evaluation\n", "Figures are of the whole test set, with 95 % intervals.\n", _overview(report)]
    parts += [_task_section(task, report.settings.get("llm_dtype", "")) for task in report.tasks.values()]
    if report.alignment:
        parts.append(_alignment_section(report.alignment))
    if report.costs:
        parts.append(cost_section(report.costs))
    settings = "".join(f"- {name}: `{value}`\n" for name, value in report.settings.items())
    return "\n".join([*parts, "## Settings\n", settings])


def _overview(report: Report) -> str:
    """Systems x tasks, by their main metrics."""
    table: dict[str, dict[str, Interval]] = {}
    for kind, task in report.tasks.items():
        for system, scores in task.scores.items():
            if task.main in scores:
                table.setdefault(system, {})[f"{kind}: {in_full(task.main)}"] = scores[task.main]
    return score_table(table)


def _task_section(task: TaskReport, llm_dtype: str) -> str:
    speakers = f", {task.speakers} {task.unit}{'s' * (task.speakers > 1)}" if task.speakers else ""
    parts = [f"## {TITLES[task.kind]} ({task.rows} utterances{speakers})\n", score_table(task.scores)]
    parts.append("".join(f"- {in_full(name)}: `{signature}`\n" for name, signature in task.signatures.items()))
    if task.kind == "qa" and llm_dtype in ("bfloat16", "float16"):
        parts.append(_ROUNDED.format(dtype=llm_dtype))
    parts.append(f"![scores](scores-{task.kind}.png)\n")
    if task.errors:
        parts.append(_error_section(task))
    if task.differences:
        parts += ["### Differences of these systems\n", _difference_text(task), difference_table(task.differences)]
    for test, result in task.sacrebleu.items():
        name = {"bs": "bootstrap (mean ± margin)", "ar": "paired approximate randomisation"}[test]
        parts.append(f"sacreBLEU's own {name}, against {next(iter(result.results))}:\n")
        parts.append(_sacrebleu_table(result))
    if _has_conditions(task):
        draws = f", mean over {task.noise_seeds} draws of the noise" if task.noise_seeds > 1 else ""
        parts += [f"### Degraded speech: {in_full(task.main)}{draws}\n", score_table(task.robustness)]
        parts.append(f"![robustness](robustness-{task.kind}.png)\n")
    if task.speakers > 1:
        parts.append(_speaker_section(task))
    if task.heard:
        parts.append(_travel(task))
    return "\n".join(parts)


# SmolLM2-135M, batches of 16 and of 48: 64 of answers of 40 tokens (examples/comparison/EVALUATION.md).
_ROUNDED = (
    "The LLM is rounded to {dtype}: to the same text it answers otherwise in batches of another size, and a system "
    "that hears everything may stay well below 100 against the text answers. With `--llm-dtype float32` it does not.\n"
)


def _difference_text(task: TaskReport) -> str:
    drawn = f"whole {task.unit}s" if task.speakers >= MIN_BLOCKS else "utterances"
    return (
        f"Drawn and exchanged: {drawn}. Corrected: Holm, over the systems of one metric. *Yes* is said of these very "
        "systems; how another training seed would do is not in it (`blspkd compare` takes seeds).\n"
    )


def _error_section(task: TaskReport) -> str:
    """What stands behind the error rate, in percent."""
    heading = [
        "system",
        "substitutions",
        "deletions",
        "insertions",
        "capped at 100 % a row",
        "median row",
        "rows above",
    ]
    rows = [
        [
            system,
            *(_percent(one) for one in (e.substitutions, e.deletions, e.insertions)),
            format_score(e.capped),
            _percent(e.median),
            format_score(e.above_100),
        ]
        for system, e in task.errors.items()
    ]
    signature = next(iter(task.errors.values())).signature
    return f"### Errors in detail: {in_full(task.main)}\n\n`{signature}`\n\n" + markdown_table(heading, rows)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def _speaker_section(task: TaskReport) -> str:
    """How far single speakers are from one another."""
    rows = []
    for system, of_speaker in task.by_speaker.items():
        scores = [score for score in of_speaker.values() if not math.isnan(score)]
        cells = [f"{one:.1f}" for one in np.quantile(scores, [0, 0.25, 0.5, 0.75, 1])] if scores else ["–"] * 5
        rows.append([system, *cells])
    heading = [
        f"{in_full(task.main)} of single {task.unit}s",
        "lowest",
        "a quarter below",
        "median",
        "a quarter above",
        "highest",
    ]
    return f"### By {task.unit}\n\n" + markdown_table(heading, rows)


def _travel(task: TaskReport) -> str:
    """How an error in a cascade's transcript travels."""
    parts = ["### How an error in the cascade's transcript travels\n"]
    for system, heard in task.heard.items():
        rows = [[c, format_score(wer), format_score(task.robustness[system][c])] for c, wer in heard.items()]
        parts.append(
            markdown_table(
                ["speech", f"{task.heard_metric} of {system}'s transcript", f"{in_full(task.main)} of its answers"],
                rows,
            )
        )
    if task.by_error:
        parts.append(
            f"{in_full(task.main)} by the error rate of {task.binned_by}'s transcript, clean speech. As its own errors "
            f"choose the rows, {task.binned_by} looks better than it is where they are few, and worse where they are "
            "many: its column shows how its errors travel, and is not to be compared with the others.\n"
        )
        systems = list(next(iter(task.by_error.values())))
        rows = [
            [name, str(task.bins[name]), *(format_score(scores[s]) for s in systems)]
            for name, scores in task.by_error.items()
        ]
        parts.append(markdown_table([f"{task.heard_metric} of the transcript", "rows", *systems], rows))
    return "\n".join(parts)


def _sacrebleu_table(test: SacrebleuTest) -> str:
    metrics = list(test.signatures)
    has_p = any(one.p is not None for results in test.results.values() for one in results.values())
    heading = ["system", *(cell for metric in metrics for cell in ((metric, "p") if has_p else (metric,)))]
    rows = []
    for system, results in test.results.items():
        cells = [system]
        for metric in metrics:
            one = results[metric]
            margin = f" ({one.mean:.1f} ± {one.margin:.1f})" if one.mean is not None else ""
            cells.append(f"{one.score:.1f}{margin}")
            cells += [("" if one.p is None else f"{one.p:.4f}")] if has_p else []
        rows.append(cells)
    signatures = "".join(f"- {name}: `{signature}`\n" for name, signature in test.signatures.items())
    return markdown_table(heading, rows) + "\n" + signatures


def _alignment_section(alignment: Mapping[str, BoundaryFigures]) -> str:
    rows = [
        [
            system,
            format_score(interval, 0),
            f"{summary.median_ms:.0f}",
            f"{summary.bias_ms:+.0f}",
            f"{summary.centred_ms:.0f}",
            str(summary.matched),
            str(summary.unmatched),
        ]
        for system, (summary, interval, _) in alignment.items()
    ]
    heading = ["system", "mean absolute difference (ms)", "median", "bias", "without the bias", "words", "not matched"]
    pictures = "".join(f"\n![boundaries of {system}](alignment-{system}.png)\n" for system in alignment)
    whisper = next(iter(alignment.values()))[2]
    text = "CIF's token boundaries against the word ends of Whisper's cross-attention, forced onto the transcript."
    if whisper.known:
        text += (
            f" Where word ends are known ({whisper.known} joined recordings), Whisper itself is {whisper.error_ms:.0f}"
            f" ms off, with a bias of {whisper.bias_ms:+.0f} ms."
        )
    return f"## Alignment\n\n{text}\n\n" + markdown_table(heading, rows) + pictures


def _has_conditions(task: TaskReport) -> bool:
    return any(len(row) > 1 for row in task.robustness.values())
