"""What the criterions share: means per utterance, figures to log that cost one wait, and options."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from blspkd_fairseq.data.batch import Labels
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.cif import check_alpha_sum, quantity_loss
from blspkd_fairseq.modules.distillation_loss import chunk_size_for
from blspkd_fairseq.modules.speech_llm import Distillation, SpeechLlmOutput


@dataclass
class DistillationConfig(FairseqDataclass):
    """Every criterion."""

    quantity_weight: float = field(
        default=1.0, metadata={"help": "|sum(alpha) / n - 1| (BLSP-KD); an adapter without CIF has none"}
    )
    chunk_size: int = field(
        default=0, metadata={"help": "positions that go through the LLM's head at once (0: by the device)"}
    )


def chunk_size_on(cfg: DistillationConfig, device: torch.device) -> int:
    """Positions that go through the head at once there."""
    return cfg.chunk_size or chunk_size_for(device)


def mean_per_row(values: Tensor, rows: Tensor, counts: Tensor, size: int) -> Tensor:
    """``[size]`` means of ``values`` [N]; ``values[i]`` is one of the ``counts[i]`` of row ``rows[i]``; none: 0."""
    return values.new_zeros(size).index_add(0, rows, values / counts)


class Sums:
    """Sums to log, kept where they were computed until all are read at once.

    Attributes:
        rows: utterances of the batch.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._alpha_sum: Tensor | None = None

    def add(self, name: str, value: Tensor | float) -> None:
        """One more figure."""
        if isinstance(value, Tensor):
            self._sums[name] = value.detach()
        else:
            self._numbers[name] = value

    def mean(self, name: str, values: Tensor, compared: Distillation | Labels) -> Tensor:
        """``[rows]`` means of per-token values [N]; logs ``<name>_sum`` and ``<name>_tokens``."""
        self.add(f"{name}_sum", values.sum())
        self.add(f"{name}_tokens", float(len(values)))
        return mean_per_row(values, compared.rows, compared.counts, self.rows)

    def quantity(self, output: SpeechLlmOutput) -> Tensor | None:
        """``[batch.nrows]`` quantity loss of each utterance, and the count of tokens to log; None without CIF.

        Of the roll-outs of an utterance, which share its speech, the first has it.
        """
        adapter, batch = output.adapter, output.batch
        if adapter.alpha_sum is None:
            return None
        loss = quantity_loss(adapter.alpha_sum, batch.piece_tokens)
        self._alpha_sum = adapter.alpha_sum.detach()
        counted = self._alpha_sum.round().clamp(min=1)
        self.add("quantity_sum", loss.sum())
        self.add("counted", float(len(loss)))
        self.add("count_errors", (counted - batch.piece_tokens).abs().sum())
        return mean_per_row(loss, batch.piece_rows, batch.piece_counts, batch.nrows)

    def read(self, names: Sequence[str], pieces: Sequence[str]) -> dict[str, float]:
        """All figures as Python floats (a tensor or numpy scalar in a meter cannot be loaded with ``weights_only``).

        It waits for the device, once.

        Args:
            names: what must be among them, 0 if it was not added.
            pieces: names of the pieces of speech.

        Raises:
            ValueError: the adapter has collapsed; it names the utterance.
        """
        values = list(self._sums.values())
        alpha = values[0].new_zeros(0) if self._alpha_sum is None else self._alpha_sum
        read: list[float] = torch.cat([torch.stack([v.double() for v in values]), alpha.double()]).tolist()
        alphas = read[len(values) :]
        if alphas and all(map(math.isfinite, alphas)):  # else the loss is no number either, which the update refuses
            check_alpha_sum(alphas, pieces)
        return dict.fromkeys(names, 0.0) | dict(zip(self._sums, read, strict=False)) | self._numbers


def pieces_of(sample: Mapping[str, Any]) -> list[str]:
    """The utterance of each piece of speech in a batch."""
    return [cells["id"] for cells, row in zip(sample["rows"], sample["plan_rows"], strict=True) for _ in row.pieces]


def total(logs: Sequence[Mapping[str, Any]], name: str) -> float:
    """The sum of a figure over batches and processes."""
    return float(sum(log.get(name, 0) for log in logs))


def log_ratio(logs: Sequence[Mapping[str, Any]], name: str, numerator: str, denominator: str, round: int = 4) -> None:
    """Logs a mean where there is something to average."""
    count = total(logs, denominator)
    if count:
        metrics.log_scalar(name, total(logs, numerator) / count, count, round=round)


def anchor(output: AdapterOutput, parameters: Sequence[Tensor] = ()) -> Tensor:
    """0, with a gradient for the adapter and ``parameters``: processes wait for that of every parameter."""
    return sum((parameter.sum() for parameter in parameters), output.embeddings.sum()) * 0.0
