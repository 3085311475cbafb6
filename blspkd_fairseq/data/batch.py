"""The plan of a batch, made on the CPU: where every token goes, so that the device only computes.

All sequences of a batch lie end to end in one *packed* order, without padding::

    [ speech of all rows | prefix | text of row 0 | text of row 1 | ... ]

Speech comes first, so that everything that concerns speech alone (Partial LoRA, the input KL) is a slice. The *prefix*
is what all rows begin with; it is there once, and every row attends to it. The teacher reads token ids in every place;
the student has speech embeddings in the places of the speech.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq.data.conversation import Segment, Speech


@dataclass(frozen=True)
class SpeechLengths:
    """How many embeddings the adapter makes of a piece of speech.

    Attributes:
        halvings: None: one for each token of its transcript (CFormer); else the frames, halved so often (CNN).
        samples_per_frame: of the encoder.
    """

    halvings: int | None = None
    samples_per_frame: int = 320

    def of(self, samples: int, tokens: int) -> int:
        """Embeddings of ``samples`` of sound whose transcript has ``tokens``."""
        if self.halvings is None:
            return tokens
        frames = max(1, -(-samples // self.samples_per_frame))
        for _ in range(self.halvings):
            frames = (frames + 1) // 2
        return frames


@dataclass(frozen=True)
class PlanRow:
    """One sequence: a conversation with speech in it, and the response that ends it.

    Attributes:
        segments: of the conversation, up to where the response begins.
        transcripts: ids of the transcript of each of the row's pieces of speech.
        samples: of each piece.
        response: ids.
        pieces: the numbers of the row's pieces in the batch.
        taught: ids that the teacher reads in place of each transcript; None: it reads the transcripts.
        alike: of each piece the places (of the transcript's ids, of the taught ids) up to which both say the same;
            None: all places where the teacher reads the transcript's ids, and else none.
    """

    segments: Sequence[Segment]
    transcripts: Sequence[Sequence[int]]
    samples: Sequence[int]
    response: Sequence[int]
    pieces: Sequence[int]
    taught: Sequence[Sequence[int]] | None = None
    alike: Sequence[Sequence[tuple[int, int]]] | None = None

    @property
    def read(self) -> Sequence[Sequence[int]]:
        """Ids that the teacher reads at each piece."""
        return self.transcripts if self.taught is None else self.taught

    @property
    def told_alike(self) -> Sequence[Sequence[tuple[int, int]]]:
        """Of each piece the places (of the transcript's ids, of those read) up to which both say the same."""
        if self.alike is not None:
            return self.alike
        both = zip(self.transcripts, self.read, strict=True)
        return [[(i, i) for i in range(len(said))] if list(said) == list(told) else [] for said, told in both]


@dataclass(frozen=True)
class Rows:
    """Rows of tokens that lie packed, and who attends to whom: each row to itself and to what all rows begin with.

    Attributes:
        lengths: ``[R]`` positions of each row, without the prefix.
        counts: the same, as Python numbers.
        prefix: positions of the prefix.
        order: ``[N]`` packed places in the order prefix, row 0, row 1, ...; None if they lie in that order.
        place: ``[N]`` the inverse permutation.
        causal: a position does not see what follows it.
    """

    lengths: Tensor
    counts: tuple[int, ...]
    prefix: int = 0
    order: Tensor | None = None
    place: Tensor | None = None
    causal: bool = True

    @property
    def total(self) -> int:
        """N positions, the prefix's included."""
        return self.prefix + sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts, default=0)

    @cached_property
    def row(self) -> Tensor:
        """``[N - prefix]`` the row of each position behind the prefix."""
        rows = torch.arange(len(self.counts), device=self.lengths.device)
        return rows.repeat_interleave(self.lengths, output_size=sum(self.counts))

    @cached_property
    def begins(self) -> Tensor:
        """``[R]`` where each row begins in row order, the prefix not counted."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def within(self) -> Tensor:
        """``[N - prefix]`` the place of each position in its own row."""
        return torch.arange(len(self.row), device=self.row.device) - self.begins[self.row]

    @cached_property
    def padded(self) -> Tensor:
        """``[R, longest]`` index in row order of each padded place, the prefix not counted; padding repeats some."""
        columns = torch.arange(self.longest, device=self.lengths.device)
        return (self.begins.unsqueeze(1) + columns).clamp(max=max(0, sum(self.counts) - 1))

    @cached_property
    def unpadded(self) -> Tensor:
        """``[N - prefix]`` place among the flattened padded rows."""
        return self.row * self.longest + self.within

    @cached_property
    def is_padding(self) -> Tensor:
        """``[R, longest]`` bool."""
        return torch.arange(self.longest, device=self.lengths.device) >= self.lengths.unsqueeze(1)


@dataclass(frozen=True)
class Layout:
    """The packed sequences of one reader.

    Attributes:
        ids: ``[N]`` token ids; at speech, those of the transcripts (the teacher's) or 0.
        positions: ``[N]`` of each token in its sequence.
        speech: how many of the first places are speech.
        source: ``[speech]`` where each speech embedding comes from among the flattened ``[pieces, longest]``.
        response: ``[M]`` places that predict the tokens of the responses.
        rows: who attends to whom.
    """

    ids: Tensor
    positions: Tensor
    speech: int
    source: Tensor
    response: Tensor
    rows: Rows


class Labels(NamedTuple):
    """What is compared, position by position.

    Attributes:
        rows: ``[N]`` the row of each position.
        targets: ``[N]`` the token that each stands for (input) or predicts (response).
        counts: ``[N]`` positions of the same row.
    """

    rows: Tensor
    targets: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Alike:
    """The speech positions at which student and teacher can be compared: both have been told the same.

    Attributes:
        student, teacher: ``[N]`` their places in either layout.
        labels: of the tokens that the teacher reads there.
    """

    student: Tensor
    teacher: Tensor
    labels: Labels


@dataclass(frozen=True)
class Batch:
    """Everything that a training step needs to know of its texts.

    Attributes:
        student, teacher: layouts; the same object when speech has as many embeddings as the teacher reads tokens.
        transcript: labels of the transcripts' tokens, which are the first places of the teacher's layout unless it
            reads something else.
        response: labels of the responses' tokens.
        ends: ``[E]`` which of the response's positions predict the end of a turn.
        piece_rows: ``[P]`` the row of each piece of speech.
        piece_counts: ``[P]`` pieces of the same row.
        piece_tokens: ``[P]`` tokens of each piece's transcript.
        pieces: embeddings of each piece.
        tokens: tokens of all transcripts.
        nrows: sequences; several of them may share pieces of speech (roll-outs).
        alike: where student and teacher are told the same; None: everywhere.
    """

    student: Layout
    teacher: Layout
    transcript: Labels
    response: Labels
    ends: Tensor
    piece_rows: Tensor
    piece_counts: Tensor
    piece_tokens: Tensor
    pieces: Rows
    tokens: int
    nrows: int
    alike: Alike | None = None

    def flatten(self) -> tuple[Tensor, FlatSpec]:
        """All tensors as one ``[K]`` int64, which reaches a device in a single copy, and how to take it apart."""
        tensors: list[Tensor] = []
        spec = _flatten(self, tensors, {})
        return torch.cat([tensor.reshape(-1) for tensor in tensors]), FlatSpec(spec, [len(t) for t in tensors])

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        if self.piece_rows.device == device:
            return self
        flat, spec = self.flatten()
        return spec.build(flat.to(device, non_blocking=True))


@dataclass(frozen=True)
class FlatSpec:
    """Takes apart what :meth:`Batch.flatten` joined."""

    spec: Any
    lengths: list[int]

    def build(self, flat: Tensor) -> Batch:
        """The batch, its tensors views of ``flat``."""
        batch: Batch = _unflatten(self.spec, flat.split(self.lengths), {})
        return batch


_BUILT = (Batch, Layout, Rows, Labels, Alike)


def _flatten(value: Any, tensors: list[Tensor], seen: dict[int, int]) -> Any:
    """Nested (class, fields), a tensor as its number; an object that stands twice is one object again later."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return ("tensor", len(tensors) - 1)
    if isinstance(value, _BUILT):
        if id(value) in seen:
            return ("again", seen[id(value)])
        seen[id(value)] = len(seen)
        names = value._fields if isinstance(value, Labels) else [field.name for field in fields(value)]
        return ("object", type(value), {name: _flatten(getattr(value, name), tensors, seen) for name in names})
    return ("plain", value)


def _unflatten(spec: Any, tensors: Sequence[Tensor], built: dict[int, Any]) -> Any:
    if spec[0] == "tensor":
        return tensors[spec[1]]
    if spec[0] == "again":
        return built[spec[1]]
    if spec[0] == "object":
        number = len(built)
        built[number] = None
        built[number] = spec[1](**{name: _unflatten(part, tensors, built) for name, part in spec[2].items()})
        return built[number]
    return spec[1]


def plan_batch(
    rows: Sequence[PlanRow],
    lengths: SpeechLengths | Sequence[int] = SpeechLengths(),
    with_response: bool = True,
    share_prefix: bool = True,
    end_of_turn: int | None = None,
) -> Batch:
    """Plans a batch.

    Args:
        rows: its sequences; a piece of speech that several rows name is the same piece.
        lengths: embeddings of each piece of speech: a rule, or the numbers themselves (one of each piece in the batch).
        with_response: otherwise the sequences end with the speech, unless there is none.
        share_prefix: what all rows begin with is there once.
        end_of_turn: the token that ends a turn.
    """
    transcripts: dict[int, Sequence[int]] = {}
    taught: dict[int, Sequence[int]] = {}
    samples: dict[int, int] = {}
    owner: dict[int, int] = {}
    for number, row in enumerate(rows):
        transcripts |= zip(row.pieces, row.transcripts, strict=True)
        taught |= zip(row.pieces, row.read, strict=True)
        samples |= zip(row.pieces, row.samples, strict=True)
        for piece in row.pieces:
            owner.setdefault(piece, number)
    pieces = range(len(transcripts))
    tokens = [len(transcripts[piece]) for piece in pieces]
    if isinstance(lengths, SpeechLengths):
        counts = [lengths.of(samples[piece], tokens[piece]) for piece in pieces]
    else:
        counts = [lengths[piece] for piece in pieces]
    written = [_Written(row, transcripts, with_response) for row in rows]
    prefix = common_prefix([row.opening for row in written]) if share_prefix else []
    longest = max(counts, default=0)
    reads = [len(taught[piece]) for piece in pieces]
    teacher = _layout(written, prefix, reads, max(reads, default=0), taught)
    student = teacher if counts == reads else _layout(written, prefix, counts, longest, None)
    spoken = [[token for piece, ids in row.parts if piece is not None for token in ids] for row in written]
    responses = [list(row.response) if with_response else [] for row in rows]
    answer = _labels(responses)
    ends = [i for i, token in enumerate(chain.from_iterable(responses)) if token == end_of_turn]
    piece_owner = [owner[piece] for piece in pieces]
    return Batch(
        student,
        teacher,
        _labels(spoken),
        answer,
        _int64(ends),
        _int64(piece_owner),
        _int64([piece_owner.count(row) for row in piece_owner]),
        _int64(tokens),
        Rows(_int64(counts), tuple(counts), causal=False),
        sum(tokens),
        len(rows),
        None if taught == transcripts else _alike(written, counts, taught, rows),
    )


def plan_from_text(
    text: Mapping[str, Tensor],
    samples: Sequence[int],
    lengths: SpeechLengths | Sequence[int] = SpeechLengths(),
    with_response: bool = True,
    share_prefix: bool = True,
) -> Batch:
    """A plan of ids that are padded segment by segment.

    Args:
        text: ``prefix`` [P]; ``before``, ``transcript``, ``after``, ``response`` as right-padded ``[B, N]`` with
            ``<name>_lengths`` [B]. With several responses to each piece of speech ``[B x m, N]``, those of a piece one
            after another.
        samples: of each piece.
        lengths, with_response, share_prefix: as for :func:`plan_batch`.
    """
    prefix = text["prefix"].tolist()
    parts = {
        name: [ids[: int(n)] for ids, n in zip(text[name].tolist(), text[f"{name}_lengths"].tolist(), strict=True)]
        for name in ("before", "transcript", "after", "response")
    }
    replies = max(1, len(parts["response"]) // max(1, len(samples)))
    rows = [
        PlanRow([[*prefix, *before], Speech(0), after], [transcript], [samples[i // replies]], response, [i // replies])
        for i, (before, transcript, after, response) in enumerate(zip(*parts.values(), strict=True))
    ]
    return plan_batch(rows, lengths, with_response, share_prefix)


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all rows begin with."""
    if not rows:
        return []
    first, last = min(map(list, rows)), max(map(list, rows))
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


class _Written:
    """A row's segments as they are read, without the text behind the speech when no response follows it."""

    def __init__(self, row: PlanRow, transcripts: Mapping[int, Sequence[int]], with_response: bool) -> None:
        segments = list(row.segments)
        self.response = list(row.response) if with_response else []
        if not self.response:
            while segments and not isinstance(segments[-1], Speech):
                segments.pop()
        self.parts: list[tuple[int | None, Sequence[int]]] = [
            (row.pieces[one.piece], transcripts[row.pieces[one.piece]]) if isinstance(one, Speech) else (None, one)
            for one in segments
        ]
        if self.response:
            self.parts.append((None, self.response))

    @property
    def opening(self) -> list[int]:
        """The text before the first speech; without speech, all but the token that predicts the response."""
        piece, ids = self.parts[0] if self.parts else (0, ())
        has_speech = any(number is not None for number, _ in self.parts)
        return [] if piece is not None else list(ids if has_speech else ids[:-1])


def _layout(
    rows: Sequence[_Written],
    prefix: list[int],
    counts: Sequence[int],
    longest: int,
    transcripts: Mapping[int, Sequence[int]] | None,
) -> Layout:
    """Packed order of rows whose pieces have ``counts`` embeddings, or are read as ``transcripts``."""
    speech_ids: list[Sequence[int]] = []
    speech_positions: list[np.ndarray] = []
    source: list[np.ndarray] = []
    text_ids: list[Sequence[int]] = [prefix]
    text_positions: list[np.ndarray] = [np.arange(len(prefix))]
    pattern: list[list[tuple[bool, int]]] = []  # of each row: (is speech, how many)
    for row in rows:
        start, pieces = len(prefix), []
        for index, (piece, ids) in enumerate(row.parts):
            if piece is None:
                ids = ids[len(prefix) :] if index == 0 else ids
                count = len(ids)
                text_ids.append(ids)
                text_positions.append(np.arange(start, start + count))
            else:
                count = counts[piece]
                speech_ids.append(transcripts[piece] if transcripts is not None else [0] * count)
                speech_positions.append(np.arange(start, start + count))
                source.append(piece * longest + np.arange(count))
            pieces.append((piece is not None, count))
            start += count
        pattern.append(pieces)
    speech = sum(map(len, speech_ids))
    order, lengths = _order(pattern, speech, len(prefix))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # The places that predict the response are those before its tokens, in row order.
    ends = np.cumsum(lengths) + len(prefix)
    answers = [len(row.response) for row in rows]
    predicting = [np.arange(end - n - 1, end - 1) for end, n in zip(ends, answers, strict=True)]
    response = order[np.concatenate([np.empty(0, np.int64), *predicting]).astype(np.int64)]
    return Layout(
        _int64(list(chain.from_iterable([*speech_ids, *text_ids]))),
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *speech_positions, *text_positions]).astype(np.int64)),
        speech,
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *source]).astype(np.int64)),
        torch.from_numpy(response),
        Rows(_int64(lengths), tuple(lengths), len(prefix), torch.from_numpy(order), torch.from_numpy(place)),
    )


