"""Where somebody speaks: by energy, or by Silero's network where the package ``silero-vad`` is installed."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from blspkd_fairseq.data.audio import SAMPLE_RATE

MARGIN = 0.2
"""Seconds before and behind what is found, which keep soft consonants."""
GAP = 0.6
"""Seconds; shorter pauses belong to the speech around them."""

_HOP = SAMPLE_RATE // 100
_SHORTEST = 12
"""Frames of 10 ms: a click is shorter than any word."""
_ABOVE_FLOOR = 10.0
"""Speech has this many times the power of the steady sound behind it (10 dB), which hum and hiss do not have."""
_FAINTEST = 10**-5.5
"""... and at least this power (-55 dB of full scale)."""

Span = tuple[int, int]
"""First sample, and the one behind the last."""


class VadError(ValueError):
    """A detector that is unknown or not installed."""


def find_speech(waveform: np.ndarray, detector: str = "energy") -> list[Span]:
    """Spans of ``[samples]`` at 16 kHz in which somebody speaks, in order, with margins; none in silence.

    Args:
        detector: "energy", which tells speech from silence, hum, hiss and clicks, but not from music; or "silero".

    Raises:
        VadError: another name, or Silero's package is missing.
    """
    if detector not in DETECTORS:
        raise VadError(f"unknown voice activity detector {detector!r}: choose from {', '.join(DETECTORS)}")
    return _with_margins(DETECTORS[detector](waveform), len(waveform))


def speech_windows(window: np.ndarray, detector: str) -> list[tuple[int, np.ndarray]]:
    """The parts of a window in which somebody speaks, each with the sample at which it begins."""
    return [(begin, window[begin:end]) for begin, end in find_speech(window, detector)]


def _by_energy(waveform: np.ndarray) -> list[Span]:
    frames = len(waveform) // _HOP
    if frames < _SHORTEST:
        return []
    power = np.square(waveform[: frames * _HOP].reshape(frames, _HOP), dtype=np.float64).mean(1)
    power = np.convolve(power, np.ones(5) / 5, mode="same")
    floor = np.quantile(power, 0.05)
    loud = power > max(floor * _ABOVE_FLOOR, _FAINTEST)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(np.int8)))
    runs = [(begin, end) for begin, end in edges.reshape(-1, 2).tolist() if end - begin >= _SHORTEST]
    return [(begin * _HOP, end * _HOP) for begin, end in runs]


def _by_silero(waveform: np.ndarray) -> list[Span]:
    import torch

    package = _silero_package()
    found = package.get_speech_timestamps(torch.from_numpy(waveform), _silero(), sampling_rate=SAMPLE_RATE)
    return [(one["start"], one["end"]) for one in found]


def _silero_package() -> Any:
    try:
        return importlib.import_module("silero_vad")
    except ImportError as error:
        raise VadError("the detector silero needs its package: pip install 'blspkd-fairseq[vad]'") from error


@cache
def _silero() -> Any:
    return _silero_package().load_silero_vad()


DETECTORS: dict[str, Callable[[np.ndarray], list[Span]]] = {"energy": _by_energy, "silero": _by_silero}


def _with_margins(spans: list[Span], length: int) -> list[Span]:
    """Wider spans, joined where little lies between them."""
    margin, gap = int(MARGIN * SAMPLE_RATE), int(GAP * SAMPLE_RATE)
    joined: list[Span] = []
    for begin, end in spans:
        wider = max(0, begin - margin), min(length, end + margin)
        if joined and wider[0] - joined[-1][1] < gap:
            joined[-1] = joined[-1][0], wider[1]
        else:
            joined.append(wider)
    return joined
