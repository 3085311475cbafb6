"""Figures of rows and their intervals, as the tables of a comparison show them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from trainings import at_the_edge, best_rate

from blspkd_fairseq.evaluation.metrics import Measurement
from blspkd_fairseq.evaluation.significance import Interval
from blspkd_fairseq.evaluation.variance import VarianceError
from blspkd_fairseq.evaluation.verdicts import Runs

NOT_MEASURED = "not measured"


def ratio(name: str, sums: Sequence[float], counts: Sequence[float], scale: float = 1.0) -> Measurement:
    """A sum over a sum, such as a KL over its tokens; less is better."""
    statistics = np.array([sums, counts], dtype=np.float64).T

    def score_of(total: np.ndarray) -> np.ndarray:
        count = total[..., 1]
        return scale * np.divide(total[..., 0], count, out=np.full(np.shape(count), np.nan), where=count > 0)

    return Measurement(name, name, statistics, score_of, True)


def mean_of_seeds(by_seed: Mapping[int | None, Measurement], clusters: Sequence[str]) -> Interval:
    """The mean of the seeds with a t interval over seeds and clusters, within what the figure can be.

    Without an interval where nothing can be said; the seed of a system without training is None.
    """
    measured = list(by_seed.values())
    mean = float(np.mean([one.score for one in measured]))
    try:
        found = Runs({"it": by_seed}, [clusters]).score("it")
    except VarianceError as error:
        return Interval(mean, math.nan, math.nan, str(error))
    low, high = found.interval()
    return Interval(mean, max(0.0, low), high if measured[0].less_is_better else min(100.0, high), found.note)


def cell(interval: Interval | None, form: str) -> str:
    """``5.3 [4.1, 6.5]``; a dash where a system has no such figure."""
    if interval is None:
        return "–"
    bounds = f" [{interval.low:{form}}, {interval.high:{form}}]"
    return f"{interval.score:{form}}" + (bounds if not math.isnan(interval.low) else "")


def from_to(counts: Sequence[int]) -> str:
    """``1 to 3``, or ``3`` where all are the same."""
    return f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])


def rates_table(searches: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """The validation loss at each learning rate that was tried, the best in bold, one at the edge said."""
    lines = ["| searched on | validation loss at each learning rate | |", "|---|---|---|"]
    for name, losses in searches.items():
        rates = sorted(map(float, losses))
        best = best_rate(dict(losses), rates)
        cells = [f"{rate:g}: {'**' * (rate == best)}{losses[f'{rate:g}']:.3f}{'**' * (rate == best)}" for rate in rates]
        edge = "the best is at the edge: a better one may lie beyond" if at_the_edge(dict(losses)) else ""
        lines.append(f"| {titles[name]} | {', '.join(cells)} | {edge} |")
    return "\n".join(lines) + "\n"
