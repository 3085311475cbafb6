"""Recordings that two manifests share, whatever their files are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from blspkd_fairseq.data.audio import AudioError, audio_bytes, audio_size, load_audio
from blspkd_fairseq.data.manifest import Manifest

Place = tuple[str, Path | None]
"""Name of an audio file or member of an archive, and its root, as for :func:`load_audio`."""

_SAME = 0.8  # correlation of two encodings of one recording; that of others is near 0


def shared_recordings(
    one: Manifest,
    rows: Sequence[int],
    other: Manifest,
    locate: Callable[[Manifest, int], Place],
    text_of: Callable[[Manifest, int], str],
) -> Iterator[tuple[int, int]]:
    """Rows of two manifests that are one recording: of equal length, and the same bytes; or the same text and sound.

    Files of equal length and size are compared first, so that of millions few are read.

    Args:
        one, rows: rows of the first manifest to look for.
        other: in which to look.
        locate: name of the audio of a row, and its root, as for :func:`load_audio`.
        text_of: what is said in a row.

    Yields:
        A row of ``one`` and a row of ``other`` that is the same recording under another name, the first one for each.
    """
    lengths = set(one.n_frames[list(rows)].tolist())
    candidates: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.isin(other.n_frames, list(lengths))).tolist():
        candidates[int(other.n_frames[row])].append(row)
    for row in rows:
        found = _find(one, row, other, candidates[int(one.n_frames[row])], locate, text_of)
        if found is not None:
            yield row, found


def _find(
    one: Manifest,
    row: int,
    other: Manifest,
    candidates: Sequence[int],
    locate: Callable[[Manifest, int], Place],
    text_of: Callable[[Manifest, int], str],
) -> int | None:
    place, text = locate(one, row), text_of(one, row)
    for candidate in candidates:
        there = locate(other, candidate)
        try:
            if _same_bytes(place, there) or (text == text_of(other, candidate) and _same_sound(place, there)):
                return candidate
        except AudioError:
            continue  # is said elsewhere
    return None


def _same_bytes(one: Place, other: Place) -> bool:
    return audio_size(*one) == audio_size(*other) and audio_bytes(*one) == audio_bytes(*other)


def _same_sound(one: Place, other: Place) -> bool:
    first, second = (load_audio(*place, max_seconds=None) for place in (one, other))
    length = min(len(first), len(second))
    a, b = first[:length].astype(np.float64), second[:length].astype(np.float64)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return scale > 0 and float(a @ b) / scale > _SAME
