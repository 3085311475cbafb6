"""Words and lines with times, and subtitles."""

import pytest
from tokenizers_util import bpe_tokenizer

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.generation.transcript import Span, as_srt, as_vtt, cut_into_lines, join_tokens

CHAT = ChatFormat(bpe_tokenizer())


@pytest.mark.parametrize("text", ["hello world, how are you?", "a  b", "it costs 5 €, née", "日本 語", "x"])
def test_tokens_become_the_words_of_the_text(text: str) -> None:
    ids = CHAT.encode_text(text)
    words = join_tokens(ids, [(float(i), i + 1.0) for i in range(len(ids))], CHAT)
    assert [word.text for word in words] == text.split()
    assert words[0].start == 0 and words[-1].end == len(ids)
    assert all(word.end > word.start for word in words)
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False))


def test_no_tokens_are_no_words() -> None:
    assert join_tokens([], [], CHAT) == []
    assert cut_into_lines([]) == [] and as_srt([]) == "" and as_vtt([]) == "WEBVTT\n\n"


def test_lines_end_with_sentences_and_are_short_enough_to_read() -> None:
    words = [
        Span(i / 2, i / 2 + 0.4, text)
        for i, text in enumerate(["It", "is", "cold.", "Close", "the", "door", ",", "please"])
    ]
    assert cut_into_lines(words) == [Span(0, 1.4, "It is cold."), Span(1.5, 3.9, "Close the door , please")]
    slow = [Span(float(4 * i), 4 * i + 3.0, "slow") for i in range(4)]
    assert [line.text for line in cut_into_lines(slow)] == ["slow slow", "slow slow"]
    fast = [Span(i / 100, (i + 1) / 100, "twelve-letter") for i in range(20)]
    lines = cut_into_lines(fast)
    assert all(len(line.text) <= 84 for line in lines) and " ".join(line.text for line in lines).split() == 20 * [
        "twelve-letter"
    ]


def test_subtitles_have_their_formats_clocks() -> None:
    lines = [Span(0.0, 1.2345, "a < b"), Span(59.9996, 3661.5, "c")]
    assert as_srt(lines) == "1\n00:00:00,000 --> 00:00:01,234\na < b\n\n2\n00:01:00,000 --> 01:01:01,500\nc\n\n"
    assert as_vtt(lines).startswith(
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.234\na &lt; b\n\n00:01:00.000 --> 01:01:01.500"
    )
