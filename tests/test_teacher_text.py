"""Rows whose teacher reads another text than what is said: nothing is compared at their speech."""

from pathlib import Path
from typing import Any

import generate_responses
import pytest
import torch
from tiny import SENTENCES, write_split
from updates import Case, TinyWorld

from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest, ManifestError, write_manifest
from blspkd_fairseq.generation.responses import ResponseSettings
from blspkd_fairseq.models.blsp_kd import BlspKdModel

SPOKEN = 3  # rows
OTHER = "Say that nobody spoke, please."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlspKdModel, Path]:
    root = tmp_path_factory.mktemp("world")
    return TinyWorld(root / "models").build(Case({}), torch.device("cpu")).eval(), root


def batch(world: tuple[BlspKdModel, Path], name: str, **changed: str) -> dict[str, Any]:
    """Three rows, the cells of the second one changed."""
    model, root = world
    folder = root / name
    manifest = Manifest.load(write_split(folder, "train", SPOKEN, teacher_text="", conversation=""))
    rows: list[dict[str, Any]] = list(manifest)
    rows[1] |= changed
    write_manifest(folder / "train.tsv", rows, manifest.columns)
    data = SpeechTextDataset(Manifest.load(folder / "train.tsv"), model.chat)
    return data.collater([data[i] for i in range(SPOKEN)])


@torch.no_grad()
def test_the_teacher_reads_it_and_the_input_is_compared_elsewhere_only(world: tuple[BlspKdModel, Path]) -> None:
    model, _ = world
    mixed = model(**batch(world, "mixed", teacher_text=OTHER)["net_input"])
    heard = model(**batch(world, "heard")["net_input"])
    read = model(**batch(world, "read", src_text=OTHER)["net_input"])
    assert mixed.batch.student is not mixed.batch.teacher
    elsewhere = heard.input.rows != 1
    for name in ("student", "teacher", "targets", "rows", "counts"):
        expected = getattr(heard.input, name)[elsewhere]
        torch.testing.assert_close(getattr(mixed.input, name), expected, rtol=1e-4, atol=1e-5)
    second = mixed.response.rows == 1
    torch.testing.assert_close(mixed.response.student, heard.response.student, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.response.teacher[second], read.response.teacher[second], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.response.teacher[~second], heard.response.teacher[~second], rtol=1e-4, atol=1e-5)
    # The warm-up tells each embedding its token of the transcript, there as elsewhere.
    assert mixed.batch.transcript.targets.tolist() == heard.batch.transcript.targets.tolist()
    assert mixed.batch.piece_tokens.tolist() == heard.batch.piece_tokens.tolist()


@torch.no_grad()
def test_the_same_text_again_changes_nothing(world: tuple[BlspKdModel, Path]) -> None:
    plain, again = batch(world, "plain"), batch(world, "again", teacher_text=SENTENCES[1])
    assert torch.equal(plain["net_input"]["plan"], again["net_input"]["plan"])


def test_a_conversation_has_no_teacher_text(world: tuple[BlspKdModel, Path]) -> None:
    talk = '[{"role": "user", "content": [{"type": "audio", "audio": "audio/train-1.flac", "text": "Hello."}]}]'
    with pytest.raises(ManifestError, match=r"line 3 \(id train-1\).*teacher_text.*conversation"):
        batch(world, "talk", teacher_text=OTHER, conversation=talk)


def test_responses_answer_what_the_teacher_reads() -> None:
    row = {"id": "a", "src_text": "...", "teacher_text": OTHER}
    assert generate_responses.request(ResponseSettings("llm"), row).text == OTHER
    assert generate_responses.request(ResponseSettings("llm"), row | {"teacher_text": " "}).text == "..."
