"""What the page draws of a piece of speech: what the encoder sees, CIF's weights, and the tokens with their times."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.generation.text_stream import TextStream
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules.whisper_encoder import FRAMES_PER_SECOND

MEL_FRAMES_PER_SECOND = 100


@torch.no_grad()
def show_window(model: BlspKd, window: np.ndarray, start: float) -> dict[str, Any]:
    """What is heard in one window.

    Args:
        model: that hears.
        window: ``[samples]`` float32 at 16 kHz.
        start: seconds at which it begins.

    Returns:
        ``mel`` (base64 of bytes, ``frames`` x ``bins``, 0 to 255), ``weights`` of CIF at 50 per second (or None), and
        ``tokens`` with ``start``, ``end`` in seconds and ``text``.
    """
    adapted = model.adapt((window, SAMPLE_RATE))
    tokens: list[dict[str, Any]] = []
    if adapted.boundaries is not None:
        ends = (start + adapted.boundaries[0] / FRAMES_PER_SECOND).tolist()
        stream = TextStream(model.chat_format)
        texts = [stream.push(token) for token in model.nearest_tokens(adapted.embeddings[0])]
        texts[-1] += stream.finish()
        times = zip([start, *ends[:-1]], ends, texts, strict=True)
        tokens = [{"start": round(a, 3), "end": round(b, 3), "text": text} for a, b, text in times]
    mel = _as_bytes(model, window)
    weights = None
    if adapted.alpha is not None:
        frames = max(1, round(len(window) / SAMPLE_RATE * FRAMES_PER_SECOND))
        weights = [round(one, 3) for one in adapted.alpha[0, :frames].float().tolist()]
    return {
        "mel": base64.b64encode(mel.tobytes()).decode(),
        "frames": mel.shape[0],
        "bins": mel.shape[1],
        "weights": weights,
        "tokens": tokens,
    }


def join_windows(shown: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Windows one after another as one picture."""
    mel = b"".join(base64.b64decode(one["mel"]) for one in shown)
    has_weights = bool(shown) and all(one["weights"] is not None for one in shown)
    return {
        "seconds": round(seconds, 3),
        "mel": base64.b64encode(mel).decode(),
        "frames": sum(one["frames"] for one in shown),
        "bins": shown[0]["bins"] if shown else 0,
        "weights": [weight for one in shown for weight in one["weights"]] if has_weights else None,
        "tokens": [token for one in shown for token in one["tokens"]],
    }


def _as_bytes(model: BlspKd, window: np.ndarray) -> np.ndarray:
    """The log-mel spectrogram ``[frames, bins]`` of the speech encoder, its range as 0 to 255."""
    frames = max(1, round(len(window) / SAMPLE_RATE * MEL_FRAMES_PER_SECOND))
    waveform = torch.from_numpy(window).unsqueeze(0).to(model.device)
    lengths = torch.tensor([len(window)], device=model.device)
    mel = model.model.speech_encoder.log_mel(waveform, lengths, frames)[0].float().cpu().numpy()
    # log10 of power, its upper 8 decades as a range of 2: the encoder sees no more.
    scaled = (mel - mel.max() + 2.0) / 2.0 * 255.0
    return np.ascontiguousarray(scaled.clip(0, 255).astype(np.uint8).T)
