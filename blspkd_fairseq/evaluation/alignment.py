"""How far token boundaries are from word ends that another method gives, such as Whisper's cross-attention."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from blspkd_fairseq.evaluation.metrics import Measurement

Timed = Sequence[tuple[str, float]]


class Boundaries(NamedTuple):
    """One utterance.

    Attributes:
        differences_ms: ``[matched]``, end of the word's last token minus end of the word, in milliseconds.
        words: how many words there are to match.
    """

    differences_ms: np.ndarray
    words: int


class BoundarySummary(NamedTuple):
    """All utterances; milliseconds, NaN if no word was matched.

    Attributes:
        mean_ms, median_ms: of the absolute difference.
        bias_ms: mean of the signed difference; positive: tokens end later than words.
        centred_ms: mean of the absolute difference once the bias is taken off all of them.
        matched, unmatched: words.
    """

    mean_ms: float
    median_ms: float
    bias_ms: float
    centred_ms: float
    matched: int
    unmatched: int


def match_word_ends(tokens: Timed, words: Timed) -> list[float | None]:
    """Where each word ends according to the tokens.

    Both texts are compared letter by letter (case, spaces and punctuation aside). A word is matched if all its letters
    are, and are those of whole tokens in a row: a token that holds the end of one word and the begin of the next
    has no boundary between them.

    Args:
        tokens: text and end in seconds, in order.
        words: text and end in seconds, in order.

    Returns:
        A time in seconds per word; None: not matched.
    """
    token_letters = [(letter, index) for index, (text, _) in enumerate(tokens) for letter in _letters(text)]
    word_letters = [(letter, index) for index, (text, _) in enumerate(words) for letter in _letters(text)]
    place = _matched_places([letter for letter, _ in word_letters], [letter for letter, _ in token_letters])
    owner = [index for _, index in token_letters]
    return [
        _token_end([place.get(i) for i, (_, w) in enumerate(word_letters) if w == word], owner, tokens)
        for word in range(len(words))
    ]


def boundary_differences(tokens: Timed, words: Timed) -> Boundaries:
    """Token boundaries against word ends of one utterance; arguments as :func:`match_word_ends`."""
    ends = match_word_ends(tokens, words)
    pairs = [(end, word_end) for end, (_, word_end) in zip(ends, words, strict=True) if end is not None]
    return Boundaries(np.array([1000 * (end - word_end) for end, word_end in pairs], dtype=np.float64), len(words))


def summarize(utterances: Sequence[Boundaries]) -> BoundarySummary:
    """Mean, median and bias over the words of all utterances."""
    differences = np.concatenate([np.empty(0), *(utterance.differences_ms for utterance in utterances)])
    matched = len(differences)
    unmatched = sum(utterance.words for utterance in utterances) - matched
    if not matched:
        nothing = float("nan")
        return BoundarySummary(nothing, nothing, nothing, nothing, 0, unmatched)
    size, bias = np.abs(differences), float(differences.mean())
    centred = float(np.abs(differences - bias).mean())
    return BoundarySummary(float(size.mean()), float(np.median(size)), bias, centred, matched, unmatched)


class Calibration(NamedTuple):
    """How the other method itself does where word ends are known; milliseconds, NaN if there is none.

    Attributes:
        bias_ms: mean of its word end minus the known one.
        error_ms: mean absolute difference.
        known: word ends.
    """

    bias_ms: float
    error_ms: float
    known: int


def calibration_of(differences_ms: Sequence[float]) -> Calibration:
    """From the differences at known word ends."""
    if not differences_ms:
        return Calibration(float("nan"), float("nan"), 0)
    values = np.array(differences_ms)
    return Calibration(float(values.mean()), float(np.abs(values).mean()), len(values))


def boundary_measurement(utterances: Sequence[Boundaries]) -> Measurement:
    """The mean absolute difference in ms, for an interval; statistics: sum of absolute differences, matched words."""
    sums = [(float(np.abs(one.differences_ms).sum()), len(one.differences_ms)) for one in utterances]
    statistics = np.array(sums, dtype=np.float64).reshape(-1, 2)
    return Measurement("boundary error (ms)", "mean absolute|letters:whole tokens", statistics, _mean, True)


def _mean(sums: np.ndarray) -> np.ndarray:
    total, count = sums[..., 0], sums[..., 1]
    return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)


def _letters(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [letter for letter in folded if letter.isalnum()]


def _matched_places(left: list[str], right: list[str]) -> dict[int, int]:
    """Index in ``right`` of every letter of ``left`` that has one."""
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    return {block.a + offset: block.b + offset for block in blocks for offset in range(block.size)}


def _token_end(places: list[int | None], owner: list[int], tokens: Timed) -> float | None:
    """End of the tokens that hold exactly these letters."""
    first, last = (places[0], places[-1]) if places else (None, None)
    if first is None or last is None or places != list(range(first, last + 1)):
        return None
    starts_token = first == 0 or owner[first - 1] != owner[first]
    ends_token = last + 1 == len(owner) or owner[last + 1] != owner[last]
    return tokens[owner[last]][1] if starts_token and ends_token else None
