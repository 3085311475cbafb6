"""Confidence intervals and paired tests of corpus metrics, from the sufficient statistics of their rows.

A metric is ``statistics [rows, k]`` and a function from sums over rows ``[..., k]`` to scores ``[...]``, as in
:class:`~blspkd_fairseq.evaluation.metrics.Measurement`. Rows of one speaker are not independent: with ``blocks`` (a
speaker per row) whole speakers are drawn or exchanged; fewer than 10 of them stand for no others, and are not tested.
All of it is about these very systems: what another training seed would give is in
:mod:`~blspkd_fairseq.evaluation.variance`. Draws depend on the seed and the number of rows or speakers only, so the
same call gives the same figures.

Sources: bootstrap of BLEU, Koehn 2004; of WER, by speaker, Bisani and Ney 2004; approximate randomisation, Noreen 1989
and Riezler and Maxwell 2005; several comparisons, Holm 1979.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import sacrebleu
from sacrebleu.significance import PairedTest
from scipy import stats

from blspkd_fairseq.evaluation.metrics import Measurement, bleu_tokenizer

Score = Callable[[np.ndarray], np.ndarray]

SEED = 12345
SAMPLES, TRIALS = 10_000, 100_000
MIN_ROWS = 20  # for an interval
MIN_BLOCKS, FEW_BLOCKS = 10, 20  # for a test; for one without a warning
_LEVEL = 0.05
_TRIALS_AT_ONCE = 256
_TOLERANCE = 1e-9  # of a score: the same sums added in another order


class Interval(NamedTuple):
    """A score with its 95 % interval. Attributes: ``note``: what was done otherwise than asked, or nothing."""

    score: float
    low: float
    high: float
    note: str = ""


class PairedResult(NamedTuple):
    """Score of A minus score of B, two-sided p, and the 95 % interval of the difference (NaN where not estimated)."""

    difference: float
    low: float
    high: float
    p: float
    note: str = ""


# --- bootstrap --------------------------------------------------------------------------------------


def bootstrap_interval(
    statistics: np.ndarray,
    score_of: Score,
    samples: int = SAMPLES,
    seed: int = SEED,
    blocks: Sequence[str] | None = None,
) -> Interval:
    """Percentile interval of a corpus score.

    Args:
        statistics: ``[rows, k]``.
        score_of: sums ``[..., k]`` to scores ``[...]``.
        samples: resampled corpora.
        seed: of the draws.
        blocks: a speaker per row; an empty one is a speaker of its own. With fewer than 10 speakers rows are drawn: the
            interval is then about these speakers only, and the note says so.

    Returns:
        The score of the corpus as it is, the interval, and a note if rows were drawn although speakers were given, or
        if some resampled corpora had no score and were left out.

    Raises:
        ValueError: no rows, fewer than one sample, or not a block per row.
    """
    drawn, note = _into_blocks(statistics, blocks)
    scores = score_of(_resampled_sums(drawn, samples, seed))
    low, high, missing = _percentiles(scores)
    return Interval(float(score_of(statistics.sum(axis=0))), low, high, _join(note, missing))


def paired_bootstrap(
    statistics_a: np.ndarray,
    statistics_b: np.ndarray,
    score_of: Score,
    samples: int = SAMPLES,
    seed: int = SEED,
    blocks: Sequence[str] | None = None,
) -> PairedResult:
    """Both systems on the same resampled corpora.

    The p-value is twice the share of samples in which the difference has the other sign or is 0, the sample as it is
    counted in (Koehn 2004 and Bisani and Ney 2004 give the one-sided share): below 0.05 where the interval excludes 0.
    With fewer than 10 speakers there is none.

    Args, Raises: as :func:`bootstrap_interval`; both ``[rows, k]`` are of the same rows in the same order.
    """
    _check_pair(statistics_a, statistics_b)
    width = statistics_a.shape[1]
    drawn, note = _into_blocks(np.concatenate([statistics_a, statistics_b], axis=1), blocks)
    sums = _resampled_sums(drawn, samples, seed)
    differences = score_of(sums[:, :width]) - score_of(sums[:, width:])
    low, high, missing = _percentiles(differences)
    difference = _difference(statistics_a, statistics_b, score_of)
    p = float("nan") if has_few_blocks(blocks) else _sign_p(differences)
    return PairedResult(difference, low, high, p, _join(note, missing))


def _resampled_sums(statistics: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums ``[samples, k]`` of as many rows as there are, drawn with replacement."""
    if samples < 1:
        raise ValueError(f"{samples} samples: draw at least one")
    rng = np.random.default_rng(seed)
    rows = len(statistics)
    return np.stack([np.bincount(rng.integers(rows, size=rows), minlength=rows) @ statistics for _ in range(samples)])


