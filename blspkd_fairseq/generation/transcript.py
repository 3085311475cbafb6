"""Transcripts with times, and the formats in which programs want them: plain text, SubRip, WebVTT."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.generation.text_stream import TextStream

_CUE_CHARACTERS = 84  # two lines of 42, as subtitles have them
_CUE_SECONDS = 7.0
_SENTENCE_ENDS = (".", "?", "!", "。", "？", "！")


class Span(NamedTuple):
    """A word, or a line of several. Attributes: the seconds at which it begins and ends, and its text."""

    start: float
    end: float
    text: str


def join_tokens(ids: Sequence[int], times: Sequence[tuple[float, float]], chat: ChatFormat) -> list[Span]:
    """Words out of tokens: one begins where the text has white space.

    Args:
        ids: of the tokens.
        times: when each begins and ends.
        chat: decodes them; characters of several tokens are put together.
    """
    stream = TextStream(chat)
    words: list[Span] = []
    is_apart = True
    begin: float | None = None  # of tokens whose character is not complete
    for index, (token, (start, end)) in enumerate(zip(ids, times, strict=True), start=1):
        begin = start if begin is None else begin
        text = stream.push(token) + (stream.finish() if index == len(ids) else "")
        if not text:
            continue
        parts = text.split()
        seconds = (end - begin) / max(1, len(parts))
        for number, part in enumerate(parts):
            span = Span(begin + number * seconds, begin + (number + 1) * seconds, part)
            if number or is_apart or text[0].isspace():
                words.append(span)
            else:
                words[-1] = Span(words[-1].start, span.end, words[-1].text + part)
        is_apart, begin = text[-1].isspace() or not words, None
    return words


def cut_into_lines(words: Iterable[Span]) -> list[Span]:
    """Lines for subtitles: to the end of a sentence, and neither longer nor slower than one reads."""
    lines: list[Span] = []
    is_open = False
    for word in words:
        if is_open:
            line = Span(lines[-1].start, word.end, f"{lines[-1].text} {word.text}")
            is_open = len(line.text) <= _CUE_CHARACTERS and line.end - line.start <= _CUE_SECONDS
            if is_open:
                lines[-1] = line
        if not is_open:
            lines.append(word)
        is_open = not word.text.endswith(_SENTENCE_ENDS)
    return lines


def as_srt(lines: Iterable[Span]) -> str:
    """SubRip."""
    return "".join(
        f"{number}\n{_clock(line.start, ',')} --> {_clock(line.end, ',')}\n{line.text}\n\n"
        for number, line in enumerate(lines, start=1)
    )


def as_vtt(lines: Iterable[Span]) -> str:
    """WebVTT."""
    cues = (
        f"{_clock(line.start, '.')} --> {_clock(line.end, '.')}\n{html.escape(line.text, quote=False)}\n\n"
        for line in lines
    )
    return "WEBVTT\n\n" + "".join(cues)


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
