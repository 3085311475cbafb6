"""Where CIF cuts real speech, against where Whisper's cross-attention says that words end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from blspkd_fairseq.data.audio import MAX_SECONDS, SAMPLE_RATE
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.evaluation.alignment import (
    Boundaries,
    BoundarySummary,
    Calibration,
    boundary_differences,
    boundary_measurement,
    calibration_of,
    summarize,
)
from blspkd_fairseq.evaluation.plots import plot_boundaries
from blspkd_fairseq.evaluation.significance import Interval, bootstrap_interval
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.systems.answers import Questions, read_waveform
from blspkd_fairseq.systems.systems import WhisperTranscriber

logger = logging.getLogger(__name__)

_PAUSE = 0.3  # seconds between two joined recordings
_LONGEST = 13.0  # seconds of a recording that is joined with another: Whisper hears 30
_SILENT = 0.02  # of the loudest sample
_JOINS = 30


class BoundaryComparison(NamedTuple):
    """Attributes: means over all matched words; the interval of the mean absolute difference in ms; Whisper's own."""

    summary: BoundarySummary
    interval: Interval
    whisper: Calibration


def compare_boundaries(
    model: BlspKd,
    whisper: WhisperTranscriber,
    questions: Questions,
    picture: Path,
    whisper_itself: Calibration,
    samples: int = 1000,
    seed: int = 1,
) -> BoundaryComparison | None:
    """Every utterance of a manifest: CIF cuts as many tokens as its transcript has, Whisper is forced onto that.

    Recordings of more than 30 s, of which Whisper tells no times, are left out, and that is said.

    Returns:
        None if the adapter has no boundaries.

    Raises:
        ValueError: all recordings are longer.
    """
    found: list[Boundaries] = []
    example: tuple[list[tuple[str, float]], list[tuple[str, float]]] = ([], [])
    manifest = questions.manifest
    rows = _timed_rows(manifest)
    for index in tqdm(rows, desc="alignment", unit="row"):
        samples_of_row, text = read_waveform(questions, index), manifest[index]["src_text"]
        if index == rows[0] and model.adapt((samples_of_row, SAMPLE_RATE), reads=False).boundaries is None:
            return None
        tokens = token_ends(model, samples_of_row, text)
        words = whisper.word_ends(samples_of_row, text)
        found.append(boundary_differences(tokens, words))
        if len(found[-1].differences_ms) and len(words) > len(example[1]):
            example = tokens, words
    measured = boundary_measurement(found)
    differences = np.concatenate([np.empty(0), *(one.differences_ms for one in found)])
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_boundaries(differences, *example, picture)
    interval = bootstrap_interval(measured.statistics, measured.score_of, samples, seed)
    return BoundaryComparison(summarize(found), interval, whisper_itself)


def token_ends(model: BlspKd, waveform: np.ndarray, transcript: str) -> list[tuple[str, float]]:
    """The tokens of a transcript and the second at which CIF ends each, of ``[S]`` samples at 16 kHz."""
    return [(token.token, token.end) for token in model.align((waveform, SAMPLE_RATE), transcript=transcript)]


def _timed_rows(manifest: Manifest) -> list[int]:
    """Rows that Whisper hears at once."""
    rows: list[int] = np.flatnonzero(manifest.n_frames <= MAX_SECONDS * SAMPLE_RATE).tolist()
    long = len(manifest) - len(rows)
    said = f"{long} rows of {manifest.path} are longer than the {MAX_SECONDS:g} s that Whisper times"
    if not rows:
        raise ValueError(f"{said}, and no other is left: give --align a test set of shorter rows, or leave it out")
    if long:
        logger.warning(f"{said}: they are left out of the alignment")
    return rows


def calibrate(whisper: WhisperTranscriber, questions: Questions) -> Calibration:
    """Whisper on pairs of recordings, cut to where they sound and joined by a pause: it is known where the first ends.

    Rows of up to 13 s, 30 pairs at most.
    """
    manifest = questions.manifest
    short = [i for i in range(len(manifest)) if int(manifest.n_frames[i]) <= _LONGEST * SAMPLE_RATE]
    differences = []
    for first, second in list(zip(short[::2], short[1::2], strict=False))[:_JOINS]:
        waveforms = [sounding(read_waveform(questions, index)) for index in (first, second)]
        texts = [manifest[index]["src_text"] for index in (first, second)]
        difference = join_difference(whisper, waveforms, texts)
        differences += [] if difference is None else [difference]
    return calibration_of(differences)


def join_difference(whisper: WhisperTranscriber, waveforms: Sequence[np.ndarray], texts: Sequence[str]) -> float | None:
    """Milliseconds by which Whisper ends the first recording's last word too late; None if it does not time it."""
    pause = np.zeros(int(_PAUSE * SAMPLE_RATE), dtype=np.float32)
    joined = np.concatenate([waveforms[0], pause, waveforms[1]])
    ends = whisper.word_ends(joined, " ".join(texts))
    words = sum(any(letter.isalnum() for letter in word) for word in texts[0].split())
    missing = sum(any(letter.isalnum() for letter in word) for word in " ".join(texts).split()) - len(ends)
    # A first word of one token has no time.
    if missing not in (0, 1) or words - missing < 1:
        return None
    return 1000 * (ends[words - missing - 1][1] - len(waveforms[0]) / SAMPLE_RATE)


def sounding(waveform: np.ndarray) -> np.ndarray:
    """Without the silence on both sides."""
    loud = np.flatnonzero(np.abs(waveform) > _SILENT * np.abs(waveform).max())
    return waveform[loud[0] : loud[-1] + 1] if len(loud) else waveform