def _percentiles(scores: np.ndarray) -> tuple[float, float, str]:
    defined = scores[~np.isnan(scores)]
    if not len(defined):
        return float("nan"), float("nan"), "no resampled corpus has a score"
    low, high = np.quantile(defined, [_LEVEL / 2, 1 - _LEVEL / 2])
    missing = len(scores) - len(defined)
    return float(low), float(high), f"{missing} of {len(scores)} resampled corpora have no score" if missing else ""


def _sign_p(differences: np.ndarray) -> float:
    defined = differences[~np.isnan(differences)]
    if not len(defined):
        return float("nan")
    fewer = min((defined <= _TOLERANCE).sum(), (defined >= -_TOLERANCE).sum())
    return min(1.0, 2 * (1 + float(fewer)) / (1 + len(defined)))


# --- intervals of measurements ----------------------------------------------------------------------


def interval_of(
    measured: Measurement, samples: int = SAMPLES, seed: int = SEED, blocks: Sequence[str] | None = None
) -> Interval:
    """The 95 % interval that suits a metric: Wilson's of a proportion over rows, else the bootstrap's.

    The bootstrap of a proportion of 0 or 100 % has no width: with speakers as blocks it is then Wilson's, each speaker
    counted once. Fewer than 20 rows get no interval. Arguments and errors as :func:`bootstrap_interval`.
    """
    drawn, note = _into_blocks(measured.statistics, blocks)
    if len(measured.statistics) < MIN_ROWS:
        return Interval(measured.score, float("nan"), float("nan"), f"fewer than {MIN_ROWS} rows: no interval")
    if measured.is_proportion and (len(drawn) == len(measured.statistics) or measured.score in (0.0, 100.0)):
        low, high = wilson(measured.score / 100, len(drawn))
        return Interval(measured.score, 100 * low, 100 * high, note)
    return bootstrap_interval(measured.statistics, measured.score_of, samples, seed, blocks)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share 0 to 1 of so many independent rows."""
    z = stats.norm.ppf(1 - _LEVEL / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = float(middle - half), float(middle + half)
    return max(0.0, low) if share > 0 else 0.0, min(1.0, high) if share < 1 else 1.0


# --- approximate randomisation ----------------------------------------------------------------------


def paired_randomization(
    statistics_a: np.ndarray,
    statistics_b: np.ndarray,
    score_of: Score,
    trials: int = TRIALS,
    seed: int = SEED,
    blocks: Sequence[str] | None = None,
) -> PairedResult:
    """Exchanges the outputs of the two systems at random, row by row or speaker by speaker.

    The p-value is the share of exchanges with a difference at least as large as the real one, the real one counted in
    (Riezler and Maxwell 2005). It estimates no interval. With ``n`` speakers no p is below ``2 ** (1 - n)``; with fewer
    than 10 there is none.

    Args, Raises: as :func:`paired_bootstrap`.
    """
    _check_pair(statistics_a, statistics_b)
    if trials < 1:
        raise ValueError(f"{trials} trials: make at least one")
    gain, note = _into_blocks(statistics_b - statistics_a, blocks)
    difference = _difference(statistics_a, statistics_b, score_of)
    total_a, total_b = statistics_a.sum(axis=0), statistics_b.sum(axis=0)
    as_large = 0
    for moved in _exchanged_sums(gain, trials, seed):
        exchanged = score_of(total_a + moved) - score_of(total_b - moved)
        as_large += int((np.abs(exchanged) >= abs(difference) - _TOLERANCE).sum())
    p = float("nan") if np.isnan(difference) or has_few_blocks(blocks) else (1 + as_large) / (1 + trials)
    least = "" if np.isnan(p) else _least_p_note(len(gain), trials)
    return PairedResult(difference, float("nan"), float("nan"), p, _join(note, least))


def least_p(units: int, trials: int) -> float:
    """The smallest p that an exchange of so many rows or speakers can give: all of them one way, or all the other."""
    return max(2.0 ** (1 - units), 1 / (1 + trials))


def _least_p_note(units: int, trials: int) -> str:
    least = least_p(units, trials)
    return f"no p of randomisation over {units} can be below {least:.2g}" if units < FEW_BLOCKS else ""


def _exchanged_sums(gain: np.ndarray, trials: int, seed: int) -> Iterator[np.ndarray]:
    """Sums ``[some trials, k]`` of ``gain`` over a random half of the rows."""
    rng = np.random.default_rng(seed)
    for start in range(0, trials, _TRIALS_AT_ONCE):
        size = (min(_TRIALS_AT_ONCE, trials - start), len(gain))
        yield rng.integers(2, size=size, dtype=np.int8).astype(np.float64) @ gain


# --- several comparisons ----------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects the p-values of several comparisons (Holm 1979); NaN stays NaN and does not count."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    corrected = np.full(len(p), np.nan)
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return corrected.tolist()


@dataclass(frozen=True)
class Difference:
    """System A minus system B on one metric.

    Attributes:
        system_a, system_b, metric: names.
        difference, low, high: in the metric's units, with its 95 % interval (paired bootstrap).
        p_bootstrap, p_randomization: two-sided.
        corrected_bootstrap, corrected_randomization: by Holm, over the systems that were compared with the same one on
            this metric.
        holds: both corrected p-values are below 0.05: these very systems differ. It is no verdict on how they were
            trained.
        note: what was done otherwise than asked.
    """

    system_a: str
    system_b: str
    metric: str
    difference: float
    low: float
    high: float
    p_bootstrap: float
    corrected_bootstrap: float
    p_randomization: float
    corrected_randomization: float
    holds: bool
    note: str = ""


def compare_with_baseline(
    systems: Mapping[str, Measurement],
    baseline: str,
    samples: int = SAMPLES,
    trials: int = TRIALS,
    seed: int = SEED,
    blocks: Sequence[str] | None = None,
) -> list[Difference]:
    """Every other system minus the baseline, by both tests.

    Args:
        systems: the same metric of every system, of the same rows in the same order.
        baseline: one of their names.
        samples, trials: of the bootstrap and of the randomisation.
        seed: of both.
        blocks: a speaker per row, see :func:`bootstrap_interval`.

    Raises:
        ValueError: systems with other rows or another signature.
    """
    base = systems[baseline]
    names = [name for name in systems if name != baseline]
    for name in names:
        _check_comparable(name, systems[name], baseline, base)
    pairs = [(systems[name].statistics, base.statistics, base.score_of) for name in names]
    drawn = [paired_bootstrap(*pair, samples, seed, blocks) for pair in pairs]
    exchanged = [paired_randomization(*pair, trials, seed, blocks) for pair in pairs]
    corrected = zip(holm([r.p for r in drawn]), holm([r.p for r in exchanged]), strict=True)
    return [
        Difference(
            system_a=name,
            system_b=baseline,
            metric=base.name,
            difference=boot.difference,
            low=boot.low,
            high=boot.high,
            p_bootstrap=boot.p,
            corrected_bootstrap=p_boot,
            p_randomization=random.p,
            corrected_randomization=p_random,
            holds=p_boot < _LEVEL and p_random < _LEVEL,
            note=_join(*dict.fromkeys((boot.note, random.note))) if random.note != boot.note else boot.note,
        )
        for name, boot, random, (p_boot, p_random) in zip(names, drawn, exchanged, corrected, strict=True)
    ]


# --- sacreBLEU's own tests --------------------------------------------------------------------------


class SacrebleuResult(NamedTuple):
    """What sacreBLEU says of one system.

    Attributes:
        score: of the corpus.
        p: against the baseline, of randomisation; None for the baseline itself; 1 if the scores are equal. sacreBLEU's
            bootstrap has a p, too, but one that finds 9.5 to 11 % of equal systems different at .05 (it compares
            differences with their own absolute mean): it is left out.
        mean, margin: of the bootstrapped score, 95 % within mean ± margin; None for approximate randomisation.
    """

    score: float
    p: float | None
    mean: float | None
    margin: float | None


class SacrebleuTest(NamedTuple):
    """``results[system][metric]`` and ``signatures[metric]``; the metrics are "BLEU" and "chrF2"."""

    results: dict[str, dict[str, SacrebleuResult]]
    signatures: dict[str, str]


def sacrebleu_test(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    language: str,
    test: str = "bs",
    samples: int = 0,
    seed: int = SEED,
) -> SacrebleuTest:
    """sacreBLEU's paired tests of BLEU and chrF2 of several systems against the first.

    sacreBLEU gives the smallest p that there is to systems with equal scores; here it is 1.

    Args:
        systems: hypotheses, row by row; the first system is the baseline.
        references: row by row.
        language: of the target, for the tokenizer of BLEU.
        test: "bs" (paired bootstrap, 1,000 samples) or "ar" (approximate randomisation, 10,000 trials).
        samples: another number of samples or trials; 0: those.
        seed: from 1 on, as sacreBLEU takes 0 for a random one; stands for the environment's ``SACREBLEU_SEED``.

    Raises:
        ValueError: a system with another number of rows, an unknown test or a seed below 1.
    """
    if test not in ("bs", "ar") or seed < 1:
        raise ValueError(f"test {test!r} with seed {seed}: choose bs or ar, and a seed from 1 on")
    for name, hypotheses in systems.items():
        if len(hypotheses) != len(references):
            raise ValueError(f"{name} has {len(hypotheses)} hypotheses for {len(references)} references")
    metrics = {"BLEU": sacrebleu.BLEU(tokenize=bleu_tokenizer(language)), "chrF2": sacrebleu.CHRF()}
    with _sacrebleu_seed(seed):
        signatures, columns = PairedTest(list(systems.items()), metrics, [references], test, samples)()
    scores = {name: columns[name] for name in metrics}
    results = {
        system: {name: _read_result(column[row], column[0].score, test) for name, column in scores.items()}
        for row, system in enumerate(systems)
    }
    return SacrebleuTest(results, {name: str(signature) for name, signature in signatures.items()})


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """It takes its seed from the environment only."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before


