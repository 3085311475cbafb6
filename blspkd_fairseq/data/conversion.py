"""Audio of any kind to 16 kHz FLAC, in worker processes: what is cut, what is dropped, and why."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from blspkd_fairseq.data.audio import MAX_SECONDS, SAMPLE_RATE, AudioError, Flaw, Reason, find_flaw, load_audio
from blspkd_fairseq.data.corpora import Dropped, Entry
from blspkd_fairseq.files import write_whole

TOO_SHORT = "too short"
AUDIO_REASONS = (*Reason, TOO_SHORT, *Flaw)


class Limits(NamedTuple):
    """Which audio is taken.

    Attributes:
        min_seconds, max_seconds: shorter and longer utterances are dropped.
        keep_flawed: audio in which nothing, or little, can be heard is taken, too.
    """

    min_seconds: float = 0.1
    max_seconds: float = MAX_SECONDS
    keep_flawed: bool = False


class Task(NamedTuple):
    """What a worker does to one row; ``target`` is a file in the output, or None to have the bytes returned."""

    key: str
    entry: Entry
    source: str
    name: str
    target: str | None


class Result(NamedTuple):
    """The record of a row and, if they go into an archive, its FLAC bytes; or why it was dropped."""

    record: dict[str, Any]
    name: str
    flac: bytes = b""
    dropped: Dropped | None = None


def file_name(utterance: str) -> str:
    """A name for the file of an utterance, on any file system: its id, or what is left of it and a hash."""
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}", utterance):
        return utterance
    digest = hashlib.sha256(utterance.encode(errors="surrogatepass")).hexdigest()[:16]
    kept = re.sub(r"[^A-Za-z0-9_-]+", "_", utterance)[:80].strip("_-")
    return f"{kept or 'id'}-{digest}"


def do_job(tasks: Sequence[Task], root: Path, output: Path, limits: Limits) -> list[Result]:
    """Converts audio to 16 kHz FLAC. A file that holds several utterances is decoded once.

    Raises:
        OSError: the output cannot be written.
    """
    results = []
    decoded: tuple[Path, np.ndarray | Dropped] | None = None
    for task in tasks:
        entry = task.entry
        if entry.start is None and entry.end is None:
            audio = _load_whole(entry, root, limits)
        else:
            if decoded is None or decoded[0] != entry.audio:
                decoded = (entry.audio, _load(entry, root, None))
            audio = _cut(entry, decoded[1])
        results.append(_result(task, _checked(entry, audio, limits), output))
    return results


def _load_whole(entry: Entry, root: Path, limits: Limits) -> np.ndarray | Dropped:
    audio = _load(entry, root, limits.max_seconds)
    if isinstance(audio, Dropped) or entry.declared_seconds is None:
        return audio
    return _check_declared(entry, len(audio) / SAMPLE_RATE, entry.declared_seconds) or audio


def _check_declared(entry: Entry, seconds: float, declared: float) -> Dropped | None:
    """MP3 headers and resampling do a little to lengths."""
    if declared - seconds <= max(0.1, 0.02 * declared):
        return None
    return Dropped(entry.id, Reason.SHORTER, f"{seconds:.2f} s, the corpus declares {declared:.2f} s")


def _load(entry: Entry, root: Path, max_seconds: float | None) -> np.ndarray | Dropped:
    # Not resolved: links that lie in a corpus were put there by its owner, names in a list were not.
    path = Path(os.path.abspath(entry.audio))
    if not path.is_relative_to(os.path.abspath(root)):
        return Dropped(entry.id, Reason.OUTSIDE, f"{entry.audio} is not in {root}")
    if not os.path.isfile(path):  # which takes names that no file can have
        return Dropped(entry.id, Reason.MISSING, f"{path} does not exist")
    try:
        return load_audio(path, max_seconds=max_seconds)
    except AudioError as error:
        return Dropped(entry.id, error.reason, str(error))


def _cut(entry: Entry, audio: np.ndarray | Dropped) -> np.ndarray | Dropped:
    if isinstance(audio, Dropped):
        return audio._replace(id=entry.id)
    seconds = len(audio) / SAMPLE_RATE
    start, end = entry.start or 0.0, seconds if entry.end is None else entry.end
    if not (start >= 0 and math.isfinite(start) and math.isfinite(end)):
        return Dropped(entry.id, Reason.UNREADABLE, f"from {start} s to {end} s is no part of an audio file")
    if end <= start and entry.end is not None:
        return Dropped(entry.id, Reason.EMPTY, f"from {start} s to {end} s")
    # The segment, and not the whole file, must be there: others of a file cut short are still good.
    short = _check_declared(entry, seconds - start, end - start)
    if short or start >= seconds:
        return Dropped(entry.id, Reason.SHORTER, f"{entry.audio} ends at {seconds:.2f} s, the segment at {end:.2f} s")
    return audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


def _checked(entry: Entry, audio: np.ndarray | Dropped, limits: Limits) -> np.ndarray | Dropped:
    if isinstance(audio, Dropped):
        return audio
    seconds = len(audio) / SAMPLE_RATE
    if len(audio) == 0:
        return Dropped(entry.id, Reason.EMPTY, "no samples")
    if seconds < limits.min_seconds:
        return Dropped(entry.id, TOO_SHORT, f"{seconds:.3f} s")
    if seconds > limits.max_seconds:
        return Dropped(entry.id, Reason.TOO_LONG, f"{seconds:.2f} s")
    flaw = None if limits.keep_flawed else find_flaw(audio)
    return audio if flaw is None else Dropped(entry.id, flaw, "--keep-flawed keeps such audio")


def _result(task: Task, audio: np.ndarray | Dropped, output: Path) -> Result:
    record: dict[str, Any] = {"id": task.key, "source": task.source}
    if isinstance(audio, Dropped):
        return Result(record, task.name, dropped=audio)
    flac = encode_flac(audio)
    record["n_frames"] = len(audio)
    if task.target is None:
        return Result(record, task.name, flac)
    path = output / task.target
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, flac, durable=False)  # there are millions, and the validation reads each of them
    return Result({**record, "audio": task.target}, task.name)


def encode_flac(samples: np.ndarray) -> bytes:
    """Samples in [-1, 1] as 16-bit FLAC at 16 kHz; 16-bit sources come through unchanged."""
    integers = np.clip(np.rint(samples.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    # In memory: libsndfile hides why a file could not be written.
    file = io.BytesIO()
    soundfile.write(file, integers, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
