"""M4A, AAC, WebM and what else libsndfile does not know, through PyAV, which is an extra."""

from __future__ import annotations

import contextlib
import math
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


def decode_container(
    file: BinaryIO, name: str, container: str, max_seconds: float | None
) -> tuple[np.ndarray, int, float | None]:
    """Decodes the first audio stream.

    Args:
        file: at its begin.
        name, container: for messages; see :func:`container_of`.
        max_seconds: what is longer is not read on.

    Returns:
        Samples ``[frames, channels]`` float32, their rate, and the seconds that the file declares, if it does.

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
                raise AudioError(f"{name} is {container} without an audio stream: remove its row")
            stream = opened.streams.audio[0]
            samples = _read_stream(opened, stream, max_seconds)
            declared = _declared_seconds(opened, stream)
            return samples, int(stream.codec_context.sample_rate), declared
    except (av.error.FFmpegError, EOFError) as error:
        raise AudioError(
            f"{name} is {container} that cannot be decoded, so it is truncated or damaged: {error}", Reason.UNREADABLE
        ) from error


def _read_stream(opened: Any, stream: Any, max_seconds: float | None) -> np.ndarray:
    import av

    limit = math.inf if max_seconds is None else max_seconds * stream.codec_context.sample_rate
    resampler = av.AudioResampler(format="fltp", layout=stream.codec_context.layout)
    blocks: list[np.ndarray] = []
    count = 0
    for frame in opened.decode(stream):
        for converted in resampler.resample(frame):
            blocks.append(converted.to_ndarray().T)
            count += len(blocks[-1])
        if count > limit:
            break
    with contextlib.suppress(EOFError, ValueError):  # nothing is left in it
        blocks += [rest.to_ndarray().T for rest in resampler.resample(None)]
    return np.concatenate(blocks) if blocks else np.empty((0, 1), np.float32)


def _declared_seconds(opened: Any, stream: Any) -> float | None:
    import av

    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if opened.format.name == "aac":  # raw AAC has no header: its length is a guess from the bitrate
        return None
    return None if opened.duration is None else float(opened.duration / av.time_base)
