"""Degraded copies of an utterance: noise, babble, reverberation, clipping, another speed, telephone bandwidth.

Waveforms are ``[samples]`` float32 at 16 kHz. What is drawn at random depends on the seed, the kind of degradation and
the utterance's id alone: the noise of an utterance is the same at every level and in every run.

Signal-to-noise ratios are over active speech (:mod:`blspkd_fairseq.data.sound`).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import soxr

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.sound import Voices, active_power, add_noise, equally_loud, narrow_band, reverberate

__all__ = ["Condition", "Voices", "active_power", "degrade", "parse_condition"]

BABBLE_VOICES = 6


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


# --- the kinds --------------------------------------------------------------------------------------


def _apply(
    speech: np.ndarray, condition: Condition, utterance: str, rng: np.random.Generator, voices: Voices | None
) -> np.ndarray:
    level = condition.level or 0.0
    match condition.kind:
        case "white":
            return add_noise(speech, rng.standard_normal(len(speech)), level)
        case "babble":
            return add_noise(speech, _babble(len(speech), utterance, rng, voices), level)
        case "reverb":
            return reverberate(speech, level, rng)
        case "clip":
            return _clip(speech, level)
        case "speed":
            return soxr.resample(speech, SAMPLE_RATE * level, SAMPLE_RATE)
        case "8khz":
            return narrow_band(speech)
        case _:
            return speech


def _babble(length: int, utterance: str, rng: np.random.Generator, voices: Voices | None) -> np.ndarray:
    """Sum of equally loud voices, each repeated from a random point on."""
    total = np.zeros(length)
    if voices is None or not (ids := _draw_others(voices, utterance, rng)):
        raise ValueError(
            f"there is no other utterance to make the babble behind {utterance} of: give some, by other speakers"
        )
    for voice in ids:
        total += equally_loud(np.asarray(voices.load(voice), dtype=np.float64), length, rng)
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


def _clip(speech: np.ndarray, share: float) -> np.ndarray:
    """Cuts off the loudest ``share`` of the samples, digital silence aside."""
    heights = np.abs(speech[speech != 0])
    if not len(heights):
        return speech
    limit = np.quantile(heights, 1 - share)
    return np.clip(speech, -limit, limit)


# --- shared -----------------------------------------------------------------------------------------


def _generator(seed: int, kind: str, utterance: str) -> np.random.Generator:
    digest = blake2b(f"{kind}\0{utterance}".encode(), digest_size=16).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])
