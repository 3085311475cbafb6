"""How near the student is to the teacher at given responses: KL, agreement and token counts of each utterance."""

from collections.abc import Sequence
from typing import Any

import torch
from fairseq.utils import apply_to_sample
from torch import Tensor

from blspkd_fairseq.data.batch import Layout, pad_ids
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.modules.distillation_loss import linear_kl_div_with_agreement
from blspkd_fairseq.modules.speech_llm import ChatLLM, Distillation, SpeechLLM


def collate(data: SpeechTextDataset, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Rows of a data set as a batch on a device."""
    batch: dict[str, Any] = apply_to_sample(lambda tensor: tensor.to(device), data.collater([data[i] for i in rows]))
    return batch


@torch.no_grad()
def teacher_forced(model: SpeechLLM, batch: dict[str, Any]) -> dict[str, list[float]]:
    """Measures a collated batch, speech being told how many tokens its transcript has, and counting them itself.

    Returns:
        Of each utterance: ``<position>_kl`` (the sum over its tokens, nats), ``<position>_agree`` (tokens at which both
        find the same one likeliest) and ``<position>_tokens`` for the positions "input" (with an adapter that has an
        embedding for each token) and "response"; with CIF, ``counted`` tokens and the transcript's ``tokens``, and the
        position "free_response", where the adapter counts as it does when it answers: what the others leave out.
    """
    inputs = batch["net_input"]
    one_to_one = model.adapter.one_to_one
    positions = ("input", "response") if one_to_one else ("response",)
    plan = inputs["spec"].build(inputs["plan"])
    output = model(inputs["src_tokens"], inputs["src_lengths"], plan, positions, samples=inputs["samples"])
    measured: dict[str, list[float]] = {}
    for position, compared in (("input", output.input), ("response", output.response)):
        if compared is not None:
            measured |= _of_rows(model, position, compared, batch["nsentences"])
    if output.adapter.alpha_sum is not None:
        counted = output.adapter.alpha_sum.round().clamp(min=1)
        measured["counted"] = sums_of_rows(counted, plan.piece_rows, batch["nsentences"])
        measured["tokens"] = sums_of_rows(plan.piece_tokens, plan.piece_rows, batch["nsentences"])
        free = model(
            inputs["src_tokens"], inputs["src_lengths"], _texts(batch), ("response",), count_tokens=True,
            samples=inputs["samples"],
        )  # fmt: skip
        measured |= _of_rows(model, "free_response", free.response, batch["nsentences"])
    return measured


def _texts(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The ids of a batch, from which a plan is made once the adapter has counted.

    Raises:
        ValueError: a row is a conversation of several turns.
    """
    rows = batch["plan_rows"]
    if any(len(row.transcripts) != 1 or len(row.segments) != 3 for row in rows):
        raise ValueError("a conversation of several turns cannot be measured: keep to single turns")
    parts = {
        "before": [row.segments[0] for row in rows],
        "transcript": [row.read[0] for row in rows],  # the student hears as many as the adapter counts
        "after": [row.segments[2] for row in rows],
        "response": [row.response for row in rows],
    }
    texts = {"prefix": torch.zeros(0, dtype=torch.long)}
    for name, ids in parts.items():
        texts |= {name: pad_ids(ids), f"{name}_lengths": torch.tensor([len(one) for one in ids])}
    return texts


def _of_rows(model: SpeechLLM, position: str, compared: Distillation, rows: int) -> dict[str, list[float]]:
    assert compared.teacher is not None
    kl, agrees = linear_kl_div_with_agreement(
        compared.student, compared.teacher, *model.head, transform=model.logit_transform
    )
    values = {"kl": kl, "agree": agrees, "tokens": torch.ones_like(kl)}
    return {f"{position}_{name}": sums_of_rows(one, compared.rows, rows) for name, one in values.items()}


@torch.no_grad()
def text_kl(model: ChatLLM, layout: Layout) -> Tensor:
    """``[N]`` KL of the trained LLM reading text against the base LLM, at the positions that predict responses."""
    student, teacher = (read(layout).index_select(0, layout.response) for read in (model.read, model.teach))
    return linear_kl_div_with_agreement(student, teacher, *model.head, transform=model.logit_transform).kl


def sums_of_rows(values: Tensor, rows: Tensor, count: int) -> list[float]:
    """Sums of ``values`` [N] over the ``count`` rows that they belong to, to six digits."""
    totals = torch.zeros(count, dtype=torch.float64).index_add(0, rows.cpu(), values.double().cpu())
    return [round(value, 6) for value in totals.tolist()]
