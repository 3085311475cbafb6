"""What fairseq-generate and fairseq-interactive take for a sequence generator and a dictionary."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.generation.decoding import DecodingOptions, Hypothesis, answer_where_it_fits
from blspkd_fairseq.generation.fairseq_rows import LinesToAnswer, RowsToAnswer
from blspkd_fairseq.generation.hearing import hear
from blspkd_fairseq.generation.results import Results

logger = logging.getLogger(__name__)


class LlmDictionary:
    """The LLM's tokenizer in the clothes of a fairseq dictionary.

    fairseq-generate asks for it before the model is loaded, which brings the tokenizer.
    """

    PAD = -1  # no token's id: every word of an LLM may occur in a text

    def __init__(self) -> None:
        self.chat: ChatFormat | None = None

    @property
    def _chat(self) -> ChatFormat:
        if self.chat is None:
            raise RuntimeError("the model has not been built yet, and with it comes the tokenizer")
        return self.chat

    def pad(self) -> int:
        return self.PAD

    def eos(self) -> int:
        return self._chat.end_of_turn_id

    def bos(self) -> int:
        return self._chat.end_of_turn_id

    def unk(self) -> int:
        return self.PAD

    def __len__(self) -> int:
        return len(self._chat.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LlmDictionary)

    def __hash__(self) -> int:
        return hash(LlmDictionary)

    def string(self, tensor: Tensor, *_: Any, **__: Any) -> str:
        """The text on one line: fairseq prints a line per hypothesis."""
        return one_line(self._chat.decode_answer([token for token in tensor.tolist() if token >= 0]))

    def encode_line(self, line: str, append_eos: bool = True, **_: Any) -> Tensor:
        ids = self._chat.encode_text(line)
        return torch.tensor([*ids, self.eos()] if append_eos else ids, dtype=torch.int)


def one_line(text: str) -> str:
    """Line breaks of any kind become spaces."""
    return " ".join(text.splitlines())


class LlmGenerator:
    """Decodes batches with the LLM: one result for every row, whether it could be read or not.

    A row without an answer gives an empty hypothesis with the score -inf, which no answer has.

    Args:
        chat: chat format of the LLM.
        options: how to decode.
        results: keeps the answers, and why there are none.
        source: the rows of a manifest, or lines of fairseq-interactive, which say what is asked.
        seed: of sampling; each batch has its own, so that a run that was cut draws what it would have drawn. None: any.
    """

    def __init__(
        self,
        chat: ChatFormat,
        options: DecodingOptions,
        results: Results,
        source: RowsToAnswer | LinesToAnswer,
        seed: int | None = None,
    ) -> None:
        self.chat = chat
        self.options = options
        self.results = results
        self.source = source
        self.seed = seed
        self.symbols_to_strip_from_output: set[int] = set()

    def generate(self, models: Sequence[Any], sample: dict[str, Any], **_: Any) -> list[list[dict[str, Any]]]:
        """fairseq's hypotheses of a batch: tokens, score (nats), positional scores."""
        if len(models) != 1:
            raise ValueError(f"one checkpoint generates at a time, got {len(models)}: average them, or run one by one")
        model = models[0]
        model.eval()
        batch = self.source.readable(sample)
        answers: dict[int, list[Hypothesis]] = {}
        if batch.places:
            self._seed(batch.all_places)
            heard = hear(model.speech_llm, batch.waveforms, batch.lengths)
            groups = answer_where_it_fits(model.speech_llm, self.chat, heard, batch.prompts, self.options, True)
            for place, group in zip(batch.places, groups, strict=True):
                if isinstance(group, str):
                    self.source.fail(place, group)
                else:
                    answers[place] = group
            self.results.add([(self.source.asked(place), group) for place, group in answers.items()])
        return [self._hypotheses(place, answers) for place in batch.all_places]

    def _seed(self, places: Sequence[int]) -> None:
        if self.options.sampling and self.seed is not None:
            torch.manual_seed(self.seed + (places[0] << 32))

    def _hypotheses(self, place: int, answers: Mapping[int, list[Hypothesis]]) -> list[dict[str, Any]]:
        reason = self.source.failure(place)
        if reason:
            self.results.fail(self.source.id(place), reason)
            logger.warning(f"no answer to {self.source.id(place)}: {reason}")
            return [_as_fairseq(NO_ANSWER)]
        group = answers.get(place) or self.results.find(self.source.asked(place))
        return [_as_fairseq(hypothesis) for hypothesis in group]


NO_ANSWER = Hypothesis("", [], False, float("-inf"), [])


def _as_fairseq(hypothesis: Hypothesis) -> dict[str, Any]:
    empty = torch.empty(0)
    return {
        "tokens": torch.tensor(hypothesis.ids, dtype=torch.long),
        "score": torch.tensor(hypothesis.score),
        "positional_scores": torch.tensor(hypothesis.token_scores),
        "attention": empty,
        "alignment": empty,
    }
