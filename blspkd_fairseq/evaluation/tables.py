"""Markdown tables of scores with intervals, and of the differences that hold."""

import math
from collections.abc import Mapping, Sequence

from blspkd_fairseq.evaluation.significance import Difference, Interval

_NOTHING = "–"
# Names in files that mean something else elsewhere ("Self-BLEU" is a measure of diversity, Zhu et al. 2018).
_IN_FULL = {
    "Self-BLEU": "corpus BLEU against the text answers",
    "Self-ROUGE-L": "ROUGE-L against the text answers",
}


def in_full(metric: str) -> str:
    """The name of a metric in tables and pictures."""
    return _IN_FULL.get(metric, metric)


def format_score(interval: Interval, digits: int = 1) -> str:
    """``12.3 [11.0, 13.5]``; a dash for a score that is not defined."""
    if math.isnan(interval.score):
        return _NOTHING
    return f"{interval.score:.{digits}f} {_brackets(interval.low, interval.high, f'.{digits}f')}"


def score_table(scores: Mapping[str, Mapping[str, Interval]], digits: int = 1, corner: str = "system") -> str:
    """One row per system, one column per metric (in the order of their first appearance), notes below.

    Args:
        scores: ``scores[system][metric]``; a system may lack a metric.
        digits: after the point.
        corner: heading of the first column.
    """
    metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
    rows = [
        [system, *(format_score(row[metric], digits) if metric in row else _NOTHING for metric in metrics)]
        for system, row in scores.items()
    ]
    notes = [(row[metric].note, f"{in_full(metric)} of {system}") for system, row in scores.items() for metric in row]
    return markdown_table([corner, *map(in_full, metrics)], rows) + _footnotes(notes)


def difference_table(differences: Sequence[Difference], digits: int = 1) -> str:
    """One row per comparison: difference with interval, p and Holm's corrected p of both tests, whether it holds."""
    heading = ["A", "B", "metric", "A − B", "p bootstrap", "corrected", "p randomisation", "corrected", "differ"]
    rows = [
        [
            one.system_a,
            one.system_b,
            in_full(one.metric),
            f"{one.difference:+.{digits}f} {_brackets(one.low, one.high, f'+.{digits}f')}",
            *(format_p(p) for p in (one.p_bootstrap, one.corrected_bootstrap)),
            *(format_p(p) for p in (one.p_randomization, one.corrected_randomization)),
            _NOTHING if math.isnan(one.corrected_randomization) else "yes" if one.holds else "no",
        ]
        for one in differences
    ]
    notes = [(one.note, f"{in_full(one.metric)} of {one.system_a} and {one.system_b}") for one in differences]
    return markdown_table(heading, rows) + _footnotes(notes)


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as they are, but for ``|`` and line breaks; ends with a line break."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _brackets(low: float, high: float, form: str) -> str:
    return "[–]" if math.isnan(low) else f"[{low:{form}}, {high:{form}}]"


def format_p(p: float) -> str:
    """Three digits; a dash for none."""
    if math.isnan(p):
        return _NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _footnotes(notes: Sequence[tuple[str, str]]) -> str:
    """One line per different note, with what it is about unless that is the whole table."""
    lines = []
    for text in dict.fromkeys(note for note, _ in notes if note):
        about = [one for note, one in notes if note == text]
        lines.append(text if len(about) == len(notes) else f"{text}: {', '.join(about)}")
    return "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in lines)
