"""Degraded copies of an utterance: noise, babble, reverberation, clipping, another speed, telephone bandwidth.

Waveforms are ``[samples]`` float32 at 16 kHz. What is drawn at random depends on the seed, the kind of degradation and
the utterance's id alone: the noise of an utterance is the same at every level and in every run.

Signal-to-noise ratios are over *active speech*: the power of speech and the power of noise, both over the 20 ms frames
of the clean utterance that are at most 30 dB below its loudest one. Pauses would make a noise seem louder than it is
while somebody speaks. Nothing is clipped or scaled to [-1, 1] afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import soxr

from blspkd_fairseq.data.audio import SAMPLE_RATE

BABBLE_VOICES = 6
_FRAME = SAMPLE_RATE // 50
_ACTIVE_DB = 30.0


class _Kind(NamedTuple):
    """What a level means, between which values; no meaning: there is no level."""

    level: str = ""
    low: float = 0.0
    high: float = 0.0


_KINDS = {
    "clean": _Kind(),
    "white": _Kind("SNR in dB", -30, 60),
    "babble": _Kind("SNR in dB", -30, 60),
    "reverb": _Kind("RT60 in seconds", 0.05, 10),
    "clip": _Kind("share of clipped samples", 0.001, 0.99),
    "speed": _Kind("factor", 0.25, 4),
    "8khz": _Kind(),
}
RANDOM_KINDS = frozenset({"white", "babble", "reverb"})  # another seed gives another sound


@dataclass(frozen=True)
class Condition:
    """A kind of degradation and how much of it. Attributes: ``kind``, ``level`` (None where there is none)."""

    kind: str
    level: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"condition {self.kind!r} is unknown: choose among {known_conditions()}")
        kind = _KINDS[self.kind]
        if (self.level is None) == bool(kind.level):
            raise ValueError(
                f"condition {self} is incomplete or has a level too many: choose among {known_conditions()}"
            )
        if self.level is not None and not kind.low <= self.level <= kind.high:
            raise ValueError(f"condition {self} is out of range: {kind.level} is {kind.low:g} to {kind.high:g}")

    def __str__(self) -> str:
        return self.kind if self.level is None else f"{self.kind}:{self.level:g}"

    @property
    def axis(self) -> str:
        """What the level means, for a picture."""
        return _KINDS[self.kind].level


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


def known_conditions() -> str:
    """All conditions, for a message."""
    return ", ".join(f"{name}:<{kind.level}>" if kind.level else name for name, kind in _KINDS.items())


def parse_condition(text: str) -> Condition:
    """Reads ``clean``, ``white:10``, ``babble:5``, ``reverb:0.6``, ``clip:0.1``, ``speed:1.1`` or ``8khz``.

    Raises:
        ValueError: unknown, out of range, or without its level.
    """
    kind, colon, level = text.strip().partition(":")
    if not colon:
        return Condition(kind)
    try:
        return Condition(kind, float(level))
    except ValueError as error:
        if "condition" in str(error):
            raise
        raise ValueError(
            f"condition {text!r} has no number after the colon: choose among {known_conditions()}"
        ) from None


def degrade(
    samples: np.ndarray, condition: Condition, utterance: str, seed: int = 1, voices: Voices | None = None
) -> np.ndarray:
    """A degraded copy of an utterance.

    Args:
        samples: ``[samples]`` float32, 16 kHz, finite.
        condition: what to do to them.
        utterance: its id, on which the random draws depend.
        seed: of the draws, with the id.
        voices: other utterances, for babble only; neither the utterance itself (by its id) nor another of its speaker
            is among those drawn.

    Returns:
        ``[samples]`` float32 without NaN, as long as the input except for another speed. A silent utterance stays
        silent, as no noise has a ratio to it.

    Raises:
        ValueError: not one channel, empty or not finite; babble without other voices, or with silent ones.
    """
    speech = np.asarray(samples, dtype=np.float64)
    if speech.ndim != 1 or not len(speech) or not np.isfinite(speech).all():
        raise ValueError(f"{utterance} has the shape {list(speech.shape)} or NaN: give [samples], finite and not empty")
    rng = _generator(seed, condition.kind, utterance)
    return _apply(speech, condition, utterance, rng, voices).astype(np.float32)


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


# --- the kinds --------------------------------------------------------------------------------------


def _apply(
    speech: np.ndarray, condition: Condition, utterance: str, rng: np.random.Generator, voices: Voices | None
) -> np.ndarray:
    level = condition.level or 0.0
    match condition.kind:
        case "white":
            return _with_noise(speech, rng.standard_normal(len(speech)), level)
        case "babble":
            return _with_noise(speech, _babble(len(speech), utterance, rng, voices), level)
        case "reverb":
            return _reverberate(speech, level, rng)
        case "clip":
            return _clip(speech, level)
        case "speed":
            return soxr.resample(speech, SAMPLE_RATE * level, SAMPLE_RATE)
        case "8khz":
            return _narrow_band(speech)
        case _:
            return speech


def _with_noise(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    noise_power = active_power(noise, speech)
    if noise_power == 0:
        raise ValueError("the noise is silent where the utterance is not: give babble other voices")
    wanted = active_power(speech) / 10 ** (snr_db / 10)
    return speech + noise * math.sqrt(wanted / noise_power)


def _babble(length: int, utterance: str, rng: np.random.Generator, voices: Voices | None) -> np.ndarray:
    """Sum of equally loud voices, each repeated from a random point on."""
    total = np.zeros(length)
    if voices is None or not (ids := _draw_others(voices, utterance, rng)):
        raise ValueError(
            f"there is no other utterance to make the babble behind {utterance} of: give some, by other speakers"
        )
    for voice in ids:
        samples = np.asarray(voices.load(voice), dtype=np.float64)
        repeated = np.resize(np.roll(samples, -int(rng.integers(len(samples)))), length)
        total += repeated / math.sqrt(active_power(samples) or 1.0)
    return total


def _draw_others(voices: Voices, utterance: str, rng: np.random.Generator) -> list[str]:
    speaker, drawn = voices.speakers.get(utterance, ""), []
    for index in rng.permutation(len(voices.ids)):
        name = voices.ids[index]
        if name != utterance and not (speaker and voices.speakers.get(name) == speaker):
            drawn.append(name)
        if len(drawn) == BABBLE_VOICES:
            break
    return drawn


def _reverberate(speech: np.ndarray, rt60: float, rng: np.random.Generator) -> np.ndarray:
    """A room of noise that decays by 60 dB in ``rt60`` seconds, as strong as the direct sound; as loud as before."""
    time = np.arange(1, math.ceil(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    response = np.concatenate([[1.0], tail / math.sqrt((tail**2).sum())])
    length = len(speech) + len(response)
    wet = np.fft.irfft(np.fft.rfft(speech, length) * np.fft.rfft(response, length), length)[: len(speech)]
    power = active_power(wet, speech)
    return wet * math.sqrt(active_power(speech) / power) if power > 0 else speech


def _clip(speech: np.ndarray, share: float) -> np.ndarray:
    """Cuts off the loudest ``share`` of the samples, digital silence aside."""
    heights = np.abs(speech[speech != 0])
    if not len(heights):
        return speech
    limit = np.quantile(heights, 1 - share)
    return np.clip(speech, -limit, limit)


def _narrow_band(speech: np.ndarray) -> np.ndarray:
    restored = soxr.resample(soxr.resample(speech, SAMPLE_RATE, SAMPLE_RATE // 2), SAMPLE_RATE // 2, SAMPLE_RATE)
    return np.pad(restored, (0, max(0, len(speech) - len(restored))))[: len(speech)]


# --- shared -----------------------------------------------------------------------------------------


def _generator(seed: int, kind: str, utterance: str) -> np.random.Generator:
    digest = blake2b(f"{kind}\0{utterance}".encode(), digest_size=16).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])


def _frame_energy(samples: np.ndarray) -> np.ndarray:
    """Sums of squares ``[frames]``; the last frame may be shorter."""
    return np.add.reduceat(np.square(samples, dtype=np.float64), np.arange(0, len(samples), _FRAME))
