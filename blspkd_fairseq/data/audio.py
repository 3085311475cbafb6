"""Audio files as mono float32 waveforms at 16 kHz, and what can be wrong with them.

Decoding is libsndfile's (WAV, FLAC, MP3, OGG, ...), or PyAV's (M4A, WebM, ...), and resampling is soxr's. libsndfile
hides that a file was cut off: here, files are compared with the length in their header and with the manifest's.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from blspkd_fairseq.data.audio_error import AudioError, Reason
from blspkd_fairseq.data.audio_headers import (
    UNCHECKED_FORMATS,
    check_header,
    check_mp3,
    mp3_has_length,
    tolerance,
)
from blspkd_fairseq.data.av_audio import container_of, open_container

__all__ = [
    "MAX_SECONDS",
    "SAMPLE_RATE",
    "AudioError",
    "AudioWarning",
    "Flaw",
    "Reason",
    "audio_bytes",
    "audio_identity",
    "audio_seconds",
    "audio_size",
    "check_audio",
    "decode_audio",
    "find_flaw",
    "find_zip_entry",
    "load_audio",
    "prepare_portion",
    "prepare_waveform",
    "stream_audio",
    "warn_of_flaw",
]

SAMPLE_RATE = 16_000
MAX_SECONDS = 30.0

_SLOWEST = 1000  # samples per second; fewer were meant as thousands, or a header is damaged
_ZIP_ENTRY = re.compile(r"(.+):(\d+):(\d+)", re.DOTALL)
_BLOCK_FRAMES = 1 << 18
_UNKNOWN_FRAMES = 1 << 62  # libsndfile reports more than this for a stream of unknown length
_LOUDEST = 2.0  # times full scale: decoders of lossy formats overshoot, by a little
_QUIETEST = 2.0 / 32768  # from the lowest to the highest sample, which dither alone reaches
_CLIPPED = 0.25  # fraction of samples at full scale
_OFFSET = 0.25  # of full scale
_CANCELLED = 0.2  # of the energy that the mean of unrelated channels has


class Flaw(StrEnum):
    """What is wrong with samples that can be used and mean nothing, or little."""

    SILENT = "digital silence"
    CLIPPED = "clipped throughout"
    OFFSET = "constant offset"


class AudioWarning(UserWarning):
    """Audio that can be used, though an answer to it may mean nothing."""


# --- public ---------------------------------------------------------------------------------------


def load_audio(
    spec: str | Path,
    root: Path | None = None,
    declared_samples: int | None = None,
    max_seconds: float | None = MAX_SECONDS,
) -> np.ndarray:
    """Reads one utterance, whatever its rate, channels and format.

    Args:
        spec: a file, or ``archive.zip:offset:length``, the bytes of a stored member (see :func:`find_zip_entry`).
        root: folder of relative paths; then no path may lead out of it.
        declared_samples: length at 16 kHz according to the manifest; audio that is clearly shorter was cut off.
        max_seconds: longest utterance; None: any.

    Returns:
        ``[samples]`` float32, mono, 16 kHz.

    Raises:
        AudioError: missing, outside of ``root``, empty, unreadable, truncated, too long, or with samples that are NaN
            or far out of [-1, 1]; its ``reason`` says which.
    """
    name = str(spec)
    with _reading(name), _open(name, root) as file:
        waveform = _to_mono_16k(*_decode(file, name, max_seconds), name, max_seconds)
    if declared_samples is not None:
        _check_length(len(waveform), declared_samples, SAMPLE_RATE, name, "the manifest declares")
    return waveform


def stream_audio(spec: str | Path, seconds: float = 10.0) -> Iterator[np.ndarray]:
    """:func:`load_audio` of a file of any length, ``seconds`` or so at a time: memory does not grow with its length.

    Raises:
        AudioError: as there; of what only the end shows, after all that came before.
    """
    name, count = str(spec), 0
    with _reading(name), _open(name, None) as file:
        channel = _loudest_if_cancelling(file, name)
        with _open_sound(file, name, None) as sound:
            _check_rate(sound.rate, name)
            resampler = None if sound.rate == SAMPLE_RATE else soxr.ResampleStream(sound.rate, SAMPLE_RATE, 1)
            for block in _regrouped(sound.blocks, round(seconds * sound.rate)):
                with np.errstate(over="ignore", invalid="ignore"):  # as in _to_mono_16k
                    mono = block.mean(axis=1) if channel is None else np.ascontiguousarray(block[:, channel])
                _check_samples(mono, name)
                mono = mono if resampler is None else resampler.resample_chunk(mono)
                count += len(mono)
                yield mono
            if resampler is not None:
                mono = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
                count += len(mono)
                yield mono
    if count == 0:
        raise AudioError(f"{name} holds no samples: restore the file or leave it out", Reason.EMPTY)


def audio_seconds(spec: str | Path) -> float | None:
    """Length of a file according to its header, which may not say it, or not be there: for a progress bar."""
    try:
        with _reading(str(spec)), _open(str(spec), None) as file, _open_sound(file, str(spec), None) as sound:
            return None if sound.frames is None else sound.frames / sound.rate
    except AudioError:
        return None


def decode_audio(content: bytes, name: str = "audio", max_seconds: float | None = MAX_SECONDS) -> np.ndarray:
    """Reads the bytes of a file as :func:`load_audio` does the file."""
    if not content:
        raise AudioError(f"{name} is empty: restore the file or leave it out", Reason.EMPTY)
    with _reading(name):
        return _to_mono_16k(*_decode(io.BytesIO(content), name, max_seconds), name, max_seconds)


def check_audio(spec: str | Path) -> None:
    """Refuses what no model need be loaded for.

    Raises:
        AudioError: missing, a folder, or an empty file.
    """
    with _reading(str(spec)), _open(str(spec), None):
        pass


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Names the file in what the system and the decoders say."""
    try:
        yield
    except AudioError:
        raise
    except (OSError, ValueError) as error:
        raise AudioError(f"{name} cannot be read: {error}") from error