def _alike(
    written: Sequence[_Written], counts: Sequence[int], taught: Mapping[int, Sequence[int]], rows: Sequence[PlanRow]
) -> Alike:
    """The places of the pieces up to which the teacher reads what is said; ``counts`` are the student's."""
    alike = {piece: places for row in rows for piece, places in zip(row.pieces, row.told_alike, strict=True)}
    student: list[int] = []
    teacher: list[int] = []
    spoken: list[list[int]] = []
    heard = read = 0
    for row in written:
        spoken.append([])
        for piece, _ in row.parts:
            if piece is None:
                continue
            for said, told in alike[piece]:
                student.append(heard + said)
                teacher.append(read + told)
                spoken[-1].append(taught[piece][told])
            heard += counts[piece]
            read += len(taught[piece])
    return Alike(_int64(student), _int64(teacher), _labels(spoken))


def _order(pattern: Sequence[Sequence[tuple[bool, int]]], speech: int, prefix: int) -> tuple[np.ndarray, list[int]]:
    """Packed places in row order, and the length of each row."""
    next_speech, next_text = 0, speech + prefix
    runs = [np.arange(speech, speech + prefix)]
    lengths = []
    for row in pattern:
        for is_speech, count in row:
            start = next_speech if is_speech else next_text
            runs.append(np.arange(start, start + count))
            if is_speech:
                next_speech += count
            else:
                next_text += count
        lengths.append(sum(count for _, count in row))
    return np.concatenate(runs).astype(np.int64), lengths


def _labels(rows: Sequence[Sequence[int]]) -> Labels:
    counts = [len(row) for row in rows]
    numbers = np.repeat(np.arange(len(rows)), counts)
    return Labels(
        torch.from_numpy(numbers.astype(np.int64)),
        _int64(list(chain.from_iterable(rows))),
        torch.from_numpy(np.repeat(np.array(counts, np.int64), counts)),
    )


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


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
