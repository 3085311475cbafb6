"""GigaSpeech: GigaSpeech.json, of several gigabytes, and audio/**/*.opus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from blspkd_fairseq.data.corpora.items import NO_SPEECH, CorpusError, Dropped, Entry, Item
from blspkd_fairseq.data.corpora.tables import open_text

_PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_NO_SPEECH_TAGS = frozenset({"<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"})
_READ_CHARACTERS = 1 << 20


def read_gigaspeech(
    root: Path, subset: str, keep_tags: bool = False, lowercase: bool = False, lang: str = "en"
) -> Iterator[Item]:
    """Segments of a subset (XS, S, M, L, XL, DEV, TEST), by audio file.

    ``GigaSpeech.json`` has several gigabytes; one audio file's part of it is held in memory at a time. Tags of
    punctuation become punctuation (unless ``keep_tags``); segments tagged as silence, music or noise are dropped.

    Raises:
        CorpusError: another layout.
    """
    path = root / "GigaSpeech.json"
    if not path.is_file():
        raise CorpusError(f"{root} is no GigaSpeech: expected GigaSpeech.json and audio/ in it")
    for audio in _json_array(path, "audios"):
        try:
            yield from _segments(root, audio, subset, keep_tags, lowercase, lang)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorpusError):
                raise
            raise CorpusError(
                f"{path}: the audio {_name_of(audio)} is not as published ({type(error).__name__}: {error}); expected "
                "path and segments with sid, begin_time, end_time, text_tn, subsets"
            ) from error


def _name_of(audio: Any) -> str:
    return str(audio.get("aid", "without aid")) if isinstance(audio, dict) else repr(audio)[:40]


def _segments(
    root: Path, audio: dict[str, Any], subset: str, keep_tags: bool, lowercase: bool, lang: str
) -> Iterator[Item]:
    declared = float(audio["duration"]) if "duration" in audio else None
    for segment in audio["segments"]:
        if subset not in {name.strip("{}") for name in segment["subsets"]}:
            continue
        text = segment["text_tn"] if "text_tn" in segment else segment["text_tts"]
        tags = _NO_SPEECH_TAGS.intersection(text.split())
        if tags:
            yield Dropped(segment["sid"], NO_SPEECH, " ".join(sorted(tags)))
            continue
        text = text if keep_tags else punctuate(text)
        speaker = segment.get("speaker", "")
        yield Entry(
            segment["sid"],
            root / audio["path"],
            text.lower() if lowercase else text,
            speaker="" if speaker == "N/A" else speaker,
            src_lang=lang,
            start=float(segment["begin_time"]),
            end=float(segment["end_time"]),
            declared_seconds=declared,
        )


def punctuate(text: str) -> str:
    """``HELLO <COMMA> WORLD <PERIOD>`` as ``HELLO, WORLD.``"""
    return re.sub(r"\s*<(?:COMMA|PERIOD|QUESTIONMARK|EXCLAMATIONPOINT)>", lambda m: _PUNCTUATION[m[0].strip()], text)


def _json_array(path: Path, key: str) -> Iterator[Any]:
    """Elements of the array ``key`` of a JSON object, one at a time."""
    decoder = json.JSONDecoder()
    with open_text(path) as file:
        buffer = _JsonBuffer(file, path)
        position = buffer.find(re.compile(rf'"{key}"\s*:\s*\['), key)
        while True:
            position = buffer.skip(position)
            if buffer.text[position] == "]":
                return
            value, position = buffer.decode(decoder, position)
            yield value


class _JsonBuffer:
    """The part of a file that is being read."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path, self.text = file, path, ""

    def _grow(self) -> None:
        # As much again, so that an element that comes in many pieces is not parsed as many times.
        try:
            more = self.file.read(max(_READ_CHARACTERS, len(self.text)))
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self.path} is not UTF-8: fetch it again") from error
        if not more:
            raise CorpusError(f"{self.path} ends in the middle, so it is truncated or no JSON: fetch it again")
        self.text += more

    def find(self, pattern: re.Pattern[str], key: str) -> int:
        while (match := pattern.search(self.text)) is None:
            try:
                self._grow()
            except CorpusError as error:
                raise CorpusError(f'{self.path} has no "{key}": is it the file of this corpus?') from error
        return match.end()

    def skip(self, position: int) -> int:
        """The next character that is neither blank nor a comma."""
        pattern = re.compile(r"[^\s,]")
        while (match := pattern.search(self.text, position)) is None:
            self._grow()
        return match.start()

    def decode(self, decoder: json.JSONDecoder, position: int) -> tuple[Any, int]:
        self.text = self.text[position:]
        while True:
            try:
                return decoder.raw_decode(self.text)
            except json.JSONDecodeError:
                self._grow()