def find_flaw(waveform: np.ndarray) -> Flaw | None:
    """What makes a waveform ``[samples]`` in which nothing, or little, can be heard; None if nothing does."""
    lowest, highest = float(waveform.min()), float(waveform.max())
    if highest - lowest <= _QUIETEST:
        return Flaw.SILENT
    if np.mean(np.abs(waveform) >= 0.999) >= _CLIPPED:
        return Flaw.CLIPPED
    return Flaw.OFFSET if abs(float(waveform.mean())) > _OFFSET else None


def warn_of_flaw(waveform: np.ndarray, name: str) -> None:
    """Warns of samples in which nothing can be heard: what a model says to them is made up."""
    flaw = find_flaw(waveform)
    if flaw is not None:
        warnings.warn(f"{name} is audio with a flaw ({flaw}): what is answered to it may be made up", AudioWarning, 3)


def audio_identity(spec: str | Path, root: Path | None = None) -> str:
    """What tells the bytes of an utterance from others, without reading them: where they are, size and change time.

    Raises:
        AudioError: missing, or outside of ``root``.
    """
    path, entry = _locate(str(spec), root)
    stat = path.stat()
    part = "" if entry is None else f"{entry[2]}:{entry[3]}"
    return f"{path.resolve()}\0{part}\0{stat.st_size}\0{stat.st_mtime_ns}"


def audio_size(spec: str | Path, root: Path | None = None) -> int:
    """Bytes of a file or of a member of an archive.

    Raises:
        AudioError: missing, or outside of ``root``.
    """
    path, entry = _locate(str(spec), root)
    return path.stat().st_size if entry is None else int(entry[3])


def audio_bytes(spec: str | Path, root: Path | None = None) -> bytes:
    """What a file or a member of an archive holds.

    Raises:
        AudioError: missing, outside of ``root``, or not readable.
    """
    with _reading(str(spec)), _open(str(spec), root) as file:
        return file.read()


def prepare_waveform(
    samples: Any, rate: int, name: str = "audio", max_seconds: float | None = MAX_SECONDS
) -> np.ndarray:
    """Converts samples in memory as :func:`load_audio` does a file.

    Args:
        samples: numpy array, torch tensor or list: ``[samples]``, or two-dimensional with the channels on the shorter
            axis. Integers of 8 to 32 bits are scaled to [-1, 1).
        rate: samples per second.
        name: what messages call it.
        max_seconds: longest utterance; None: any.

    Returns:
        ``[samples]`` float32, mono, 16 kHz.

    Raises:
        AudioError: of another shape or type, empty, too long, or with samples that are NaN or far out of [-1, 1].
    """
    array = _scaled(_as_array(samples, name), name)
    if array.ndim not in (1, 2):
        raise AudioError(f"{name} has the shape {list(array.shape)}: give [samples] or [samples, channels]")
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    return _to_mono_16k(array, rate, name, max_seconds)


