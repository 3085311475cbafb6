"""The audio zoo: whatever is whole is heard, and whatever is not, or means nothing, is named."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from blspkd_fairseq.data.audio import (
    AudioError,
    AudioWarning,
    Flaw,
    Reason,
    find_flaw,
    load_audio,
    prepare_waveform,
    warn_of_flaw,
)
from blspkd_fairseq.data.audio_headers import UNCHECKED_FORMATS

RATE, SECONDS = 16_000, 4


def speech(seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    """A tone of changing loudness, in noise, so that no codec makes much less of it in one place."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.05, len(time))
    return (0.3 * np.sin(2 * np.pi * 300 * time) * (1 + np.sin(5 * time)) / 2 + noise).astype(np.float32)


def encoded(format: str, subtype: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, speech(), RATE, format=format, subtype=subtype, **options)
    return buffer.getvalue()


def saved(folder: Path, data: bytes | bytearray) -> Path:
    (folder / "a.audio").write_bytes(data)
    return folder / "a.audio"


FILES: dict[str, bytes] = {
    "wav": encoded("WAV"),
    "wav 24": encoded("WAV", "PCM_24"),
    "wav float": encoded("WAV", "FLOAT"),
    "wav ulaw": encoded("WAV", "ULAW"),
    "wav extensible": encoded("WAVEX"),
    "rf64": encoded("RF64"),
    "w64": encoded("W64"),
    "aiff": encoded("AIFF"),
    "aiff-c float": encoded("AIFF", "FLOAT"),
    "aiff-c ulaw": encoded("AIFF", "ULAW"),
    "au": encoded("AU"),
    "caf": encoded("CAF"),
    "nist": encoded("NIST"),
    "flac": encoded("FLAC"),
    "vorbis": encoded("OGG", "VORBIS"),
    "opus": encoded("OGG", "OPUS"),
    "mp3 constant": encoded("MP3", bitrate_mode="CONSTANT"),
    "mp3 variable": encoded("MP3", bitrate_mode="VARIABLE"),
}


# --- whole files, and parts of files --------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_heard(name: str, tmp_path: Path) -> None:
    waveform = load_audio(saved(tmp_path, FILES[name]))
    assert abs(len(waveform) - SECONDS * RATE) <= (0 if "mp3" not in name else 2000)
    assert find_flaw(waveform) is None


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", FILES)
def test_parts_of_files_are_named(name: str, part: float, tmp_path: Path) -> None:
    data = FILES[name]
    with pytest.raises(AudioError, match="a.audio .*(truncated|hole)") as raised:
        load_audio(saved(tmp_path, data[: int(part * len(data))]))
    assert raised.value.reason in (Reason.SHORTER, Reason.UNREADABLE, Reason.HOLE)


@pytest.mark.parametrize("format", sorted(UNCHECKED_FORMATS & soundfile.available_formats().keys() - {"RAW", "SD2"}))
def test_formats_that_hide_whether_they_are_whole_are_refused(format: str, tmp_path: Path) -> None:
    data = encoded(format, soundfile.default_subtype(format))
    for part in (1.0, 0.5):
        with pytest.raises(AudioError, match="a.audio (is .* hides whether it is whole: convert it|cannot be decoded)"):
            load_audio(saved(tmp_path, data[: int(part * len(data))]))


def with_number(data: bytes | bytearray, place: int, format: str, number: int) -> bytearray:
    changed = bytearray(data)
    struct.pack_into(format, changed, place, number)
    return changed


AIFF_50 = with_number(FILES["aiff"], FILES["aiff"].index(b"COMM") + 10, ">I", 50)
LONGER = {
    "wav": with_number(FILES["wav"], 40, "<I", 100),
    "wav float": with_number(FILES["wav float"], FILES["wav float"].index(b"data") + 4, "<I", 100),
    "rf64": with_number(FILES["rf64"], FILES["rf64"].index(b"ds64") + 16, "<Q", 100),
    "aiff": with_number(AIFF_50, FILES["aiff"].index(b"SSND") + 4, ">I", 108),
    "aiff frames": AIFF_50,
    "au": with_number(FILES["au"], 8, ">I", 100),
    "nist": bytearray(FILES["nist"].replace(b"sample_count -i 64000", b"sample_count -i 00050")),
}


@pytest.mark.parametrize("name", LONGER)
def test_files_that_declare_less_than_they_hold_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="a.audio declares .*(more|in another): .*(header|damaged)") as raised:
        load_audio(saved(tmp_path, LONGER[name]))
    assert raised.value.reason == Reason.LONGER


TAGS = {
    "a list of words": b"LIST" + struct.pack("<I", 20_000) + b"words" * 4000,
    "two chunks": b"LIST\x04\0\0\0abcd" + b"id3 " + struct.pack("<I", 9000) + bytes(9000),
    "an odd chunk": b"note\x03\0\0\0abc\0LIST\x02\0\0\0ab",
    "an ID3v1 tag": b"TAG" + bytes(125),
    "zeros": bytes(512),
}


