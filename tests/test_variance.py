"""Variance over seeds and clusters: against slow loops, closed forms, scipy's tests and simulations of its promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from blspkd_fairseq.evaluation.variance import (
    Arm,
    VarianceError,
    arm_of,
    cluster_sums,
    components,
    estimate,
    half_width,
    p_value,
    pseudo_values,
)


def ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * sums[..., 0] / sums[..., 1]


def table(seeds: int, clusters: int, seed: int = 0) -> np.ndarray:
    """``[S, B, 2]`` errors and words of clusters of unequal size."""
    rng = np.random.default_rng(seed)
    words = rng.integers(20, 200, size=clusters)
    return np.stack([rng.binomial(words, 0.2, (seeds, clusters)), np.broadcast_to(words, (seeds, clusters))], -1) * 1.0


# --- against slow loops and closed forms ------------------------------------------------------------


def test_pseudo_values_are_those_of_a_slow_loop() -> None:
    sums = table(2, 12)
    found = pseudo_values(sums, ratio)
    for seed in range(2):
        for left in range(12):
            rest = [sums[seed, b] for b in range(12) if b != left]
            without = 100 * sum(r[0] for r in rest) / sum(r[1] for r in rest)
            whole = 100 * sums[seed, :, 0].sum() / sums[seed, :, 1].sum()
            assert found[seed, left] == pytest.approx(12 * whole - 11 * without, rel=1e-12)


def test_pseudo_values_of_equal_clusters_are_their_means() -> None:
    sums = np.stack([np.arange(15.0), np.full(15, 3.0)], -1)
    np.testing.assert_allclose(pseudo_values(sums, ratio), 100 * np.arange(15) / 3, rtol=1e-12)


def test_rows_are_summed_by_cluster_in_every_seed() -> None:
    rows = np.arange(24.0).reshape(2, 6, 2)
    names = ["b", "a", "b", "c", "a", "b"]
    found = cluster_sums(rows, names)
    np.testing.assert_array_equal(found[:, 0], rows[:, 1] + rows[:, 4])
    np.testing.assert_array_equal(found[:, 1], rows[:, 0] + rows[:, 2] + rows[:, 5])
    np.testing.assert_array_equal(found[:, 2], rows[:, 3])


@pytest.mark.parametrize(("of_seed", "of_cluster"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_components_are_those_of_a_slow_two_way_table(of_seed: float, of_cluster: float) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 23)) + of_seed * rng.normal(size=(5, 1)) + of_cluster * rng.normal(size=(1, 23))
    found = components([(1.0, Arm(values.mean(axis=1), [values]))])
    grand = values.mean()
    v_a = sum((row.mean() - grand) ** 2 for row in values) / 4 / 5
    v_b = sum((column.mean() - grand) ** 2 for column in values.T) / 22 / 23
    square = 0.0
    for s in range(5):
        for b in range(23):
            square += (values[s, b] - values[s].mean() - values[:, b].mean() + grand) ** 2
    v_r = square / (4 * 22) / (5 * 23)
    total = max(v_a + v_b - v_r, v_a, v_b, v_r)
    spread = (v_a > v_r) * v_a**2 / 4 + (v_b > v_r) * v_b**2 / 22 + v_r**2 / 88
    assert (found.total, found.df) == pytest.approx((total, total**2 / spread))


def test_without_seeds_it_is_the_t_test_over_clusters() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, size=(1, 30))
    found = estimate(Arm(values.mean(axis=1), [values], is_fixed=True))
    expected = stats.ttest_1samp(values[0], 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval(0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert found.seeds is None and not found.note


def test_without_varying_clusters_it_is_the_t_test_over_seeds() -> None:
    """All clusters are alike: only seeds vary, and the residual is 0."""
    scores = np.random.default_rng(1).normal(1, 1, size=6)
    values = np.repeat(scores[:, None], 40, axis=1)
    expected = stats.ttest_1samp(scores, 0)
    assert estimate(Arm(scores, [values])).p == pytest.approx(expected.pvalue)


def test_unpaired_seeds_are_welchs_test() -> None:
    one, other = np.random.default_rng(2).normal(1, 1, size=5), np.random.default_rng(3).normal(0, 3, size=8)
    arms = [Arm(scores, [np.repeat(scores[:, None], 30, axis=1)]) for scores in (one, other)]
    found = estimate(*arms)
    expected = stats.ttest_ind(one, other, equal_var=False)
    assert (found.p, found.df) == pytest.approx((expected.pvalue, expected.df))
    assert found.seeds == 5


def test_pairs_use_that_both_share_a_start() -> None:
    """What a start does to both is no part of their difference, unless they are told to be no pairs."""
    rng = np.random.default_rng(4)
    start, noise = rng.normal(0, 5, size=(5, 1)), rng.normal(0, 0.5, size=(2, 5, 40))
    one, other = (Arm(v.mean(axis=1), [v]) for v in (start + noise[0] + 1, start + noise[1]))
    assert estimate(one, other, paired=True).p < 0.001 < 0.5 < estimate(one, other).p


def test_a_trained_system_against_one_without_seeds() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(2, 1, size=30)
    trained = rows + rng.normal(0, 1, size=(5, 1)) + rng.normal(0, 0.1, size=(5, 30))
    found = estimate(Arm(trained.mean(1), [trained]), Arm(rows.mean(keepdims=True), [rows[None]], is_fixed=True))
    assert found.seeds == 5 and found.v_seeds == pytest.approx(trained.mean(1).var(ddof=1) / 5)
    assert found.v_clusters < 0.01  # the rows are the same for both


def test_systems_that_are_exchanged_change_the_sign_only() -> None:
    arms = [arm_of(table(5, 20, seed), ratio, []) for seed in (1, 2)]
    for paired in (True, False):
        one, other = estimate(*arms, paired=paired), estimate(*arms[::-1], paired=paired)
        assert one.value == pytest.approx(-other.value) and one.p == pytest.approx(other.p)


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "clusters", "message"),
    [
        (table(5, 30), [["one"] * 30], "1 cluster"),
        (table(5, 30), [["a", "b"] * 15], "2 clusters: with fewer than 10"),
        (table(5, 30), [[str(i % 9) for i in range(30)]], "9 clusters"),
        (table(5, 30), [["a"] * 29], "29 clusters are named for 30 rows"),
        (table(5, 30), [[str(i) for i in range(30)]] * 3, "at most two"),
        (np.full((5, 30, 2), np.nan), [], "not a number"),
        (np.ones((5, 30, 2)), [], "no variance"),
    ],
)
def test_what_carries_no_estimate_is_refused(rows: np.ndarray, clusters: list[list[str]], message: str) -> None:
    with pytest.raises(VarianceError, match=message):
        estimate(arm_of(rows, ratio, clusters))


def test_equal_systems_have_no_p() -> None:
    arm = arm_of(table(5, 30), ratio, [])
    with pytest.raises(VarianceError, match="the difference is 0 for every seed and cluster"):
        estimate(arm, arm, paired=True)


def test_other_numbers_of_seeds_are_no_pairs() -> None:
    with pytest.raises(VarianceError, match="5 and 6 seeds are no pairs"):
        estimate(arm_of(table(5, 30), ratio, []), arm_of(table(6, 30), ratio, []), paired=True)


def test_one_row_that_holds_all_words_is_refused() -> None:
    rows = np.zeros((1, 20, 2))
    rows[0, 3] = 1, 10
    with pytest.raises(VarianceError, match="without one of the clusters"):
        arm_of(rows, ratio, [], is_fixed=True)


@pytest.mark.parametrize(
    ("seeds", "clusters", "note"),
    [(1, 40, "knows nothing of other seeds"), (4, 40, "too few for a verdict"), (5, 19, "fewer than 20"), (5, 20, "")],
)
def test_few_seeds_and_clusters_are_said(seeds: int, clusters: int, note: str) -> None:
    found = estimate(arm_of(table(seeds, clusters), ratio, [])).note
    assert note in found and bool(note) == bool(found)


def test_one_row_that_decides_the_mean_is_nothing_that_holds() -> None:
    """A loop of 500 words in one of 40 rows: 5 points of WER, and no evidence of a difference."""
    errors = np.ones((5, 40))
    errors[:, 7] = 500
    one = np.stack([errors, np.full((5, 40), 10.0)], -1)
    other = np.stack([np.ones((5, 40)), np.full((5, 40), 10.0)], -1)
    one[:, :, 0] += np.random.default_rng(0).integers(0, 2, size=(5, 40))
    found = estimate(arm_of(one, ratio, []), arm_of(other, ratio, []), paired=True)
    assert found.value > 100 and found.p > 0.3


# --- simulations: what the figures promise ----------------------------------------------------------

_SHARES = {  # SD of seeds, clusters, seeds x clusters, rows: which of them decides
    "seeds": (1.5, 0.5, 0.2, 5.0),
    "clusters": (0.0, 3.0, 0.5, 5.0),
    "both": (1.5, 6.0, 1.0, 10.0),
    "rows": (0.6, 1.0, 0.5, 17.0),
}


def simulated(
    runs: int, seeds: int, clusters: int, share: str, is_balanced: bool, rng: np.random.Generator
) -> np.ndarray:
    """Errors and words ``[runs, S, B, 2]`` of a difference whose truth is 0, added to 50 %."""
    of_seed, of_cluster, of_both, of_row = _SHARES[share]
    shape = (runs, 1, clusters)
    rows = np.full(shape, 30.0) if is_balanced else np.maximum(2, np.round(rng.lognormal(3.2, 0.7, shape)))
    difference = rng.normal(0, of_seed, (runs, seeds, 1)) + rng.normal(0, of_cluster, shape)
    difference = difference + rng.normal(0, of_both, (runs, seeds, clusters))
    difference = difference + rng.normal(0, of_row, (runs, seeds, clusters)) / np.sqrt(rows)
    words = np.broadcast_to(10 * rows, difference.shape)
    return np.stack([(50 + difference) / 100 * words, words], axis=-1)


def rejections(arms: list[tuple[float, Arm]], truth: float, level: float = 0.05) -> tuple[float, float]:
    """Type I error and coverage of the interval, in percent of the simulated runs."""
    found = components(arms)
    value = sum(sign * arm.scores.mean(axis=-1) for sign, arm in arms) - truth
    outside = np.abs(value) > half_width(found.total, found.df, 1 - level)
    return 100 * float((p_value(value, found.total, found.df) < level).mean()), 100 - 100 * float(outside.mean())


def check_promise(runs: int, seeds: int, clusters: int, share: str, is_balanced: bool) -> None:
    rng = np.random.default_rng(11)
    sums = simulated(runs, seeds, clusters, share, is_balanced, rng)
    arm = Arm(ratio(sums.sum(axis=-2)), [pseudo_values(sums, ratio)])
    error, coverage = rejections([(1.0, arm)], 50.0)
    assert 3 <= error <= 8 and 92 <= coverage <= 97, f"type I error {error:.1f} %, coverage {coverage:.1f} %"


@pytest.mark.parametrize("is_balanced", [True, False])
@pytest.mark.parametrize("share", _SHARES)
@pytest.mark.parametrize(("seeds", "clusters"), [(5, 20), (8, 40)])
def test_type_one_error_and_coverage(seeds: int, clusters: int, share: str, is_balanced: bool) -> None:
    check_promise(2000, seeds, clusters, share, is_balanced)


@pytest.mark.slow
@pytest.mark.parametrize("is_balanced", [True, False])
@pytest.mark.parametrize("share", _SHARES)
@pytest.mark.parametrize(("seeds", "clusters"), [(5, 20), (5, 40), (8, 20), (8, 40), (10, 100)])
def test_type_one_error_and_coverage_of_many_runs(seeds: int, clusters: int, share: str, is_balanced: bool) -> None:
    check_promise(20_000, seeds, clusters, share, is_balanced)


def test_where_neither_seeds_nor_clusters_vary_it_is_cautious() -> None:
    values = np.random.default_rng(15).normal(size=(2000, 5, 20))
    error, coverage = rejections([(1.0, Arm(values.mean(axis=-1), [values]))], 0.0)
    assert error <= 5 and coverage >= 95


@pytest.mark.parametrize(("seeds", "others"), [(5, 5), (5, 8)])
def test_type_one_error_of_seeds_that_are_no_pairs(seeds: int, others: int) -> None:
    """One method varies three times as much with its seed as the other; clusters are the same for both."""
    rng = np.random.default_rng(12)
    cluster = rng.normal(0, 3, (2000, 1, 20))
    arms = []
    for count, spread in ((seeds, 0.5), (others, 1.5)):
        values = cluster + rng.normal(0, spread, (2000, count, 1)) + rng.normal(0, 1, (2000, count, 20))
        arms.append(Arm(values.mean(axis=-1), [values]))
    error, coverage = rejections([(1.0, arms[0]), (-1.0, arms[1])], 0.0)
    assert 3 <= error <= 8 and 92 <= coverage <= 97, f"type I error {error:.1f} %, coverage {coverage:.1f} %"


def test_type_one_error_of_crossed_speakers_and_texts() -> None:
    """20 speakers read the same 25 texts: one factor alone would find far too much."""
    rng = np.random.default_rng(13)
    runs, speakers, texts = 1000, 20, 25
    rows = rng.normal(0, 1.5, (runs, 1, speakers, 1)) + rng.normal(0, 2, (runs, 1, 1, texts))
    rows = rows + rng.normal(0, 0.3, (runs, 5, 1, 1)) + rng.normal(0, 1, (runs, 1, speakers, texts))
    rows = rows + rng.normal(0, 1, (runs, 5, speakers, texts))
    of_speakers, of_texts, cells = rows.mean(axis=-1), rows.mean(axis=-2), rows.reshape(runs, 5, -1)
    scores = cells.mean(axis=-1)
    error, coverage = rejections([(1.0, Arm(scores, [of_speakers, of_texts], cells))], 0.0)
    assert 3 <= error <= 8 and 92 <= coverage <= 97, f"type I error {error:.1f} %, coverage {coverage:.1f} %"
    alone, _ = rejections([(1.0, Arm(scores, [of_speakers]))], 0.0)
    assert alone > 12


@pytest.mark.parametrize(("share", "left_out"), [("seeds", 1), ("clusters", 2)])
def test_clusters_alone_or_seeds_alone_would_find_too_much(share: str, left_out: int) -> None:
    """Why both are factors: what intervals over utterances, or over seeds, alone make of equal systems."""
    sums = simulated(2000, 5, 20, share, True, np.random.default_rng(14))
    values = pseudo_values(sums, ratio) - 50
    p = stats.ttest_1samp(values.mean(axis=left_out), 0, axis=-1).pvalue
    assert (p < 0.05).mean() > 0.2
