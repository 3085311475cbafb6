"""From speech (or its transcript) and a prompt to text, by the LLM's own decoding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blspkd_fairseq import compat
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.modules.distillation_loss import linear_cross_entropy
from blspkd_fairseq.modules.partial_lora import ALL_POSITIONS, speech_positions
from blspkd_fairseq.modules.sequence import Segment, concatenate
from blspkd_fairseq.modules.speech_llm import ChatLLM, SpeechLLM


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
        if self.beam < 1 or not math.isfinite(self.length_penalty):
            raise ValueError(
                f"the beam must be at least 1 and the length penalty finite, got {self.beam}, {self.length_penalty}"
            )
        if not 1 <= self.n_best <= self.beam:
            raise ValueError(f"n-best must be between 1 and the beam size ({self.beam}), got {self.n_best}")
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"length limits must be 0 <= min ({self.min_new_tokens}) <= max ({self.max_new_tokens}), max > 0"
            )
        if self.sampling and (self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0):
            raise ValueError("sampling needs temperature > 0, 0 < top-p <= 1 and top-k >= 0")

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


class Prompt(NamedTuple):
    """A left-padded prompt. Attributes: ``embeds`` [B, L, D], ``valid`` [B, L], ``speech`` [B, L] (LoRA's mask)."""

    embeds: Tensor
    valid: Tensor
    speech: Tensor


@torch.no_grad()
def answer_speech(
    model: SpeechLLM,
    chat: ChatFormat,
    waveforms: Tensor,
    lengths: Tensor,
    prompts: Sequence[str],
    options: DecodingOptions = DecodingOptions(),
    with_scores: bool = False,
) -> list[list[Hypothesis]]:
    """Answers each utterance under its prompt.

    Args:
        model: in eval mode.
        chat: the chat format of its LLM.
        waveforms: ``[B, S]`` fp32 at 16 kHz.
        lengths: ``[B]`` samples.
        prompts: B texts with one ``{speech}`` slot each.
        options: how to decode.
        with_scores: fill in the scores, at the price of one more forward pass.

    Returns:
        For each utterance its ``n_best`` hypotheses, best first. They do not depend on the rest of the batch.
    """
    adapter = model.adapt(waveforms, lengths)
    speech = Segment(adapter.embeddings.to(model.llm.dtype), adapter.lengths)
    return _answer(model, chat, speech, prompts, options, with_scores, is_speech=True)


@torch.no_grad()
def answer_text(
    model: ChatLLM,
    chat: ChatFormat,
    transcripts: Sequence[str],
    prompts: Sequence[str],
    options: DecodingOptions = DecodingOptions(),
    with_scores: bool = False,
) -> list[list[Hypothesis]]:
    """The teacher's answers: as :func:`answer_speech`, with the transcript in place of the speech."""
    transcript = _pad([chat.encode_text(text) for text in transcripts], model)
    return _answer(model, chat, transcript, prompts, options, with_scores, is_speech=False)


def _answer(
    model: ChatLLM,
    chat: ChatFormat,
    speech: Segment,
    prompts: Sequence[str],
    options: DecodingOptions,
    with_scores: bool,
    is_speech: bool,
) -> list[list[Hypothesis]]:
    prompt = build_prompt(model, chat, speech, prompts)
    everywhere = is_speech and model.lora_scope == "all"
    prefill_mask = None
    if is_speech and model.lora_scope != "none":
        prefill_mask = ALL_POSITIONS if everywhere else prompt.speech[:, :-1]
    # Speech is in the prompt alone, so all that follows the prefill is the plain LLM (or LoRA on every position).
    with speech_positions(model.llm, prefill_mask):
        cache = prefill(model, prompt)
    arguments = options.as_generate_arguments()
    copies = max(arguments["num_beams"], arguments["num_return_sequences"])
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    with speech_positions(model.llm, ALL_POSITIONS if everywhere else None):
        generated = model.llm.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.valid.long(),
            **compat.cache_argument(cache),
            **arguments,
        )
    answers = [strip_end(row.tolist(), chat.eos_ids) for row in generated]
    per_row = arguments["num_return_sequences"]
    scores = [[] for _ in answers] if not with_scores else _score(model, chat, prompt, answers, per_row, prefill_mask)
    hypotheses = [
        Hypothesis(chat.decode(ids), ids, finished, sum(s) / max(1, len(s)) ** options.length_penalty, s)
        for (ids, finished), s in zip(answers, scores, strict=True)
    ]
    groups = [hypotheses[i : i + per_row] for i in range(0, len(hypotheses), per_row)]
    if with_scores:
        groups = [sorted(group, key=lambda h: -h.score) for group in groups]
    return [group[: options.n_best] for group in groups]


def build_prompt(model: ChatLLM, chat: ChatFormat, speech: Segment, prompts: Sequence[str]) -> Prompt:
    ids = [chat.prompt_ids(prompt) for prompt in prompts]
    before, after = (_pad([pair[side] for pair in ids], model) for side in (0, 1))
    sequence = concatenate([before, speech, after], pad_left=True)
    return Prompt(sequence.embeds, sequence.segment >= 0, sequence.segment == 1)


def _pad(rows: list[list[int]], model: ChatLLM) -> Segment:
    device = model.llm.get_input_embeddings().weight.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return Segment(model.embed(ids.to(device)), lengths)


def prefill(model: ChatLLM, prompt: Prompt) -> Any:
    """Keys and values of all prompt positions but the last, which ``generate`` feeds itself."""
    valid = prompt.valid[:, :-1].long()
    output = model.llm.get_decoder()(
        inputs_embeds=prompt.embeds[:, :-1],
        attention_mask=valid,
        position_ids=(valid.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
    )
    return compat.cache_of(output)


def strip_end(ids: list[int], eos_ids: list[int]) -> tuple[list[int], bool]:
    """The tokens before the end of turn, and whether there was one."""
    for index, token in enumerate(ids):
        if token in eos_ids:
            return ids[:index], True
    return ids, False


def _score(
    model: ChatLLM,
    chat: ChatFormat,
    prompt: Prompt,
    answers: list[tuple[list[int], bool]],
    per_row: int,
    prefill_mask: Any,
) -> list[list[float]]:
    """Log-probability of each answer's tokens, by one forward pass over prompt and answer."""
    tokens = [ids + ([chat.end_of_turn_id] if finished else []) for ids, finished in answers]
    answer = _pad(tokens, model)
    embeds = torch.cat([prompt.embeds.repeat_interleave(per_row, 0), answer.embeds], 1)
    steps = torch.arange(answer.embeds.shape[1], device=embeds.device)
    answer_valid = steps < answer.lengths.unsqueeze(1)
    valid = torch.cat([prompt.valid.repeat_interleave(per_row, 0), answer_valid], 1).long()
    mask = prefill_mask
    if isinstance(mask, Tensor):
        mask = prompt.speech.repeat_interleave(per_row, 0)
        mask = torch.cat([mask, torch.zeros_like(answer_valid)], 1)
    with speech_positions(model.llm, mask):
        hidden = model.llm.get_decoder()(
            inputs_embeds=embeds, attention_mask=valid, position_ids=(valid.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).last_hidden_state
    first = prompt.embeds.shape[1] - 1
    kept = hidden[:, first : first + answer.embeds.shape[1]][answer_valid]
    targets = torch.tensor([token for row in tokens for token in row], dtype=torch.long, device=kept.device)
    losses = linear_cross_entropy(kept, targets, *model.head).tolist()
    scores, start = [], 0
    for row in tokens:
        scores.append([-loss for loss in losses[start : start + len(row)]])
        start += len(row)
    return scores
