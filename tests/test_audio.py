"""Audio: every usual form gives the same waveform, and every fault a sentence that names the file."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from blspkd_fairseq.data.audio import SAMPLE_RATE, AudioError, find_zip_entry, load_audio, prepare_waveform


def tone(seconds: float = 2.0, rate: int = SAMPLE_RATE, channels: int = 0) -> np.ndarray:
    """A 440 Hz sine that becomes louder; with channels, their mean is that sine."""
    time = np.arange(round(seconds * rate)) / rate
    mono = 0.4 * np.sin(2 * np.pi * 440 * time) * np.linspace(0.2, 1, len(time))
    if not channels:
        return mono.astype(np.float32)
    weights = np.linspace(0.5, 1.5, channels)
    return (mono[:, None] * weights / weights.mean()).astype(np.float32)


def encoded(format: str, seconds: float = 2.0, rate: int = SAMPLE_RATE, channels: int = 0, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds, rate, channels), rate, format=format, **options)
    return buffer.getvalue()


def saved(folder: Path, data: bytes | bytearray, name: str = "a.wav") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def assert_is_tone(waveform: np.ndarray, seconds: float = 2.0, tolerance: float = 2e-3) -> None:
    assert waveform.dtype == np.float32 and waveform.shape == (round(seconds * SAMPLE_RATE),)
    middle = slice(800, -800)  # filters ring at the ends
    np.testing.assert_allclose(waveform[middle], tone(seconds)[middle], atol=tolerance)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["WAV", "FLAC", "AIFF", "W64"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [0, 2, 3])
def test_every_rate_and_channel_count(tmp_path: Path, format: str, rate: int, channels: int) -> None:
    assert_is_tone(load_audio(saved(tmp_path, encoded(format, rate=rate, channels=channels))))


@pytest.mark.parametrize("format", ["MP3", "OGG"])
def test_lossy_formats(tmp_path: Path, format: str) -> None:
    assert_is_tone(load_audio(str(saved(tmp_path, encoded(format)))), tolerance=0.05)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM"])
def test_every_kind_of_wav(tmp_path: Path, subtype: str) -> None:
    waveform = load_audio(saved(tmp_path, encoded("WAV", subtype=subtype)))
    assert_is_tone(waveform[:32_000], tolerance=0.03)


def test_paths_are_confined_to_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    saved(root / "sub", encoded("WAV"))
    outside = saved(tmp_path, encoded("WAV"))
    (root / "link.wav").symlink_to(outside)
    assert_is_tone(load_audio("sub/a.wav", root))
    assert_is_tone(load_audio("sub/../sub/a.wav", root))
    assert_is_tone(load_audio(root / "sub" / "a.wav", root))
    assert_is_tone(load_audio(outside))
    for spec in ("../a.wav", str(outside), "sub/../../a.wav", "link.wav", "../a.wav:44:100"):
        with pytest.raises(AudioError, match=f"^{re.escape(spec)} is outside of the audio root"):
            load_audio(spec, root)


@pytest.mark.parametrize("name", ["a:1:2", "talk.zip:30:99", "12:30.wav", "é 你.wav"])
def test_a_file_may_be_called_anything(tmp_path: Path, name: str) -> None:
    saved(tmp_path, encoded("WAV"), name)
    assert_is_tone(load_audio(name, tmp_path))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"is a folder: name the audio files in it"):
        load_audio(tmp_path)


@pytest.mark.parametrize("spec", ["no.wav", "no.zip:30:10", "", "a\0b", "x" * 300])
def test_missing_files(tmp_path: Path, spec: str) -> None:
    with pytest.raises(AudioError, match=rf"^{re.escape(spec)} (does not exist|cannot be read)"):
        load_audio(spec, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "cannot be decoded"),
        (encoded("WAV")[:20], "cannot be decoded"),
        (encoded("WAV", seconds=0), "no samples"),
        (encoded("WAV", seconds=1 / 96_000, rate=96_000), "too short"),
        (encoded("WAV")[:-2], r"holds 63998 of the 64000 bytes .* its header declares: it is truncated"),
        (encoded("WAV")[:9_000], "truncated"),
        (encoded("FLAC")[:9_000], "truncated"),
        (encoded("MP3")[: len(encoded("MP3")) // 2], "holds .* s of the 2.00 s that its header declares"),
        (encoded("WAV", seconds=30.01), r"is 30.01 s long; the limit is 30 s: cut it into segments"),
        (encoded("OGG", seconds=31), "31.00 s long"),
    ],
)
def test_faulty_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = saved(tmp_path, data)
    with pytest.raises(AudioError, match=f"{re.escape(str(path))} .*({message})"):
        load_audio(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    samples = tone(channels=2)
    samples[100, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="a.wav .*NaN or infinite"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="the call.*NaN or infinite"):
        prepare_waveform(samples, SAMPLE_RATE, "the call")


def test_the_longest_utterance(tmp_path: Path) -> None:
    path = saved(tmp_path, encoded("FLAC", seconds=31))
    assert len(load_audio(saved(tmp_path, encoded("FLAC", seconds=30), "30.flac"))) == 30 * SAMPLE_RATE
    assert len(load_audio(path, max_seconds=None)) == 31 * SAMPLE_RATE
    with pytest.raises(AudioError, match="31.00 s long; the limit is 2.5 s"):
        load_audio(path, max_seconds=2.5)


@pytest.mark.parametrize(("declared", "is_fine"), [(32_000, True), (33_500, True), (10, True), (33_700, False)])
def test_the_manifest_declares_the_length(tmp_path: Path, declared: int, is_fine: bool) -> None:
    path = saved(tmp_path, encoded("OGG", rate=48_000))
    if is_fine:
        assert len(load_audio(path, declared_samples=declared)) == 32_000
    else:
        with pytest.raises(AudioError, match="a.wav holds 2.00 s of the 2.11 s that the manifest declares"):
            load_audio(path, declared_samples=declared)


# --- headers that do not tell the length ----------------------------------------------------------


@pytest.mark.parametrize("riff_size", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("data_size", [0, 0x7FFFF024, 0xFFFFFFFF])
def test_wav_written_into_a_pipe(tmp_path: Path, riff_size: int, data_size: int) -> None:
    data = bytearray(encoded("WAV"))
    data[4:8] = struct.pack("<I", riff_size)
    data[40:44] = struct.pack("<I", data_size)
    assert data[36:40] == b"data"
    assert_is_tone(load_audio(saved(tmp_path, data)))


def test_an_empty_wav_with_a_comment_is_empty(tmp_path: Path) -> None:
    data = encoded("WAV", seconds=0) + b"LIST" + struct.pack("<I", 400) + b"words" * 80
    with pytest.raises(AudioError, match="no samples"):
        load_audio(saved(tmp_path, data[:4] + struct.pack("<I", len(data) - 8) + data[8:]))


def test_flac_written_into_a_pipe(tmp_path: Path) -> None:
    data = bytearray(encoded("FLAC"))
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])  # the number of samples in STREAMINFO
    assert_is_tone(load_audio(saved(tmp_path, data)))
    with pytest.raises(AudioError, match="2.00 s long; the limit is 1 s"):
        load_audio(saved(tmp_path, data), max_seconds=1)


def without_length_header(mp3: bytes) -> bytes:
    """Drops the first frame, which says how many follow."""
    assert b"Xing" in mp3[:64] or b"Info" in mp3[:64]
    return mp3[mp3.index(mp3[:2], 2) :]


def test_mp3_without_its_length(tmp_path: Path) -> None:
    """libsndfile guesses it from the first frame: too long if that is silent, and too short if silence comes last."""
    silence_first = np.concatenate([np.zeros(16_000), np.random.default_rng(0).uniform(-0.5, 0.5, 160_000)])
    for samples, is_whole in ((silence_first, True), (silence_first[::-1], False)):
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, SAMPLE_RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
        path = saved(tmp_path, without_length_header(buffer.getvalue()))
        guessed = soundfile.info(path).frames
        if is_whole:
            assert guessed > 30 * SAMPLE_RATE
            assert abs(len(load_audio(path)) - len(samples)) < 4_000
        else:
            assert guessed < 0.95 * len(samples)
            with pytest.raises(AudioError, match="does not say its length: convert it"):
                load_audio(path)


# --- archives -------------------------------------------------------------------------------------


def archive(folder: Path, compression: int = zipfile.ZIP_STORED, name: str = "clips/ä 你.flac") -> Path:
    with zipfile.ZipFile(folder / "shard.zip", "w", compression) as file:
        file.writestr("first.txt", "text " * 100)
        # An extra field of the local header alone, as Info-ZIP writes: the directory does not show it.
        with file.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
            member.write(encoded("FLAC"))
    return folder / "shard.zip"


def test_members_of_archives(tmp_path: Path) -> None:
    path = archive(tmp_path)
    spec = find_zip_entry(path, "clips/ä 你.flac")
    assert re.fullmatch(rf"{path}:\d+:{len(encoded('FLAC'))}", spec)
    assert_is_tone(load_audio(spec))
    assert_is_tone(load_audio(spec.removeprefix(f"{tmp_path}/"), tmp_path))
    prefixed = tmp_path / "self-extracting.zip"
    prefixed.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    offset = int(find_zip_entry(prefixed, "clips/ä 你.flac").split(":")[1])
    assert prefixed.read_bytes()[offset : offset + 4] == b"fLaC"


def test_faulty_members(tmp_path: Path) -> None:
    path = archive(tmp_path)
    text = find_zip_entry(path, "first.txt")
    size = path.stat().st_size
    saved(tmp_path, encoded("FLAC"), "a.flac")
    for spec, message in (
        (text, "cannot be decoded"),
        (f"{path}:{size - 10}:11", "beyond the end"),
        (f"{path}:40:0", "is empty"),
        (f"{tmp_path}/a.flac:40:100", "no zip archive"),
    ):
        with pytest.raises(AudioError, match=f"{re.escape(spec)} .*{message}"):
            load_audio(spec)


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        with pytest.raises(AudioError, match="zip -0"), zipfile.ZipFile(tmp_path / "c.zip", "w", compression) as file:
            file.writestr("a", "a" * 100)
            file.close()
            find_zip_entry(tmp_path / "c.zip", "a")
    with pytest.raises(AudioError, match="no member b"):
        find_zip_entry(tmp_path / "c.zip", "b")
    for name in ("no.zip", saved(tmp_path, b"text", "text.zip").name):
        with pytest.raises(AudioError, match=f"{name} cannot be read as a zip archive"):
            find_zip_entry(tmp_path / name, "a")


# --- samples in memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_arrays_and_tensors(channels: int, transposed: bool, as_tensor: bool) -> None:
    samples: Any = tone(rate=48_000, channels=channels)
    samples = samples.T if transposed else samples
    assert_is_tone(prepare_waveform(torch.from_numpy(samples).requires_grad_() if as_tensor else samples, 48_000))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint16, np.float16, np.float64])
def test_types_of_samples(dtype: Any) -> None:
    samples = tone().astype(np.float64)
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        samples = np.floor((samples + 1) * 2.0 ** (info.bits - 1)) + info.min
    assert_is_tone(prepare_waveform(samples.astype(dtype), SAMPLE_RATE), tolerance=0.01)


def test_full_scale() -> None:
    extremes = np.array([-(2**15), 2**15 - 1, 0], np.int16)
    np.testing.assert_array_equal(prepare_waveform(extremes, SAMPLE_RATE), np.array([-1, 1 - 2**-15, 0], np.float32))


def test_bfloat16() -> None:
    assert_is_tone(prepare_waveform(torch.from_numpy(tone()).bfloat16(), SAMPLE_RATE), tolerance=0.01)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        ([], 16_000, "no samples"),
        (np.zeros((2, 0)), 16_000, "no samples"),
        (0.5, 16_000, r"shape \[\]"),
        (np.zeros((1, 2, 3)), 16_000, r"shape \[1, 2, 3\]"),
        ([1, 2, 3], 16_000, "type int64"),
        (np.zeros(9, complex), 16_000, "type complex128"),
        (np.zeros(9, bool), 16_000, "type bool"),
        (["a"], 16_000, "type <U1"),
        (np.zeros(9), 0, "sample rate 0"),
        (np.zeros(9), float("nan"), "sample rate nan"),
        (np.zeros(9), 16, "sample rate 16: give its number of samples per second, 1000 or more"),
        ([[0.0, 0.1], [0.2]], 16_000, "no array of samples"),
        (np.zeros(8_000 * 31), 8_000, "31.00 s long"),
        (np.array([1e300]), 16_000, "NaN or infinite"),
    ],
)
def test_faulty_samples(samples: Any, rate: int, message: str) -> None:
    with pytest.raises(AudioError, match=f"the call .*{message}"):
        prepare_waveform(samples, rate, "the call")
