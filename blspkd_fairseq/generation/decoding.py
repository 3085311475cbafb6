"""From speech (or its transcript) and a prompt to text, by the LLM's own decoding."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from blspkd_fairseq import compat
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.conversation import Segment, Speech
from blspkd_fairseq.generation.hearing import Heard, hear
from blspkd_fairseq.generation.kv_cache import give_room
from blspkd_fairseq.generation.option_types import check_numbers
from blspkd_fairseq.modules.distillation_loss import linear_cross_entropy
from blspkd_fairseq.modules.partial_lora import ALL_POSITIONS, PositionMask, SpeechPlaces, speech_positions
from blspkd_fairseq.modules.speech_llm import ChatLLM, SpeechLLM

WIDEST_BEAM = 1024
"""The most hypotheses of an utterance: some gigabytes of keys and values of a small LLM already."""
COLDEST = 1e-4
"""The lowest temperature to draw at: float32 holds the logits divided by it."""


@dataclass(frozen=True)
class DecodingOptions:
    """How the LLM decodes; greedy by default, 128 new tokens at most (blsp-emo's defaults).

    Attributes:
        beam: hypotheses kept by beam search; with ``sampling``, samples drawn.
        n_best: hypotheses returned for each utterance, best first.
        sampling: draw from the distribution; ``temperature``, ``top_k`` (0: all) and ``top_p`` shape it.
        max_new_tokens, min_new_tokens: length limits, the end of turn included.
        length_penalty: the score is the log-probability divided by length ** length_penalty.
        no_repeat_ngram_size: no n-gram of the answer occurs twice (0: off).
    """

    beam: int = 1
    n_best: int = 1
    sampling: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 1 <= self.beam <= WIDEST_BEAM or not math.isfinite(self.length_penalty):
            raise ValueError(
                f"the beam must be 1 to {WIDEST_BEAM} (each hypothesis has keys and values of its own) and the length "
                f"penalty finite, got {self.beam}, {self.length_penalty}"
            )
        if not 1 <= self.n_best <= self.beam:
            raise ValueError(f"n-best must be between 1 and the beam size ({self.beam}), got {self.n_best}")
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}, and min_new_tokens between 0 and that, "
                f"got {self.min_new_tokens}"
            )
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size must be at least 0, got {self.no_repeat_ngram_size}")
        is_cold = not COLDEST <= self.temperature < math.inf
        if self.sampling and (is_cold or not 0 < self.top_p <= 1 or self.top_k < 0):
            raise ValueError(
                f"sampling needs temperature >= {COLDEST:g}, 0 < top-p <= 1 and top-k >= 0, got {self.temperature:g}, "
                f"{self.top_p:g} and {self.top_k}"
            )

    @property
    def takes_the_likeliest(self) -> bool:
        """Every token is the likeliest one, whatever comes after."""
        return self.beam == 1 and not (self.sampling or self.no_repeat_ngram_size or self.min_new_tokens)

    def as_generate_arguments(self) -> dict[str, Any]:
        """The arguments of Hugging Face's ``generate``, every one explicit."""
        arguments: dict[str, Any] = {
            "do_sample": self.sampling,
            "num_beams": 1 if self.sampling else self.beam,
            "num_return_sequences": self.beam if self.sampling else self.n_best,
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens or None,
            "no_repeat_ngram_size": self.no_repeat_ngram_size or None,
        }
        if self.sampling:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        elif self.beam > 1:
            arguments |= {"length_penalty": self.length_penalty, "early_stopping": False}
        return arguments


class Hypothesis(NamedTuple):
    """One answer.

    Attributes:
        text: the answer, without control tokens.
        ids: its tokens, without the end of turn.
        finished: the LLM ended its turn before the length limit.
        score: sum of ``token_scores`` / length ** length_penalty; 0 when scores were not asked for.
        token_scores: log-probability (nats, temperature 1) of each token, the end of turn included.
    """

    text: str
    ids: list[int]
    finished: bool
    score: float
    token_scores: list[float]


@dataclass(frozen=True)
class Prompts:
    """Conversations up to where the answers begin, padded on the left.

    Attributes:
        embeds: ``[B, L, D]``.
        valid: ``[B, L]`` int64, 1 where there is no padding.
        soft: ``[2, S]`` row and column of each speech embedding that is none of the LLM's own tokens.
        student: its LoRA acts, on these; otherwise the teacher, the base LLM, reads and answers.
        lengths: of each, in tokens.
    """

    embeds: Tensor
    valid: Tensor
    soft: Tensor
    student: bool
    lengths: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest; L."""
        return max(self.lengths)

    def places(self, width: int, copies: int = 1) -> SpeechPlaces:
        """Those of :attr:`soft` in ``copies`` of each row, one after another, whose sequences are ``width`` long."""
        rows, columns = self.soft
        repeated = rows.unsqueeze(1) * copies + torch.arange(copies, device=rows.device)
        places = (repeated * width + columns.unsqueeze(1)).flatten()
        return SpeechPlaces(places, (len(self.embeds) * copies, width))


Instruction = str | Sequence[Segment]
"""A prompt with one ``{speech}`` slot, or a rendered conversation (:meth:`ChatFormat.render`)."""


@torch.no_grad()
def answer_speech(
    model: SpeechLLM,
    chat: ChatFormat,
    waveforms: Tensor | None,
    lengths: Tensor,
    prompts: Sequence[Instruction],
    options: DecodingOptions = DecodingOptions(),
    with_scores: bool = False,
    **speech: Any,
) -> list[list[Hypothesis]]:
    """Answers each conversation.

    Args:
        model: in eval mode.
        chat: the chat format of its LLM.
        waveforms: ``[P, S]`` fp32 at 16 kHz: the pieces of speech of all conversations, one after another.
        lengths: ``[P]`` samples.
        prompts: of each conversation, which holds one piece of speech if it is a text.
        options: how to decode.
        with_scores: fill in the scores.
        speech: further arguments of :meth:`SpeechLLM.adapt`.

    Returns:
        For each conversation its ``n_best`` hypotheses, best first. They do not depend on the rest of the batch, unless
        the LLM's context ends before ``max_new_tokens``: then they end as early as the one of the longest prompt must.
    """
    return answer_heard(model, chat, hear(model, waveforms, lengths, **speech), prompts, options, with_scores)


@torch.no_grad()
def answer_where_it_fits(
    model: SpeechLLM,
    chat: ChatFormat,
    heard: Heard,
    prompts: Sequence[Instruction],
    *how: Any,
) -> list[list[Hypothesis] | str]:
    """As :func:`answer_heard`; of a conversation that the LLM has no room for, why there is no answer."""
    conversations = [render_prompt(chat, prompt) for prompt in prompts]
    pieces = iter(range(len(heard.counts)))
    chosen: list[int] = []  # pieces of the conversations that fit
    found: list[list[Hypothesis] | str] = []
    fitting: list[Sequence[Segment]] = []
    for conversation in conversations:
        own = list(islice(pieces, sum(isinstance(segment, Speech) for segment in conversation)))
        texts = sum(len(segment) for segment in conversation if not isinstance(segment, Speech))
        try:
            check_context(model, texts + sum(heard.counts[piece] for piece in own))
        except ContextError as error:
            found.append(str(error))
        else:
            found.append([])
            fitting.append(conversation)
            chosen += own
    if fitting:
        answers = iter(answer_heard(model, chat, heard.of(chosen), fitting, *how))
        found = [one if isinstance(one, str) else next(answers) for one in found]
    return found


@torch.no_grad()
def answer_heard(
    model: SpeechLLM,
    chat: ChatFormat,
    heard: Heard,
    prompts: Sequence[Instruction],
    options: DecodingOptions = DecodingOptions(),
    with_scores: bool = False,
) -> list[list[Hypothesis]]:
    """As :func:`answer_speech`, of speech that was heard already (:func:`hear`, :func:`hear_windows`).

    Raises:
        ContextError: the LLM's context has no room for a conversation and an answer.
    """
    asked = build_prompts(model, [render_prompt(chat, prompt) for prompt in prompts], heard)
    return answer_prompts(model, chat, asked, options, with_scores)


@torch.no_grad()
def answer_text(
    model: ChatLLM,
    chat: ChatFormat,
    transcripts: Sequence[str],
    prompts: Sequence[Instruction],
    options: DecodingOptions = DecodingOptions(),
    with_scores: bool = False,
) -> list[list[Hypothesis]]:
    """The teacher's answers: as :func:`answer_speech`, with the transcript in place of the speech.

    Raises:
        ContextError: as of :func:`answer_heard`.
    """
    conversations = [render_prompt(chat, prompt) for prompt in prompts]
    ids = [chat.encode_text(text) for text in transcripts]
    asked = build_prompts(model, conversations, transcripts=ids, student=False)
    return answer_prompts(model, chat, asked, options, with_scores)


def render_prompt(chat: ChatFormat, prompt: Instruction) -> list[Segment]:
    """The segments of the conversation that a prompt stands for."""
    if not isinstance(prompt, str):
        return list(prompt)
    before, after = chat.prompt_ids(prompt)
    return [before, Speech(0), after]


def context_of(model: ChatLLM) -> int | None:
    """Most tokens that the LLM was made for, or None where its configuration does not say."""
    return llm_context(model.llm)


def llm_context(llm: PreTrainedModel) -> int | None:
    """:func:`context_of` an LLM alone."""
    context: int | None = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    return context


class ContextError(ValueError):
    """A prompt that leaves no room for an answer. Attributes: ``row``, which of a batch."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row


def check_context(model: ChatLLM, tokens: int, row: int = 0) -> None:
    """Refuses a prompt that leaves no room for an answer.

    Args:
        model: is to answer.
        tokens: of the prompt.
        row: which of a batch it is, for the error.

    Raises:
        ContextError: it has as many tokens as the LLM can read, or more.
    """
    context = context_of(model)
    if context is not None and tokens >= context:
        raise ContextError(
            f"the conversation has {tokens} tokens, speech included, and the LLM reads {context} together with its "
            "answer: shorten the audio or the text, or leave out earlier turns",
            row,
        )


def build_prompts(
    model: ChatLLM,
    conversations: Sequence[Sequence[Segment]],
    heard: Heard | None = None,
    transcripts: Sequence[Sequence[int]] = (),
    student: bool = True,
) -> Prompts:
    """Puts conversations together.

    Args:
        model: whose embeddings they are.
        conversations: their segments.
        heard: all their pieces of speech.
        transcripts: ids in place of the speech.
        student: who reads; see :class:`Prompts`.
    """
    rows: list[list[int]] = []
    places: list[tuple[int, int, int]] = []  # row, column, index among the flattened embeddings
    piece, width = 0, 0 if heard is None else heard.embeddings.shape[1]
    for number, segments in enumerate(conversations):
        row: list[int] = []
        for segment in segments:
            if not isinstance(segment, Speech):
                row += segment
                continue
            ids = transcripts[piece] if heard is None else [0] * heard.counts[piece]
            places += [(number, len(row) + i, piece * width + i) for i in range(len(ids))]
            row += ids
            piece += 1
        rows.append(row)
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    tokens = torch.tensor([[0] * n + row for n, row in zip(padding, rows, strict=True)]).to(model.device)
    valid = torch.tensor([[0] * n + [1] * (longest - n) for n in padding]).to(model.device)
    shifted = [(row, column + padding[row], index) for row, column, index in places]
    spoken = torch.tensor(shifted, dtype=torch.long).view(-1, 3).t()
    embeds, soft = model.embed(tokens), spoken[:2, :0]
    if heard is not None:
        soft = spoken[:2, ~heard.is_text.flatten()[spoken[2]]]
        row, column, index = spoken.to(model.device)
        embeds[row, column] = heard.embeddings.flatten(0, 1)[index]
    embeds = embeds * valid.unsqueeze(2)  # padding is seen by nobody, and NaN in it would be
    return Prompts(embeds, valid, soft.to(model.device), student, lengths)


def decode(
    model: ChatLLM, prompts: Prompts, copies: int = 1, logits_processor: LogitsProcessor | None = None, **arguments: Any
) -> Tensor:
    """Ids ``[B x copies, N]`` that the LLM's own ``generate`` gives, with these arguments, after each prompt.

    The prompt is read once, under Partial LoRA; all that follows it is text.
    """
    return _decode(model, prompts, read_prompts(model, prompts), copies, logits_processor, **arguments)


def _decode(
    model: ChatLLM,
    prompts: Prompts,
    cache: Any,
    copies: int = 1,
    logits_processor: LogitsProcessor | None = None,
    **arguments: Any,
) -> Tensor:
    everywhere = prompts.student and model.lora_scope == "all"
    embeds, valid = prompts.embeds.repeat_interleave(copies, 0), prompts.valid.repeat_interleave(copies, 0)
    rows = torch.arange(len(prompts.embeds), device=embeds.device)
    repeats = copies * max(arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1))
    if repeats > 1:  # as a step of beam search does, which caches of every kind of layer know
        cache.reorder_cache(rows.repeat_interleave(repeats))
    processors = LogitsProcessorList([] if logits_processor is None else [logits_processor])
    with speech_positions(model.llm, ALL_POSITIONS if everywhere else None), warnings.catch_warnings():
        # That n-grams are those of the answer alone is what is meant.
        warnings.filterwarnings("ignore", message="Passing `no_repeat_ngram_size` with `inputs_embeds`")
        generated: Tensor = model.llm.generate(
            inputs_embeds=embeds,
            attention_mask=valid,
            logits_processor=processors,
            **compat.cache_argument(give_room(cache)),
            **arguments,
        )
    return generated


