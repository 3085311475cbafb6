"""Estimates of contrasts over seeds and clusters, and verdicts: holds, equivalent, undecided, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from blspkd_fairseq.evaluation.contrasts import LEVEL, Contrast
from blspkd_fairseq.evaluation.metrics import Measurement
from blspkd_fairseq.evaluation.significance import holm
from blspkd_fairseq.evaluation.variance import (
    MIN_CLUSTERS,
    MIN_SEEDS,
    Arm,
    Estimate,
    VarianceError,
    arm_of,
    cluster_sums,
    estimate,
)

HOLDS, OPPOSITE, EQUIVALENT, UNDECIDED, NONE = "holds", "the opposite holds", "equivalent", "undecided", "no verdict"
Seed = int | None


@dataclass(frozen=True, eq=False)
class Runs:
    """One metric of several systems on the same rows.

    Attributes:
        of: ``[system][seed]``; the only seed of a system without seeds is None.
        factors: one or two, each with the name of a cluster per row; none: every row is a cluster.
    """

    of: Mapping[str, Mapping[Seed, Measurement]]
    factors: Sequence[Sequence[str]] = ()

    def arm(self, system: str) -> Arm:
        """Raises: VarianceError, with the system's name."""
        measured = list(self.of[system].values())
        if len({(one.name, one.signature) for one in measured}) > 1:
            raise VarianceError(f"the seeds of {system} were not measured in the same way")
        if len({one.statistics.shape for one in measured}) > 1:
            raise VarianceError(f"the seeds of {system} have not the same rows")
        statistics = np.stack([one.statistics for one in measured])
        return arm_of(statistics, measured[0].score_of, self.factors, is_fixed=None in self.of[system])

    def score(self, system: str) -> Estimate:
        """A system's mean score over its seeds."""
        return estimate(self.arm(system))

    def difference(self, better: str, worse: str, shared_start: bool) -> Estimate:
        """The first less the second.

        Raises:
            VarianceError: they were not measured in the same way, are no pairs, or do not vary.
        """
        pair = [next(iter(self.of[name].values())) for name in (better, worse)]
        if pair[0].signature != pair[1].signature or pair[0].less_is_better != pair[1].less_is_better:
            raise VarianceError(
                f"{better} ({pair[0].signature}) and {worse} ({pair[1].signature}) were not measured in the same way"
            )
        if shared_start and list(self.of[better]) != list(self.of[worse]):
            raise VarianceError(f"{better} and {worse} have not the same seeds, so that no start is shared")
        return estimate(self.arm(better), self.arm(worse), shared_start)

    def by_cluster(self, better: str, worse: str) -> dict[str, float]:
        """Differences of each cluster's own scores, mean over seeds; of the first factor."""
        if not self.factors:
            return {}
        names = sorted(set(self.factors[0]))
        means = []
        for system in (better, worse):
            sums = [cluster_sums(one.statistics, self.factors[0]) for one in self.of[system].values()]
            score_of = next(iter(self.of[system].values())).score_of
            means.append(np.mean([score_of(one) for one in sums], axis=0))
        return dict(zip(names, (means[0] - means[1]).tolist(), strict=True))


@dataclass(frozen=True)
class Verdict:
    """One contrast.

    Attributes:
        contrast: as planned. metric: its name.
        scores: mean over seeds of both systems.
        estimate: of ``better`` less ``worse``; None if there is none.
        verdict: "" of a secondary one.
        corrected: Holm's p over all primary contrasts, NaN if there is none.
        smallest_effect: of the task; sentence: why there is no verdict, or what limits it.
        by_cluster: differences of single clusters.
    """

    contrast: Contrast
    metric: str
    scores: tuple[float, float]
    estimate: Estimate | None
    verdict: str = ""
    corrected: float = float("nan")
    smallest_effect: float = float("nan")
    less_is_better: bool = False
    sentence: str = ""
    by_cluster: Mapping[str, float] = field(default_factory=dict)


def decide(value: float, estimated: Estimate, corrected: float, smallest_effect: float, level: float) -> str:
    """The verdict on one primary contrast.

    Args:
        value: the difference, positive in favour of what is to be shown.
        estimated: its interval; symmetric, so that the sign is of no matter.
        corrected: p over all primary contrasts.
        smallest_effect: of interest.
        level: of the test; equivalence has the interval of twice that.
    """
    if (estimated.seeds is not None and estimated.seeds < MIN_SEEDS) or estimated.clusters < MIN_CLUSTERS:
        return NONE
    if corrected < level and abs(value) >= smallest_effect:
        return HOLDS if value > 0 else OPPOSITE
    low, high = estimated.interval(1 - 2 * level)
    return EQUIVALENT if -smallest_effect < low and high < smallest_effect else UNDECIDED


def compare_runs(contrast: Contrast, metric: str, runs: Runs, smallest_effect: float = float("nan")) -> Verdict:
    """The estimate of one contrast, yet without a verdict."""
    pair = contrast.better, contrast.worse
    scores = [float(np.mean([one.score for one in runs.of[name].values()])) for name in pair]
    found, clusters = None, {}
    try:
        found = runs.difference(*pair, contrast.shared_start)
        sentence = found.note
        clusters = runs.by_cluster(*pair)
    except VarianceError as error:
        sentence = str(error)
    return Verdict(
        contrast=contrast,
        metric=metric,
        scores=(scores[0], scores[1]),
        estimate=found,
        smallest_effect=smallest_effect,
        less_is_better=next(iter(runs.of[contrast.better].values())).less_is_better,
        sentence=sentence,
        by_cluster=clusters,
    )


def correct(made: Sequence[Verdict], level: float = LEVEL) -> list[Verdict]:
    """Verdicts on all primary contrasts, Holm's correction over them together."""
    p_values = [one.estimate.p if one.estimate else float("nan") for one in made]
    decided = []
    for one, p in zip(made, holm(p_values), strict=True):
        if one.estimate is None:
            decided.append(_with(one, NONE, p))
            continue
        value = -one.estimate.value if one.less_is_better else one.estimate.value
        decided.append(_with(one, decide(value, one.estimate, p, one.smallest_effect, level), p))
    return decided


def _with(one: Verdict, verdict: str, corrected: float) -> Verdict:
    return replace(one, verdict=verdict, corrected=corrected)
