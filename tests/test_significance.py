"""Significance: against slow loops, exact enumeration, closed forms and sacreBLEU itself."""

from __future__ import annotations

import math
import os
from itertools import product

import numpy as np
import pytest
import sacrebleu
from scipy import stats

from blspkd_fairseq.evaluation import metrics
from blspkd_fairseq.evaluation.metrics import Measurement
from blspkd_fairseq.evaluation.significance import (
    Interval,
    bootstrap_interval,
    compare_with_baseline,
    holm,
    interval_of,
    least_p,
    paired_bootstrap,
    paired_randomization,
    sacrebleu_test,
    wilson,
)
from blspkd_fairseq.evaluation.tables import difference_table, score_table


def ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def measurement(statistics: np.ndarray) -> Measurement:
    return Measurement("rate", "none", statistics, ratio)


def error_rows(rows: int, rate: float, seed: int) -> np.ndarray:
    """Errors and words."""
    rng = np.random.default_rng(seed)
    words = rng.integers(3, 20, size=rows)
    return np.stack([rng.binomial(words, rate), words], axis=1).astype(np.float64)


# --- bootstrap --------------------------------------------------------------------------------------


def test_interval_is_that_of_a_slow_loop_over_rows() -> None:
    rows = error_rows(37, 0.2, 0)
    rng = np.random.default_rng(7)
    scores = []
    for _ in range(200):
        drawn = [rows[i] for i in rng.integers(37, size=37)]
        scores.append(sum(row[0] for row in drawn) / sum(row[1] for row in drawn))
    expected = np.quantile(scores, [0.025, 0.975])
    found = bootstrap_interval(rows, ratio, samples=200, seed=7)
    assert found.score == rows[:, 0].sum() / rows[:, 1].sum() and not found.note
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    assert bootstrap_interval(rows, ratio, samples=200, seed=8) != found


def test_interval_of_a_mean_is_near_its_closed_form() -> None:
    values = np.random.default_rng(0).normal(10, 3, size=400)
    found = bootstrap_interval(np.stack([values, np.ones(400)], axis=1), ratio, samples=4000)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_whole_speakers_are_drawn() -> None:
    """20 speakers, half of them with all errors: rows alone would make the interval several times too narrow."""
    speakers = [f"s{i}" for i in range(20) for _ in range(25)]
    errors = np.repeat(np.arange(20) % 2, 25).astype(np.float64)
    rows = np.stack([errors, np.ones(500)], axis=1)
    blocked = bootstrap_interval(rows, ratio, samples=2000, blocks=speakers)
    by_rows = bootstrap_interval(rows, ratio, samples=2000)
    assert blocked.high - blocked.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(20), abs=0.06)
    assert by_rows.high - by_rows.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(500), abs=0.01)
    assert not blocked.note


def test_speakers_of_one_row_each_are_rows() -> None:
    rows = error_rows(30, 0.3, 1)
    named = bootstrap_interval(rows, ratio, seed=3, blocks=[f"{i:02d}" for i in range(30)])
    assert named == bootstrap_interval(rows, ratio, seed=3)


def test_rows_without_a_speaker_are_speakers_of_their_own() -> None:
    rows = error_rows(16, 0.3, 1)
    others = [f"o{i}" for i in range(10)]
    unnamed = bootstrap_interval(rows, ratio, samples=300, blocks=["y", "y", "y", "z", "", "", *others])
    named = bootstrap_interval(rows, ratio, samples=300, blocks=["y", "y", "y", "z", "\0w", "\0x", *others])
    pooled = bootstrap_interval(rows, ratio, samples=300, blocks=["y", "y", "y", "z", "w", "w", *others])
    assert unnamed.score == named.score and unnamed.note == named.note != pooled.note
    assert (unnamed.low, unnamed.high) != (pooled.low, pooled.high)


@pytest.mark.parametrize(
    ("speakers", "said"),
    [(0, "no speakers are known"), (1, "only one speaker"), (2, "only 2 speakers"), (9, "only 9 speakers")],
)
def test_too_few_speakers_are_said_and_not_tested(speakers: int, said: str) -> None:
    rows, other = error_rows(40, 0.3, 1), error_rows(40, 0.1, 2)
    blocks = [f"s{i % speakers}" if speakers else "" for i in range(40)]
    found = bootstrap_interval(rows, ratio, 500, blocks=blocks)
    assert said in found.note
    assert found[:3] == bootstrap_interval(rows, ratio, 500)[:3]
    for result in (
        paired_bootstrap(rows, other, ratio, 500, blocks=blocks),
        paired_randomization(rows, other, ratio, 500, blocks=blocks),
    ):
        assert np.isnan(result.p) == (speakers > 0) and said in result.note
    compared = compare_with_baseline({"a": measurement(rows), "b": measurement(other)}, "b", 500, 500, blocks=blocks)
    assert compared[0].holds == (speakers == 0)