def prepare_portion(samples: Any, rate: Any, name: str = "a portion") -> np.ndarray:
    """Converts a portion of a stream as :func:`prepare_waveform` does the whole, but for its rate.

    Returns:
        ``[samples]`` float32, of the same rate.

    Raises:
        AudioError: of another shape or type, or with samples or a rate that :func:`prepare_waveform` refuses.
    """
    _check_rate(rate, name)
    array = _scaled(_as_array(samples, name), name)
    if array.ndim != 1:
        raise AudioError(f"{name} has the shape {list(array.shape)}: give [samples] of one channel")
    portion = np.asarray(array, np.float32)
    _check_samples(portion, name)
    return portion


def find_zip_entry(zip_path: str | Path, member: str) -> str:
    """The ``archive.zip:offset:length`` that names a member's bytes.

    Offsets come from the member's own header in the archive: the directory at the end does not know its length.

    Raises:
        AudioError: no archive, no such member, or one that is compressed or encrypted.
    """
    try:
        with zipfile.ZipFile(zip_path) as archive, open(zip_path, "rb") as file:
            info = archive.getinfo(member)
            file.seek(info.header_offset)
            header = file.read(30)
    except KeyError as error:
        raise AudioError(f"{zip_path} has no member {member}") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise AudioError(f"{zip_path} cannot be read as a zip archive: {error}") from error
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise AudioError(f"{zip_path} holds {member} compressed or encrypted: make the archive with `zip -0`")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return f"{zip_path}:{info.header_offset + 30 + name_length + extra_length}:{info.file_size}"


# --- files ----------------------------------------------------------------------------------------


def _open(spec: str, root: Path | None) -> BinaryIO:
    """The bytes of a file or of a member of an archive, seekable."""
    path, entry = _locate(spec, root)
    if entry is not None:
        return io.BytesIO(_read_zip_entry(path, int(entry[2]), int(entry[3]), spec))
    if path.stat().st_size == 0:
        raise AudioError(f"{spec} is an empty file: restore the file or leave it out", Reason.EMPTY)
    return open(path, "rb")


def _locate(spec: str, root: Path | None) -> tuple[Path, re.Match[str] | None]:
    """The file, and for a member of an archive what its name says."""
    path = _confined(spec, root)
    entry = None if path.is_file() else _ZIP_ENTRY.fullmatch(spec)
    if entry is not None:
        path = _confined(entry[1], root)
    if spec and path.is_dir():
        raise AudioError(f"{spec} is a folder: name the audio files in it", Reason.MISSING)
    if not path.is_file():
        hint = "" if root is None else f" in the audio root {root}"
        raise AudioError(f"{spec} does not exist{hint}: check the path", Reason.MISSING)
    return path, entry


def _confined(path: str, root: Path | None) -> Path:
    if root is None:
        return Path(path)
    folder = root.resolve()
    resolved = (folder / path).resolve()
    if not resolved.is_relative_to(folder):
        raise AudioError(
            f"{path} is outside of the audio root {root}: choose a root that holds all audio", Reason.OUTSIDE
        )
    return resolved


def _read_zip_entry(path: Path, offset: int, length: int, spec: str) -> bytes:
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise AudioError(f"{spec} names a part of a file that is no zip archive")
        if length == 0 or offset + length > path.stat().st_size:
            raise AudioError(f"{spec} is empty or reaches beyond the end of the archive: write the manifest anew")
        file.seek(offset)
        return file.read(length)


# --- decoding -------------------------------------------------------------------------------------


