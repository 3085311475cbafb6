"""The page's picture of a piece of speech: the encoder's spectrogram, CIF's weights, and tokens with their times."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.audio_stream import Window
from blspkd_fairseq.hub import AlignedToken, BlspKd
from blspkd_fairseq.modules.whisper_encoder import FRAMES_PER_SECOND

MEL_FRAMES_PER_SECOND = 100


class Hearing(NamedTuple):
    """How the model hears one window.

    Attributes:
        start: seconds at which it begins.
        mel: ``[frames, bins]`` uint8: the encoder's spectrogram, 100 frames per second, its range as 0 to 255.
        weights: ``[frames]`` of CIF, 50 per second; None without CIF.
        tokens: the nearest of the LLM's tokens to each speech embedding, and the seconds that it covers.
    """

    start: float
    mel: np.ndarray
    weights: np.ndarray | None
    tokens: list[AlignedToken]


@torch.no_grad()
def hear_window(model: BlspKd, window: Window) -> Hearing:
    """Runs encoder and adapter on one window."""
    speech = (window.samples, SAMPLE_RATE)
    adapted = model.adapt(speech, reads=False)
    tokens: list[AlignedToken] = []
    if adapted.boundaries is not None:
        shift = window.start
        tokens = [AlignedToken(shift + one.start, shift + one.end, one.token) for one in model.align(speech)]
    weights = None
    if adapted.alpha is not None:
        weights = adapted.alpha[0, : _frames(window, FRAMES_PER_SECOND)].float().cpu().numpy()
    return Hearing(window.start, _spectrogram(model, window), weights, tokens)


def draw(hearings: Sequence[Hearing], seconds: float) -> dict[str, Any]:
    """Windows on one axis of time, as the page takes them; where there was no speech, it stays dark."""
    bins = max((one.mel.shape[1] for one in hearings), default=1)
    mel = np.zeros((max(1, round(seconds * MEL_FRAMES_PER_SECOND)), bins), np.uint8)
    weights = np.zeros(max(1, round(seconds * FRAMES_PER_SECOND)), np.float32)
    for one in hearings:
        _put(mel, one.mel, one.start * MEL_FRAMES_PER_SECOND)
        if one.weights is not None:
            _put(weights, one.weights, one.start * FRAMES_PER_SECOND)
    tokens = [
        {"start": round(token.start, 3), "end": round(min(token.end, seconds), 3), "text": token.token}
        for one in hearings
        for token in one.tokens
    ]
    has_weights = any(one.weights is not None for one in hearings)
    return {
        "seconds": round(seconds, 3),
        "mel": base64.b64encode(mel.tobytes()).decode(),
        "frames": len(mel),
        "bins": bins,
        "weights": [round(float(one), 3) for one in weights] if has_weights else None,
        "tokens": tokens,
    }


def _put(whole: np.ndarray, part: np.ndarray, start: float) -> None:
    place = whole[round(start) : round(start) + len(part)]
    place[:] = part[: len(place)]


def _spectrogram(model: BlspKd, window: Window) -> np.ndarray:
    waveform = torch.from_numpy(window.samples).unsqueeze(0).to(model.device)
    lengths = torch.tensor([len(window.samples)], device=model.device)
    frames = _frames(window, MEL_FRAMES_PER_SECOND)
    mel = model.model.speech_encoder.log_mel(waveform, lengths, frames)[0].float().cpu().numpy()
    # The encoder sees the upper 8 of log10 of the power, divided by 4.
    scaled = (mel - mel.max() + 2.0) / 2.0 * 255.0
    return np.ascontiguousarray(scaled.clip(0, 255).astype(np.uint8).T)


def _frames(window: Window, rate: float) -> int:
    return max(1, round(len(window.samples) / SAMPLE_RATE * rate))
