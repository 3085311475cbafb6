"""Audio that clients send, as waveforms. Only bytes of the request are read: no path and no URL is opened."""

from __future__ import annotations

import base64
import binascii
import io
import re
import tempfile

import numpy as np
import soundfile

from blspkd_fairseq.data.audio import AudioError, load_audio
from blspkd_fairseq.serving.errors import ApiError

_REMEDY = re.compile(r"[:,] (restore the file or )?leave it out$")  # for who has the file
_SAMPLES_PER_SECOND = 192_000  # of all channels: a small file of silence can be decoded to gigabytes


def decode_audio(content: bytes, max_seconds: float, param: str) -> np.ndarray:
    """Decodes a file, whatever its name or type says that it is.

    Args:
        content: of the file.
        max_seconds: longest audio.
        param: what the error is to blame.

    Returns:
        ``[samples]`` float32, mono, 16 kHz.

    Raises:
        ApiError: no audio, truncated, too long, or of too many samples.
    """
    _check_samples(content, max_seconds, param)
    with tempfile.NamedTemporaryFile(prefix="blspkd-") as file:
        file.write(content)
        file.flush()
        try:
            return load_audio(file.name, max_seconds=max_seconds)
        except AudioError as error:
            reason = _REMEDY.sub("", str(error).replace(file.name, "the audio"))
            raise ApiError(400, reason, "invalid_audio", param) from error


def decode_base64(data: str, max_seconds: float, param: str) -> np.ndarray:
    """:func:`decode_audio` of base64, as in a part ``input_audio``.

    Raises:
        ApiError: no base64 (such as a path or a URL), and as for :func:`decode_audio`.
    """
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"{param} must be the base64 of an audio file, no path and no URL", "invalid_audio", param
        ) from error
    return decode_audio(content, max_seconds, param)


def _check_samples(content: bytes, max_seconds: float, param: str) -> None:
    """Refuses a file whose header announces too many samples; what is no audio is refused by the decoder."""
    try:
        info = soundfile.info(io.BytesIO(content))
    except (soundfile.SoundFileError, OSError, ValueError):
        return
    frames = min(info.frames, max_seconds * info.samplerate)
    if frames * info.channels > max_seconds * _SAMPLES_PER_SECOND:
        reason = f"the audio has {info.channels} channels at {info.samplerate} Hz: send one at 16 kHz"
        raise ApiError(400, reason, "invalid_audio", param)
