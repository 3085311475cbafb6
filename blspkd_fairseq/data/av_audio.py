"""M4A, AAC, WebM and what else libsndfile does not know, through PyAV, which is an extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, BinaryIO

import numpy as np

from blspkd_fairseq.data.audio_error import AudioError, Reason

INSTALL = "pip install 'blspkd-fairseq[recordings]'"
_SIGNATURES = (
    (4, b"ftyp", "MPEG-4 audio (M4A, MP4)"),
    (0, b"\x1aE\xdf\xa3", "WebM or Matroska audio"),
    (0, b"\xff\xf1", "AAC audio"),
    (0, b"\xff\xf9", "AAC audio"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "Windows Media audio"),
    (0, b"#!AMR", "AMR audio"),
)


def container_of(file: BinaryIO) -> str:
    """What a file is, if it needs PyAV; "" for anything else. Leaves the file at its begin."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    return next((name for place, mark, name in _SIGNATURES if head[place:].startswith(mark)), "")


@contextlib.contextmanager
def open_container(
    file: BinaryIO, name: str, container: str
) -> Iterator[tuple[int, float | None, Iterator[np.ndarray]]]:
    """Decodes the first audio stream.

    Args:
        file: at its begin.
        name, container: for messages; see :func:`container_of`.

    Yields:
        Its rate, the seconds that the file declares, if it does, and its samples in blocks ``[frames, channels]``
        float32.

    Raises:
        AudioError: PyAV is not installed, the file is damaged, or it has no audio.
    """
    try:
        import av
    except ImportError as error:
        raise AudioError(
            f"{name} is {container}, which needs PyAV: {INSTALL}, or convert it to FLAC ({error})"
        ) from error
    try:
        with av.open(file, mode="r") as opened:
            if not opened.streams.audio:
                raise AudioError(f"{name} is {container} without an audio stream: leave it out")
            stream = opened.streams.audio[0]
            blocks = _read_stream(opened, stream)
            first = list(islice(blocks, 1))  # some codecs say in it that the rate is another
            yield int(stream.codec_context.sample_rate), _declared_seconds(opened, stream), chain(first, blocks)
    except (av.error.FFmpegError, EOFError) as error:
        raise AudioError(
            f"{name} is {container} that cannot be decoded, so it is truncated or damaged: {error}", Reason.UNREADABLE
        ) from error


def _read_stream(opened: Any, stream: Any) -> Iterator[np.ndarray]:
    import av

    resampler = av.AudioResampler(format="fltp", layout=stream.codec_context.layout)
    for frame in opened.decode(stream):
        for converted in resampler.resample(frame):
            yield converted.to_ndarray().T
    with contextlib.suppress(EOFError, ValueError):  # nothing is left in it
        for rest in resampler.resample(None):
            yield rest.to_ndarray().T


def _declared_seconds(opened: Any, stream: Any) -> float | None:
    import av

    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if opened.format.name == "aac":  # raw AAC has no header: its length is a guess from the bitrate
        return None
    return None if opened.duration is None else float(opened.duration / av.time_base)
