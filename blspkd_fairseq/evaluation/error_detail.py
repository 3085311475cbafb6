"""What stands behind a word error rate: kinds of errors, and how much of it a few looping rows make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blspkd_fairseq.evaluation.metrics import Measurement, tokens_of


class EditCounts(NamedTuple):
    """Attributes: errors of an alignment with the fewest errors, and among those the fewest gaps."""

    substitutions: int
    deletions: int
    insertions: int


@dataclass(frozen=True, eq=False)
class ErrorDetail:
    """One system's errors, in percent of the reference's words (letters where words are not spaced).

    Attributes:
        signature: of the error rate: unit and normaliser.
        substitutions, deletions, insertions: their sum is the error rate.
        median: of the rows' own error rates, rows with an empty reference aside.
        capped: the error rate when no row counts more errors than it has words (one if it has none).
        above_100: share of rows with more errors than words.
    """

    signature: str
    substitutions: float
    deletions: float
    insertions: float
    median: float
    capped: Measurement
    above_100: Measurement


def error_detail(
    whole: Measurement,
    hypotheses: Sequence[str],
    references: Sequence[str],
    unit: str = "WER",
    language: str = "",
    normalize: bool = True,
    spelling: Mapping[str, str] | None = None,
) -> ErrorDetail:
    """Takes an error rate apart.

    Args:
        whole: of :func:`~blspkd_fairseq.evaluation.metrics.error_rate`, which has counted the errors of each row.
        hypotheses, references, unit, language, normalize, spelling: what it was given.
    """
    tokens = tokens_of(unit, language, normalize, spelling)
    errors, words = whole.statistics.T
    rows = zip(errors, hypotheses, references, strict=True)
    counts = np.array([edit_counts(tokens(h), tokens(r)) if wrong else (0, 0, 0) for wrong, h, r in rows])
    total = words.sum()
    kinds = (100 * counts.sum(axis=0) / total if total else np.full(3, np.nan)).tolist()
    rates = 100 * errors[words > 0] / words[words > 0]
    return ErrorDetail(
        signature=whole.signature,
        substitutions=kinds[0],
        deletions=kinds[1],
        insertions=kinds[2],
        median=float(np.median(rates)) if len(rates) else float("nan"),
        capped=capped_error_rate(whole),
        above_100=rows_above_100(whole),
    )


def capped_error_rate(whole: Measurement) -> Measurement:
    """Of an error rate: no row counts more errors than it has words, or one if it has none."""
    errors, words = whole.statistics.T
    statistics = np.stack([np.minimum(errors, np.maximum(words, 1)), words], axis=1)
    return Measurement(f"capped {whole.name}", f"{whole.signature}|cap:100%", statistics, whole.score_of, True)


def rows_above_100(whole: Measurement) -> Measurement:
    """Percentage of rows with more errors than words, as loops make them."""
    errors, words = whole.statistics.T
    statistics = np.stack([errors > words, np.ones(len(words))], axis=1).astype(np.float64)
    return Measurement("rows above 100 %", whole.signature, statistics, whole.score_of, True, is_proportion=True)


def edit_counts(hypothesis: Sequence[str], reference: Sequence[str]) -> EditCounts:
    """Kinds of errors of one row, from one row of the table of edits after another."""
    # A gap costs one unit more than a substitution does, far below the cost of an error.
    error = len(hypothesis) + len(reference) + 1
    gap = error + 1
    vocabulary: dict[str, int] = {}
    heard = np.array([vocabulary.setdefault(token, len(vocabulary)) for token in hypothesis], dtype=np.int64)
    steps = gap * np.arange(len(hypothesis) + 1)
    row = steps
    for token in reference:
        same = heard == vocabulary.setdefault(token, len(vocabulary))
        best = np.concatenate([[row[0] + gap], np.minimum(row[1:] + gap, row[:-1] + np.where(same, 0, error))])
        row = np.minimum.accumulate(best - steps) + steps  # and insertions after any of them
    errors, gaps = divmod(int(row[-1]), error)
    surplus = len(hypothesis) - len(reference)
    insertions = (gaps + surplus) // 2
    return EditCounts(errors - gaps, gaps - insertions, insertions)
