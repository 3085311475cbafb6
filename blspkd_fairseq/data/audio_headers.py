"""What the header of an audio file declares against what the file holds, which libsndfile does not compare.

WAV, RF64, W64, AIFF, AU and NIST SPHERE declare how many bytes of samples follow; Ogg marks its last page; the frames
of an MP3 follow one another without a gap.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from blspkd_fairseq.data.audio_error import AudioError, Reason

_PLACEHOLDER = 0x7FFFF000  # programs that write into a pipe give sizes from here on, or 0
_RESTORE = "restore the file or leave it out"
# libsndfile's other formats hide that they were cut off, and nobody keeps speech in them.
UNCHECKED_FORMATS = frozenset(
    {"AVR", "IRCAM", "MAT4", "MAT5", "MPC2K", "PAF", "PVF", "SDS", "SVX", "VOC", "WVE", "XI", "RAW", "SD2"}
)


class _Data(NamedTuple):
    """Where the samples of a file are. Attributes: first byte, declared bytes, bytes of a second (0: unknown)."""

    begin: int
    declared: int
    rate: int = 0


def check_header(file: BinaryIO, name: str) -> BinaryIO:
    """Compares what a header declares with the file; returns the file to decode, at its begin.

    A WAV header that was written before its size was known gets one that libsndfile takes for "up to the end".

    Raises:
        AudioError: the file is clearly shorter or longer than it declares.
    """
    magic = file.read(12)
    size = file.seek(0, io.SEEK_END)
    found = next((check for key, check in _CHECKS if magic.startswith(key)), None)
    checked = found(file, size, name) if found else file
    checked.seek(0)
    return checked


def tolerance(declared: int, rate: int) -> int:
    """How much of ``declared`` may be missing, at ``rate`` a second: what MP3 headers and resampling do to lengths."""
    return max(rate // 10, declared // 50)


# --- chunks ---------------------------------------------------------------------------------------


def _check_riff(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """WAV and RF64."""
    head = _read(file, 0, 12)
    if head[8:] != b"WAVE":
        return file
    riff_size = int.from_bytes(head[4:8], "little")
    chunks = {kind: (begin, length) for kind, begin, length in _chunks(file, size, "<")}
    begin, declared = chunks.get(b"data", (0, 0))
    if begin == 0:
        return file
    if head[:4] == b"RF64" and b"ds64" in chunks:
        declared = struct.unpack("<Q", _read(file, chunks[b"ds64"][0] + 8, 8))[0]
    elif declared >= _PLACEHOLDER:
        return file
    elif declared == 0 and (riff_size == 0 or riff_size >= _PLACEHOLDER):
        content = bytearray(_read(file, 0, size))
        content[begin - 4 : begin] = b"\xff\xff\xff\xff"
        return io.BytesIO(content)
    rate = struct.unpack("<I", _read(file, chunks[b"fmt "][0] + 8, 4))[0] if b"fmt " in chunks else 0
    data = _Data(begin, declared, rate)
    _check_shorter(data, size, name)
    _check_longer(data, _end_of_chunks(file, size, begin + declared + declared % 2, "<"), size, name)
    return file


def _check_aiff(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """AIFF and AIFF-C."""
    if _read(file, 8, 4)[:3] != b"AIF":
        return file
    chunks = {kind: (begin, length) for kind, begin, length in _chunks(file, size, ">")}
    if b"SSND" not in chunks or b"COMM" not in chunks:
        return file
    begin, length = chunks[b"SSND"]
    channels, frames, bits = struct.unpack(">HIH", _read(file, chunks[b"COMM"][0], 8))
    frame = channels * ((bits + 7) // 8)
    rate = frame * 16_000
    declared = length - 8  # its offset and block size come first
    _check_shorter(_Data(begin + 8, declared, rate), size, name)
    is_raw = _read(file, 8, 4) == b"AIFF"
    if is_raw and abs(frames * frame - declared) > tolerance(declared, rate):
        raise AudioError(
            f"{name} declares {frames} samples in one place of its header and {declared // max(1, frame)} in another: "
            f"it is damaged, {_RESTORE}",
            Reason.SHORTER if frames * frame > declared else Reason.LONGER,
        )
    end = begin + length + length % 2
    _check_longer(_Data(begin, length, rate), _end_of_chunks(file, size, end, ">"), size, name)
    return file


def _chunks(file: BinaryIO, size: int, order: str, position: int = 12) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and length of the chunks of a RIFF or AIFF file, up to one that reaches beyond its end."""
    while position + 8 <= size:
        kind, length = struct.unpack(f"{order}4sI", _read(file, position, 8))
        yield kind, position + 8, length
        position += 8 + length + length % 2


