"""KL at given responses: told the transcript's length, and with the adapter's own count."""

from __future__ import annotations

import pytest
import tiny
import torch

from blspkd_fairseq import BlspKd
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.generation.teacher_forced import collate, teacher_forced
from blspkd_fairseq.modules.distillation_loss import linear_kl_div


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlspKd, SpeechTextDataset]:
    root = tmp_path_factory.mktemp("forced")
    tiny.write_split(root, "test", 5)
    model = tiny.tiny_model(root)
    return model, SpeechTextDataset(Manifest.load(root / "test.tsv"), model.chat_format, audio_root=root)


def test_the_own_count_is_that_of_answering(setting: tuple[BlspKd, SpeechTextDataset]) -> None:
    """Utterance by utterance, as many embeddings as the adapter gives when nobody tells it how many."""
    model, data = setting
    batch = collate(data, range(5), model.device)
    measured = teacher_forced(model.model, batch)
    inner, head = model.model, model.model.head
    for index, row in enumerate(batch["plan_rows"]):
        inputs = collate(data, [index], model.device)["net_input"]
        with torch.no_grad():
            speech = inner.adapt(inputs["src_tokens"], inputs["src_lengths"]).embeddings
        before, after, response = (
            torch.tensor([list(ids)]) for ids in (row.segments[0], row.segments[2], row.response)
        )
        assert measured["counted"][index] == speech.shape[1]
        text = {"prefix": before[0]}
        for name, ids in (("before", torch.zeros(1, 0)), ("transcript", torch.tensor([list(row.transcripts[0])])),
                          ("after", after), ("response", response)):  # fmt: skip
            text |= {name: ids.long(), f"{name}_lengths": torch.tensor([ids.shape[1]])}
        with torch.no_grad():
            out = inner(inputs["src_tokens"], inputs["src_lengths"], text, ("response",), count_tokens=True).response
            kl = linear_kl_div(out.student, out.teacher, *head)
        assert measured["free_response_kl"][index] == pytest.approx(float(kl.sum()), rel=1e-3)
        assert measured["free_response_tokens"][index] == measured["response_tokens"][index] == response.shape[1]


def test_it_differs_from_the_kl_of_the_told_length(setting: tuple[BlspKd, SpeechTextDataset]) -> None:
    model, data = setting
    measured = teacher_forced(model.model, collate(data, range(5), model.device))
    wrong = [i for i in range(5) if measured["counted"][i] != measured["tokens"][i]]
    assert wrong and all(
        measured["free_response_kl"][i] != pytest.approx(measured["response_kl"][i], rel=1e-3) for i in wrong
    )
