"""Kinds of errors against jiwer, and what loops, empty texts and single rows do to an error rate."""

from __future__ import annotations

import math
import random

import jiwer
import numpy as np
import pytest
from test_metrics import rows

from blspkd_fairseq.evaluation import error_detail as module
from blspkd_fairseq.evaluation.error_detail import ErrorDetail, edit_counts, error_detail
from blspkd_fairseq.evaluation.metrics import error_rate


def detail_of(hypotheses: list[str], references: list[str], unit: str, language: str) -> ErrorDetail:
    whole = error_rate(hypotheses, references, unit, language)
    return error_detail(whole, hypotheses, references, unit, language)


@pytest.mark.parametrize("seed", range(30))
def test_kinds_of_errors_add_up_and_are_the_fewest(seed: int) -> None:
    rng = random.Random(seed)
    hypothesis, reference = (rng.choices("abcd", k=rng.randint(0, 25)) for _ in range(2))
    found = edit_counts(hypothesis, reference)
    assert min(found) >= 0 and found.insertions - found.deletions == len(hypothesis) - len(reference)
    if reference:
        theirs = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
        assert sum(found) == theirs.substitutions + theirs.deletions + theirs.insertions
        assert found.insertions + found.deletions <= theirs.insertions + theirs.deletions


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("a b c", "a b c", (0, 0, 0)),
        ("a x c", "a b c", (1, 0, 0)),
        ("a c", "a b c", (0, 1, 0)),
        ("a b b c", "a b c", (0, 0, 1)),
        ("", "a b c", (0, 3, 0)),
        ("a b", "", (0, 0, 2)),
        ("", "", (0, 0, 0)),
    ],
)
def test_kinds_of_errors_by_hand(hypothesis: str, reference: str, expected: tuple[int, int, int]) -> None:
    assert edit_counts(hypothesis.split(), reference.split()) == expected


@pytest.mark.parametrize("language", ["en", "de"])
def test_kinds_sum_to_the_error_rate(language: str) -> None:
    hypotheses, references = rows(language)
    found = detail_of(hypotheses, references, "WER", language)
    whole = error_rate(hypotheses, references, "WER", language)
    assert found.substitutions + found.deletions + found.insertions == pytest.approx(whole.score)
    assert found.signature == whole.signature and "norm:whisper" in found.signature


def test_a_loop_decides_the_error_rate_and_neither_median_nor_capped_one() -> None:
    references = ["one two three four"] * 50
    hypotheses = ["one two three"] * 49 + ["one two three four" + " four" * 200]
    found = detail_of(hypotheses, references, "WER", "de")
    assert error_rate(hypotheses, references, "WER", "de").score > 120
    assert found.median == 25 and found.capped.score == pytest.approx((49 * 1 + 4) / 2)
    assert found.above_100.score == 2 and found.insertions == 100


def test_empty_references_and_answers() -> None:
    found = detail_of(["a b", "", "x"], ["", "x y", "x"], "WER", "de")
    assert (found.substitutions, found.deletions, found.insertions) == pytest.approx((0, 200 / 3, 200 / 3))
    assert found.capped.score == pytest.approx(100) and found.median == 50
    assert found.above_100.score == pytest.approx(100 / 3)
    nothing = detail_of(["a"], [""], "WER", "de")
    assert math.isnan(nothing.median) and math.isnan(nothing.substitutions) and math.isnan(nothing.capped.score)


def test_numbers_that_the_english_normaliser_changes_are_in_the_raw_figure() -> None:
    raw, normalized = (
        error_rate(["one two three"], ["123"], "WER", "en", normalize).score for normalize in (False, True)
    )
    assert (raw, normalized) == (300, 0)


def test_letters_are_counted_in_languages_without_spaces() -> None:
    found = detail_of(["今天天汽"], ["今天天气好"], "CER", "zh")
    assert (found.substitutions, found.deletions) == (20, 20)
    assert np.isclose(found.capped.score, 40)


def test_right_rows_are_not_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    aligned: list[list[str]] = []

    def align(hypothesis: list[str], reference: list[str]) -> tuple[int, int, int]:
        aligned.append(hypothesis)
        return edit_counts(hypothesis, reference)

    monkeypatch.setattr(module, "edit_counts", align)
    found = detail_of(["a b", "a c", "A, b!"], ["a b", "a b", "a b"], "WER", "de")
    assert aligned == [["a", "c"]] and found.substitutions == pytest.approx(100 / 6)
