"""The real small models: Whisper tiny.en and SmolLM2-135M-Instruct, and a neural voice."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fairseq
from tiny import read_jsonl

from blspkd_fairseq.cache import default_cache
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.evaluation.metrics import word_errors

CACHE = default_cache()
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
UTTERANCES = 24

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen spoken sentences as train.tsv and test.tsv."""
    sys.path.insert(0, str(QUICKSTART))
    from make_speech import make_speech, plan

    folder = tmp_path_factory.mktemp("speech")
    make_speech(plan(UTTERANCES, 1, 1, seed=3)[:1], folder, processes=2)
    manifest = Manifest.load(folder / "train.tsv")
    write_manifest(folder / "test.tsv", [manifest[i] for i in range(len(manifest))], manifest.columns)
    return folder


def test_log_mel_and_encoder_equal_transformers_on_real_speech(speech: Path) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    from blspkd_fairseq.data.audio import load_audio
    from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder

    manifest = Manifest.load(speech / "train.tsv")
    samples = [load_audio(manifest[i]["audio"], speech) for i in range(3)]
    path = CACHE / "whisper-tiny.en"
    features = WhisperFeatureExtractor.from_pretrained(path)(samples, sampling_rate=16_000, return_tensors="pt")
    encoder = SpeechEncoder.from_pretrained(str(path), pad_to_30s=True).eval()
    waveforms = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(s) for s in samples], batch_first=True)
    lengths = torch.tensor([len(s) for s in samples])
    assert (encoder.log_mel(waveforms, lengths, 3000) - features.input_features).abs().max() < 1e-4
    with torch.no_grad():
        reference = WhisperModel.from_pretrained(path, dtype=torch.float32).get_encoder()
        expected = reference(features.input_features).last_hidden_state
        frames, padding = encoder(waveforms, lengths)
    for b in range(3):
        torch.testing.assert_close(frames[b][~padding[b]], expected[b, : (~padding[b]).sum()], atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_few_dozen_utterances_are_learned_until_repeat_gives_them_back(speech: Path, tmp_path: Path) -> None:
    fairseq(
        "train", speech, "--arch", "blsp_kd", "--criterion", "kl_distillation",
        "--speech-encoder", CACHE / "whisper-tiny.en", "--llm", CACHE / "smollm2-135m-instruct",
        "--lora-scope", "none", "--cache-encoder-features", "--adapter-pre-layers", 1, "--adapter-post-layers", 1,
        "--adapter-heads", 6, "--adapter-dropout", 0, "--token-ce-weight", 1, "--token-mse-weight", 1,
        "--response-kl-weight", 0, "--input-kl-weight", 0, "--token-vocabulary", "train",
        "--optimizer", "adam", "--lr", 1e-3,
        "--lr-scheduler", "polynomial_decay", "--warmup-updates", 10, "--total-num-update", 120, "--max-update", 120,
        "--clip-norm", 1.0, "--batch-size", 12, "--disable-validation", "--no-epoch-checkpoints", "--seed", 1,
        "--log-interval", 20, "--num-workers", 0, "--save-dir", tmp_path, "--no-progress-bar",
    )  # fmt: skip
    fairseq(
        "generate", speech, "--gen-subset", "test", "--path", tmp_path / "checkpoint_last.pt", "--prompt", "repeat",
        "--beam", 1, "--max-len-b", 24, "--batch-size", 24, "--results-path", tmp_path,
    )  # fmt: skip
    rows = read_jsonl(tmp_path / "generate-test.jsonl")
    assert len(rows) == UTTERANCES
    counts = [word_errors(row["hypothesis"], row["transcript"]) for row in rows]
    # SmolLM2 itself drops a few words when it repeats the text.
    assert sum(c.errors for c in counts) / sum(c.words for c in counts) < 0.15, rows


@pytest.mark.recordings
def test_the_cascade_hears_real_recordings_and_tells_when_words_end(tmp_path: Path) -> None:
    from blspkd_fairseq.data.audio import load_audio
    from blspkd_fairseq.evaluation.metrics import error_rate
    from blspkd_fairseq.generation.decoding import DecodingOptions
    from blspkd_fairseq.modules.build import SpeechLlmConfig
    from blspkd_fairseq.systems.systems import CascadeSystem, Utterance

    recordings = CACHE / "asterisk"
    manifest = Manifest.load(recordings / "recordings.tsv")
    rows = [row for row in manifest if 5 <= len(row["src_text"].split()) <= 9][:12]
    batch = [Utterance(load_audio(row["audio"], recordings), row["src_text"], "{speech}", "en") for row in rows]
    system = CascadeSystem(
        str(CACHE / "whisper-tiny.en"), SpeechLlmConfig(llm=str(CACHE / "smollm2-135m-instruct"), llm_dtype="float32")
    )
    system.load()
    heard = system.answer(batch, DecodingOptions(max_new_tokens=4), is_asr=True)
    assert error_rate([a.text for a in heard], [row["src_text"] for row in rows], language="en").score < 10
    answers = system.answer(batch[:2], DecodingOptions(max_new_tokens=4))
    assert [a.heard for a in answers] == [a.text for a in heard[:2]] and answers[0].text != answers[0].heard
    assert system._transcriber is not None
    for utterance, row in zip(batch[:4], rows, strict=False):
        assert utterance.waveform is not None
        words = system._transcriber.word_ends(utterance.waveform)
        ends = [end for _, end in words]
        assert ends == sorted(ends) and ends[0] > 0 and ends[-1] <= len(utterance.waveform) / 16_000
        assert abs(len(words) - len(row["src_text"].split())) <= 2
        # People speak two to five words a second: the last word begins near the end of speech, the first ends early.
        assert ends[0] < 1.5 and ends[-1] > 0.5 * len(utterance.waveform) / 16_000
    # Recordings one after another: where each ends is known, and so is where its last word does.
    silence = np.zeros(4_800, dtype=np.float32)
    joined = np.concatenate([part for one in batch[:3] for part in (_trimmed(one.waveform), silence)])
    known = np.cumsum([len(_trimmed(one.waveform)) + 4_800 for one in batch[:3]]) / 16_000 - 0.3
    words = system._transcriber.word_ends(joined)
    for transcript, end in zip([one.transcript for one in batch[:3]], known, strict=True):
        last = _letters(transcript.split()[-1])
        assert min(abs(found - end) for word, found in words if _letters(word) == last) < 0.3, (last, end, words)


def _trimmed(waveform: np.ndarray) -> np.ndarray:
    """Without the silence on both sides."""
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
    return waveform[loud[0] : loud[-1] + 1]


def _letters(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter.isalnum())
