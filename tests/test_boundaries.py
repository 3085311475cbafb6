"""Word ends by Whisper, forced onto a transcript, and how far off it is itself where they are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blspkd_fairseq.systems.boundaries import join_difference, sounding
from blspkd_fairseq.systems.systems import WhisperTranscriber

CACHE = Path.home() / ".cache" / "blspkd_fairseq"


class Late:
    """Ends every word of the first recording 40 ms too late; a first word has no time, as in Whisper."""

    def __init__(self, end: float, words: int, times_the_first: bool) -> None:
        self.end, self.words, self.first = end, words, 0 if times_the_first else 1

    def word_ends(self, waveform: np.ndarray, transcript: str = "") -> list[tuple[str, float]]:
        step = (self.end + 0.04) / self.words
        return [(word, (i + 1) * step) for i, word in enumerate(transcript.split())][self.first :]


@pytest.mark.parametrize("times_the_first", [True, False])
def test_a_known_end_tells_how_late_whisper_is(times_the_first: bool) -> None:
    waveforms = [np.ones(32_000, dtype=np.float32), np.ones(16_000, dtype=np.float32)]
    late: object = Late(2.0, 3, times_the_first)
    assert join_difference(late, waveforms, ["the small cat", "ran off"]) == pytest.approx(40)  # type: ignore[arg-type]


def test_words_that_are_not_timed_give_no_known_end() -> None:
    late: object = Late(2.0, 1, False)
    waveforms = [np.ones(32_000, dtype=np.float32)] * 2
    assert join_difference(late, waveforms, ["cat", "ran off"]) is None  # type: ignore[arg-type]


def test_silence_on_both_sides_is_cut() -> None:
    waveform = np.concatenate([np.zeros(50), np.ones(30), np.zeros(20), np.ones(5), np.zeros(70)])
    assert len(sounding(waveform)) == 55 and len(sounding(np.zeros(9))) == 9


@pytest.mark.real
def test_whisper_says_what_it_is_forced_to() -> None:
    whisper = WhisperTranscriber(str(CACHE / "whisper-tiny.en"))
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    words = whisper.word_ends(noise, "Nobody said these five words.")
    assert [word.strip(".") for word, _ in words] in (
        ["Nobody", "said", "these", "five", "words"],
        ["said", "these", "five", "words"],
    )
    assert all(0 < end <= 3 for _, end in words)