@pytest.mark.parametrize("speakers", [10, 19, 20, 40])
def test_few_speakers_are_tested_with_a_note_and_the_least_p(speakers: int) -> None:
    rows, other = error_rows(80, 0.3, 1), error_rows(80, 0.05, 2)
    blocks = [f"s{i % speakers}" for i in range(80)]
    found = paired_randomization(rows, other, ratio, 500, blocks=blocks)
    assert found.p >= least_p(speakers, 500) and ("somewhat too narrow" in found.note) == (speakers < 20)
    assert (f"no p of randomisation over {speakers} can be below" in found.note) == (speakers < 20)


@pytest.mark.parametrize(("speakers", "low", "high"), [(10, 85, 95), (20, 88, 97), (40, 90, 98)])
def test_coverage_of_the_interval_over_speakers(speakers: int, low: float, high: float) -> None:
    """What the notes say of few speakers: 10 hold the truth in about 92 % of cases, 20 and 40 in about 95."""
    rng, covered = np.random.default_rng(3), 0
    blocks = [f"s{i}" for i in range(speakers) for _ in range(5)]
    for _ in range(250):
        values = np.repeat(rng.normal(0, 1, speakers), 5) + rng.normal(0, 0.5, 5 * speakers)
        found = bootstrap_interval(np.stack([values, np.ones(len(values))], 1), ratio, 400, blocks=blocks)
        covered += found.low <= 0 <= found.high
    assert low <= 100 * covered / 250 <= high


# --- proportions ------------------------------------------------------------------------------------


def proportion(hits: int, rows: int) -> Measurement:
    statistics = np.stack([np.arange(rows) < hits, np.ones(rows)], 1).astype(np.float64)
    return Measurement("matches", "none", statistics, lambda sums: 100 * ratio(sums), is_proportion=True)


@pytest.mark.parametrize(("hits", "rows"), [(0, 30), (30, 30), (7, 40), (1, 500)])
def test_intervals_of_proportions_are_wilsons(hits: int, rows: int) -> None:
    expected = stats.binomtest(hits, rows).proportion_ci(method="wilson")
    found = interval_of(proportion(hits, rows))
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert found.high > found.low


def test_a_proportion_of_none_is_not_certain_over_speakers_either() -> None:
    found = interval_of(proportion(0, 100), 200, blocks=[f"s{i % 25}" for i in range(100)])
    assert found.low == 0 and found.high == pytest.approx(100 * wilson(0, 25)[1])


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_coverage_of_proportions(share: float) -> None:
    hits = np.random.default_rng(0).binomial(60, share, 4000)
    ends = np.array([wilson(one / 60, 60) for one in range(61)])[hits]
    assert 0.92 <= ((ends[:, 0] <= share) & (share <= ends[:, 1])).mean() <= 0.99


def test_under_twenty_rows_there_is_no_interval() -> None:
    found = interval_of(measurement(error_rows(19, 0.3, 0)))
    assert np.isnan([found.low, found.high]).all() and found.note == "fewer than 20 rows: no interval"
    assert np.isfinite(interval_of(measurement(error_rows(20, 0.3, 0)), 100).low)


def test_resampled_corpora_without_a_score_are_counted() -> None:
    rows = np.array([[1.0, 2.0], [1.0, 0.0]])
    found = bootstrap_interval(rows, ratio, samples=400)
    count = int(found.note.split()[0])
    assert 60 < count < 140  # a quarter of them: row 2 twice
    assert np.isfinite(found[:3]).all()
    nothing = bootstrap_interval(np.array([[1.0, 0.0]]), ratio)
    assert np.isnan(nothing[:3]).all() and nothing.note == "no resampled corpus has a score"


def test_paired_bootstrap_draws_the_same_rows_for_both() -> None:
    """A constant difference has no spread, however much the scores themselves vary."""
    a = np.stack([np.random.default_rng(0).normal(0, 50, 60), np.ones(60)], axis=1)
    b = a - [2.0, 0.0]
    found = paired_bootstrap(a, b, ratio)
    assert (found.difference, found.low, found.high) == pytest.approx((2, 2, 2))
    assert found.p == 2 / 10_001


def test_paired_bootstrap_p_agrees_with_the_interval_and_the_normal_approximation() -> None:
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 1, size=200)
    noise = (noise - noise.mean()) / noise.std()
    for shift in (0.10, 0.18, 0.5):
        a = np.stack([noise + shift, np.ones(200)], axis=1)
        found = paired_bootstrap(a, a * [0, 1], ratio, samples=8000)
        z = shift * np.sqrt(200)
        expected = 2 * (1 - _normal_cdf(z))
        assert found.p == pytest.approx(expected, abs=0.02)
        assert (found.p < 0.05) == (found.low > 0)


