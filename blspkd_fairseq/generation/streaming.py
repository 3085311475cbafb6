"""Answers token by token, several at a time, to requests that come and go: :class:`StreamingDecoder`.

The interface, from the top down. One thread may drive a model at a time; everything here is called from that thread.

One conversation, in Python::

    for text in model.chat(messages, stream=True, max_new_tokens=64, temperature=0.7, seed=1):
        print(text, end="")

Several that share each step of the LLM (a server; continuous batching)::

    decoder = model.streaming_decoder()              # one for a model; keeps keys and values of earlier answers
    request = model.request(messages, Sampling(max_new_tokens=64, stop=("\\n",)))   # checks, decodes, no model runs
    row = decoder.add(request)                       # at any time; only queues
    while decoder.active:                            # rows that are waiting or answering
        for delta in decoder.step():                 # hears and reads some of what waits, one token for each row
            delta.row, delta.text                    # new text; "" while a character or a stop string is incomplete
            delta.finish                             # None, "stop", "length" or "error" (then see delta.error)
            delta.usage                              # with finish: tokens of the prompt, of the answer, reused ones
    decoder.cancel(row)                              # its place is free at once; no further delta

What a row gives does not depend on the rows beside it: each has its own generator, and what is padded is not seen. A
conversation that goes on from an earlier one reads only what is new: keys and values of the longest common beginning
are kept (``kept_bytes``), found by content, so that nobody has to name a session. A long request is heard and read in
portions between the steps of the others.

What was said, with times, of recordings of any length, is :meth:`BlspKd.transcripts`, whose formats are those of
:mod:`blspkd_fairseq.data.transcript` (``as_dict`` is OpenAI's ``verbose_json``). A server that lets transcriptions
share the steps asks ``model.request([{"role": "user", "content": [TEXT, AUDIO]}], ...)`` for each window by itself.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq import compat
from blspkd_fairseq.data.batch import pad_waveforms
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.conversation import Segment, Speech
from blspkd_fairseq.generation.decoding import check_context, context_of
from blspkd_fairseq.generation.hearing import hear, most_written, nearest_texts
from blspkd_fairseq.generation.kv_cache import (
    cache_bytes,
    can_cut,
    cut_to,
    give_room,
    has_plain_layers,
    join,
    keep_rows,
    take_row,
)
from blspkd_fairseq.generation.option_types import check_number, check_numbers
from blspkd_fairseq.generation.text_stream import AnswerStream, TextStream
from blspkd_fairseq.modules.partial_lora import ALL_POSITIONS, PositionMask, SpeechPlaces, speech_positions
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.whisper_encoder import SAMPLE_RATE

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn; greedy by default.

    Attributes:
        max_new_tokens: of the answer, its end of turn included.
        temperature: of the distribution; 0: the likeliest token.
        top_p, top_k: draw from the likeliest tokens of this total probability, of this number (0: all).
        seed: of this answer's own generator; None: another one each time.
        stop: the answer ends before the first of these strings.
        repeats: the answer is what is heard, and ends where more is written (:func:`most_written`).
        nearest: the answer is the tokens nearest to what is heard; the LLM is not asked.
        if_spoken: where there is speech, and no word among the tokens nearest to it, the answer is ""; the LLM is not
            asked.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repeats: bool = False
    nearest: bool = False
    if_spoken: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"the temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"sampling needs 0 < top_p <= 1 and top_k >= 0, got {self.top_p} and {self.top_k}")
        if self.seed is not None:
            check_number(self.seed, "seed", is_whole=True)
            if not -(2**63) <= self.seed < 2**63:
                raise ValueError(f"seed must have at most 63 bits, got {self.seed}")
        if self.nearest and self.temperature > 0:
            raise ValueError("the tokens nearest to what is heard are not drawn: leave the temperature at 0")
        is_list = isinstance(self.stop, (list, tuple))
        if not is_list or not all(isinstance(one, str) and one for one in self.stop):
            raise ValueError("stop must be a list of texts that are not empty")


class Request(NamedTuple):
    """A conversation to answer.

    Attributes:
        segments: as :meth:`ChatFormat.render` gives them.
        speech: for each piece of speech its windows, one after another, each ``[samples]`` float32 at 16 kHz, no
            longer than the speech encoder's.
        sampling: how to answer.
        silent: nobody spoke, and the answer is "": the LLM is not asked, so that it cannot invent what was said.
    """

    segments: Sequence[Segment]
    speech: Sequence[Sequence[np.ndarray]]
    sampling: Sampling = Sampling()
    silent: bool = False


class Usage(NamedTuple):
    """Tokens, and how probable the answer is.

    Attributes:
        prompt: tokens, speech included. answer: tokens. reused: tokens of the prompt that were not read again.
        log_probability: of all tokens of the answer, nats; None where the LLM was not asked.
    """

    prompt: int
    answer: int
    reused: int
    log_probability: float | None = None


class Delta(NamedTuple):
    """What a step gave for one row.

    Attributes:
        row: as :meth:`StreamingDecoder.add` returned it.
        text: what is new and certain; may be empty.
        finish: why the answer is over, or None.
        usage: at the end.
        error: with ``finish`` "error".
    """

    row: int
    text: str
    finish: Finish | None = None
    usage: Usage | None = None
    error: Exception | None = None


@dataclass(eq=False)
class _Row:
    """A request on its way.

    Attributes:
        number, request: whose it is.
        unheard: windows that the speech encoder has not seen yet, by digest.
        embeds: ``[L, D]`` of the prompt, once all is heard; speech: its columns that are speech; soft: ``[S]`` those
            of them that are none of the LLM's own tokens, on which its LoRA acts.
        signature: what stands in each column, by content.
        length: columns that are in the cache.
        cache: its own, while it is read in portions.
        next_id: the token to feed next.
        limit: of the answer's tokens.
        log_probability: of those that were drawn.
    """

    number: int
    request: Request
    text: TextStream
    generator: torch.Generator | None
    digests: list[list[str]]
    unheard: dict[str, np.ndarray]
    embeds: Tensor | None = None
    speech: Sequence[int] = ()
    soft: Tensor | None = None
    signature: list[Hashable] = field(default_factory=list)
    prompt: int = 0
    length: int = 0
    reused: int = 0
    answered: int = 0
    cache: Any = None
    next_id: int = 0
    limit: int = 0
    log_probability: float = 0.0

    @property
    def unread(self) -> int:
        return self.prompt - 1 - self.length


@dataclass
class _Group:
    """Rows that are decoded together: their cache of ``width`` columns, in which all end."""

    rows: list[_Row]
    cache: Any
    width: int


class _Window(NamedTuple):
    """A window that was heard: ``embeddings`` [U, D]; ``is_text``, which are the LLM's own tokens."""

    embeddings: Tensor
    is_text: list[bool]


