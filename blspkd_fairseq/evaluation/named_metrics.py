"""The metrics that a plan can name, computed from texts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from blspkd_fairseq.evaluation import metrics
from blspkd_fairseq.evaluation.error_detail import capped_error_rate, rows_above_100
from blspkd_fairseq.evaluation.metrics import Measurement

_Metric = Callable[[Sequence[str], Sequence[str], str], Measurement]


def _error_rate(unit: str, normalize: bool) -> _Metric:
    return lambda hypotheses, references, language: metrics.error_rate(
        hypotheses, references, unit, language, normalize
    )


METRICS: dict[str, _Metric] = {
    "WER": _error_rate("WER", True),
    "WER raw": _error_rate("WER", False),
    "WER capped": lambda *rows: capped_error_rate(_error_rate("WER", True)(*rows)),
    "rows above 100 %": lambda *rows: rows_above_100(_error_rate("WER", True)(*rows)),
    "CER": _error_rate("CER", True),
    "CER raw": _error_rate("CER", False),
    "BLEU": metrics.bleu,
    "chrF2": lambda hypotheses, references, language: metrics.chrf(hypotheses, references),
    "ROUGE-L": metrics.rouge_l,
    "exact match": metrics.exact_match,
    "contains match": metrics.contains_match,
}


def measure(name: str, hypotheses: Sequence[str], references: Sequence[str], language: str) -> Measurement:
    """The metric of that name, which it then bears.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown: choose among {', '.join(METRICS)}, or give row scores of it")
    return replace(METRICS[name](hypotheses, references, language), name=name)
