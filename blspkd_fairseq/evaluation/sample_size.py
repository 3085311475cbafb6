"""How many seeds and rows an effect needs to be found: power of the t test over seeds and clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from blspkd_fairseq.evaluation.variance import Estimate

_MOST_CLUSTERS = 1_000_000
_FAR = 4.0


@dataclass(frozen=True)
class Spread:
    """How a difference of two systems varies, in the metric's units.

    Attributes:
        seeds: standard deviation of the difference over seeds (of both systems together, where they share no start).
        clusters: over clusters of rows, each cluster's own difference. residual: of both factors together.
    """

    seeds: float
    clusters: float
    residual: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(one) and one >= 0 for one in (self.seeds, self.clusters, self.residual)):
            raise ValueError(f"standard deviations are {self}: give finite ones from 0 on")
        if not self.seeds + self.clusters + self.residual:
            raise ValueError("all standard deviations are 0: nothing varies, so that any size will do")


def spread_of_rows(seed_sd: float, row_sd: float, rows_per_cluster: float = 1, correlation: float = 0) -> Spread:
    """From the standard deviation of single rows' differences, and how alike rows of one cluster are (0 to 1).

    Raises:
        ValueError: numbers that are none of these.
    """
    if rows_per_cluster < 1 or not 0 <= correlation <= 1:
        raise ValueError(
            f"{rows_per_cluster:g} rows per cluster with a correlation of {correlation:g}: give 1 or more, and 0 to 1"
        )
    alike = 1 + (rows_per_cluster - 1) * correlation
    return Spread(seed_sd, row_sd * math.sqrt(alike / rows_per_cluster))


def spread_of_pilot(pilot: Estimate, seeds: int, clusters: int) -> Spread:
    """Components of a pilot's estimate, below 0 taken as 0.

    Args:
        pilot: of a difference.
        seeds: of each system. clusters: of the factor.
    """
    rest = pilot.v_residual * seeds * clusters
    of_seeds = max(0.0, pilot.v_seeds * seeds - rest / clusters)
    of_clusters = max(0.0, pilot.v_clusters * clusters - rest / seeds)
    return Spread(math.sqrt(of_seeds), math.sqrt(of_clusters), math.sqrt(max(0.0, rest)))


def seed_sd_interval(seed_sd: float, seeds: int, level: float = 0.8) -> tuple[float, float]:
    """How little a pilot of few seeds knows of their standard deviation (chi squared)."""
    df = seeds - 1
    ends = stats.chi2.ppf([0.5 + level / 2, 0.5 - level / 2], df)
    low, high = (seed_sd * math.sqrt(df / end) for end in ends)
    return low, high


def power(effect: float, spread: Spread, seeds: int, clusters: int, level: float = 0.05) -> float:
    """Probability that a difference of ``effect`` is found at a two-sided level, 0 to 1.

    Args:
        effect: the true difference.
        spread: of the difference.
        seeds, clusters: two or more of each.
        level: of the test: Holm's worst case is 0.05 by the number of primary contrasts.
    """
    v_r = spread.residual**2 / (seeds * clusters)
    v_a, v_b = spread.seeds**2 / seeds + v_r, spread.clusters**2 / clusters + v_r
    variance = v_a + v_b - v_r
    parts = v_a**2 / (seeds - 1) + v_b**2 / (clusters - 1) + v_r**2 / ((seeds - 1) * (clusters - 1))
    df = variance**2 / parts
    critical, shift = stats.t.ppf(1 - level / 2, df), abs(effect) / math.sqrt(variance)
    # Found with the wrong sign; so far out that scipy has no number for it, it is none.
    wrong = stats.nct.cdf(-critical, df, shift) if shift < _FAR else 0.0
    return float(stats.nct.sf(critical, df, shift) + wrong)


def clusters_needed(
    effect: float, spread: Spread, seeds: int, target: float = 0.8, level: float = 0.05, least: int = 20
) -> int | None:
    """The smallest number of clusters with the wanted power; None if no number gives it with so few seeds."""
    if power(effect, spread, seeds, _MOST_CLUSTERS, level) < target:
        return None
    low, high = least, _MOST_CLUSTERS
    while low < high:
        middle = (low + high) // 2
        if power(effect, spread, seeds, middle, level) >= target:
            high = middle
        else:
            low = middle + 1
    return low