@pytest.mark.parametrize("name", ["wav", "wav float"])
@pytest.mark.parametrize("tag", TAGS)
def test_tags_after_the_samples_are_no_samples(name: str, tag: str, tmp_path: Path) -> None:
    assert len(load_audio(saved(tmp_path, FILES[name] + TAGS[tag]))) == SECONDS * RATE


# --- MP3 ------------------------------------------------------------------------------------------


def without_length(mp3: bytes) -> bytes:
    """Without the first frame, which says how many follow."""
    return mp3[mp3.index(mp3[:2], 2) :]


HOLES = {
    "zeros": lambda size: bytes(size),
    "noise": lambda size: np.random.default_rng(1).bytes(size),
    "text": lambda size: (b"<html>not found</html>" * size)[:size],
}


@pytest.mark.parametrize("filling", HOLES)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.65])
@pytest.mark.parametrize("name", ["mp3 constant", "mp3 variable", "no length"])
def test_mp3_with_a_hole(name: str, place: float, share: float, filling: str, tmp_path: Path) -> None:
    data = without_length(FILES["mp3 constant"]) if name == "no length" else FILES[name]
    start, size = int(place * len(data)), int(share * len(data))
    damaged = data[:start] + HOLES[filling](size) + data[start + size :]
    with pytest.raises(AudioError, match="a.audio .*(hole|truncated|does not say its length)"):
        load_audio(saved(tmp_path, damaged))


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_mp3_of_which_a_part_was_cut_out(share: float, tmp_path: Path) -> None:
    data = FILES["mp3 constant"]
    start, size = len(data) // 3, int(share * len(data))
    with pytest.raises(AudioError, match="a.audio .*(hole|truncated)"):
        load_audio(saved(tmp_path, data[:start] + data[start + size :]))


ID3 = b"ID3\x04\0\0\0\0\x0f\x00" + b"\xff\xfb" * 960
APE = b"APETAGEX" + struct.pack("<III", 2000, 200, 0) + bytes(12)
AROUND = {
    "ID3 before": (ID3, b""),
    "two ID3 before": (ID3 + ID3, b""),
    "ID3v1 after": (b"", b"TAG" + b"\xff" * 125),
    "APE after": (b"", bytes(200) + APE),
    "APE and ID3v1 after": (b"", b"\xff" * 200 + APE + b"TAG" + bytes(125)),
    "zeros after": (b"", bytes(5000)),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["mp3 constant", "mp3 variable"])
def test_tags_of_mp3_are_no_holes(name: str, around: str, tmp_path: Path) -> None:
    before, after = AROUND[around]
    waveform = load_audio(saved(tmp_path, before + FILES[name] + after))
    assert abs(len(waveform) - SECONDS * RATE) <= 2000


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
def test_every_kind_of_mp3_is_gone_through(rate: int, mode: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, speech(2, rate), rate, format="MP3", bitrate_mode=mode)
    assert abs(len(load_audio(saved(tmp_path, buffer.getvalue()))) - 2 * RATE) <= 3000


# --- what libsndfile does not know ----------------------------------------------------------------

CONTAINERS = {
    "m4a": ("mp4", "aac"),
    "mp4": ("mov", "aac"),
    "aac": ("adts", "aac"),
    "webm": ("webm", "libopus"),
    "mka": ("matroska", "libopus"),
    "opus in mp4": ("mp4", "libopus"),
}


def in_container(kind: str, channels: int = 1) -> bytes:
    av = pytest.importorskip("av")
    format, codec = CONTAINERS[kind]
    samples = speech(rate=48_000)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono" if channels == 1 else "stereo")
        frame = av.AudioFrame.from_ndarray(np.tile(samples, (channels, 1)), "fltp", stream.layout.name)
        frame.sample_rate = 48_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("channels", [1, 2])
def test_containers_are_heard(kind: str, channels: int, tmp_path: Path) -> None:
    waveform = load_audio(saved(tmp_path, in_container(kind, channels)))
    assert abs(len(waveform) - SECONDS * RATE) < 2500
    spectrum = np.abs(np.fft.rfft(waveform))
    assert abs(spectrum.argmax() * RATE / len(waveform) - 300) < 5
    with pytest.raises(AudioError, match="s long; the limit is 2 s") as raised:
        load_audio(saved(tmp_path, in_container(kind, channels)), max_seconds=2)
    assert raised.value.reason == Reason.TOO_LONG


@pytest.mark.parametrize("kind", sorted(CONTAINERS.keys() - {"aac"}))
@pytest.mark.parametrize("part", [0.3, 0.8])
def test_parts_of_containers_are_named(kind: str, part: float, tmp_path: Path) -> None:
    data = in_container(kind)
    with pytest.raises(AudioError, match="a.audio .*truncated"):
        load_audio(saved(tmp_path, data[: int(part * len(data))]))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_without_pyav_the_format_and_the_extra_are_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, in_container(kind))
    monkeypatch.setitem(sys.modules, "av", None)
    name = {"aac": "AAC", "webm": "WebM", "mka": "Matroska"}.get(kind, "MPEG-4")
    with pytest.raises(AudioError, match=rf"a.audio is .*{name}.* audio.* needs PyAV: pip install .*\[recordings\]"):
        load_audio(path)


