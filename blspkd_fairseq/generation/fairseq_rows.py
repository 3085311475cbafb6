"""What fairseq-generate and fairseq-interactive answer, row by row.

A row that cannot be read is an error of its own and not the command's; one that has been answered is not read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq.data.audio import SAMPLE_RATE, AudioError, audio_identity, load_audio, warn_of_flaw
from blspkd_fairseq.data.batch import pad_ids
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.dataset import SpeechDataset, SpeechTextDataset, Utterance
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.generation.decoding import Instruction
from blspkd_fairseq.generation.references import check_scorer, reference_column
from blspkd_fairseq.generation.results import Asked


@dataclass(frozen=True)
class Readable:
    """The rows of a batch that are to be answered now.

    Attributes:
        all_places: numbers of all its rows.
        places: of those to be answered.
        waveforms: ``[P, S]`` fp32 at 16 kHz, their pieces of speech.
        lengths: ``[P]`` samples.
        prompts: the conversation of each.
    """

    all_places: list[int]
    places: list[int]
    waveforms: Tensor | None
    lengths: Tensor
    prompts: Sequence[Instruction]


# ---- fairseq-generate ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Absent:
    """A row without audio in its batch. Attributes: ``place`` in the manifest; ``reason``, or "" if it is answered."""

    place: int
    reason: str


class RowsToAnswer(SpeechTextDataset):
    """The rows of a manifest, or of one shard of it.

    Args:
        manifest, chat: as for :class:`SpeechTextDataset`.
        max_seconds: longest piece of speech.
        shard: its number and how many there are; it has every so-manieth row.
        scoring: fairseq's options of the scorer; None: answers are not scored.
        options: further ones of :class:`SpeechTextDataset`.

    Attributes:
        known: ids of rows that are answered.
        reference: the column that answers are scored against; "" for none.
    """

    def __init__(
        self,
        manifest: Manifest,
        chat: ChatFormat,
        max_seconds: float,
        shard: tuple[int, int] = (0, 1),
        scoring: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(manifest, chat, max_seconds=float("inf"), **options)
        self.max_seconds = max_seconds  # only now: a row that is longer is refused when it is read, and no other is
        self.shard = shard
        self.reference = "tgt_text" if "tgt_text" in manifest.columns else ""
        if scoring is not None and len(manifest):
            self.reference = reference_column(manifest, self.prompt, getattr(scoring, "_name", ""))
            check_scorer(manifest, self.reference, scoring)
        self.known: frozenset[str] = frozenset()
        self._failures: dict[int, str] = {}  # of batches that have come

    def __getitem__(self, index: int) -> Utterance | Absent:  # type: ignore[override]
        place = int(index)
        row = self.manifest[place]
        if row["id"] in self.known:
            return Absent(place, "")
        try:
            utterance = self._read(place, row)
        except (ValueError, OSError) as error:  # of the audio, the texts, the prompt or the conversation
            return Absent(place, str(error))
        for waveform in utterance.waveforms:
            warn_of_flaw(waveform.numpy(), self.manifest.location(place))
        return utterance

    def collater(self, samples: Sequence[Utterance | Absent]) -> dict[str, Any]:  # type: ignore[override]
        """A batch of all rows.

        Returns:
            ``id`` [B] and ``target`` [B, N] (None without a reference) of all rows; ``readable``, the batch of
            :class:`SpeechTextDataset` of those that are to be answered, or None; ``absent``, the others. ``net_input``
            is empty: fairseq-generate takes each line of what is in it for a row.
        """
        utterances = [sample for sample in samples if isinstance(sample, Utterance)]
        places = [sample.place for sample in samples]
        return {
            "id": torch.tensor(places, dtype=torch.long),
            "net_input": {},
            "readable": super().collater(utterances) if utterances else None,
            "absent": [sample for sample in samples if isinstance(sample, Absent)],
            "target": pad_ids([self._target(place) for place in places], -1) if self.reference else None,
            "nsentences": len(samples),
        }

    def _target(self, place: int) -> list[int]:
        try:
            return self.chat.encode_text(self.manifest[place][self.reference])
        except ValueError:  # is why the row is absent
            return []

    def ordered_indices(self) -> np.ndarray:
        order = super().ordered_indices()
        return order[order % self.shard[1] == self.shard[0]]

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> Any:
        """Rows that are too long to be heard, or that are several pieces, fit no limit: they are batches of one."""
        limit = max(max_tokens or 0, self.max_seconds * SAMPLE_RATE)
        is_long = self.manifest.n_frames[indices] > limit
        if not is_long.any():
            return super().batch_by_size(indices, max_tokens, max_sentences)
        rest = indices[~is_long]
        batches = list(super().batch_by_size(rest, max_tokens, max_sentences)) if len(rest) else []
        return [[place] for place in indices[is_long]] + batches

    # ---- what the generator asks -------------------------------------------------------------------------------

    def readable(self, sample: dict[str, Any]) -> Readable:
        """The rows of a collated batch that are to be answered."""
        self._failures |= {absent.place: absent.reason for absent in sample["absent"] if absent.reason}
        everything, batch = sample["id"].tolist(), sample["readable"]
        if batch is None:
            return Readable(everything, [], None, torch.zeros(0, dtype=torch.long), [])
        inputs = batch["net_input"]
        prompts = [row.segments for row in batch["plan_rows"]]
        return Readable(everything, batch["id"].tolist(), inputs["src_tokens"], inputs["src_lengths"], prompts)

    def id(self, place: int) -> str:
        return str(self.manifest[place]["id"])

    def failure(self, place: int) -> str:
        """Why a row could not be read, or ""."""
        return self._failures.get(place, "")

    def fail(self, place: int, reason: str) -> None:
        """It was read, and cannot be answered."""
        self._failures[place] = reason

    def asked(self, place: int) -> Asked:
        """A readable row as it is answered."""
        row = self.manifest[place]
        audio = [audio_identity(p.audio, self._root(p.audio)) for p in self._conversation(row)[1]]
        return Asked(row["id"], "\n".join(audio), {**self.cells(place), "conversation": row.get("conversation", "")})

    def cells(self, place: int) -> dict[str, str]:
        """What the JSON lines say of a row besides its answer."""
        row = self.manifest[place]
        cells = {"speaker": row.get("speaker", ""), "prompt": self._shown_prompt(row)}
        return cells | {"transcript": row.get("src_text", ""), "reference": row.get("tgt_text", "")}

    def _shown_prompt(self, row: dict[str, str]) -> str:
        try:
            return self._conversation(row)[2]
        except ValueError:  # what is wrong with it stands in the place of an answer
            return row.get("prompt", "")

    def records(self) -> list[tuple[str, dict[str, str]]]:
        """Id and cells of all rows of the shard, in the order of the manifest."""
        return [(self.id(place), self.cells(place)) for place in range(self.shard[0], len(self), self.shard[1])]


# ---- fairseq-interactive -------------------------------------------------------------------------------------------


class LinesToAnswer:
    """What fairseq-interactive is given: audio files, one a line, all under one prompt.

    Args:
        prompt: text with its ``{speech}`` slot.
        audio_root: folder that holds all audio; None: paths are taken as they are.
        max_seconds: longest utterance.
        max_samples: what --max-tokens allows; None: anything.

    Attributes:
        known: ids of lines that are answered; a line's id is its number, from 0.
    """

    def __init__(self, prompt: str, audio_root: Path | None, max_seconds: float, max_samples: int | None) -> None:
        self.prompt = prompt
        self.audio_root = audio_root
        self.max_seconds = max_seconds
        self.max_samples = max_samples
        self.known: frozenset[str] = frozenset()
        self._lines: list[str] = []
        self._failures: dict[int, str] = {}

    def read(self, lines: Sequence[str]) -> list[Tensor]:
        """The waveforms of the next lines; of one that is answered or cannot be read, one without a sample."""
        return [self._read(line.strip()) for line in lines]

    def _read(self, line: str) -> Tensor:
        number = len(self._lines)
        self._lines.append(line)
        if self.id(number) in self.known:
            return torch.zeros(0)
        try:
            waveform = load_audio(line, self.audio_root, max_seconds=self.max_seconds)
            if self.max_samples and len(waveform) > self.max_samples:
                raise AudioError(
                    f"{line} has {len(waveform)} samples and --max-tokens, which counts them, is {self.max_samples}"
                )
        except AudioError as error:
            self._failures[number] = str(error)
            return torch.zeros(0)
        warn_of_flaw(waveform, line)
        return torch.from_numpy(waveform)

    def dataset(self, waveforms: Sequence[Tensor], lengths: Sequence[int]) -> SpeechDataset:
        """What :meth:`read` returned last, for fairseq to batch."""
        return _NumberedSpeech(waveforms, lengths, len(self._lines) - len(waveforms))

    def readable(self, sample: dict[str, Any]) -> Readable:
        """The lines of a batch that are to be answered."""
        inputs = sample["net_input"]
        numbers, lengths = inputs["src_lengths"].unbind(1)
        chosen = lengths.nonzero().flatten()
        prompts = [self.prompt] * len(chosen)
        waveforms = inputs["src_tokens"][chosen]
        return Readable(numbers.tolist(), numbers[chosen].tolist(), waveforms, lengths[chosen], prompts)

    def id(self, place: int) -> str:
        return str(place)

    def failure(self, place: int) -> str:
        """Why a line could not be read, or ""."""
        return self._failures.get(place, "")

    def fail(self, place: int, reason: str) -> None:
        """It was read, and cannot be answered."""
        self._failures[place] = reason

    def asked(self, place: int) -> Asked:
        """A readable line as it is answered."""
        return Asked(self.id(place), audio_identity(self._lines[place], self.audio_root), self.cells(place))

    def cells(self, place: int) -> dict[str, str]:
        """What the JSON lines say of a line besides its answer."""
        return {"audio": self._lines[place], "prompt": self.prompt}

    def records(self) -> list[tuple[str, dict[str, str]]]:
        """Id and cells of all lines so far."""
        return [(self.id(number), self.cells(number)) for number in range(len(self._lines))]


class _NumberedSpeech(SpeechDataset):
    """``src_lengths`` [B, 2]: fairseq-interactive hands on nothing else that could say which lines these are."""

    def __init__(self, waveforms: Sequence[Tensor], lengths: Sequence[int], first: int) -> None:
        super().__init__(waveforms, lengths)
        self.first = first

    def collater(self, samples: Sequence[tuple[int, Tensor]]) -> dict[str, Any]:
        batch = super().collater(samples)
        inputs = batch["net_input"]
        inputs["src_lengths"] = torch.stack([batch["id"] + self.first, inputs["src_lengths"]], 1)
        return batch
