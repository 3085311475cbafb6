"""Options of decoding that cannot be meant."""

from typing import Any

import pytest

from blspkd_fairseq.generation.decoding import DecodingOptions


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam": 100_000}, "beam must be 1 to 1024 .* got 100000"),
        ({"beam": 1.5}, "beam must be a whole number, got 1.5"),
        ({"beam": "2"}, "beam must be a whole number, got '2'"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"min_new_tokens": None}, "min_new_tokens must be a whole number"),
        ({"length_penalty": "1"}, "length_penalty must be a number"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0"),
        ({"sampling": True, "temperature": float("nan")}, "temperature >= 0.0001"),
        ({"sampling": True, "temperature": float("inf")}, "temperature >= 0.0001"),
        ({"sampling": True, "temperature": 1e-40}, "temperature >= 0.0001"),
        ({"sampling": True, "top_p": 0}, "0 < top-p"),
    ],
)
def test_they_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**wrong)
