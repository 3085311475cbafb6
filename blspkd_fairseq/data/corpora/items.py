"""What a corpus consists of: utterances, and rows that name none."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from blspkd_fairseq.data.audio_error import Reason

NO_CLIP = Reason.MISSING.value
MALFORMED = "malformed row"
NO_SPEECH = "no speech"


class CorpusError(ValueError):
    """A corpus that cannot be read; the message names the file and says what was expected there."""


class Entry(NamedTuple):
    """One utterance of a corpus.

    Attributes:
        id: unique in the corpus.
        audio: its file, which may hold others, too.
        text: transcript, as the corpus has it.
        translation: the text in ``tgt_lang``, or None.
        speaker: name of the speaker, empty if unknown.
        src_lang, tgt_lang: language codes of the corpus.
        start, end: seconds in the file; None: its beginning, its end.
        declared_seconds: length of the whole file according to the corpus.
    """

    id: str
    audio: Path
    text: str
    translation: str | None = None
    speaker: str = ""
    src_lang: str = ""
    tgt_lang: str = ""
    start: float | None = None
    end: float | None = None
    declared_seconds: float | None = None


class Dropped(NamedTuple):
    """A row that gives no utterance, and why."""

    id: str
    reason: str
    detail: str


Item = Entry | Dropped