def _reading(model: ChatLLM, prompts: Prompts, width: int, copies: int = 1) -> PositionMask:
    """Where LoRA acts on prompts that are cut, or filled up, to ``width``."""
    if not prompts.student or model.lora_scope == "none":
        return None
    if model.lora_scope == "all":
        return ALL_POSITIONS
    return prompts.places(width, copies) if prompts.soft.shape[1] else None


def read_prompts(model: ChatLLM, prompts: Prompts) -> Any:
    """A cache of all prompt positions but the last, which ``generate`` feeds itself."""
    valid = prompts.valid[:, :-1]
    with speech_positions(model.llm, _reading(model, prompts, prompts.longest - 1)):
        output = model.llm.get_decoder()(
            inputs_embeds=prompts.embeds[:, :-1], attention_mask=valid, position_ids=_positions(valid), use_cache=True
        )
    return compat.cache_of(output)


def _positions(valid: Tensor) -> Tensor:
    return (valid.cumsum(1) - 1).clamp(min=0)


def answer_prompts(
    model: ChatLLM, chat: ChatFormat, prompts: Prompts, options: DecodingOptions, with_scores: bool
) -> list[list[Hypothesis]]:
    check_context(model, prompts.longest, prompts.lengths.index(prompts.longest))
    if (context := context_of(model)) is not None:  # some LLMs have no positions beyond it
        most, least = (min(n, context - prompts.longest) for n in (options.max_new_tokens, options.min_new_tokens))
        options = replace(options, max_new_tokens=most, min_new_tokens=least)
    arguments = options.as_generate_arguments()
    per_row = arguments["num_return_sequences"]
    likeliest = _Likeliest() if with_scores and options.takes_the_likeliest else None
    cache = read_prompts(model, prompts)
    scores_apart = with_scores and likeliest is None
    states = _plain_states(cache) if scores_apart else None  # as they are now: decoding makes new ones
    generated = _decode(model, prompts, cache, logits_processor=likeliest, **arguments).tolist()
    answers = [strip_end(row, chat.eos_ids) for row in generated]
    scores: list[list[float]] = [[] for _ in answers]
    if likeliest is not None:
        scores = likeliest.scores([len(ids) + finished for ids, finished in answers])
    elif scores_apart:
        scores = _score(model, chat, prompts, answers, per_row, states)
    hypotheses = [
        Hypothesis(chat.decode_answer(ids), ids, finished, sum(s) / max(1, len(s)) ** options.length_penalty, s)
        for (ids, finished), s in zip(answers, scores, strict=True)
    ]
    groups = [hypotheses[i : i + per_row] for i in range(0, len(hypotheses), per_row)]
    if with_scores:
        groups = [sorted(group, key=lambda h: -h.score) for group in groups]
    return [group[: options.n_best] for group in groups]


