"""Conversations of several turns and several pieces of speech: read, rendered, planned, trained on and answered."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fairseq, load, train
from tiny import SENTENCES, read_jsonl, save_llm, save_whisper, write_speech
from tokenizers_util import bpe_tokenizer

import blspkd_fairseq
from blspkd_fairseq.cli import responses
from blspkd_fairseq.cli.merge import merge
from blspkd_fairseq.data.batch import PlanRow, SpeechLengths, plan_batch
from blspkd_fairseq.data.chat import ChatError, ChatFormat
from blspkd_fairseq.data.conversation import ConversationError, Speech, Turn, one_turn, read_conversation, read_messages
from blspkd_fairseq.data.manifest import Manifest, ManifestError, write_manifest
from blspkd_fairseq.data.validate import validate


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def heard(audio: str, text: str = "") -> dict[str, str]:
    return {"type": "audio", "audio": audio} | ({"text": text} if text else {})


TWO_TURNS = [
    said(heard("a.flac", SENTENCES[0]), " In short?"),
    {"role": "assistant", "content": "The light.<|im_end|>"},
    said("And this: ", heard("b.flac", SENTENCES[1]), heard("c.flac", SENTENCES[2])),
]


# ---- reading and rendering -----------------------------------------------------------------------------------------


def test_messages_are_taken_apart() -> None:
    turns, pieces = read_messages(json.dumps(TWO_TURNS))
    assert turns == (
        Turn("user", (Speech(0), " In short?")),
        Turn("assistant", ("The light.<|im_end|>",)),
        Turn("user", ("And this: ", Speech(1), Speech(2))),
    )
    assert [piece.audio for piece in pieces] == ["a.flac", "b.flac", "c.flac"]
    assert [piece.transcript for piece in pieces] == list(SENTENCES[:3])
    assert one_turn("Repeat: {speech}.") == (Turn("user", ("Repeat: ", Speech(0), ".")),)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ([said("\ud83d")], "message 1 holds half of a surrogate pair"),
        ([said({"type": "audio", "audio": "a.wav", "text": "a \udc00"})], "message 1 holds half of a surrogate pair"),
        ([], "at least one"),
        (["hello"], "message 1 must be an object with a role"),
        ([{"role": "robot", "content": "x"}], "message 1 must be an object with a role"),
        ([{"role": "user", "content": ""}], "message 1 is empty"),
        ([{"role": "user", "content": 3}], "content must be a text or a list"),
        ([said({"type": "image"})], "a part must be"),
        ([said({"type": "audio"})], "a part must be"),
        ([said("x"), said("y")], "take turns"),
        ([said("x"), said("y", role="assistant")], "take turns, the user first .* and last"),
        ([said("x", role="system")], "take turns"),
        ([said("x"), said(heard("a", "b"), role="assistant"), said("y")], "message 2: only the user speaks"),
    ],
)
def test_what_is_no_conversation_is_said(messages: Any, message: str) -> None:
    with pytest.raises(ConversationError, match=message):
        read_messages(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [([said("x")], "no piece of audio"), ([said(heard("a.flac"))], "no transcript"), ([said(heard(" ", "x"))], "path")],
)
def test_a_manifest_wants_speech_with_transcripts(messages: Any, message: str) -> None:
    with pytest.raises(ConversationError, match=message):
        read_conversation(json.dumps(messages))


def test_a_conversation_is_rendered_by_the_template_and_no_text_makes_a_control_token() -> None:
    chat = ChatFormat(bpe_tokenizer())
    segments = chat.render(read_messages(TWO_TURNS)[0])
    assert [one for one in segments if isinstance(one, Speech)] == [Speech(0), Speech(1), Speech(2)]
    texts = ["|" if isinstance(one, Speech) else chat.tokenizer.decode(one) for one in segments]
    assert "".join(texts) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n| In short?<|im_end|>\n"
        "<|im_start|>assistant\nThe light.<|im_end|><|im_end|>\n<|im_start|>user\nAnd this: ||<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = [token for one in segments if not isinstance(one, Speech) for token in one]
    assert ids.count(chat.end_of_turn_id) == 4  # the template's, and not the one that the answer spells
    # An earlier answer has the ids that it had when it was given.
    answer = chat.encode_text("The light.<|im_end|>")
    assert any(ids[i : i + len(answer)] == answer for i in range(len(ids)))


def test_one_turn_is_the_prompt_and_a_system_message_takes_the_place_of_the_default() -> None:
    chat = ChatFormat(bpe_tokenizer(), system="Be brief.")
    before, speech, after = chat.render(one_turn("Repeat: {speech}"))
    assert (before, after) == chat.prompt_ids("Repeat: {speech}") and speech == Speech(0)
    own = chat.render((Turn("system", ("Be kind.",)), Turn("user", (Speech(0),))))
    assert "Be kind." in chat.decode(own[0]) and "brief" not in chat.decode(own[0])
    chat.render(one_turn("{speech}"))[0].clear()
    assert chat.render(one_turn("{speech}"))[0]  # results are not shared


def test_a_template_that_loses_a_turn_is_refused() -> None:
    chat = ChatFormat(bpe_tokenizer(), chat_template="{{ messages[-1].content }}<|im_end|>")
    with pytest.raises(ChatError, match="does not show what the user says once"):
        chat.render(read_messages(TWO_TURNS)[0])


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_a_plan_puts_every_token_in_its_place() -> None:
    rows = [
        PlanRow([[1, 2, 3], Speech(0), [4], Speech(1), [5, 6]], [[10, 11], [12]], [9_600, 6_400], [20, 21], [0, 1]),
        PlanRow([[1, 2, 7], Speech(0), [5, 6]], [[13, 14, 15]], [32_000], [22], [2]),
    ]
    batch = plan_batch(rows, end_of_turn=21)
    layout = batch.student
    assert layout is batch.teacher and layout.speech == 6 and layout.rows.prefix == 2
    assert layout.ids[layout.rows.order].tolist() == [
        1, 2, 3, 10, 11, 4, 12, 5, 6, 20, 21, 7, 13, 14, 15, 5, 6, 22,
    ]  # fmt: skip
    assert layout.positions[layout.rows.order].tolist() == [0, 1, *range(2, 11), *range(2, 9)]
    assert layout.rows.order[layout.rows.place].tolist() == list(range(18))
    assert layout.source.tolist() == [0, 1, 3, 6, 7, 8]  # pieces of up to 3 embeddings
    assert batch.transcript.targets.tolist() == [10, 11, 12, 13, 14, 15]
    assert batch.transcript.rows.tolist() == [0, 0, 0, 1, 1, 1] and batch.transcript.counts.tolist() == [3] * 6
    assert layout.ids[layout.response].tolist() == [6, 20, 6]  # the tokens before those of the responses
    assert batch.response.targets.tolist() == [20, 21, 22] and batch.ends.tolist() == [1]
    assert batch.piece_rows.tolist() == [0, 0, 1] and batch.piece_counts.tolist() == [2, 2, 1]
    short = plan_batch(rows, with_response=False)
    assert short.student.ids[short.student.rows.order].tolist() == [1, 2, 3, 10, 11, 4, 12, 7, 13, 14, 15]
    strided = plan_batch(rows, SpeechLengths(halvings=3))  # 30, 20 and 100 frames
    assert strided.pieces.counts == (4, 3, 13) and strided.student.speech == 20 and strided.teacher.speech == 6
    again = strided.flatten()[1].build(strided.flatten()[0])
    assert (
        torch.equal(again.student.ids, strided.student.ids) and again.teacher.rows.counts == strided.teacher.rows.counts
    )
    joined = batch.flatten()[1].build(batch.flatten()[0])
    assert joined.student is joined.teacher


# ---- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single turns and conversations in one manifest."""
    root = tmp_path_factory.mktemp("conversations")
    save_llm(root / "llm")
    save_whisper(root / "whisper")
    samples = {name: write_speech(root / f"{name}.flac", 0.7 + 0.1 * i, i) for i, name in enumerate("abcd")}
    columns = ("id", "audio", "n_frames", "src_text", "tgt_text", "conversation")
    rows = [
        ("one", "d.flac", samples["d"], SENTENCES[3], SENTENCES[4], ""),
        ("two", "", sum(samples[name] for name in "abc"), "", SENTENCES[5], json.dumps(TWO_TURNS)),
        ("three", "", samples["a"], "", SENTENCES[6], json.dumps([said("Hear: ", heard("a.flac", SENTENCES[0]))])),
    ]
    for split in ("train", "valid"):
        write_manifest(root / f"{split}.tsv", [dict(zip(columns, row, strict=True)) for row in rows], columns)
    return root


