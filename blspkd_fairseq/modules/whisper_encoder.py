"""Whisper's encoder on waveforms of any length up to 30 s: log-mel features in torch, cut to the batch's speech.

Whisper was trained on 30 s windows and transformers refuses anything shorter, but the encoder itself does not care:
its position table can be sliced and padding masked. That makes a 6 s clip 4 times and a 3 s clip 6 times cheaper.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from blspkd_fairseq.data.batch import Rows
from blspkd_fairseq.modules.packed_llm import packed_rows
from blspkd_fairseq.modules.ragged import Ragged, crop, pack, pad, rows_of

SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = 320
FRAMES_PER_SECOND = SAMPLE_RATE / SAMPLES_PER_FRAME
"""Frames of the encoder's output, 20 ms each; a log-mel frame is half as long."""

_FFT, _HOP = 400, 160
_TRAILING_SILENCE = FRAMES_PER_SECOND / 2
"""Frames of silence behind an utterance when it is not padded to 30 s: Whisper expects speech to end."""


def frame_lengths(samples: Tensor) -> Tensor:
    """Encoder frames of utterances of that many samples (at least 1)."""
    return ((samples + SAMPLES_PER_FRAME - 1) // SAMPLES_PER_FRAME).clamp(min=1)


def frame_counts(samples: Sequence[int]) -> list[int]:
    """:func:`frame_lengths` of Python numbers."""
    return [max(1, -(-one // SAMPLES_PER_FRAME)) for one in samples]


class LogMel(nn.Module):
    """Whisper's log-mel spectrogram of the first frames of its 30 s window, equal to its feature extractor's.

    In float32, whatever the encoder is in: with window and filters rounded to bfloat16, faint sound beside loud one
    is another.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, bins: int, max_frames: int = 3000) -> None:
        super().__init__()
        filters = WhisperFeatureExtractor(feature_size=bins).mel_filters  # (1 + fft / 2) x bins
        self.register_buffer("filters", torch.from_numpy(np.asarray(filters.T, dtype=np.float32)), persistent=False)
        self.register_buffer("window", torch.hann_window(_FFT), persistent=False)
        self.max_frames = max_frames

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # signature of nn.Module
        exact = self.filters, self.window
        super()._apply(fn, recurse)
        self.filters, self.window = (one.to(self.window.device) for one in exact)
        return self

    def forward(self, waveforms: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """Spectrogram of utterances followed by silence.

        Args:
            waveforms: ``[B, S]`` fp32 at 16 kHz.
            lengths: ``[B]`` samples; what lies behind them is ignored.
            frames: how many to return, 100 per second, at most ``max_frames``.

        Returns:
            ``[B, bins, frames]`` fp32.
        """
        beyond = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths.unsqueeze(1)
        waveforms = waveforms.float().masked_fill(beyond, 0.0)
        # The last frames look half a window ahead. Whisper mirrors the signal at 30 s, so go no further than that.
        samples = min(frames * _HOP + _FFT, self.max_frames * _HOP)
        waveforms = nn.functional.pad(waveforms, (0, samples - waveforms.shape[1]))  # crops if negative
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrum = torch.stft(waveforms, _FFT, _HOP, window=self.window, return_complex=True)
            power = spectrum[:, :, :frames].abs().square()
            log_mel = (self.filters @ power).clamp(min=1e-10).log10()
        loudest = log_mel.amax((1, 2), keepdim=True)
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0


class SpeechEncoder(nn.Module):
    """Waveforms to frames: log-mel features and Whisper's encoder.

    Args:
        encoder: transformers' Whisper encoder.
        pad_to_30s: give the encoder the whole 30 s window, as published, in place of the speech plus half a second.
    """

    def __init__(self, encoder: WhisperEncoder, pad_to_30s: bool = False) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.pad_to_30s = pad_to_30s
        self.max_frames: int = config.max_source_positions
        self.output_dim: int = config.d_model
        self.log_mel = LogMel(config.num_mel_bins, 2 * self.max_frames)

    @classmethod
    def from_pretrained(
        cls, name: str, dtype: torch.dtype = torch.float32, pad_to_30s: bool = False
    ) -> "SpeechEncoder":
        """Loads the encoder of a Whisper model by its Hugging Face name or from a local directory.

        Raises:
            ValueError: the model is no Whisper model.
        """
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # by default, it asks at the terminal
        if not isinstance(config, WhisperConfig):
            raise ValueError(f"the speech encoder must be a Whisper model, but {name} is of type {config.model_type}")
        model = WhisperModel.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
        return cls(model.get_encoder(), pad_to_30s)

    @property
    def settings(self) -> tuple[object, ...]:
        """What decides on the frames beside the weights: stored frames of other settings are others."""
        # In half precision the spectrogram was rounded, too, when such frames were first stored.
        is_half = self.encoder.conv1.weight.dtype.itemsize < 4
        return (self.pad_to_30s, *(["log-mel in float32"] if is_half else []))

    @property
    def max_samples(self) -> int:
        """Longest utterance that fits the position table: 30 s at 16 kHz for every published Whisper."""
        return self.max_frames * SAMPLES_PER_FRAME

    def forward(
        self, waveforms: Tensor, lengths: Tensor, samples: Sequence[int] | None = None, ragged: bool = False
    ) -> Any:
        """Encodes a batch; every row's result is independent of the others.

        Args:
            waveforms: ``[B, S]`` fp32 at 16 kHz.
            lengths: ``[B]`` samples.
            samples: the same as Python numbers; without them the device is asked.
            ragged: return the frames without padding.

        Returns:
            Frames ``[B, T, D]`` at 50 per second, cropped to the longest speech, in the encoder's dtype, and the
            padding mask ``[B, T]``, True on padding; or :class:`~blspkd_fairseq.modules.ragged.Ragged` frames.

        Raises:
            ValueError: an utterance is longer than the encoder's window.
        """
        speech = rows_of(frame_lengths(lengths), frame_counts(lengths.tolist() if samples is None else samples))
        if speech.longest > self.max_frames:
            raise ValueError(
                f"an utterance of {speech.longest / FRAMES_PER_SECOND:.1f} s does not fit the speech encoder's "
                f"{self.max_frames / FRAMES_PER_SECOND:.0f} s: cut it into segments"
            )
        # Whisper's input is this much longer than the speech; at most its window, all of it if asked for.
        margin = self.max_frames if self.pad_to_30s else int(_TRAILING_SILENCE)
        visible = rows_of(
            (speech.lengths + margin).clamp(max=self.max_frames),
            [min(count + margin, self.max_frames) for count in speech.counts],
        )
        hidden = pack(self._convolve(waveforms, lengths, visible.longest), visible)
        frames = Ragged(self._encode(hidden, visible), visible)
        return crop(frames, speech) if ragged else (pad(*frames)[:, : speech.longest], speech.is_padding)

    def _convolve(self, waveforms: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """``[B, frames, D]``. One more frame is computed, so that the last one sees silence and not the zero padding of
        the convolution, wherever the batch ends; at 30 s it sees the padding, as in Whisper."""
        frames_with_margin = min(frames + 1, self.max_frames)
        mel = self.log_mel(waveforms, lengths, 2 * frames_with_margin).to(self.encoder.conv1.weight.dtype)
        hidden = nn.functional.gelu(self.encoder.conv1(mel))
        hidden = nn.functional.gelu(self.encoder.conv2(hidden))
        return hidden[:, :, :frames].transpose(1, 2)

    def _encode(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Positions and transformer layers over packed frames ``[N, D]``; each row sees itself."""
        encoder = self.encoder
        hidden = hidden + encoder.embed_positions.weight[rows.within]
        hidden = nn.functional.dropout(hidden, p=encoder.dropout, training=encoder.training).unsqueeze(0)
        with packed_rows(encoder.config, rows):
            for layer in encoder.layers:
                hidden = layer(hidden, None)
        return encoder.layer_norm(hidden).squeeze(0)