class _Stream(soundfile.SoundFile):
    """A file that soundfile reads from begin to end without seeking, which fails in FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


class _Sound(NamedTuple):
    """A file that is being decoded.

    Attributes:
        rate: in Hz.
        frames: that it declares, if it does.
        blocks: ``[frames, channels]`` float32, up to a little more than the longest audio, so that a stream without end
            is not read on. At their end what came is compared with what was declared.
    """

    rate: int
    frames: int | None
    blocks: Iterator[np.ndarray]


@contextmanager
def _open_sound(file: BinaryIO, name: str, max_seconds: float | None) -> Iterator[_Sound]:
    """Decodes a file that is at its begin."""
    container = container_of(file)
    with (
        _open_with_av(file, name, container, max_seconds)
        if container
        else _open_with_libsndfile(file, name, max_seconds)
    ) as sound:
        yield sound


@contextmanager
def _open_with_av(file: BinaryIO, name: str, container: str, max_seconds: float | None) -> Iterator[_Sound]:
    with open_container(file, name, container) as (rate, seconds, blocks):
        frames = None if seconds is None else round(seconds * rate)
        yield _Sound(rate, frames, _read_container(blocks, rate, seconds, name, max_seconds))


def _read_container(
    blocks: Iterator[np.ndarray], rate: int, seconds: float | None, name: str, max_seconds: float | None
) -> Iterator[np.ndarray]:
    limit, count = _most_frames(rate, max_seconds), 0
    for block in blocks:
        yield block
        count += len(block)
        if count > limit:
            break
    if seconds is not None:
        _check_seconds(min(seconds, count / rate + 0.1), name, max_seconds)
        _check_length(count, round(seconds * rate), rate, name, "its header declares")


@contextmanager
def _open_with_libsndfile(file: BinaryIO, name: str, max_seconds: float | None) -> Iterator[_Sound]:
    file = check_header(file, name)
    has_length = mp3_has_length(file)
    try:
        with _Stream(file) as sound:
            is_mp3, rate = sound.format == "MP3", sound.samplerate
            if sound.format in UNCHECKED_FORMATS:
                raise AudioError(f"{name} is {sound.format_info}, which hides whether it is whole: convert it to FLAC")
            declared = sound.frames if sound.frames < _UNKNOWN_FRAMES and (has_length or not is_mp3) else None
            if declared is not None:
                _check_seconds(declared / rate, name, max_seconds)
            yield _Sound(rate, declared, _read_libsndfile(sound, file, declared, name, max_seconds))
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} cannot be decoded, so it is truncated, damaged or no audio: {error.error_string or error}"
        ) from error


def _read_libsndfile(
    sound: soundfile.SoundFile, file: BinaryIO, declared: int | None, name: str, max_seconds: float | None
) -> Iterator[np.ndarray]:
    limit, count = _most_frames(sound.samplerate, max_seconds), 0
    while count <= limit:
        block = sound.read(min(_BLOCK_FRAMES, sound.frames - count), dtype="float32", always_2d=True)
        count += len(block)
        yield block
        if len(block) < _BLOCK_FRAMES:
            break
    end = file.tell()
    if sound.format == "MP3":
        check_mp3(file, name)
    if declared is not None:
        _check_length(count, declared, sound.samplerate, name, "its header declares")
    elif sound.format == "MP3" and end + 2048 < file.seek(0, io.SEEK_END):
        # libsndfile guessed the length from the first frame, too short, and stopped there.
        raise AudioError(f"{name} is an MP3 of variable bit rate that does not say its length: convert it to FLAC")


def _most_frames(rate: int, max_seconds: float | None) -> float:
    return math.inf if max_seconds is None else max_seconds * rate


def _decode(file: BinaryIO, name: str, max_seconds: float | None) -> tuple[np.ndarray, int]:
    """All samples ``[frames, channels]`` float32, and their rate."""
    with _open_sound(file, name, max_seconds) as sound:
        blocks = list(sound.blocks)
    return np.concatenate(blocks) if blocks else np.empty((0, 1), np.float32), sound.rate


# --- samples --------------------------------------------------------------------------------------


def _to_mono_16k(samples: np.ndarray, rate: float, name: str, max_seconds: float | None) -> np.ndarray:
    """``[frames]`` or ``[frames, channels]`` to ``[samples]`` float32 at 16 kHz."""
    _check_rate(rate, name)
    if samples.size == 0:
        raise AudioError(f"{name} holds no samples: restore the file or leave it out", Reason.EMPTY)
    _check_seconds(len(samples) / rate, name, max_seconds)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is Inf, which is reported
        mono = _mixed(np.asarray(samples, np.float32))
    _check_samples(mono, name)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if len(mono) == 0:
        raise AudioError(f"{name} is too short to hold one sample at 16 kHz: leave it out", Reason.EMPTY)
    return np.ascontiguousarray(mono)


def _check_rate(rate: Any, name: str) -> None:
    if not (isinstance(rate, (int, float, np.number)) and _SLOWEST <= rate < math.inf):
        raise AudioError(
            f"{name} has the sample rate {rate}: give its number of samples per second, {_SLOWEST} or more"
        )


def _check_samples(mono: np.ndarray, name: str) -> None:
    """Raises AudioError for samples that are no numbers, or far out of [-1, 1]."""
    if not np.isfinite(mono).all():
        raise AudioError(f"{name} holds samples that are NaN or infinite: write the file anew", Reason.NO_NUMBERS)
    peak = float(np.abs(mono).max(initial=0.0))
    if peak > _LOUDEST:
        raise AudioError(
            f"{name} holds samples of up to {peak:.4g}, which are to be in [-1, 1]: if they are 16-bit integers as "
            "floats, divide them by 32768",
            Reason.OUT_OF_RANGE,
        )


def _mixed(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels; of channels that cancel out, such as two of opposite polarity, the loudest."""
    if samples.ndim == 1:
        return samples
    mono = samples.mean(axis=1)
    channel = _loudest(_energies(samples, mono))
    return np.asarray(mono, np.float32) if channel is None else np.ascontiguousarray(samples[:, channel])