def test_conversations_train_resume_and_are_answered(data: Path, tmp_path: Path) -> None:
    def run(save: Path, updates: int) -> str:
        return train(data, save, data / "llm", data / "whisper", "--max-update", updates, "--batch-size", 2,
                     "--eval-wer", "--eval-bleu", "--eval-max-tokens", 4)  # fmt: skip

    log = run(tmp_path / "whole", 4)
    assert "input_kl" in log and "response_kl" in log and "wer" in log and "bleu" in log
    run(tmp_path / "parts", 3)
    run(tmp_path / "parts", 4)
    one, other = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("whole", "parts"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=2e-6, rtol=1e-5)
    fairseq(
        "generate", data, "--gen-subset", "valid", "--path", tmp_path / "whole" / "checkpoint_last.pt", "--beam", 2,
        "--max-len-b", 6, "--batch-size", 2, "--results-path", tmp_path / "results",
    )  # fmt: skip
    answers = {one["id"]: one["hypothesis"] for one in read_jsonl(tmp_path / "results" / "generate-valid.jsonl")}
    assert answers.keys() == {"one", "two", "three"}

    model = blspkd_fairseq.BlspKd.from_pretrained(tmp_path / "whole", llm_dtype="float32")
    messages = [json.loads(json.dumps(TWO_TURNS).replace('.flac"', '.flac"').replace('"a.', f'"{data}/a.')
                           .replace('"b.', f'"{data}/b.').replace('"c.', f'"{data}/c.')),
                [said("Hear: ", heard(f"{data}/a.flac"))]]  # fmt: skip
    options = {"beam": 2, "max_new_tokens": 6}
    assert model.generate(messages=messages, **options) == [answers["two"], answers["three"]]
    assert model.generate(messages=messages[0], **options) == answers["two"]
    assert isinstance(model.generate(messages=[said("Hello?")], **options), str)  # nothing is heard
    assert model.generate(messages=[said("Hear: ", heard(f"{data}/a.flac"))], **options) == model.generate(
        f"{data}/a.flac", "Hear: {speech}", **options
    )


