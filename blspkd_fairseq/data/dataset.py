"""A manifest as a fairseq data set: audio and the token ids of the sequences around it."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq import compat

compat.require_fairseq()  # one sentence instead of a missing module

from fairseq.data import FairseqDataset  # noqa: E402

from blspkd_fairseq.data.audio import SAMPLE_RATE, AudioError, load_audio  # noqa: E402
from blspkd_fairseq.data.chat import ChatFormat  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, ManifestError, response_is_cut  # noqa: E402
from blspkd_fairseq.data.prompts import resolve_prompt  # noqa: E402

logger = logging.getLogger(__name__)

# What fairseq-generate takes when neither --max-tokens nor --batch-size is given is meant for text: .75 s of samples.
_FAIRSEQ_MAX_TOKENS = 12_000
_MAX_TOKENS = 120 * SAMPLE_RATE
# More tokens than Whisper has frames; people speak two to six a second.
_ANY_TOKENS, _TOKENS_PER_SECOND = 64, 50


class Utterance(NamedTuple):
    """One row, ready to be batched.

    Attributes:
        place: its index in the manifest.
        row: its cells.
        waveform: ``[S]`` fp32 at 16 kHz.
        before, after: ids of the prompt around the speech.
        transcript: ids of ``src_text``.
        response: ids of ``tgt_text``, with the end of turn unless the response was cut.
        prompt: the instruction as text, with its ``{speech}`` slot.
    """

    place: int
    row: dict[str, str]
    waveform: Tensor
    before: list[int]
    transcript: list[int]
    after: list[int]
    response: list[int]
    prompt: str


class SpeechTextDataset(FairseqDataset):
    """Speech, transcript and response of every row of a manifest.

    Args:
        manifest: its rows; columns ``prompt``, ``src_lang`` and ``tgt_lang`` are used where present, and ``cut`` = 1
            says that the length limit ended the response, so that no end of turn follows it.
        chat: chat format of the LLM.
        prompt: instruction of rows without one: a name or a text (see :mod:`blspkd_fairseq.data.prompts`).
        audio_root: folder that holds all audio; default: relative paths start at the manifest, absolute ones anywhere.
        max_seconds: rows that are longer are an error.
        shuffle: train in a new random order every epoch; batches hold utterances of similar length.
        skip_bad_audio: leave out rows whose audio is too long, missing, unreadable or of another text.
    """

    def __init__(
        self,
        manifest: Manifest,
        chat: ChatFormat,
        prompt: str = "continue",
        audio_root: Path | None = None,
        max_seconds: float = 30.0,
        shuffle: bool = False,
        skip_bad_audio: bool = False,
    ) -> None:
        self.manifest = manifest
        self.chat = chat
        self.prompt = prompt
        self.audio_root = audio_root
        self.max_seconds = max_seconds
        self.shuffle = shuffle
        self.skip_bad_audio = skip_bad_audio
        too_long = np.flatnonzero(manifest.n_frames > max_seconds * SAMPLE_RATE)
        if len(too_long) and not skip_bad_audio:
            first = int(too_long[0])
            raise ManifestError(
                f"{manifest.location(first)}: {manifest.n_frames[first] / SAMPLE_RATE:.1f} s of audio are longer than "
                f"{max_seconds:g} s, as are {len(too_long) - 1} more rows: cut them into segments, or leave them out "
                "of training with --skip-bad-audio"
            )
        if len(too_long):
            logger.warning(f"{manifest.path}: {len(too_long)} rows longer than {max_seconds:g} s are left out")
        # Keys of utterances differ between manifests: an epoch may be a slice of the data.
        self._first_key = zlib.crc32(str(manifest.path.resolve()).encode()) << 32
        self._too_long = frozenset(too_long.tolist())
        if len(manifest):
            self._prompt(manifest[0])  # an unknown prompt is said now and not by a worker

    def _prompt(self, row: Mapping[str, str]) -> str:
        name = row.get("prompt") or self.prompt
        return resolve_prompt(name, row.get("src_lang", ""), row.get("tgt_lang", ""))

    def _root(self, audio: str) -> Path | None:
        """Absolute paths are taken as they are, unless an audio root confines them."""
        if self.audio_root is None and Path(audio).is_absolute():
            return None
        return self.audio_root or self.manifest.path.parent

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Utterance | None:
        index = int(index)  # fairseq's are numpy's, which overflow
        row = self.manifest[index]
        try:
            root = self._root(row["audio"])
            samples = load_audio(row["audio"], root, int(self.manifest.n_frames[index]), self.max_seconds)
        except AudioError as error:
            message = f"{self.manifest.location(index)}: {error}"
            if not self.skip_bad_audio:
                raise AudioError(message) from error
            logger.warning(f"left out: {message}")
            return None
        try:
            prompt, is_cut = self._prompt(row), response_is_cut(row)
        except ValueError as error:
            raise ManifestError(f"{self.manifest.location(index)}: {error}") from error
        before, after = self.chat.prompt_ids(prompt)
        response = row.get("tgt_text", "")
        transcript = self.chat.encode_text(row.get("src_text", ""))
        if len(transcript) > max(_ANY_TOKENS, _TOKENS_PER_SECOND * len(samples) / SAMPLE_RATE):
            message = (
                f"{self.manifest.location(index)}: {len(transcript)} tokens of transcript for "
                f"{len(samples) / SAMPLE_RATE:.1f} s of audio: it is not the text of this audio, or lacks its end"
            )
            if not self.skip_bad_audio:
                raise ManifestError(message)
            logger.warning(f"left out: {message}")
            return None
        return Utterance(
            index,
            row,
            torch.from_numpy(samples),
            list(before),
            transcript,
            list(after),
            self.chat.response_ids(response, finished=not is_cut) if response else [],
            prompt,
        )

    def collater(self, samples: Sequence[Utterance | None]) -> dict[str, Any]:
        """Pads and stacks.

        Returns:
            ``id`` [B], ``net_input`` (the arguments of the model), ``target`` (ids of ``tgt_text`` [B, N] padded with
            -1, or None without that column), ``nsentences``, ``ntokens``, ``prompts`` and ``rows`` (lists). If every
            row was left out, one that can be read stands in for them, and ``left_out`` is True.

        Raises:
            AudioError: no row of the manifest can be read.
        """
        utterances = [sample for sample in samples if sample is not None]
        left_out = not utterances and len(self.manifest) > 0
        if left_out:
            utterances = [self._first_readable()]
        lengths = torch.tensor([len(u.waveform) for u in utterances], dtype=torch.long)
        prefix = common_prefix([u.before for u in utterances])
        text: dict[str, Tensor] = {"prefix": torch.tensor(prefix, dtype=torch.long)}
        segments = {
            "before": [u.before[len(prefix) :] for u in utterances],
            "transcript": [u.transcript for u in utterances],
            "after": [u.after for u in utterances],
            "response": [u.response for u in utterances],
        }
        for name, rows in segments.items():
            text[name], text[f"{name}_lengths"] = pad_ids(rows), torch.tensor([len(r) for r in rows], dtype=torch.long)
        has_target = "tgt_text" in self.manifest.columns
        targets = [self.chat.encode_text(u.row["tgt_text"]) for u in utterances] if has_target else []
        return {
            "id": torch.tensor([u.place for u in utterances], dtype=torch.long),
            "net_input": {
                "src_tokens": pad_waveforms([u.waveform for u in utterances]),
                "src_lengths": lengths,
                "text": text,
                "keys": [self._first_key + u.place for u in utterances],
            },
            "target": pad_ids(targets, -1) if has_target else None,
            "left_out": left_out,
            "nsentences": len(utterances),
            "ntokens": int(text["transcript_lengths"].sum() + text["response_lengths"].sum()),
            "prompts": [u.prompt for u in utterances],
            "rows": [u.row for u in utterances],
        }

    def _first_readable(self) -> Utterance:
        for index in range(len(self)):
            utterance = self[index]
            if utterance is not None:
                return utterance
        raise AudioError(f"{self.manifest.path}: every row was left out; the messages before this one say why")

    def num_tokens(self, index: int) -> int:
        return int(self.manifest.n_frames[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.manifest.n_frames[indices]

    def size(self, index: int) -> int:
        return int(self.manifest.n_frames[index])

    @property
    def sizes(self) -> np.ndarray:
        return self.manifest.n_frames

    def ordered_indices(self) -> np.ndarray:
        """By length, longest first, so that batches are even and memory runs out at once or never."""
        order = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))
        order = order[np.argsort(-self.manifest.n_frames[order], kind="stable")]
        return order[~np.isin(order, list(self._too_long))] if self._too_long else order

    def batch_by_size(self, indices: np.ndarray, **options: Any) -> Any:
        """One empty batch stands for a manifest without rows, so that generation of nothing ends well."""
        if len(indices) == 0 and not self.shuffle:
            return [[]]
        # fairseq drops what exceeds a multiple of this (8 by default); every row counts here, in every split.
        options["required_batch_size_multiple"] = 1
        if options.get("max_tokens") == _FAIRSEQ_MAX_TOKENS and options.get("max_sentences") is None:
            options["max_tokens"] = _MAX_TOKENS
        return super().batch_by_size(indices, **options)


class SpeechDataset(FairseqDataset):
    """Waveforms alone, in the order given (fairseq-interactive)."""

    def __init__(self, waveforms: Sequence[Tensor], lengths: Sequence[int]) -> None:
        self.waveforms = waveforms
        self.sizes = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.waveforms)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.waveforms[index]

    def collater(self, samples: Sequence[tuple[int, Tensor]]) -> dict[str, Any]:
        waveforms = [waveform for _, waveform in samples]
        lengths = torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.long)
        return {
            "id": torch.tensor([index for index, _ in samples], dtype=torch.long),
            "net_input": {"src_tokens": pad_waveforms(waveforms), "src_lengths": lengths},
            "nsentences": len(samples),
        }

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        return int(self.sizes[index])


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The ids that all rows begin with."""
    if not rows:
        return []
    first, last = min(rows), max(rows)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return list(first[:length])


def pad_ids(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """``[B, N]`` int64, padded on the right."""
    width = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.long)
    return padded


def pad_waveforms(waveforms: Sequence[Tensor]) -> Tensor:
    """``[B, S]`` fp32, zeros behind each utterance."""
    if not waveforms:
        return torch.zeros(0, 0)
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
