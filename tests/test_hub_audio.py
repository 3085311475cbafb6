"""What the interface in Python takes for audio, and what it says of audio that means nothing."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tiny import tiny_model, write_speech

from blspkd_fairseq import BlspKd
from blspkd_fairseq.data.audio import AudioError, AudioWarning
from blspkd_fairseq.data.conversation import ConversationError
from blspkd_fairseq.data.dataset import Utterance
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.generation.fairseq_rows import LinesToAnswer, RowsToAnswer
from blspkd_fairseq.systems.answers import Questions, read_waveform


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    return tiny_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    write_speech(tmp_path / "a.wav", 0.7, seed=3, rate=44_100)
    return tmp_path / "a.wav"


class Decoder:
    """What data sets give where torchcodec decodes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get_all_samples(self) -> Any:
        samples, self.sample_rate = soundfile.read(self.path, dtype="float32")
        self.data = torch.from_numpy(samples)[None]  # [channels, samples]
        return self


def forms(path: Path) -> dict[str, Any]:
    samples, rate = soundfile.read(path, dtype="float32")
    return {
        "path": path,
        "text": str(path),
        "pair": (samples, rate),
        "array": {"path": "x.wav", "array": samples, "sampling_rate": rate},
        "array alone": {"array": torch.from_numpy(samples), "sampling_rate": np.int64(rate)},
        "tensors": {"array": torch.from_numpy(samples), "sampling_rate": torch.tensor(rate)},
        "pair with an array of the rate": (samples, np.array(float(rate))),
        "bytearray": bytearray(path.read_bytes()),
        "an open file": io.BytesIO(path.read_bytes()),
        "bytes": {"path": "x.wav", "bytes": path.read_bytes()},
        "bytes alone": {"bytes": path.read_bytes()},
        "path in a mapping": {"path": str(path), "bytes": None},
        "decoder": Decoder(path),
    }


def test_every_form_of_audio_is_answered_alike(model: BlspKd, wav: Path) -> None:
    given = forms(wav)
    expected = model.generate(wav, max_new_tokens=8)
    for name, audio in given.items():
        assert model.generate(audio, max_new_tokens=8) == expected, name
        messages = [{"role": "user", "content": [{"type": "audio", "audio": audio}]}]
        assert model.generate(messages=messages, max_new_tokens=8) == expected, name
    assert model.generate(list(given.values()), max_new_tokens=8) == [expected] * len(given)
    assert model.align(given["array"]) == model.align(wav)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ({}, "a mapping with nothing in it is no audio: give a path"),
        ({"audio": 1}, "a mapping with 'audio' in it is no audio"),
        ({"path": "x.wav", "array": [0.0]}, 'x.wav has an "array" and no "sampling_rate"'),
        ({"array": np.zeros((2, 2, 2)), "sampling_rate": 16_000}, r"audio has the shape \[2, 2, 2\]"),
        ({"array": np.zeros(9), "sampling_rate": 0}, "sample rate 0"),
        ({"path": "none.wav"}, "none.wav does not exist"),
        ({"path": "x.wav", "bytes": b""}, "x.wav is empty"),
        ({"path": "x.wav", "bytes": b"nothing"}, "x.wav cannot be decoded"),
        ({"path": "x.wav", "bytes": "text"}, "x.wav is of type str where the bytes of a file are wanted"),
        ({"path": "x.wav", "array": np.zeros(9), "sampling_rate": "16k"}, """x.wav has the "sampling_rate" '16k'"""),
        ({"array": [[0.0, 0.1], [0.2]], "sampling_rate": 16_000}, "audio is no array of samples"),
        ({"array": np.zeros(9), "sampling_rate": 16}, "sample rate 16: give its number of samples per second"),
        ({"array": np.full(9, 3e4), "sampling_rate": 16_000}, "audio holds samples of up to 3e[+]04"),
    ],
)
def test_other_mappings_are_refused(audio: dict[str, Any], message: str, model: BlspKd) -> None:
    with pytest.raises(AudioError, match=message):
        model.generate(audio)


@pytest.mark.parametrize("audio", [3, None, [None], [3], np.zeros(9), [0.1, 0.2], (np.zeros(9), "16000")], ids=repr)
@pytest.mark.parametrize("call", ["generate", "transcribe", "align"])
def test_what_is_no_audio_is_refused(call: str, audio: Any, model: BlspKd) -> None:
    with pytest.raises(ValueError, match="give a path, samples with their rate"):
        getattr(model, call)(audio)


@pytest.mark.parametrize(
    "messages", [{"role": "user", "content": "x"}, 3, iter(["x"])], ids=lambda one: type(one).__name__
)
def test_what_is_no_list_of_messages_is_refused(messages: Any, model: BlspKd) -> None:
    for call in (model.chat, lambda one: model.generate(messages=one)):
        with pytest.raises(ConversationError, match="a conversation must be a list of messages"):
            call(messages)


def test_messages_may_be_json(model: BlspKd) -> None:
    messages = [{"role": "user", "content": "Call my mother."}]
    assert model.generate(messages=json.dumps(messages), max_new_tokens=4) == model.chat(messages, max_new_tokens=4)


@pytest.mark.parametrize("name", ["path", "pair", "array", "bytes"])
def test_silence_is_warned_about(name: str, model: BlspKd, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000)
    with pytest.warns(AudioWarning, match=r"(audio|\.wav) is audio with a flaw .digital silence.: what is answered"):
        model.generate(forms(tmp_path / "a.wav")[name], max_new_tokens=2)


def test_speech_is_not(model: BlspKd, wav: Path) -> None:
    samples, rate = soundfile.read(wav, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AudioWarning)
        answer = model.generate((samples, rate), max_new_tokens=8)
        assert model.generate((np.stack([samples, -samples]), rate), max_new_tokens=8) == answer


def test_silence_is_warned_about_by_the_commands(model: BlspKd, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000)
    row = {"id": "u", "audio": "a.wav", "n_frames": 8000, "src_text": "hello"}
    write_manifest(tmp_path / "test.tsv", [row])
    manifest = Manifest.load(tmp_path / "test.tsv")
    with pytest.warns(AudioWarning, match="test.tsv line 2 .id u. is audio with a flaw .digital silence"):
        read_waveform(Questions("asr", manifest, "repeat"), 0)
    with pytest.warns(AudioWarning, match="test.tsv line 2 .id u. is audio with a flaw .digital silence"):
        assert isinstance(RowsToAnswer(manifest, model.chat_format, 30.0)[0], Utterance)
    with pytest.warns(AudioWarning, match="a.wav is audio with a flaw .digital silence"):
        LinesToAnswer("{speech}", tmp_path, 30.0, None).read(["a.wav"])
