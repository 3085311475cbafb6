"""Audio of any length in windows, decoded while it is needed: an hour takes no more memory than a minute."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blspkd_fairseq.data.audio import SAMPLE_RATE, audio_seconds, load_audio, stream_audio
from blspkd_fairseq.data.windows import WindowCutter

_LONG = 60.0


class Window(NamedTuple):
    """Attributes: ``start`` in seconds of the whole; ``samples`` [S] float32 at 16 kHz."""

    start: float
    samples: np.ndarray


def stream_windows(path: str | Path, longest: float) -> Iterator[Window]:
    """The windows of a file of any length; see :class:`WindowCutter`.

    Raises:
        AudioError: as of :func:`load_audio`, for a damaged file maybe after some windows.
    """
    start = 0
    for window in _windows(_blocks(path), WindowCutter(longest)):
        yield Window(start / SAMPLE_RATE, window)
        start += len(window)


def _windows(blocks: Iterator[np.ndarray], cutter: WindowCutter) -> Iterator[np.ndarray]:
    for block in blocks:
        yield from cutter.feed(block)
    yield from cutter.flush()


def _blocks(path: str | Path) -> Iterator[np.ndarray]:
    """Mono samples at 16 kHz; what is not long at once, and so resampled as :func:`load_audio` does it."""
    seconds = audio_seconds(path)
    if seconds is not None and seconds <= _LONG:
        yield load_audio(path, max_seconds=None)
    else:
        yield from stream_audio(path)
