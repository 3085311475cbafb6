"""The frozen encoder's frames on disk, so that each piece of speech is heard once: by any rank, in any run.

A folder holds the frames of one encoder. Every process that writes has two files of its own there, which only grow::

    NAME.frames   frames of one piece after another, bf16
    NAME.index    a record of fixed size for each: what is where, and checksums

Data is written before its record, so that a writer that is killed leaves a whole entry or none. Readers map the files
and look for what others have added since. Frames are the same in the epoch that writes them as in all later ones.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_RECORD = np.dtype(
    [("key", "V16"), ("begin", "<u8"), ("frames", "<u4"), ("samples", "<u4"), ("data", "<u4"), ("check", "<u4")]
)
_REFRESH_SECONDS = 1.0  # a miss looks at the folder no more often than this
_RECORD_BITS = 40
_BYTES = 2  # of a bf16 number
_REMEDY = "make room or choose another --feature-store, or leave out --cache-encoder-features"

Encode = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Waveforms ``[P, S]``, their lengths ``[P]`` and the same as Python numbers to frames ``[N, D]``, end to end."""


class FeatureStoreError(ValueError):
    """A store that cannot be written; the message names the folder and the remedy."""


class Stored(NamedTuple):
    """The frames of one piece of speech.

    Attributes:
        frames: ``[T, D]`` bf16, as the uint16 of its bits; a view of the file.
        samples: of its sound, at 16 kHz.
    """

    frames: np.ndarray
    samples: int


def entry_key(identity: str, n_frames: int) -> bytes:
    """The key of a piece of speech.

    Args:
        identity: of its bytes (:func:`blspkd_fairseq.data.audio.audio_identity`).
        n_frames: what its row declares: another number is checked against the sound anew.
    """
    return hashlib.blake2b(f"{identity}\0{n_frames}".encode(), digest_size=16).digest()


