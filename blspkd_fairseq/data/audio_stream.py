"""Audio of any length in windows, decoded while it is needed: an hour takes no more memory than a minute."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from blspkd_fairseq.data.audio import SAMPLE_RATE, AudioError, load_audio
from blspkd_fairseq.data.windows import WindowCutter

_BLOCK_SECONDS = 10


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


def seconds_of(path: str | Path) -> float | None:
    """Length of a file according to its header, or None: for a progress bar."""
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError):
        return None
    return info.frames / info.samplerate if info.frames < 1 << 62 else None


def _blocks(path: str | Path) -> Iterator[np.ndarray]:
    """Mono samples at 16 kHz, ten seconds or so at a time, of WAV and FLAC, whose length is sure; others whole."""
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError):
        info = None
    if info is None or info.format not in ("WAV", "FLAC") or info.frames <= 60 * info.samplerate:
        yield load_audio(path, max_seconds=None)
        return
    count = 0
    resampler = None if info.samplerate == SAMPLE_RATE else soxr.ResampleStream(info.samplerate, SAMPLE_RATE, 1)
    try:
        for block in soundfile.blocks(str(path), _BLOCK_SECONDS * info.samplerate, dtype="float32", always_2d=True):
            mono = block.mean(1)
            count += len(mono)
            if not np.isfinite(mono).all():
                raise AudioError(f"{path} holds samples that are NaN or infinite: write the file anew")
            yield mono if resampler is None else resampler.resample_chunk(mono)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path} cannot be decoded, so it is truncated or damaged: {error.error_string}") from error
    if count < info.frames:
        raise AudioError(
            f"{path} holds {count / info.samplerate:.2f} s of the {info.frames / info.samplerate:.2f} s that its "
            "header declares: it is truncated, restore the file"
        )
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
