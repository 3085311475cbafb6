"""Roll-outs: answers sampled from the student as it is, for on-policy distillation.

Each roll-out draws its random numbers from a generator of its own, so that it depends on its seed and not on what it is
batched with (up to the rounding of batched matrix products, which can tip a draw that falls on a border).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.generation.decoding import Prompts, decode
from blspkd_fairseq.modules.speech_llm import ChatLLM

_LEAST_TEMPERATURE = 1e-6  # practically greedy; smaller ones overflow


@dataclass(frozen=True)
class RolloutOptions:
    """How roll-outs are drawn.

    Attributes:
        per_prompt: roll-outs of each prompt (X-OPD: 4).
        temperature: divides the logits.
        top_p: draw from the likeliest tokens that make up this share of the probability.
        max_new_tokens: length limit, the end of turn included.
    """

    per_prompt: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.per_prompt < 1 or self.max_new_tokens < 1:
            raise ValueError("roll-outs: at least one per prompt, of at least one token")
        if not (self.temperature >= _LEAST_TEMPERATURE and 0 < self.top_p <= 1):
            raise ValueError(f"roll-outs need a temperature of at least {_LEAST_TEMPERATURE:g} and 0 < top-p <= 1")


@torch.no_grad()
def roll_out(
    model: ChatLLM, chat: ChatFormat, prompts: Prompts, seeds: Sequence[int], options: RolloutOptions
) -> list[list[int]]:
    """Samples answers of the student.

    Args:
        model: in eval mode.
        chat: the chat format of its LLM.
        prompts: with speech, on which Partial LoRA acts, or with the transcripts.
        seeds: of each roll-out, ``B x per_prompt``, those of a prompt one after another.
        options: how to draw.

    Returns:
        The ids of each roll-out, with the end of turn unless the length limit cut it; at least one.

    Raises:
        ValueError: prompt and roll-out are longer than the LLM reads.
        FloatingPointError: the student's logits are not finite.
    """
    _check_length(model, prompts.longest, options)
    generated = decode(
        model,
        prompts,
        options.per_prompt,
        _Draw(seeds, options, len(chat.tokenizer), prompts.embeds.device),
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
    )
    return [_until_end(row, chat.eos_ids) for row in generated.tolist()]


def rollout_seed(*parts: object) -> int:
    """A seed that differs when one of the parts does, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _check_length(model: ChatLLM, prompt: int, options: RolloutOptions) -> None:
    positions = getattr(model.llm.config, "max_position_embeddings", None)
    if positions is not None and prompt + options.max_new_tokens > positions:
        raise ValueError(
            f"a prompt of {prompt} tokens and --rollout-max-tokens {options.max_new_tokens} are longer than the "
            f"{positions} positions of the LLM: give less"
        )


def _until_end(ids: list[int], eos_ids: list[int]) -> list[int]:
    """Up to the first end of turn; what follows it is padding."""
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in eos_ids), ids)


class _Draw(LogitsProcessor):
    """Leaves one token of each row: the one drawn by that row's own generator.

    Tables of LLMs are padded; ids beyond the tokenizer's ``vocabulary`` are none.
    """

    def __init__(self, seeds: Sequence[int], options: RolloutOptions, vocabulary: int, device: torch.device) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        steps = [torch.rand(options.max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
        self.uniform = torch.stack(steps).to(device)  # [rows, steps]
        self.options, self.vocabulary = options, vocabulary
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(1).isfinite().all():
            raise FloatingPointError(
                f"the student's logits of token {self.step + 1} of the roll-outs are not finite: lower --lr, take "
                "--llm-dtype bfloat16 in place of float16, or begin with a trained adapter"
            )
        logits = scores[:, : self.vocabulary]
        tokens = draw(logits, self.uniform[:, self.step], self.options.temperature, self.options.top_p)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The token of each row whose share of the probability ``uniform`` falls into.

    Args:
        logits: ``[B, V]``.
        uniform: ``[B]`` in [0, 1).
        temperature, top_p: see :class:`RolloutOptions`; the likeliest token is always kept.

    Returns:
        ``[B]`` indices.
    """
    probability = (logits.float() / temperature).softmax(1).double()
    tokens = None
    if top_p < 1:
        probability, tokens = torch.sort(probability, dim=1, descending=True, stable=True)
        before = probability.cumsum(1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
    ends = probability.cumsum(1)
    place = torch.searchsorted(ends, uniform.unsqueeze(1).to(ends) * ends[:, -1:], right=True)
    return (place if tokens is None else tokens.gather(1, place)).squeeze(1)