class _Kept(NamedTuple):
    signature: tuple[Hashable, ...]
    cache: Any
    bytes: int


class StreamingDecoder:
    """Decodes all requests that it has, a token of each at every step.

    Args:
        model: in eval mode.
        chat: the chat format of its LLM.
        most_rows: that answer at a time; others wait.
        chunk: columns of a long prompt, and tokens of short prompts together, that are read in one step.
        seconds: of audio that are heard in one step.
        kept_bytes: of keys and values of answered conversations, for those that go on from them.
    """

    def __init__(
        self,
        model: SpeechLLM,
        chat: ChatFormat,
        most_rows: int = 64,
        chunk: int = 1024,
        seconds: float = 30.0,
        kept_bytes: int = 256 << 20,
    ) -> None:
        self.model = model
        self.chat = chat
        self.most_rows = most_rows
        self.chunk = chunk
        self.seconds = seconds
        self.kept_bytes = kept_bytes
        self._numbers = 0
        self._waiting: list[_Row] = []
        self._groups: list[_Group] = []
        self._kept: OrderedDict[tuple[Hashable, ...], _Kept] = OrderedDict()
        self._heard: OrderedDict[str, _Window] = OrderedDict()
        self._boxes: dict[int, deque[Delta]] = {}

    # ---- requests ----------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Rows that wait or answer."""
        return len(self._waiting) + sum(len(group.rows) for group in self._groups)

    def add(self, request: Request) -> int:
        """Queues a request and returns its row's number.

        Raises:
            ValueError: its segments do not fit its speech, or end with it.
        """
        row = self._row_of(request)
        self._waiting.append(row)
        return row.number

    def cancel(self, row: int) -> None:
        """Forgets a row; one that is over, or unknown, is no error."""
        self._waiting = [one for one in self._waiting if one.number != row]
        for group in self._groups:
            self._leave(group, [one.number != row for one in group.rows])
        self._groups = [group for group in self._groups if group.rows]
        self._boxes.pop(row, None)

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of one request, those of others being kept for their own streams; closing it cancels the row.

        Raises:
            Exception: what went wrong with this row.
        """
        row = self.add(request)
        self._boxes[row] = deque()
        try:
            while True:
                while not self._boxes[row]:
                    self.step()
                delta = self._boxes[row].popleft()
                if delta.error is not None:
                    raise delta.error
                yield delta
                if delta.finish:
                    return
        finally:
            self.cancel(row)

    @torch.no_grad()
    def hear(self, windows: Sequence[np.ndarray]) -> None:
        """Hears windows ahead of the request that will hold them; they are known by content."""
        self._hear({_digest(window): window for window in windows})

    @torch.no_grad()
    def read_ahead(self, request: Request) -> None:
        """Hears and reads a conversation up to the end of its last piece of speech, for requests that go on from there.

        Raises:
            ValueError: as of :meth:`add`, and where the LLM has no room for it.
        """
        row = self._row_of(request)
        self._hear(row.unheard)
        self._compose(row)
        if not row.speech or not self._has_plain_cache or not self.kept_bytes:
            return
        row.prompt = row.speech[-1] + 2  # what is behind it may change
        while row.unread > 0:
            portion = min(self.chunk, row.unread)
            row.cache = self._read_columns([row], portion)
            row.length += portion
        if row.cache is not None:
            self._keep(tuple(row.signature[: row.length]), take_row(row.cache, 0, row.length))

    def _row_of(self, request: Request) -> _Row:
        pieces = sum(isinstance(one, Speech) for one in request.segments)
        if pieces != len(request.speech):
            raise ValueError(f"the conversation has {pieces} pieces of speech, not {len(request.speech)}")
        if request.sampling.nearest and not self.model.adapter.one_to_one:
            raise ValueError("this model's adapter has no embedding for each token: ask the LLM instead")
        if not request.segments or isinstance(request.segments[-1], Speech) or not len(request.segments[-1]):
            raise ValueError("the chat template must write something between the user's speech and the answer")
        limit = self.model.speech_encoder.max_samples
        if any(not 0 < len(window) <= limit for piece in request.speech for window in piece):
            raise ValueError(f"windows of speech must have 1 to {limit} samples: cut longer audio (data/windows.py)")
        digests = [[_digest(window) for window in piece] for piece in request.speech]
        windows = {d: w for ds, ws in zip(digests, request.speech, strict=True) for d, w in zip(ds, ws, strict=True)}
        generator = None
        if request.sampling.temperature > 0:
            generator = torch.Generator()
            seed = request.sampling.seed
            generator.seed() if seed is None else generator.manual_seed(int(seed))
        text = AnswerStream(self.chat, request.sampling.stop)
        self._numbers += 1
        return _Row(self._numbers, request, text, generator, digests, windows)

    # ---- steps -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Hears and reads some of what waits, and decodes a token of every row that has been read.

        Returns:
            The deltas of the rows that have news, those of :meth:`stream` left out.
        """
        deltas: list[Delta] = []
        self._admit(deltas)
        self._merge()
        for group in self._groups:
            deltas += self._decode(group)
        self._groups = [group for group in self._groups if group.rows]
        for delta in deltas:
            if delta.row in self._boxes:
                self._boxes[delta.row].append(delta)
        return [delta for delta in deltas if delta.row not in self._boxes]

    def _admit(self, deltas: list[Delta]) -> None:
        room = self.most_rows - sum(len(group.rows) for group in self._groups)
        rows = self._waiting[: max(0, room)]
        if not rows:
            return
        self._hear(self._choose_windows(rows))
        for row in rows:
            row.unheard = {d: w for d, w in row.unheard.items() if d not in self._heard}
        deltas += self._write_nearest([row for row in rows if row.request.sampling.nearest and not row.unheard])
        asked = [row for row in rows if not row.request.sampling.nearest]
        silent = self._without_words(asked)
        for row in asked:
            if row.request.silent or row in silent:
                self._waiting.remove(row)
                deltas.append(Delta(row.number, "", "stop", Usage(0, 0, 0)))
            elif row.embeds is None and not row.unheard:
                try:
                    self._compose(row)
                except ValueError as error:
                    self._waiting.remove(row)
                    deltas.append(Delta(row.number, "", "error", Usage(row.prompt, 0, 0), error))
        self._read([row for row in asked if row.embeds is not None and row in self._waiting])

    # ---- hearing -----------------------------------------------------------------------------------------------

    def _choose_windows(self, rows: Sequence[_Row]) -> dict[str, np.ndarray]:
        """One window of the oldest row, and then as many as one step may hear, of short requests first."""
        by_size = sorted(rows, key=lambda row: sum(map(len, row.unheard.values())))
        oldest = next((row for row in rows if row.unheard), None)
        first = [] if oldest is None else list(oldest.unheard.items())[:1]
        budget = int(self.seconds * SAMPLE_RATE)
        chosen: dict[str, np.ndarray] = {}
        for digest, window in [*first, *(item for row in by_size for item in row.unheard.items())]:
            if digest in self._heard or digest in chosen:
                continue
            if chosen and len(window) > budget:
                break
            chosen[digest] = window
            budget -= len(window)
        return chosen

    def _hear(self, windows: dict[str, np.ndarray]) -> None:
        new = {digest: window for digest, window in windows.items() if digest not in self._heard}
        if not new:
            return
        lengths = torch.tensor([len(window) for window in new.values()], device=self.model.device)
        padded = pad_waveforms([torch.from_numpy(window) for window in new.values()]).to(self.model.device)
        heard = hear(self.model, padded, lengths, samples=[len(window) for window in new.values()])
        for digest, embeddings, is_text, count in zip(new, heard.embeddings, heard.is_text, heard.counts, strict=True):
            self._heard[digest] = _Window(embeddings[:count].clone(), is_text[:count].tolist())

    def _write_nearest(self, rows: Sequence[_Row]) -> list[Delta]:
        """Answers rows that do not ask the LLM, all of them with one look at its table."""
        if not rows:
            return []
        heard = [self._windows_of(row) for row in rows]
        deltas = []
        for row, windows, text in zip(rows, heard, nearest_texts(self.model, self.chat, heard), strict=True):
            count = sum(map(len, windows))
            deltas.append(Delta(row.number, text, "stop", Usage(count, count, 0)))
            self._waiting.remove(row)
        self._forget_speech()
        return deltas

    def _without_words(self, rows: Sequence[_Row]) -> set[_Row]:
        """Those that have just been heard, and are to be answered if somebody speaks, of which that is not so."""
        asked = [row for row in rows if row.request.sampling.if_spoken and any(row.digests)]
        heard = [row for row in asked if row.embeds is None and not row.unheard]
        if not heard:
            return set()
        texts = nearest_texts(self.model, self.chat, [self._windows_of(row) for row in heard])
        return {row for row, text in zip(heard, texts, strict=True) if not text}

    def _windows_of(self, row: _Row) -> list[Tensor]:
        """``[U, D]`` the embeddings of each window of its speech, one after another."""
        return [self._heard[digest].embeddings for piece in row.digests for digest in piece]

    def _forget_speech(self) -> None:
        """Embeddings that no waiting row needs, beyond a quarter of what may be kept."""
        needed = {digest for row in self._waiting if row.embeds is None for piece in row.digests for digest in piece}
        total = sum(one.embeddings.nbytes for one in self._heard.values())
        for digest in list(self._heard):
            if total <= self.kept_bytes // 4:
                return
            if digest not in needed:
                total -= self._heard.pop(digest).embeddings.nbytes

    def _compose(self, row: _Row) -> None:
        """The prompt's embeddings, and as much of its keys and values as an earlier conversation has left.

        Raises:
            ValueError: the LLM has no room for it.
        """
        parts: list[Tensor] = []
        speech: list[int] = []
        is_text: list[bool] = []
        for segment in row.request.segments:
            if isinstance(segment, Speech):
                for digest in row.digests[segment.piece]:
                    self._heard.move_to_end(digest)
                    window = self._heard[digest]
                    speech += range(len(row.signature), len(row.signature) + len(window.is_text))
                    is_text += window.is_text
                    row.signature += [(digest, i) for i in range(len(window.is_text))]
                    parts.append(window.embeddings)
            elif len(segment):
                parts.append(self.model.embed(torch.tensor(segment, device=self.model.device)))
                row.signature += segment
        row.embeds = torch.cat(parts)
        row.prompt = len(row.signature)
        row.next_id = int(row.request.segments[-1][-1])
        row.speech = speech
        row.soft = torch.tensor(speech, dtype=torch.long)[~torch.tensor(is_text, dtype=torch.bool)]
        sampling = row.request.sampling
        row.limit = sampling.max_new_tokens
        if sampling.repeats:
            row.limit = min(row.limit, most_written(len(speech)))
        check_context(self.model, row.prompt)
        self._reuse(row)
        self._forget_speech()

    # ---- reading -----------------------------------------------------------------------------------------------

    def _read(self, rows: list[_Row]) -> None:
        """Reads prompts but for their last token: short ones together, of the long ones a portion of the first."""
        together: list[_Row] = []
        width = 0
        for row in rows:
            if row.length == 0 and row.unread <= self.chunk:
                longest = max(width, row.unread)
                if together and longest * (len(together) + 1) > self.chunk:
                    continue
                together.append(row)
                width = longest
        alone = [row for row in rows if row.length > 0 or row.unread > self.chunk]
        short = [row for row in alone if row.unread <= self.chunk]
        if together:
            self._start(_Group(together, self._read_columns(together, width), width))
        for row in short or alone[:1]:
            # Recurrent states cannot go on from a portion.
            portion = min(self.chunk, row.unread) if self._has_plain_cache else row.unread
            if portion:
                row.cache = self._read_columns([row], portion)
            row.length += portion
            if not row.unread:
                group = _Group([row], row.cache, row.length)
                row.cache = None
                self._start(group)

    def _start(self, group: _Group) -> None:
        for row in group.rows:
            row.length = row.prompt - 1
            row.embeds = None
            self._waiting.remove(row)
        give_room(group.cache)
        self._groups.append(group)

    def _read_columns(self, rows: list[_Row], width: int) -> Any:
        """A cache with ``width`` columns more of each row, which end where the rows' portions end."""
        device, known = self.model.device, rows[0].length
        embeds = rows[0].embeds.new_zeros(len(rows), width, rows[0].embeds.shape[1])  # type: ignore[union-attr]
        valid = torch.zeros(len(rows), known + width, dtype=torch.long, device=device)
        places: list[Tensor] = []
        for number, row in enumerate(rows):
            assert row.embeds is not None and row.soft is not None
            count = min(width, row.unread)
            embeds[number, width - count :] = row.embeds[row.length : row.length + count]
            valid[number, known + width - count :] = 1
            valid[number, :known] = 1
            inside = row.soft[(row.soft >= row.length) & (row.soft < row.length + count)]
            places.append(inside - row.length + width - count + number * width)
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, known:]
        with speech_positions(self.model.llm, self._mask(torch.cat(places).to(device), (len(rows), width))):
            output = self.model.llm.get_decoder()(
                inputs_embeds=embeds,
                attention_mask=valid,
                position_ids=positions,
                use_cache=True,
                **({} if rows[0].cache is None else compat.cache_argument(rows[0].cache)),
            )
        return compat.cache_of(output)

    def _mask(self, places: Tensor, shape: tuple[int, ...]) -> PositionMask:
        if self.model.lora_scope != "speech":
            return ALL_POSITIONS if self.model.lora_scope == "all" else None
        return SpeechPlaces(places, shape) if len(places) else None

    @property
    def _has_plain_cache(self) -> bool:
        """Whether the LLM's states can be cut and put together; found out by a trial of one token."""
        if not hasattr(self, "_plain"):
            with speech_positions(self.model.llm, None):
                ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
                output = self.model.llm.get_decoder()(input_ids=ids, use_cache=True)
            self._plain = has_plain_layers(compat.cache_of(output))
        return self._plain

    # ---- decoding ----------------------------------------------------------------------------------------------

    def _merge(self) -> None:
        if len(self._groups) > 1 and self._has_plain_cache:
            width = max(group.width for group in self._groups)
            rows = [row for group in self._groups for row in group.rows]
            self._groups = [_Group(rows, join([group.cache for group in self._groups], width), width)]

    def _decode(self, group: _Group) -> list[Delta]:
        device = self.model.device
        ids = torch.tensor([[row.next_id] for row in group.rows], device=device)
        lengths = torch.tensor([[row.length] for row in group.rows], device=device)
        columns = torch.arange(group.width + 1, device=device)
        with speech_positions(self.model.llm, ALL_POSITIONS if self.model.lora_scope == "all" else None):
            output = self.model.llm(
                inputs_embeds=self.model.embed(ids),
                attention_mask=(columns >= group.width - lengths).long(),
                position_ids=lengths,
                use_cache=True,
                **compat.cache_argument(group.cache),
            )
        group.cache = compat.cache_of(output)
        group.width += 1
        chosen = _choose(output.logits[:, -1].float(), group.rows)
        deltas = [self._push(row, *one) for row, one in zip(group.rows, chosen, strict=True)]
        goes_on = [delta.finish is None for delta in deltas]
        if not all(goes_on):
            for index, row in enumerate(group.rows):
                if not goes_on[index]:
                    self._keep_row(row, group.cache, index)
            self._leave(group, goes_on)
        return [delta for delta in deltas if delta.text or delta.finish]

    def _push(self, row: _Row, token: int, log_probability: float) -> Delta:
        """Takes a row's next token."""
        row.log_probability += log_probability
        if row.length >= row.prompt:
            row.signature.append(row.next_id)
        row.length += 1
        row.answered += 1
        row.next_id = token
        finish: Finish | None = None
        text = ""
        if token in self.chat.eos_ids:
            finish = "stop"
        else:
            text = row.text.push(token)
            if row.text.stopped:
                finish = "stop"
            elif row.answered >= row.limit or row.length == context_of(self.model):
                finish = "length"
        if finish is None:
            return Delta(row.number, text)
        usage = Usage(row.prompt, row.answered, row.reused, row.log_probability)
        return Delta(row.number, text + row.text.finish(), finish, usage)

    def _leave(self, group: _Group, stay: Sequence[bool]) -> None:
        """Takes rows out of a group, and the columns that no other needs."""
        if all(stay):
            return
        indices = [index for index, stays in enumerate(stay) if stays]
        group.rows = [group.rows[index] for index in indices]
        if not group.rows:
            group.cache = None
            return
        width = max(row.length for row in group.rows) if self._has_plain_cache else group.width
        group.cache = keep_rows(group.cache, indices, width)
        group.width = width

    # ---- earlier conversations ---------------------------------------------------------------------------------

    def _keep_row(self, row: _Row, cache: Any, index: int) -> None:
        if self._has_plain_cache and self.kept_bytes:
            self._keep(tuple(row.signature[: row.length]), take_row(cache, index, row.length))

    def _keep(self, signature: tuple[Hashable, ...], cache: Any) -> None:
        """Keeps a conversation in place of those that it goes on from."""
        for known in [one for one in self._kept if one == signature[: len(one)]]:
            del self._kept[known]
        self._kept[signature] = _Kept(signature, cache, cache_bytes(cache))
        while self._kept and sum(one.bytes for one in self._kept.values()) > self.kept_bytes:
            self._kept.popitem(last=False)

    def _reuse(self, row: _Row) -> None:
        """Begins with what is kept, where that spares most of the prompt: a row of its own is read by itself."""
        found = [(min(_common(one.signature, row.signature), row.prompt - 1), one) for one in self._kept.values()]
        found = [(length, one) for length, one in found if can_cut(one.cache, length, len(one.signature))]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is not None and 2 * length >= row.prompt:
            self._kept.move_to_end(best.signature)
            row.cache = cut_to(best.cache, length)
            row.length = row.reused = length