def _read_result(result: object, baseline_score: float, test: str) -> SacrebleuResult:
    score, p, mean, margin = (getattr(result, name) for name in ("score", "p_value", "mean", "ci"))
    if test == "bs":
        p = None
    elif p is not None and score == baseline_score:
        p = 1.0
    return SacrebleuResult(float(score), *(None if value is None else float(value) for value in (p, mean, margin)))


# --- shared -----------------------------------------------------------------------------------------


def has_few_blocks(blocks: Sequence[str] | None) -> bool:
    """Speakers are known, and fewer than 10: nothing is said of others."""
    return blocks is not None and any(blocks) and _block_count(blocks) < MIN_BLOCKS


def _block_count(blocks: Sequence[str]) -> int:
    return len({name for name in blocks if name}) + sum(not name for name in blocks)


def _into_blocks(statistics: np.ndarray, blocks: Sequence[str] | None) -> tuple[np.ndarray, str]:
    """Sums ``[blocks, k]``, the rows themselves if they are the blocks, and a note on what that means."""
    rows = len(statistics)
    if not rows:
        raise ValueError("no rows: there is nothing to draw from")
    if blocks is None:
        return statistics, ""
    if len(blocks) != rows:
        raise ValueError(f"{len(blocks)} speakers for {rows} rows: give one per row")
    if not any(blocks):
        return statistics, "no speakers are known: rows were drawn instead"
    count = _block_count(blocks)
    if count < MIN_BLOCKS:
        speakers = "only one speaker" if count == 1 else f"only {count} speakers"
        return statistics, f"{speakers}: rows were drawn, nothing is said of other speakers, and nothing is tested"
    _, index = np.unique([name or f"\0{row}" for row, name in enumerate(blocks)], return_inverse=True)
    sums = np.zeros((count, statistics.shape[1]))
    np.add.at(sums, index, statistics)
    note = f"{count} speakers, fewer than {FEW_BLOCKS}: intervals are somewhat too narrow" if count < FEW_BLOCKS else ""
    return sums, note


def _difference(statistics_a: np.ndarray, statistics_b: np.ndarray, score_of: Score) -> float:
    return float(score_of(statistics_a.sum(axis=0)) - score_of(statistics_b.sum(axis=0)))


def _check_pair(statistics_a: np.ndarray, statistics_b: np.ndarray) -> None:
    if statistics_a.shape != statistics_b.shape:
        raise ValueError(
            f"statistics {list(statistics_a.shape)} and {list(statistics_b.shape)} are not of the same rows: pair them"
        )


def _check_comparable(name: str, measurement: Measurement, baseline: str, base: Measurement) -> None:
    if (measurement.name, measurement.signature) != (base.name, base.signature):
        raise ValueError(
            f"{name} ({measurement.signature}) and {baseline} ({base.signature}) were not measured in the same way"
        )


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
