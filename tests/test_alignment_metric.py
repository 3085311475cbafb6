"""Token boundaries against word ends: matched by letters, whole tokens only."""

from __future__ import annotations

import math

import numpy as np
import pytest

from blspkd_fairseq.evaluation.alignment import (
    Boundaries,
    boundary_differences,
    boundary_measurement,
    calibration_of,
    match_word_ends,
    summarize,
)

TOKENS = [(" Turn", 0.30), (" on", 0.52), (" the", 0.66), (" kit", 0.90), ("chen", 1.31), (" light", 1.60), (".", 1.75)]
WORDS = [("turn", 0.32), ("on", 0.50), ("the", 0.66), ("kitchen", 1.25), ("light.", 1.70)]


def test_a_word_ends_with_its_last_token_and_not_with_the_punctuation() -> None:
    assert match_word_ends(TOKENS, WORDS) == [0.30, 0.52, 0.66, 1.31, 1.60]


def test_differences_and_their_summary() -> None:
    found = boundary_differences(TOKENS, WORDS)
    np.testing.assert_allclose(found.differences_ms, [-20, 20, 0, 60, -100], atol=1e-9)
    summary = summarize([found, Boundaries(np.array([400.0]), 3)])
    assert summary.mean_ms == pytest.approx(100)
    assert summary.median_ms == pytest.approx(40)
    assert summary.bias_ms == pytest.approx(60)
    assert (summary.matched, summary.unmatched) == (6, 2)


def test_the_measurement_is_the_summarys_mean() -> None:
    utterances = [boundary_differences(TOKENS, WORDS), Boundaries(np.array([400.0]), 3), Boundaries(np.empty(0), 2)]
    measured = boundary_measurement(utterances)
    assert measured.score == pytest.approx(summarize(utterances).mean_ms)
    assert measured.statistics.shape == (3, 2) and measured.less_is_better


def test_a_word_heard_otherwise_is_not_matched_but_its_neighbours_are() -> None:
    tokens = [(" Turn", 0.30), (" off", 0.52), (" the", 0.66), (" chicken", 1.31), (" light", 1.60)]
    assert match_word_ends(tokens, WORDS) == [0.30, None, 0.66, None, 1.60]
    assert boundary_differences(tokens, WORDS).words == 5


def test_a_word_inside_of_a_longer_one_is_not_matched() -> None:
    assert match_word_ends([(" cat", 0.5)], [("a", 0.4)]) == [None]
    assert match_word_ends([(" cat", 0.5), ("alog", 0.8)], [("cat", 0.4)]) == [0.5]  # whole tokens
    assert match_word_ends([(" other", 0.5)], [("the", 0.4)]) == [None]


def test_a_token_over_a_word_boundary_has_no_end_for_either() -> None:
    words = [("今天", 0.4), ("天气", 0.8), ("好", 1.0)]
    assert match_word_ends([("今天天", 0.5), ("气", 0.8), ("好", 1.1)], words) == [None, None, 1.1]


def test_a_word_with_something_foreign_in_between_is_not_matched() -> None:
    assert match_word_ends([(" kit", 0.2), (" um", 0.4), ("chen", 0.6)], [("kitchen", 0.5)]) == [None]


def test_repeated_words_keep_their_order() -> None:
    tokens = [(" no", 0.1), (" no", 0.2), (" no", 0.3)]
    assert match_word_ends(tokens, [("No,", 0.1), ("no,", 0.2), ("no!", 0.3)]) == [0.1, 0.2, 0.3]


def test_nothing_to_match() -> None:
    assert match_word_ends([], WORDS) == [None] * 5
    assert match_word_ends(TOKENS, []) == []
    assert match_word_ends([("\ufffd", 0.1)], [("?!", 0.1)]) == [None]
    summary = summarize([boundary_differences([], WORDS)])
    assert math.isnan(summary.mean_ms) and math.isnan(summary.bias_ms) and summary.unmatched == 5
    assert math.isnan(boundary_measurement([boundary_differences([], WORDS)]).score)


def test_a_bias_is_told_from_what_is_left_without_it() -> None:
    found = summarize([Boundaries(np.array([-100.0, -80.0, -60.0]), 3), Boundaries(np.array([-80.0]), 1)])
    assert (found.mean_ms, found.bias_ms, found.centred_ms) == (80, -80, 10)


def test_calibration_by_known_word_ends() -> None:
    found = calibration_of([10.0, -30.0, 50.0])
    assert (found.bias_ms, found.error_ms, found.known) == (10, 30, 3)
    assert math.isnan(calibration_of([]).bias_ms) and calibration_of([]).known == 0