class _Likeliest(LogitsProcessor):
    """Notes the log-probability of the likeliest token at each step: greedy decoding needs no pass for its scores."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.amax(1).float() - scores.float().logsumexp(1))
        return scores

    def scores(self, counts: Sequence[int]) -> list[list[float]]:
        """Of the first ``counts[i]`` tokens of row i."""
        steps = torch.stack(self.steps, 1).tolist()
        return [row[:count] for row, count in zip(steps, counts, strict=True)]


def strip_end(ids: list[int], eos_ids: list[int]) -> tuple[list[int], bool]:
    """The tokens before the end of turn, and whether there was one."""
    for index, token in enumerate(ids):
        if token in eos_ids:
            return ids[:index], True
    return ids, False


def _plain_states(cache: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of each layer; None if some layer keeps anything else."""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    return [(layer.keys, layer.values) for layer in cache.layers]


def _score(
    model: ChatLLM,
    chat: ChatFormat,
    prompts: Prompts,
    answers: list[tuple[list[int], bool]],
    per_row: int,
    states: list[tuple[Tensor, Tensor]] | None,
) -> list[list[float]]:
    """Log-probability of each answer's tokens, by one forward pass, over the answers alone where keys were kept."""
    tokens = [ids + ([chat.end_of_turn_id] if finished else []) for ids, finished in answers]
    counts = [len(row) for row in tokens]
    longest = max(counts)
    device = prompts.embeds.device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], dtype=torch.long).to(device)
    answered = torch.tensor([[1] * n + [0] * (longest - n) for n in counts], dtype=torch.long).to(device)
    embeds = torch.cat([prompts.embeds.repeat_interleave(per_row, 0), model.embed(ids)], 1)
    valid = torch.cat([prompts.valid.repeat_interleave(per_row, 0), answered], 1)
    known = 0 if states is None else prompts.longest - 1
    cached: dict[str, Any] = {"use_cache": False}
    if states is not None:
        cache = DynamicCache()
        for layer, state in enumerate(states):
            cache.update(*(one.repeat_interleave(per_row, 0) for one in state), layer)
        cached = compat.cache_argument(cache)
    mask = _reading(model, prompts, embeds.shape[1], per_row)
    with speech_positions(model.llm, mask if states is None or mask is ALL_POSITIONS else None):
        hidden = model.llm.get_decoder()(
            inputs_embeds=embeds[:, known:], attention_mask=valid, position_ids=_positions(valid)[:, known:], **cached
        ).last_hidden_state
    first = prompts.longest - 1 - known
    kept = hidden[:, first : first + longest][answered.bool()]
    targets = torch.tensor([token for row in tokens for token in row], dtype=torch.long).to(device)
    losses = linear_cross_entropy(kept, targets, *model.head, transform=model.logit_transform)
    return [[-loss for loss in row] for row in _split(losses.tolist(), counts)]


def _split(values: list[float], counts: Sequence[int]) -> list[list[float]]:
    remaining = iter(values)
    return [list(islice(remaining, count)) for count in counts]