def _choose(logits: Tensor, rows: Sequence[_Row]) -> list[tuple[int, float]]:
    """The next token of each row and its log probability, of logits ``[B, V]``; the device is waited for once."""
    tokens = logits.argmax(1)
    for index, row in enumerate(rows):
        if row.generator is not None:
            tokens[index] = _draw(logits[index], row.request.sampling, row.generator)
    found = logits.gather(1, tokens.unsqueeze(1))[:, 0] - logits.logsumexp(1)
    ids, log_probabilities = torch.stack([tokens.float(), found]).tolist()  # ids are far below 2^24
    return [(int(id_), value) for id_, value in zip(ids, log_probabilities, strict=True)]


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """A token, of logits ``[V]``, on their device; the generator is one of the CPU."""
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    # From the likeliest down, so that no temperature makes NaN of it.
    scaled = (logits - logits.max()).to(exact) / sampling.temperature
    probabilities, order = scaled.softmax(0), None
    if sampling.top_k:
        probabilities, order = probabilities.topk(min(sampling.top_k, len(logits)))
    elif sampling.top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
    if sampling.top_p < 1:
        # Those before which the sum has not been reached; at least the first.
        is_beyond = probabilities.cumsum(0) - probabilities >= sampling.top_p * probabilities.sum()
        is_beyond[0] = False
        probabilities = probabilities.masked_fill(is_beyond, 0.0)
    ends = probabilities.cumsum(0)
    place = torch.searchsorted(ends, ends[-1:] * uniform, right=True).clamp(max=len(ends) - 1)
    return (place if order is None else order[place]).squeeze(0)


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest common beginning."""
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)


def _digest(window: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(window, np.float32).tobytes(), digest_size=16).hexdigest()
