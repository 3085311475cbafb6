"""What was said and when: words with times, and the formats in which others take them (text, JSON, SRT, WebVTT)."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

LONGEST_CUE = 6.0
"""Seconds of a subtitle."""
WIDEST_CUE = 84
"""Characters of a subtitle: two lines."""

_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uff00-\uffef]")
"""Thai, Lao, kana and Chinese characters, between which no spaces are written."""


class Word(NamedTuple):
    """Attributes: ``start`` and ``end`` in seconds; ``text`` without spaces."""

    start: float
    end: float
    text: str


class Segment(NamedTuple):
    """What was said in one window.

    Attributes:
        start, end: seconds in the whole recording.
        text: what was said; words: the same with times, or () where the adapter has none.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...]


class Transcript(NamedTuple):
    """Attributes: ``seconds`` of the recording, and its ``segments`` with speech, in order."""

    seconds: float
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return join_texts([segment.text for segment in self.segments])

    @property
    def words(self) -> list[Word]:
        return [word for segment in self.segments for word in segment.words]


def join_texts(texts: Sequence[str]) -> str:
    """Texts one after another, with spaces where their script has them."""
    joined = ""
    for text in filter(None, (text.strip() for text in texts)):
        close = joined and _NO_SPACES.match(joined[-1]) and _NO_SPACES.match(text)
        joined += text if close or not joined else f" {text}"
    return joined


def words_of(text: str, pieces: Sequence[str], ends: Sequence[float], start: float = 0.0) -> tuple[Word, ...]:
    """Words with times from those of tokens.

    Args:
        text: what was said.
        pieces: the text of each token; together they are the text, but for spaces at its ends.
        ends: seconds at which each ends; the next begins there.
        start: seconds at which the first one begins.
    """
    begins = [start, *ends[:-1]]
    times = [(b, e) for piece, b, e in zip(pieces, begins, ends, strict=True) for _ in piece]
    said = "".join(pieces)
    pattern = r"\S" if _NO_SPACES.search(text) and " " not in text.strip() else r"\S+"
    return tuple(
        Word(times[match.start()][0], times[match.end() - 1][1], match[0]) for match in re.finditer(pattern, said)
    )


# --- formats --------------------------------------------------------------------------------------


def as_text(transcript: Transcript) -> str:
    """One line."""
    return transcript.text + "\n"


def as_dict(transcript: Transcript) -> dict[str, Any]:
    """As OpenAI's ``verbose_json``: seconds with milliseconds."""
    return {
        "duration": round(transcript.seconds, 3),
        "text": transcript.text,
        "segments": [
            {"id": number, "start": round(one.start, 3), "end": round(one.end, 3), "text": one.text}
            for number, one in enumerate(transcript.segments)
        ],
        "words": [
            {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in transcript.words
        ],
    }


def as_json(transcript: Transcript) -> str:
    return json.dumps(as_dict(transcript), ensure_ascii=False, indent=2) + "\n"


def as_srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    cues = (
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(cues_of(transcript), start=1)
    )
    return "\n".join(cues)


def as_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles."""
    cues = (
        f"\n{_clock(start, '.')} --> {_clock(end, '.')}\n{_escape(text)}\n" for start, end, text in cues_of(transcript)
    )
    return "WEBVTT\n" + "".join(cues)


FORMATS: dict[str, Callable[[Transcript], str]] = {
    "text": as_text,
    "json": as_json,
    "srt": as_srt,
    "vtt": as_vtt,
}


def cues_of(transcript: Transcript) -> Iterator[Word]:
    """Subtitles: sentences, or as much of them as fits; a segment without times of words is one."""
    for segment in transcript.segments:
        if not segment.words:
            yield Word(segment.start, segment.end, segment.text)
        cue: list[Word] = []
        for word in segment.words:
            if cue and not _fits([*cue, word]):
                yield _cue(cue)
                cue = []
            cue.append(word)
        if cue:
            yield _cue(cue)


def _fits(words: Sequence[Word]) -> bool:
    """Whether a word may still follow those before it in one subtitle."""
    cue = _cue(words)
    return cue.end - cue.start <= LONGEST_CUE and len(cue.text) <= WIDEST_CUE and words[-2].text[-1] not in ".?!。？！"


def _cue(words: Sequence[Word]) -> Word:
    return Word(words[0].start, words[-1].end, join_texts([word.text for word in words]))


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
