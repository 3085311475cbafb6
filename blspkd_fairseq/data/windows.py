"""Long audio cut into windows that a speech encoder can hear, in pauses or at quiet places, while it comes in."""

from collections.abc import Iterator, Sequence

import numpy as np

from blspkd_fairseq.data.audio import SAMPLE_RATE

PAUSE = 0.24
"""Seconds; stops inside of words are shorter."""

_HOP = SAMPLE_RATE // 100
_PAUSE_HOPS = round(PAUSE * SAMPLE_RATE / _HOP)
_ONSET_HOPS = 8
"""What is left of a pause before the next word, whose first consonant may be soft."""
_QUIET = 10**-3.5
"""A pause has this share of the power of the loudest place before it in the window (-35 dB)."""


class WindowCutter:
    """Cuts a stream of samples into windows that together are the stream: no sample is lost or heard twice.

    A window ends with the first pause after ``shortest`` seconds, for in training, too, speech is followed by silence
    and seldom begins with it; where no pause ends for ``longest`` seconds, at the quietest place of their second half.
    The cuts do not depend on the portions in which the stream came in.

    Args:
        longest, shortest: seconds of a window; shortest is a third of the longest by default. The last may be shorter.
    """

    def __init__(self, longest: float = 30.0, shortest: float | None = None) -> None:
        shortest = longest / 3 if shortest is None else shortest
        if not PAUSE <= shortest <= longest:
            raise ValueError(f"windows need {PAUSE} <= shortest <= longest seconds, got {shortest:g} and {longest:g}")
        self.longest = int(longest * SAMPLE_RATE)
        self.shortest = int(shortest * SAMPLE_RATE)
        self._buffer = np.zeros(0, np.float32)

    def feed(self, samples: np.ndarray) -> list[np.ndarray]:
        """Takes in ``[samples]`` float32 at 16 kHz and returns the windows that they complete."""
        self._buffer = np.concatenate([self._buffer, samples])
        windows = []
        while (end := self._find_end()) is not None:
            windows.append(self._take(end))
        return windows

    def flush(self) -> list[np.ndarray]:
        """The last window, if anything is left."""
        return [self._take(len(self._buffer))] if len(self._buffer) else []

    def _find_end(self) -> int | None:
        if len(self._buffer) <= self.shortest:
            return None
        heard = self._buffer[: self.longest]
        pause = end_of_pause(heard, self.shortest)
        if pause is not None or len(self._buffer) <= self.longest:
            return pause
        return quietest_place(heard, self.longest // 2)

    def _take(self, samples: int) -> np.ndarray:
        window, self._buffer = self._buffer[:samples], self._buffer[samples:]
        return window


def cut_windows(waveform: np.ndarray, longest: float = 30.0, shortest: float | None = None) -> list[np.ndarray]:
    """All windows of ``[samples]``; see :class:`WindowCutter`. Audio that fits one window is one."""
    if len(waveform) <= longest * SAMPLE_RATE:
        return [waveform]
    cutter = WindowCutter(longest, shortest)
    return [*cutter.feed(waveform), *cutter.flush()]


def starts(windows: Sequence[np.ndarray]) -> Iterator[float]:
    """The second at which each of successive windows begins."""
    begin = 0
    for window in windows:
        yield begin / SAMPLE_RATE
        begin += len(window)


def end_of_pause(waveform: np.ndarray, after: int) -> int | None:
    """The sample shortly before the first pause behind the sample ``after`` ends; None if none has ended yet."""
    power = _powers(waveform)
    quiet = power < np.maximum.accumulate(power) * _QUIET
    quiet[: -(-after // _HOP)] = False
    # How many frames it has been quiet, before each frame: the distance to the last one that was not.
    frames = np.arange(len(quiet))
    run = frames - np.maximum.accumulate(np.where(quiet, -1, frames))
    ends = np.flatnonzero(~quiet[1:] & (run[:-1] >= _PAUSE_HOPS)) + 1
    return int(ends[0] - _ONSET_HOPS) * _HOP if len(ends) else None


def sounding(waveform: np.ndarray) -> tuple[int, int]:
    """The first sample, and the one behind the last, that are not 35 dB below the loudest; all where all is quiet."""
    power = _powers(waveform)
    loud = np.flatnonzero(power > power.max() * _QUIET) if len(power) else power
    return (int(loud[0]) * _HOP, int(loud[-1] + 1) * _HOP) if len(loud) else (0, len(waveform))


def quietest_place(waveform: np.ndarray, after: int) -> int:
    """The sample behind ``after`` around which there is least energy; the last of several."""
    power, first, middle = _powers(waveform), -(-after // _HOP), _PAUSE_HOPS // 2
    around = power[max(0, first - middle) :]
    if len(around) < _PAUSE_HOPS:
        return len(waveform)
    energy = np.lib.stride_tricks.sliding_window_view(around, _PAUSE_HOPS).sum(1)
    return (max(0, first - middle) + middle + len(energy) - 1 - int(np.argmin(energy[::-1]))) * _HOP


def _powers(waveform: np.ndarray) -> np.ndarray:
    """Power of each 10 ms."""
    frames = len(waveform) // _HOP
    power: np.ndarray = np.square(waveform[: frames * _HOP].reshape(frames, _HOP), dtype=np.float64).mean(1)
    return power