# --- samples that mean nothing --------------------------------------------------------------------

NOISE = np.random.default_rng(0)
FLAWS = {
    "zeros": (np.zeros(RATE), Flaw.SILENT),
    "a constant": (np.full(RATE, 0.4), Flaw.SILENT),
    "dither": (NOISE.choice([0, 1 / 32768], RATE), Flaw.SILENT),
    "an offset": (speech() * 0.2 + 0.5, Flaw.OFFSET),
    "a negative offset": (speech() * 0.2 - 0.5, Flaw.OFFSET),
    "integers that were cut to floats": (np.clip(speech() * 32768, -1, 1), Flaw.CLIPPED),
    "too loud": (np.clip(speech() * 30, -1, 1), Flaw.CLIPPED),
    "speech": (speech(), None),
    "quiet speech": (speech() * 1e-3, None),
    "a small offset": (speech() * 0.5 + 0.05, None),
    "loud speech": (np.clip(speech() * 2, -1, 1), None),
    "a click in silence": (np.eye(1, RATE, 100)[0] * 0.3, None),
}


@pytest.mark.parametrize("name", FLAWS)
def test_flaws(name: str) -> None:
    samples, flaw = FLAWS[name]
    waveform = prepare_waveform(samples, RATE)
    assert find_flaw(waveform) == flaw
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_flaw(waveform, "a.wav")
    assert [str(one.message) for one in caught] == [
        f"a.wav is audio with a flaw ({flaw}): what is answered to it may be made up" for _ in range(flaw is not None)
    ]
    assert all(one.category is AudioWarning for one in caught)


@pytest.mark.parametrize("scale", [2.5, 255.0, 32767.0, 2.0**31])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_integers_as_floats_are_refused(scale: float, channels: int, rate: int, tmp_path: Path) -> None:
    samples = np.tile(speech() / np.abs(speech()).max() * scale, (channels, 1)).T
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    for read in (lambda: load_audio(tmp_path / "a.wav"), lambda: prepare_waveform(samples, rate, "a.wav")):
        with pytest.raises(AudioError, match=r"a.wav holds samples of up to .* in \[-1, 1\].*divide them") as raised:
            read()
        assert raised.value.reason == Reason.OUT_OF_RANGE


def test_a_little_over_full_scale_is_what_lossy_formats_do() -> None:
    assert np.abs(prepare_waveform(speech() * 3, RATE)).max() > 1.1


# --- channels -------------------------------------------------------------------------------------

LEFT = speech()
OTHER = np.random.default_rng(5).normal(0, 0.1, len(LEFT)).astype(np.float32)
CHANNELS = {
    "opposite": ([LEFT, -LEFT], LEFT),
    "opposite, one louder": ([0.9 * LEFT, -LEFT], -LEFT),
    "nearly opposite": ([LEFT, -LEFT + 0.05 * OTHER], None),
    "three that cancel": ([LEFT, -0.5 * LEFT, -0.5 * LEFT], LEFT),
    "same": ([LEFT, LEFT], LEFT),
    "one silent": ([LEFT, 0 * LEFT], LEFT / 2),
    "one of five": ([LEFT, *[0 * LEFT] * 4], LEFT / 5),
    "unrelated": ([LEFT, OTHER], (LEFT + OTHER) / 2),
    "ten unrelated": ([np.roll(OTHER, 1000 * i) for i in range(10)], None),
    "silent": ([0 * LEFT, 0 * LEFT], 0 * LEFT),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_never_cancel_out(name: str, tmp_path: Path) -> None:
    channels, expected = CHANNELS[name]
    samples = np.stack(channels, axis=1)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    for waveform in (load_audio(tmp_path / "a.wav"), prepare_waveform(samples, RATE)):
        if expected is not None:
            np.testing.assert_allclose(waveform, expected, atol=1e-6)
        elif name == "nearly opposite":
            assert np.abs(np.corrcoef(waveform, LEFT)[0, 1]) > 0.99
        else:
            np.testing.assert_allclose(waveform, samples.mean(axis=1), atol=1e-6)


# --- reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"no audio at all", Reason.UNREADABLE),
        (FILES["wav"][:9000], Reason.SHORTER),
        (LONGER["wav"], Reason.LONGER),
        (None, Reason.MISSING),
    ],
)
def test_errors_have_a_reason_that_other_processes_learn(data: Any, reason: Reason, tmp_path: Path) -> None:
    path = tmp_path / "none.wav" if data is None else saved(tmp_path, data)
    with pytest.raises(AudioError) as raised:
        load_audio(path)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert raised.value.reason == copy.reason == reason and str(copy) == str(raised.value)
    with pytest.raises(AudioError, match="outside") as outside:
        load_audio("../x.wav", tmp_path)
    assert outside.value.reason == Reason.OUTSIDE
