"""What fairseq-generate and fairseq-interactive take for a sequence generator and a dictionary."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.generation.decoding import DecodingOptions, Hypothesis, answer_speech

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
    """Decodes batches with the LLM; one result for every row, also as lines of JSON with the manifest's ids.

    Args:
        chat: chat format of the LLM.
        options: how to decode.
        default_prompt: instruction for batches that bring none (fairseq-interactive).
        results: file for the JSON lines; it appears when ``expected_rows`` of them are there.
        expected_rows: rows of the data set.
    """

    def __init__(
        self,
        chat: ChatFormat,
        options: DecodingOptions,
        default_prompt: str,
        results: Path | None = None,
        expected_rows: int = 0,
    ) -> None:
        self.chat = chat
        self.options = options
        self.default_prompt = default_prompt
        self.symbols_to_strip_from_output: set[int] = set()
        self.results = JsonLines(results, expected_rows) if results else None

    def generate(self, models: Sequence[Any], sample: dict[str, Any], **_: Any) -> list[list[dict[str, Any]]]:
        """fairseq's hypotheses of a batch: tokens, score (nats), positional scores."""
        if len(models) != 1:
            raise ValueError(f"one checkpoint generates at a time, got {len(models)}: average them, or run one by one")
        model = models[0]
        model.eval()
        inputs = sample["net_input"]
        rows = len(sample.get("plan_rows", inputs["src_lengths"]))  # fairseq-interactive's have audio alone
        if not rows:  # only a manifest without rows makes such a batch, and fairseq's scorers fail on no text at all
            logger.info("the manifest has no rows: nothing to generate, nothing to score")
            raise SystemExit(0)
        prompts: list[Any] = [row.segments for row in sample.get("plan_rows", ())] or [self.default_prompt] * rows
        groups = answer_speech(
            model.speech_llm, self.chat, inputs["src_tokens"], inputs["src_lengths"], prompts, self.options, True
        )
        if self.results and "rows" in sample:
            self.results.write([_record(*pair) for pair in zip(sample["rows"], sample["prompts"], groups, strict=True)])
        return [[_as_fairseq(hypothesis) for hypothesis in group] for group in groups]


def _as_fairseq(hypothesis: Hypothesis) -> dict[str, Any]:
    empty = torch.empty(0)
    return {
        "tokens": torch.tensor(hypothesis.ids, dtype=torch.long),
        "score": torch.tensor(hypothesis.score),
        "positional_scores": torch.tensor(hypothesis.token_scores),
        "attention": empty,
        "alignment": empty,
    }


def _record(row: dict[str, str], prompt: str, group: list[Hypothesis]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": row["id"],
        "speaker": row.get("speaker", ""),
        "prompt": prompt,
        "transcript": row.get("src_text", ""),
        "hypothesis": group[0].text,
        "reference": row.get("tgt_text", ""),
        "score": group[0].score,
        "finished": group[0].finished,
    }
    if len(group) > 1:
        record["n_best"] = [{"hypothesis": h.text, "score": h.score} for h in group]
    return record


class JsonLines:
    """Writes records to ``path``, which appears only when it is complete (before: ``path.partial``)."""

    def __init__(self, path: Path, expected: int) -> None:
        self.path = path
        self.expected = expected
        self.written = 0
        self.partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.write_text("", encoding="utf-8")
        self._finish_if_complete()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        with open(self.partial, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.written += len(records)
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        if self.written == self.expected:
            os.replace(self.partial, self.path)