class FeatureStore:
    """Frames by key. In memory it keeps where they are, about 150 bytes a piece.

    Args:
        folder: holds the stores of all encoders; made if it does not exist.
        encoder: what tells this encoder from all others (:func:`blspkd_fairseq.modules.fingerprint.identity`).
        width: D.

    Raises:
        FeatureStoreError: the folder cannot be made.
    """

    def __init__(self, folder: Path, encoder: str, width: int) -> None:
        self._arguments = folder, encoder, width
        self.folder, self.width = folder / f"{width}-{encoder}", width
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        # Another thread may look for entries while this one adds some: what either does, it may do twice.
        self._places: dict[bytes, int] = {}  # the number of the file and that of the record
        self._copies: dict[bytes, list[int]] = {}  # further places of what was written twice
        self._names: dict[int, str] = {}
        self._read: dict[str, tuple[int, int]] = {}  # number of each file, records read of it
        self._numbers = itertools.count()
        self._maps: dict[str, np.ndarray] = {}
        self._damaged: set[str] = set()
        self._refreshed = -_REFRESH_SECONDS
        self._writer: _Writer | None = None
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process that is not forked opens the folder itself."""
        return type(self), self._arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureStore:
        return self

    def __len__(self) -> int:
        return len(self._places)

    @property
    def frame_size(self) -> int:
        """Bytes of a frame."""
        return _BYTES * self.width

    @property
    def size(self) -> int:
        """Bytes of all frames in the folder."""
        return sum(path.stat().st_size for path in self.folder.glob("*.frames"))

    # ---- reading -----------------------------------------------------------------------------------------------

    def find(self, key: bytes) -> Stored | None:
        """The frames of a piece, if they are there and undamaged."""
        if key not in self._places and time.monotonic() - self._refreshed >= _REFRESH_SECONDS:
            self.refresh()
        place = self._places.get(key)
        if place is None:
            return None
        name, number = self._names[place >> _RECORD_BITS], place & ((1 << _RECORD_BITS) - 1)
        try:
            record = self._mapped(f"{name}.index", _RECORD, number + 1)[number]
            begin, end = int(record["begin"]), int(record["begin"]) + int(record["frames"]) * self.width
            bits = self._mapped(f"{name}.frames", np.dtype("<u2"), end)[begin:end]
            if zlib.crc32(bits.data) != record["data"]:
                raise ValueError("wrong checksum")
        except (OSError, ValueError) as error:
            self._forget(key, name, error)
            return self.find(key) if key in self._places else None
        return Stored(bits.reshape(-1, self.width), int(record["samples"]))

    def refresh(self) -> None:
        """Finds what other processes have added."""
        self._refreshed = time.monotonic()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".index"):
                    self._read_index(entry.name.removesuffix(".index"), entry.stat().st_size // _RECORD.itemsize)

    def _read_index(self, name: str, count: int) -> None:
        """Takes in the records of a file up to ``count``; half a record at its end was never finished."""
        file, read = self._read.get(name) or (next(self._numbers), 0)
        if count <= read:
            return
        self._names[file] = name
        with open(self.folder / f"{name}.index", "rb") as index:
            index.seek(read * _RECORD.itemsize)
            content = index.read((count - read) * _RECORD.itemsize)
        for number in range(len(content) // _RECORD.itemsize):
            record = content[number * _RECORD.itemsize : (number + 1) * _RECORD.itemsize]
            if record[-4:] == _checksum(record[:-4]):
                key, place = record[:16], file << _RECORD_BITS | (read + number)
                if self._places.setdefault(key, place) != place:
                    self._copies.setdefault(key, []).append(place)
        self._read[name] = file, read + len(content) // _RECORD.itemsize

    def _mapped(self, name: str, dtype: np.dtype[Any], end: int) -> np.ndarray:
        """The numbers of a file, which has grown if there are fewer than ``end`` of them."""
        numbers = self._maps.get(name)
        if numbers is None or len(numbers) < end:
            path = self.folder / name
            count = path.stat().st_size // dtype.itemsize
            if count < end:
                raise ValueError("it is cut off")
            numbers = self._maps[name] = np.memmap(path, dtype, "r", shape=(count,))
        return numbers

    def _forget(self, key: bytes, name: str, error: Exception) -> None:
        self._places.pop(key, None)
        if copies := self._copies.get(key):
            self._places[key] = copies.pop()
        if name not in self._damaged:
            self._damaged.add(name)
            logger.warning(
                f"{self.folder / name}.frames is damaged ({error}), so that speech in it is heard again: "
                f"delete it and its .index when no training runs"
            )

    # ---- writing -----------------------------------------------------------------------------------------------

    def add(self, keys: Sequence[bytes], samples: Sequence[int], counts: Sequence[int], frames: Tensor) -> None:
        """Keeps the frames of pieces that are not there yet.

        Args:
            keys: of each piece.
            samples: of its sound.
            counts: its frames.
            frames: ``[N, D]`` bf16 on the CPU, end to end.

        Raises:
            FeatureStoreError: they cannot be written (disk full); what was there before is kept.
        """
        parts = np.split(frames.contiguous().view(torch.int16).numpy().view("<u2"), np.cumsum(counts)[:-1])
        new = {key: i for i, key in enumerate(keys) if self.find(key) is None}
        try:
            self._writer = self._writer or _Writer(self.folder)
            written = self._writer.write([(key, samples[i], parts[i]) for key, i in new.items()])
            self._read_index(self._writer.name, written)
        except OSError as error:
            raise self._unwritable(error) from error

    def check_room(self, size: int) -> None:
        """Says how large the store will be when it has ``size`` bytes.

        Raises:
            FeatureStoreError: that does not fit, or the folder cannot be written.
        """
        there = self.size
        logger.info(
            f"--cache-encoder-features: the encoder's frames of this training data take {_shown(size)} in "
            f"{self.folder}, which holds {_shown(there)}"
        )
        if size <= there:
            return
        free = shutil.disk_usage(self.folder).free
        if size - there > free:
            raise FeatureStoreError(
                f"the encoder's frames take {_shown(size - there)} more in {self.folder}, where {_shown(free)} are "
                f"free: {_REMEDY}"
            )
        try:
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> FeatureStoreError:
        return FeatureStoreError(
            f"the encoder's frames cannot be written to {self.folder} ({error.strerror}): {_REMEDY}"
        )


class _Writer:
    """The two files of this process. Without buffers: what a failed write leaves in one would be written later."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._frames, self._index = (io.FileIO(folder / f"{self.name}.{end}", "xb") for end in ("frames", "index"))
        self._end, self._count = 0, 0

    def write(self, entries: Sequence[tuple[bytes, int, np.ndarray]]) -> int:
        """Appends entries of key, samples and frames; returns how many the file has now."""
        end, data, records = self._end, [], []
        for key, samples, frames in entries:
            data.append(frames.tobytes())
            record = np.array((key, end // _BYTES, len(frames), samples, zlib.crc32(data[-1]), 0), _RECORD)
            content = record.tobytes()[:-4]
            records.append(content + _checksum(content))
            end += len(data[-1])
        _append(self._frames, self._end, b"".join(data))
        _append(self._index, self._count * _RECORD.itemsize, b"".join(records))
        self._end, self._count = end, self._count + len(records)
        return self._count


def _append(file: io.FileIO, end: int, data: bytes) -> None:
    """Writes ``data`` at the ``end`` of the file, all of it or nothing."""
    rest = memoryview(data)
    file.seek(end)
    try:
        while rest:
            rest = rest[file.write(rest) :]  # a full disk takes a part first
    except OSError:
        file.truncate(end)
        raise


def _checksum(record: bytes) -> bytes:
    return zlib.crc32(record).to_bytes(4, "little")


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


# ---- batches -------------------------------------------------------------------------------------------------------


def join(stored: Sequence[Stored], width: int) -> Tensor:
    """Frames ``[N, D]`` bf16 of pieces, end to end."""
    bits = np.concatenate([np.empty((0, width), np.uint16), *(one.frames for one in stored)])
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def with_features(sample: dict[str, Any], encode: Encode, store: FeatureStore, per_frame: int) -> dict[str, Any]:
    """A collated batch whose speech is ``features`` and no waveforms: what is not stored is heard now, and kept.

    Args:
        sample: of a :class:`~blspkd_fairseq.data.dataset.SpeechTextDataset`, or one without ``stored``, which stays.
        encode: the encoder.
        store: where the frames are kept.
        per_frame: samples per frame.
    """
    if "stored" not in sample:
        return sample
    inputs, stored = sample["net_input"], sample["stored"]
    samples, missing = inputs["samples"], stored["missing"]
    frames: Tensor = stored["frames"]
    if missing:
        counts = [max(1, -(-one // per_frame)) for one in samples]
        lengths = inputs["src_lengths"][missing]
        heard = encode(inputs["src_tokens"], lengths, [samples[i] for i in missing]).to(torch.bfloat16)
        store.add(stored["keys"], [samples[i] for i in missing], [counts[i] for i in missing], heard.cpu())
        frames = _in_order(counts, set(missing), heard, frames)
    ready = {key: value for key, value in sample.items() if key != "stored"}
    return ready | {"net_input": inputs | {"features": frames, "src_tokens": None}}


def _in_order(counts: Sequence[int], new: set[int], heard: Tensor, stored: Tensor) -> Tensor:
    """Frames of all pieces, those of the ``new`` ones from ``heard``."""
    fresh = iter(heard.split([count for i, count in enumerate(counts) if i in new]))
    kept = iter(stored.split([count for i, count in enumerate(counts) if i not in new]))
    return torch.cat([next(fresh) if i in new else next(kept) for i in range(len(counts))])