def _energies(samples: np.ndarray, mono: np.ndarray) -> np.ndarray:
    """Of the mean of the channels, and of each."""
    squares = [np.square(one, dtype=np.float64).sum(axis=0) for one in (mono[:, None], samples)]
    return np.concatenate(squares)


def _loudest(energies: np.ndarray) -> int | None:
    """Which of channels that cancel out is to be heard; None if they do not, and their mean is."""
    mean, channels = energies[0], energies[1:]
    return int(channels.argmax()) if mean < _CANCELLED * channels.mean() / len(channels) else None


def _loudest_if_cancelling(file: BinaryIO, name: str) -> int | None:
    """:func:`_loudest` of a file, which is decoded for that if it has several channels; leaves it at its begin."""
    energies: np.ndarray | None = None
    with _open_sound(file, name, None) as sound:
        for block in sound.blocks:
            if block.shape[1] == 1:
                break
            with np.errstate(over="ignore", invalid="ignore"):
                more = _energies(block, block.mean(axis=1))
            energies = more if energies is None else energies + more
    file.seek(0)
    return None if energies is None else _loudest(energies)


def _regrouped(blocks: Iterator[np.ndarray], frames: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of ``frames``, or a little more."""
    kept: list[np.ndarray] = []
    for block in blocks:
        kept.append(block)
        if sum(map(len, kept)) >= frames:
            yield np.concatenate(kept)
            kept = []
    if kept:
        yield np.concatenate(kept)


def _as_array(samples: Any, name: str) -> np.ndarray:
    if hasattr(samples, "detach"):  # a torch tensor; numpy has no bfloat16
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()
    try:
        return np.asarray(samples)
    except ValueError as error:  # rows of different lengths
        raise AudioError(f"{name} is no array of samples: give [samples] or [samples, channels]") from error


def _scaled(array: np.ndarray, name: str) -> np.ndarray:
    """Integers to [-1, 1)."""
    if array.dtype.kind == "f":
        return array
    if array.dtype.kind not in "iu" or array.dtype.itemsize > 4:
        # 64-bit integers are a list of Python numbers or a cast: their full scale is anybody's guess.
        raise AudioError(f"{name} has samples of type {array.dtype}: give floats in [-1, 1] or int16")
    half = 2.0 ** (8 * array.dtype.itemsize - 1)
    middle = half if array.dtype.kind == "u" else 0.0
    return (array - middle) / half


def _check_seconds(seconds: float, name: str, max_seconds: float | None) -> None:
    if max_seconds is not None and seconds > max_seconds:
        shown = f"{seconds:.2f}" if seconds - max_seconds >= 0.01 else f"{seconds:.5f}"
        raise AudioError(
            f"{name} is {shown} s long; the limit is {max_seconds:g} s: cut it into segments", Reason.TOO_LONG
        )


def _check_length(found: int, declared: int, rate: int, name: str, who: str) -> None:
    """Audio is as long as declared, up to what MP3 headers and resampling do to lengths."""
    if declared - found > tolerance(declared, rate):
        raise AudioError(
            f"{name} holds {found / rate:.2f} s of the {declared / rate:.2f} s that {who}: "
            "it is truncated, restore the file or leave it out",
            Reason.SHORTER,
        )
