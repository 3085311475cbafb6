"""What happens to speech on its way to a microphone: noise, other voices, rooms, narrow bands.

Waveforms are ``[samples]`` float64 at 16 kHz. Signal-to-noise ratios are over *active speech*: the power of speech and
the power of noise, both over the 20 ms frames of the clean utterance that are at most 30 dB below its loudest one.
Pauses would make a noise seem louder than it is while somebody speaks. Nothing is clipped or scaled to [-1, 1]
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import soxr

from blspkd_fairseq.data.audio import SAMPLE_RATE

_FRAME = SAMPLE_RATE // 50
_ACTIVE_DB = 30.0


class Voices(NamedTuple):
    """Utterances for babble.

    Attributes:
        ids: of the utterances.
        load: id to ``[samples]`` float32 at 16 kHz.
        speakers: by id, as far as they are known; nobody babbles behind himself.
    """

    ids: Sequence[str]
    load: Callable[[str], np.ndarray]
    speakers: Mapping[str, str] = {}


def active_power(samples: np.ndarray, speech: np.ndarray | None = None) -> float:
    """Mean square over the frames in which somebody speaks.

    Args:
        samples: ``[samples]``.
        speech: the clean utterance that decides which frames those are; None: ``samples``.
    """
    speech = samples if speech is None else speech
    loudness = _frame_energy(speech)
    active = loudness >= loudness.max() * 10 ** (-_ACTIVE_DB / 10)
    counts = _frame_energy(np.ones(len(speech)))
    return float(_frame_energy(samples)[active].sum() / counts[active].sum())


def add_noise(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Speech and noise ``[samples]`` with this ratio in dB; silence stays silent.

    Raises:
        ValueError: the noise is silent where somebody speaks.
    """
    noise_power = active_power(noise, speech)
    if noise_power == 0:
        raise ValueError("the noise is silent where the utterance is not: give babble other voices")
    wanted = active_power(speech) / 10 ** (snr_db / 10)
    return speech + noise * math.sqrt(wanted / noise_power)


def equally_loud(voice: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """``[length]`` of a voice with active power 1, repeated from a random point on."""
    repeated = np.resize(np.roll(voice, -int(rng.integers(len(voice)))), length)
    return repeated / math.sqrt(active_power(voice) or 1.0)


def reverberate(speech: np.ndarray, rt60: float, rng: np.random.Generator) -> np.ndarray:
    """A room of noise that decays by 60 dB in ``rt60`` seconds, as strong as the direct sound; as loud as before."""
    time = np.arange(1, math.ceil(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    response = np.concatenate([[1.0], tail / math.sqrt((tail**2).sum())])
    length = len(speech) + len(response)
    wet = np.fft.irfft(np.fft.rfft(speech, length) * np.fft.rfft(response, length), length)[: len(speech)]
    power = active_power(wet, speech)
    return wet * math.sqrt(active_power(speech) / power) if power > 0 else speech


def narrow_band(speech: np.ndarray, rate: float = SAMPLE_RATE / 2) -> np.ndarray:
    """What is left of speech that was sampled at ``rate``; as long as before."""
    restored = soxr.resample(soxr.resample(speech, SAMPLE_RATE, rate), rate, SAMPLE_RATE)
    return np.pad(restored, (0, max(0, len(speech) - len(restored))))[: len(speech)]


def _frame_energy(samples: np.ndarray) -> np.ndarray:
    """Sums of squares ``[frames]``; the last frame may be shorter."""
    return np.add.reduceat(np.square(samples, dtype=np.float64), np.arange(0, len(samples), _FRAME))