def _normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_planted_speaker_effect_is_no_difference_between_systems() -> None:
    """System A is better for 6 of 12 speakers and worse for the others, a little more often better."""
    speakers = [f"s{i}" for i in range(12) for _ in range(100)]
    effect = np.repeat([3.0, 3.2, 3.1, -2.4, -2.5, -2.6] * 2, 100)
    a = np.stack([effect, np.ones(1200)], axis=1)
    b = np.stack([np.zeros(1200), np.ones(1200)], axis=1)
    assert paired_bootstrap(a, b, ratio).p < 0.05
    assert paired_randomization(a, b, ratio, trials=2000).p < 0.05
    assert paired_bootstrap(a, b, ratio, blocks=speakers).p > 0.5
    assert paired_randomization(a, b, ratio, trials=2000, blocks=speakers).p > 0.5


# --- approximate randomisation ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_randomisation_p_is_the_exact_one(seed: int) -> None:
    a, b = error_rows(8, 0.5, seed), error_rows(8, 0.3, seed + 100)
    b[:, 1] = a[:, 1]
    real = abs(ratio(a.sum(0)) - ratio(b.sum(0)))
    as_large = 0
    for choice in product([False, True], repeat=8):
        swap = np.array(choice)[:, None]
        difference = ratio(np.where(swap, b, a).sum(0)) - ratio(np.where(swap, a, b).sum(0))
        as_large += abs(difference) >= real - 1e-12
    exact = as_large / 256
    found = paired_randomization(a, b, ratio, trials=20_000, seed=seed + 1)
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)
    assert np.isnan(found.low)


def test_equal_systems_do_not_differ() -> None:
    rows = error_rows(40, 0.2, 0)
    assert paired_randomization(rows, rows, ratio, trials=500).p == 1
    assert paired_bootstrap(rows, rows, ratio).p == 1


def test_randomisation_holds_its_level_under_the_null() -> None:
    """Of many pairs of equally good systems, about 5 % have a p below 0.05, and no many more."""
    rejected = 0
    for seed in range(200):
        a, b = error_rows(30, 0.3, 2 * seed), error_rows(30, 0.3, 2 * seed + 1)
        b[:, 1] = a[:, 1]
        b[:, 0] = np.minimum(b[:, 0], b[:, 1])
        swap = np.random.default_rng(seed).integers(2, size=30).astype(bool)[:, None]
        a, b = np.where(swap, a, b), np.where(swap, b, a)
        rejected += paired_randomization(a, b, ratio, trials=400, seed=seed + 1).p < 0.05
    assert 2 <= rejected <= 20


# --- several systems --------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []
    corrected = holm([float("nan"), 0.02, 0.03])
    assert np.isnan(corrected[0]) and corrected[1:] == pytest.approx([0.04, 0.04])


def test_every_system_is_compared_with_the_baseline_and_corrected() -> None:
    base = error_rows(300, 0.4, 0)
    better, same = base.copy(), base.copy()
    better[:, 0] = np.maximum(0, better[:, 0] - 1)
    same[:, 0] += np.random.default_rng(1).integers(-1, 2, size=300)
    systems = {"better": measurement(better), "cascade": measurement(base), "same": measurement(same)}
    found = compare_with_baseline(systems, "cascade", samples=500, trials=999)
    assert [(one.system_a, one.system_b) for one in found] == [("better", "cascade"), ("same", "cascade")]
    assert [one.holds for one in found] == [True, False]
    assert found[0].difference == pytest.approx(systems["better"].score - systems["cascade"].score)
    assert found[0].corrected_randomization == pytest.approx(2 * found[0].p_randomization) == 2 / 1000
    assert found[1].corrected_bootstrap == found[1].p_bootstrap
    table = difference_table(found, digits=3)
    assert table.count("\n") == 4 and "| yes |" in table.splitlines()[2] and "| no |" in table.splitlines()[3]


def test_rows_or_measures_that_differ_are_refused() -> None:
    a, b = error_rows(5, 0.3, 0), error_rows(6, 0.3, 0)
    with pytest.raises(ValueError, match="not of the same rows"):
        paired_bootstrap(a, b, ratio)
    with pytest.raises(ValueError, match="not of the same rows"):
        paired_randomization(a, b, ratio)
    with pytest.raises(ValueError, match="one per row"):
        bootstrap_interval(a, ratio, blocks=["x"])
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_interval(np.empty((0, 2)), ratio)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval(a, ratio, samples=0)
    other = Measurement("rate", "another tokenizer", a, ratio)
    with pytest.raises(ValueError, match="not measured in the same way"):
        compare_with_baseline({"a": measurement(a), "b": other}, "a")


