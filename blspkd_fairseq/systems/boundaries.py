"""Where CIF cuts real speech, against where Whisper's cross-attention says that words end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.evaluation.alignment import (
    Boundaries,
    BoundarySummary,
    boundary_differences,
    boundary_measurement,
    summarize,
)
from blspkd_fairseq.evaluation.plots import plot_boundaries
from blspkd_fairseq.evaluation.significance import Interval, bootstrap_interval
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.systems.answers import Questions, read_waveform
from blspkd_fairseq.systems.systems import WhisperTranscriber


def compare_boundaries(
    model: BlspKd, whisper: WhisperTranscriber, questions: Questions, picture: Path, samples: int = 1000, seed: int = 1
) -> tuple[BoundarySummary, Interval] | None:
    """Every utterance of a manifest, CIF cutting it into as many tokens as its transcript has.

    Returns:
        Means over all matched words and the interval of the mean absolute difference in ms (utterances are drawn); None
        if the adapter has no boundaries.
    """
    found: list[Boundaries] = []
    example: tuple[list[tuple[str, float]], list[tuple[str, float]]] = ([], [])
    manifest = questions.manifest
    for index in tqdm(range(len(manifest)), desc="alignment", unit="row"):
        samples_of_row = read_waveform(questions, index)
        if not index and model.adapt((samples_of_row, SAMPLE_RATE)).boundaries is None:
            return None
        aligned = model.align((samples_of_row, SAMPLE_RATE), transcript=manifest[index]["src_text"])
        tokens = [(token.token, token.end) for token in aligned]
        words = whisper.word_ends(samples_of_row)
        found.append(boundary_differences(tokens, words))
        if len(found[-1].differences_ms) and len(words) > len(example[1]):
            example = tokens, words
    measured = boundary_measurement(found)
    differences = np.concatenate([np.empty(0), *(one.differences_ms for one in found)])
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_boundaries(differences, *example, picture)
    return summarize(found), bootstrap_interval(measured.statistics, measured.score_of, samples, seed)
