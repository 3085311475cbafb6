"""Training speech made different every epoch: speed, rooms, noise, other voices, narrow bands, loudness.

Waveforms are ``[samples]`` float32 at 16 kHz. What is drawn depends on the seed, the epoch, the utterance's id and the
kind alone: on no order, batch or process, and with one kind more or less the others stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import soxr

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.sound import active_power, add_noise, equally_loud, narrow_band, reverberate

# How often each kind happens with "all", in the order in which they happen to sound.
KINDS: dict[str, float] = {"speed": 0.5, "reverb": 0.25, "noise": 0.3, "babble": 0.3, "band": 0.15, "gain": 1.0}

SPEED = (0.9, 1.1)
RT60 = (0.1, 0.8)  # seconds
NOISE_SNR = (0.0, 30.0)  # dB
BABBLE_SNR = (3.0, 30.0)  # dB; at less, people do not know whom to listen to
BABBLE_VOICES = (2, 6)  # of one voice alone every word can be heard
BAND = (6_000.0, 16_000.0)  # Hz, of the sampling rate that is left; a telephone has 8,000
GAIN = (-20.0, 10.0)  # dB
NOISE_SLOPE = (0.0, 2.0)  # power falls with this power of the frequency: white to brown


class AugmentationError(ValueError):
    """A specification that cannot be used; the message says what can be."""


class Others(NamedTuple):
    """Utterances to make babble of.

    Attributes:
        total: how many there are.
        load: ``[samples]`` of one, by its number; none if it cannot be used.
        own: the number of the utterance itself.
    """

    total: int
    load: Callable[[int], np.ndarray]
    own: int


def parse_augmentation(text: str) -> dict[str, float]:
    """Reads how often each kind happens: ``all``, or kinds with a probability such as ``noise:0.5,gain:1``.

    Raises:
        AugmentationError: an unknown kind, or no probability.
    """
    if text.strip() == "all":
        return dict(KINDS)
    wanted: dict[str, float] = {}
    for part in text.split(","):
        kind, _, value = part.strip().partition(":")
        try:
            probability = float(value)
        except ValueError:
            probability = -1.0
        if kind not in KINDS or not 0 <= probability <= 1:
            raise AugmentationError(
                f"--augment {text!r}: {part.strip()!r} is no kind with a probability between 0 and 1; write all, or "
                f"some of {', '.join(f'{name}:{value:g}' for name, value in KINDS.items())} with commas between them"
            )
        wanted[kind] = probability
    return wanted


@dataclass(frozen=True)
class Augmenter:
    """Changes utterances at random.

    Attributes:
        probabilities: of each kind, independent of one another.
        seed: of all that is drawn.
        variants: of each utterance, which take turns; 0: every epoch draws anew.
    """

    probabilities: Mapping[str, float]
    seed: int = 1
    variants: int = 0

    def variant(self, epoch: int) -> int:
        """The number of what an epoch (1, 2, ...) hears; the same number is the same sound."""
        return (epoch - 1) % self.variants + 1 if self.variants else epoch

    def key(self, utterance: str, epoch: int) -> str:
        """What tells this version of an utterance from all others, but for whose voices its babble is made of."""
        kinds = ",".join(f"{kind}:{value:g}" for kind, value in sorted(self.probabilities.items()))
        return "\0".join((kinds, str(self.seed), str(self.variant(epoch)), utterance))

    def __call__(
        self, samples: np.ndarray, utterance: str, epoch: int, others: Others | None = None, longest: float = np.inf
    ) -> np.ndarray:
        """A changed copy.

        Args:
            samples: ``[samples]``.
            utterance: its id.
            epoch: another one draws anew, or takes its turn.
            others: whose voices the babble is made of; None: there is none.
            longest: samples; what would become longer keeps its speed.

        Returns:
            ``[samples]`` float32; of another length where the speed changed. Silence gets no noise.
        """
        speech = np.asarray(samples, dtype=np.float64)
        for kind in KINDS:
            rng = _generator(self.seed, self.variant(epoch), kind, utterance)
            if rng.random() < self.probabilities.get(kind, 0.0):
                changed = _apply(kind, speech, rng, others)
                speech = changed if len(changed) <= longest else speech
        return speech.astype(np.float32)


def _apply(kind: str, speech: np.ndarray, rng: np.random.Generator, others: Others | None) -> np.ndarray:
    match kind:
        case "speed":
            return soxr.resample(speech, SAMPLE_RATE * rng.uniform(*SPEED), SAMPLE_RATE)
        case "reverb":
            return reverberate(speech, rng.uniform(*RT60), rng)
        case "noise":
            return _add(speech, coloured_noise(len(speech), rng.uniform(*NOISE_SLOPE), rng), rng.uniform(*NOISE_SNR))
        case "babble":
            return _add(speech, _babble(len(speech), rng, others), rng.uniform(*BABBLE_SNR))
        case "band":
            return narrow_band(speech, rng.uniform(*BAND))
        case _:
            return speech * 10 ** (rng.uniform(*GAIN) / 20)


def coloured_noise(length: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """``[length]`` of Gaussian noise whose power falls with frequency to the power of ``slope`` above 50 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 50.0)
    return np.fft.irfft(spectrum * (frequency / 50.0) ** (-slope / 2), length)


def _babble(length: int, rng: np.random.Generator, others: Others | None) -> np.ndarray:
    """Several other utterances at once; silence where there are too few of them."""
    low, high = BABBLE_VOICES
    if others is None:
        return np.zeros(length)
    drawn = {int(number) for number in rng.integers(others.total, size=int(rng.integers(low, high + 1)))}
    loaded = (np.asarray(others.load(number), np.float64) for number in sorted(drawn - {others.own}))
    voices = [voice for voice in loaded if voice.any()]
    if len(voices) < low:
        return np.zeros(length)
    return np.sum([equally_loud(voice, length, rng) for voice in voices], axis=0)


def _add(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Speech and noise, or speech alone where one of them is silent."""
    return add_noise(speech, noise, snr_db) if speech.any() and active_power(noise, speech) > 0 else speech


def _generator(seed: int, epoch: int, kind: str, utterance: str) -> np.random.Generator:
    digest = blake2b(f"{kind}\0{utterance}".encode(), digest_size=16).digest()
    return np.random.default_rng([seed, epoch, *np.frombuffer(digest, dtype=np.uint32).tolist()])