def _end_of_chunks(file: BinaryIO, size: int, position: int, order: str) -> int:
    """Where the chunks after the samples end, and bytes begin that belong to none."""
    for kind, begin, length in _chunks(file, size, order, position):
        if not re.fullmatch(rb"[ -~]{4}", kind) or begin + length > size:
            break
        position = begin + length + length % 2
    return position


def _check_w64(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """Sony's: kinds of 16 bytes, sizes of 8 that count themselves and the kind."""
    position, rate = 40, 0
    while position + 24 <= size:
        kind, length = struct.unpack("<16sQ", _read(file, position, 24))
        if kind[:4] == b"fmt ":
            rate = struct.unpack("<I", _read(file, position + 32, 4))[0]
        if kind[:4] == b"data":
            _check_shorter(_Data(position + 24, max(0, length - 24), rate), size, name)
            break
        position += max(24, length + -length % 8)
    return file


def _check_au(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """Sun's and NeXT's, big-endian."""
    begin, declared = struct.unpack(">II", _read(file, 4, 8))
    if declared < _PLACEHOLDER:
        data = _Data(begin, declared, 32_000)
        _check_shorter(data, size, name)
        _check_longer(data, begin + declared, size, name)
    return file


def _check_nist(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """SPHERE, whose header is text. Compressed samples are left to libsndfile, which refuses them."""
    text = _read(file, 0, 1024)
    fields = {key: int(value) for key, value in re.findall(rb"(\w+) -i (\d+)", text)}
    begin = int(text[8:16].strip() or 0) if text[8:16].strip().isdigit() else 0
    counts = [fields.get(key, 0) for key in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    if begin and all(counts) and b"shorten" not in text and b"wavpack" not in text:
        frame = counts[1] * counts[2]
        data = _Data(begin, counts[0] * frame, fields.get(b"sample_rate", 16_000) * frame)
        _check_shorter(data, size, name)
        _check_longer(data, begin + data.declared, size, name)
    return file


def _check_shorter(data: _Data, size: int, name: str) -> None:
    if data.declared > size - data.begin:
        raise AudioError(
            f"{name} holds {size - data.begin} of the {data.declared} bytes of samples that its header declares: "
            f"it is truncated, {_RESTORE}",
            Reason.SHORTER,
        )


def _check_longer(data: _Data, end: int, size: int, name: str) -> None:
    """Tags after the samples are short; samples that the header does not know of are not."""
    if size - end > max(4096, tolerance(data.declared, data.rate)):
        raise AudioError(
            f"{name} declares {data.declared} bytes of samples and holds {size - end} more: its header is wrong, and "
            "what follows would not be heard: convert it anew, or repair its header",
            Reason.LONGER,
        )


# --- streams --------------------------------------------------------------------------------------


def _check_ogg(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """The last page is marked, and is whole."""
    first = max(0, size - (1 << 17))  # a page has 65,307 bytes at most
    tail = _read(file, first, size - first)
    place = tail.rfind(b"OggS")
    page = tail[place:]
    is_whole = place >= 0 and len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    if not is_whole or not page[5] & 4:
        raise AudioError(f"{name} ends before its last page: it is truncated, {_RESTORE}", Reason.SHORTER)
    return file


class _Mp3Kind(NamedTuple):
    """Layer III: bits that all frames of a file share, and what the length of a frame follows from."""

    shared: int
    bitrates: tuple[int, ...]
    factor: int
    rate: int


_BITRATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_BITRATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_SHARED = 0xFFFE0C00  # sync, version, layer, sample rate


def check_mp3(file: BinaryIO, name: str) -> None:
    """Goes from frame to frame.

    Raises:
        AudioError: more than a tenth of a second, and more than 2 %, is no frame.
    """
    data = _mp3_audio(_read(file, 0, file.seek(0, io.SEEK_END)))
    kind = _mp3_kind(data)
    if kind is None:
        return
    position = skipped = frames = 0
    first_gap = -1
    while position < len(data):
        length = _mp3_frame(data, position, kind)
        if length:
            position, frames = position + length, frames + 1
            continue
        after = _next_mp3_frame(data, position, kind)
        if after < len(data) or frames:
            first_gap = position if first_gap < 0 else first_gap
        skipped += after - position
        position = after
    seconds = frames * kind.factor * 8 / kind.rate
    bytes_per_second = int((len(data) - skipped) / seconds) if seconds else 0
    if skipped > tolerance(len(data), bytes_per_second):
        raise AudioError(
            f"{name} has a hole: {skipped} of its {len(data)} bytes, the first at {first_gap}, are no MP3 frames; "
            f"it is damaged, {_RESTORE}",
            Reason.HOLE,
        )


def _mp3_audio(data: bytes) -> bytes:
    """Without the tags at begin and end: ID3, APE and padding."""
    begin = 0
    while data[begin : begin + 3] == b"ID3" and len(data) >= begin + 10:
        a, b, c, d = data[begin + 6 : begin + 10]
        begin += 10 + (a << 21 | b << 14 | c << 7 | d)
    end = len(data)
    if data[-128:-125] == b"TAG":
        end -= 128
    if data[max(0, end - 32) : end].startswith(b"APETAGEX"):
        length = int.from_bytes(data[end - 20 : end - 16], "little")
        end -= length + (32 if data[max(0, end - length - 32) : end - length].startswith(b"APETAGEX") else 0)
    return data[begin : max(begin, end)].strip(b"\0")


def _mp3_kind(data: bytes) -> _Mp3Kind | None:
    """Of the first frame; None if it is of another layer, or of no declared bitrate."""
    header = int.from_bytes(data[:4], "big")
    version, layer, bitrate, rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if len(data) < 4 or header >> 21 != 0x7FF or version == 1 or layer != 1 or rate == 3 or bitrate in (0, 15):
        return None
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return _Mp3Kind(header & _SHARED, _BITRATES_1 if version == 3 else _BITRATES_2, 144 if version == 3 else 72, hertz)


def _mp3_frame(data: bytes, position: int, kind: _Mp3Kind) -> int:
    """Length in bytes of the frame at a position; 0 if there is none, or not all of it."""
    header = int.from_bytes(data[position : position + 4], "big")
    bitrate = kind.bitrates[header >> 12 & 15]
    if header & _SHARED != kind.shared or not bitrate:
        return 0
    length = kind.factor * bitrate * 1000 // kind.rate + (header >> 9 & 1)
    return length if position + length <= len(data) else 0


def _next_mp3_frame(data: bytes, position: int, kind: _Mp3Kind) -> int:
    """Where a frame begins that another one, or the end, follows."""
    sync = kind.shared >> 24
    while (position := data.find(sync, position + 1)) >= 0:
        length = _mp3_frame(data, position, kind)
        if length and (position + length == len(data) or _mp3_frame(data, position + length, kind)):
            return position
    return len(data)


def mp3_has_length(file: BinaryIO) -> bool:
    """Whether an MP3 begins with a Xing, Info or VBRI header; libsndfile only guesses the length of others."""
    file.seek(0)
    tag = file.read(10)
    skipped = 0
    if tag[:3] == b"ID3" and len(tag) == 10:
        a, b, c, d = tag[6:]
        skipped = 10 + (a << 21 | b << 14 | c << 7 | d)
    first_frame = _read(file, skipped, 256)
    file.seek(0)
    return any(mark in first_frame for mark in (b"Xing", b"Info", b"VBRI"))


def _read(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


_CHECKS: tuple[tuple[bytes, Callable[[BinaryIO, int, str], BinaryIO]], ...] = (
    (b"RIFF", _check_riff),
    (b"RF64", _check_riff),
    (b"FORM", _check_aiff),
    (b"riff", _check_w64),
    (b".snd", _check_au),
    (b"NIST_1A", _check_nist),
    (b"OggS", _check_ogg),
)
