"""Long audio cut into windows that a speech encoder can hear, at the quietest places, while it comes in."""

from collections.abc import Iterator

import numpy as np

from blspkd_fairseq.data.audio import SAMPLE_RATE

_HOP = SAMPLE_RATE // 100
"""Energy is looked at each 10 ms."""
_SMOOTHING = 25
"""... as the mean of that many: a quiet consonant is shorter than a quarter of a second, a pause is not."""


class WindowCutter:
    """Cuts a stream of samples into windows that together are the stream, no sample lost or heard twice.

    A window is closed as soon as more than ``longest`` seconds have come in, at the quietest place (of the last ones as
    quiet) between ``shortest`` and ``longest``; so the cuts do not depend on how the stream was portioned.

    Args:
        longest: seconds of a window.
        shortest: seconds of a window, but for the last; half of ``longest`` by default.

    Attributes:
        start: samples in the windows that were given so far.
    """

    def __init__(self, longest: float = 30.0, shortest: float | None = None) -> None:
        shortest = longest / 2 if shortest is None else shortest
        if not 0.02 <= shortest <= longest:
            raise ValueError(f"windows need 0.02 <= shortest <= longest seconds, got {shortest:g} and {longest:g}")
        self.longest = int(longest * SAMPLE_RATE)
        self.shortest = int(shortest * SAMPLE_RATE)
        self.start = 0
        self._buffer = np.zeros(0, np.float32)

    def feed(self, samples: np.ndarray) -> list[np.ndarray]:
        """Takes in ``[samples]`` float32 at 16 kHz and returns the windows that they complete."""
        self._buffer = np.concatenate([self._buffer, samples])
        windows = []
        while len(self._buffer) > self.longest:
            windows.append(self._take(quietest_place(self._buffer, self.shortest, self.longest)))
        return windows

    def flush(self) -> list[np.ndarray]:
        """The last window, if anything is left."""
        return [self._take(len(self._buffer))] if len(self._buffer) else []

    def _take(self, samples: int) -> np.ndarray:
        window, self._buffer = self._buffer[:samples], self._buffer[samples:]
        self.start += samples
        return window


def cut_windows(waveform: np.ndarray, longest: float = 30.0, shortest: float | None = None) -> list[np.ndarray]:
    """All windows of ``[samples]``; see :class:`WindowCutter`. Audio that fits one is one."""
    cutter = WindowCutter(longest, shortest)
    return [*cutter.feed(waveform), *cutter.flush()]


def starts(windows: list[np.ndarray]) -> Iterator[float]:
    """The second at which each of successive windows begins."""
    begin = 0
    for window in windows:
        yield begin / SAMPLE_RATE
        begin += len(window)


def quietest_place(waveform: np.ndarray, first: int, last: int) -> int:
    """The sample between ``first`` and ``last`` around which there is least energy, the middle of the last such pause.

    Args:
        waveform: ``[samples]`` with at least ``last`` of them.
    """
    level = _levels(waveform[:last])
    low, high = -(-first // _HOP), last // _HOP
    if high <= low:
        return last
    choice = level[low:high]
    quiet = np.flatnonzero(choice <= choice.min() + 1e-12)
    # In digital silence all are as quiet: the middle of the last run of them.
    run = quiet[np.flatnonzero(np.diff(quiet, prepend=-2) > 1)[-1] :]
    return int((low + (run[0] + run[-1] + 1) / 2) * _HOP)


def _levels(waveform: np.ndarray) -> np.ndarray:
    """Smoothed power at each multiple of 10 ms."""
    frames = len(waveform) // _HOP
    power = np.square(waveform[: frames * _HOP].reshape(frames, _HOP), dtype=np.float64).mean(1)
    return np.convolve(power, np.ones(_SMOOTHING) / _SMOOTHING, mode="same")