def test_validation_reads_conversations(data: Path, tmp_path: Path) -> None:
    findings = validate(data, audio="all")
    assert [p for p in findings.problems if "shares" not in p] == []
    rows = [{**row, "teacher_text": ""} for row in Manifest.load(data / "train.tsv")]
    rows[1]["n_frames"] = "100"
    rows[2] |= {"conversation": json.dumps([said("nothing is heard")]), "teacher_text": "Say that nobody spoke."}
    write_manifest(tmp_path / "train.tsv", rows)
    problems = "\n".join(validate(tmp_path, audio="all", audio_root=data).problems)
    assert re.search(r"line 3 \(id two\).*n_frames is 100", problems)
    assert re.search(r"line 4 \(id three\).*no piece of audio", problems)
    assert re.search(r"line 4 \(id three\): teacher_text stands for one piece of speech", problems)
    assert "line 2" not in problems


def test_rows_that_cannot_be_used_are_named(data: Path, tmp_path: Path) -> None:
    for cells, error, message in (
        ({"conversation": "[]"}, ManifestError, r"line 3 \(id two\): a conversation must be a list"),
        ({"conversation": ""}, ManifestError, r"line 3 \(id two\): it has neither a conversation nor src_text"),
        ({"n_frames": "5"}, ValueError, r"line 3 \(id two\): n_frames is 5, but its 3 pieces of audio have"),
    ):
        rows = [dict(row) for row in Manifest.load(data / "train.tsv")]
        rows[1] |= cells
        write_manifest(tmp_path / "train.tsv", rows)
        with pytest.raises(error, match=message):
            train(tmp_path, tmp_path / "save", data / "llm", data / "whisper", "--audio-root", data, "--max-update", 2,
                  "--disable-validation")  # fmt: skip


def test_merged_they_are_heard_where_they_were(data: Path, tmp_path: Path) -> None:
    single = {"id": "four", "audio": str(data / "a.flac"), "n_frames": 11_200, "src_text": "a", "tgt_text": "b"}
    taught = {**single, "id": "five", "teacher_text": "Say that nobody spoke."}
    for name, row in (("single", single), ("taught", taught)):
        write_manifest(tmp_path / f"{name}.tsv", [row])
    merge([tmp_path / "single.tsv", data / "train.tsv", tmp_path / "taught.tsv"], tmp_path / "all/train.tsv")
    merged = Manifest.load(tmp_path / "all/train.tsv")
    kept = {"four": single, **{row["id"]: row for row in Manifest.load(data / "train.tsv")}, "five": taught}
    assert [row["id"] for row in merged] == list(kept)
    for row in merged:
        before = kept[row["id"]]
        assert row["teacher_text"] == before.get("teacher_text", "")
        assert bool(row["conversation"]) == bool(before.get("conversation")) != bool(row["audio"])
        expected = str(before.get("conversation", "")).replace('"audio": "', f'"audio": "{data.resolve()}/')
        assert row["conversation"] == "" == expected or json.loads(row["conversation"]) == json.loads(expected)
    assert validate(tmp_path / "all", audio="all", audio_root=Path("/")).problems == []
    broken = [{**row, "conversation": "["} for row in Manifest.load(data / "train.tsv")]
    write_manifest(tmp_path / "broken.tsv", broken)
    with pytest.raises(ManifestError, match=r"broken.tsv line 2 \(id one\): a conversation must be JSON"):
        merge([tmp_path / "broken.tsv"], tmp_path / "none.tsv")
    assert not (tmp_path / "none.tsv").exists()


def test_responses_are_not_made_of_a_part_of_them(data: Path, tmp_path: Path) -> None:
    rows = [{**row, "src_text": "what is said last"} for row in Manifest.load(data / "train.tsv")]
    for texts in ({}, {"src_text": ""}):
        write_manifest(tmp_path / "in.tsv", [{**row, **texts} for row in rows])
        words = ["--input", tmp_path / "in.tsv", "--output", tmp_path / "out.tsv", "--llm", data / "llm"]
        with pytest.raises(ManifestError, match=r"in.tsv line 3 \(id two\): a conversation's response comes with it"):
            responses.main([str(word) for word in words])
    assert [path.name for path in tmp_path.iterdir()] == ["in.tsv"]