# --- sacreBLEU's own tests --------------------------------------------------------------------------


def translations() -> tuple[dict[str, list[str]], list[str]]:
    rng = np.random.default_rng(1)
    sentence = "the cat sat on a mat while dogs ran over green hills and rivers"
    words = np.array(sentence.split())
    references = [" ".join(rng.choice(words, size=rng.integers(5, 12))) for _ in range(80)]

    def spoiled(share: float) -> list[str]:
        return [" ".join("x" if rng.random() < share else word for word in text.split()) for text in references]

    return {"base": spoiled(0.3), "good": spoiled(0.1), "alike": spoiled(0.3)}, references


@pytest.mark.parametrize("test", ["bs", "ar"])
def test_sacrebleu_says_which_system_is_better(test: str) -> None:
    systems, references = translations()
    found = sacrebleu_test(systems, references, "en", test, samples=300)
    for name, hypotheses in systems.items():
        assert found.results[name]["BLEU"].score == sacrebleu.corpus_bleu(hypotheses, [references]).score
        assert found.results[name]["chrF2"].score == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert found.results["base"]["BLEU"].p is None
    good, alike = (found.results[name]["BLEU"].p for name in ("good", "alike"))
    if test == "bs":
        assert good is None and alike is None  # its p finds twice as many differences as there are
    else:
        assert good is not None and alike is not None and good < 0.01 < 0.05 < alike
    assert f"{test}:300" in found.signatures["BLEU"] and "seed:12345" in found.signatures["chrF2"]
    assert (found.results["good"]["BLEU"].margin is None) == (test == "ar")


def test_our_tests_agree_with_sacrebleus() -> None:
    systems, references = translations()
    theirs = sacrebleu_test(systems, references, "en", "ar", samples=2000).results["alike"]["BLEU"].p
    measured = {name: metrics.bleu(hypotheses, references, "en") for name, hypotheses in systems.items()}
    alike, base = measured["alike"], measured["base"]
    ours = paired_randomization(alike.statistics, base.statistics, base.score_of, trials=2000)
    assert ours.p == pytest.approx(theirs, abs=0.05)
    margin = sacrebleu_test(systems, references, "en", "bs").results["good"]["BLEU"].margin
    interval = bootstrap_interval(measured["good"].statistics, base.score_of)
    assert (interval.high - interval.low) / 2 == pytest.approx(margin, rel=0.1)


def test_sacrebleus_verdict_on_equal_systems_is_corrected() -> None:
    systems, references = translations()
    found = sacrebleu_test({"a": systems["base"], "b": systems["base"]}, references, "en", "ar", samples=50)
    assert {result.p for result in found.results["b"].values()} == {1.0}


def test_seed_of_sacrebleu_is_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    systems, references = translations()
    monkeypatch.setenv("SACREBLEU_SEED", "none")
    first = sacrebleu_test(systems, references, "en", "bs", samples=50, seed=3)
    assert first == sacrebleu_test(systems, references, "en", "bs", samples=50, seed=3)
    assert first.results != sacrebleu_test(systems, references, "en", "bs", samples=50, seed=4).results
    assert os.environ["SACREBLEU_SEED"] == "none"
    monkeypatch.delenv("SACREBLEU_SEED")
    sacrebleu_test(systems, references, "en", "bs", samples=5)
    assert "SACREBLEU_SEED" not in os.environ
    with pytest.raises(ValueError, match="from 1 on"):
        sacrebleu_test(systems, references, "en", "bs", seed=0)
    with pytest.raises(ValueError, match="79 hypotheses for 80"):
        sacrebleu_test({"a": systems["base"][1:]}, references, "en")


# --- tables -----------------------------------------------------------------------------------------


def test_score_table() -> None:
    nan = float("nan")
    table = score_table(
        {
            "a|b": {"BLEU": Interval(12.34, 11.04, 13.46), "WER": Interval(5, 4, 6, "only one speaker")},
            "c": {"WER": Interval(nan, nan, nan), "chrF2": Interval(50, nan, nan)},
        }
    )
    assert table.splitlines() == [
        "| system | BLEU | WER | chrF2 |",
        "| --- | --- | --- | --- |",
        "| a\\|b | 12.3 [11.0, 13.5] | 5.0 [4.0, 6.0] | – |",
        "| c | – | – | 50.0 [–] |",
        "",
        "Only one speaker: WER of a|b.",
    ]
