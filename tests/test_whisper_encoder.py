"""The speech encoder against transformers' own features and encoder."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from blspkd_fairseq.modules.whisper_encoder import LogMel, SpeechEncoder, frame_lengths


def speech(seconds: float, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    time = np.arange(int(16_000 * seconds)) / 16_000
    samples = np.sin(2 * np.pi * 300 * time) * np.sin(2 * np.pi * 2 * time) + 0.01 * rng.normal(size=len(time))
    return torch.from_numpy(samples.astype(np.float32))


def batch(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(w) for w in waveforms])
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True, padding_value=7.0), lengths


@pytest.fixture(scope="module")
def whisper() -> WhisperModel:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        init_std=0.3,
    )  # fmt: skip
    return WhisperModel(config).eval()


@pytest.mark.parametrize("bins", [80, 128])
def test_log_mel_equals_whispers_feature_extractor(bins: int) -> None:
    waveforms = [speech(0.013), speech(1.7, 1), speech(29.995, 2), speech(30.0, 3)]
    expected = WhisperFeatureExtractor(feature_size=bins)(
        [w.numpy() for w in waveforms], sampling_rate=16_000, return_tensors="pt"
    ).input_features
    padded, lengths = batch(waveforms)
    actual = LogMel(bins)(padded, lengths, 3000)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-4
    short = LogMel(bins)(padded[:2], lengths[:2], 250)  # cut, not padded to 30 s
    assert (short - expected[:2, :, :250]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_mel_stays_exact_beside_an_encoder_in_half_precision(whisper: WhisperModel, dtype: torch.dtype) -> None:
    encoder = SpeechEncoder(copy.deepcopy(whisper.encoder))
    padded, lengths = batch([speech(1.7, 1)])
    expected = encoder.log_mel(padded, lengths, 170)
    actual = encoder.to(dtype).log_mel(padded, lengths, 170)
    assert encoder.encoder.conv1.weight.dtype == dtype
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_padded_to_30_seconds_it_is_whispers_encoder(whisper: WhisperModel) -> None:
    waveforms = [speech(1.7, 1), speech(30.0, 3)]
    features = WhisperFeatureExtractor()([w.numpy() for w in waveforms], sampling_rate=16_000, return_tensors="pt")
    expected = whisper.encoder(features.input_features).last_hidden_state
    actual, padding = SpeechEncoder(whisper.encoder, pad_to_30s=True)(*batch(waveforms))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (~padding).sum(1).tolist() == [85, 1500]


@torch.no_grad()
@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_an_utterance_does_not_depend_on_its_batch(whisper: WhisperModel, pad_to_30s: bool) -> None:
    encoder = SpeechEncoder(whisper.encoder, pad_to_30s)
    waveforms = [speech(1.0, 1), speech(2.51, 2), speech(0.02, 3)]
    together, padding = encoder(*batch(waveforms))
    for b, waveform in enumerate(waveforms):
        alone, _ = encoder(waveform[None], torch.tensor([len(waveform)]))
        torch.testing.assert_close(together[b][~padding[b]], alone[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cut_window_sees_the_speech_and_half_a_second_of_silence(whisper: WhisperModel) -> None:
    """With the attention of 30 s windows replaced by that of the visible frames, nothing else differs."""
    encoder = SpeechEncoder(whisper.encoder)
    waveform = speech(1.0)
    features = WhisperFeatureExtractor()(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    hidden = torch.nn.functional.gelu(whisper.encoder.conv1(features))
    hidden = torch.nn.functional.gelu(whisper.encoder.conv2(hidden)).transpose(1, 2)[:, :75]
    hidden = hidden + whisper.encoder.embed_positions.weight[:75]
    for layer in whisper.encoder.layers:
        hidden = layer(hidden, None)
    expected = whisper.encoder.layer_norm(hidden)[:, :50]
    actual, _ = encoder(waveform[None], torch.tensor([16_000]))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_frame_lengths() -> None:
    assert frame_lengths(torch.tensor([1, 320, 321, 480_000])).tolist() == [1, 1, 2, 1500]


def test_longer_than_the_window_is_refused(whisper: WhisperModel) -> None:
    with pytest.raises(ValueError, match=r"30\.1 s does not fit"):
        SpeechEncoder(whisper.encoder)(*batch([speech(30.1)]))
