"""Rows that have more than the LLM reads or the encoder hears: named, and the others go on."""

import json
from pathlib import Path

import pytest
import torch
from commands import fairseq, train
from tiny import SENTENCES, read_jsonl, save_llm, save_whisper, tiny_model, write_speech
from tokenizers_util import bpe_tokenizer

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.conversation import read_messages
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest, ManifestError, write_manifest
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_speech, answer_where_it_fits, context_of
from blspkd_fairseq.generation.hearing import hear
from blspkd_fairseq.generation.responses import HuggingFaceBackend, Request, ResponseSettings

CONTEXT = 512  # of the tiny LLM


def conversation(text: str, *audio: str) -> str:
    parts = [{"type": "audio", "audio": name, "text": SENTENCES[0]} for name in audio]
    return json.dumps([{"role": "user", "content": [{"type": "text", "text": text}, *parts]}])


def rows_of(folder: Path, **conversations: str) -> list[dict[str, object]]:
    """A row of one turn, and some that are conversations."""
    samples = write_speech(folder / "a.flac", 0.8, 1)
    row = {"id": "plain", "audio": "a.flac", "n_frames": samples, "src_text": SENTENCES[0], "tgt_text": SENTENCES[1]}
    others = [
        {
            **row,
            "id": name,
            "audio": "",
            "src_text": "",
            "conversation": text,
            "n_frames": text.count("a.flac") * samples,
        }
        for name, text in conversations.items()
    ]
    return [{**row, "conversation": ""}, *others, {**row, "id": "last", "conversation": ""}]


def test_a_conversation_without_room_gets_a_reason_and_the_others_their_answers(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    assert context_of(model.model) == CONTEXT
    chat, options = model.chat_format, DecodingOptions(max_new_tokens=6)
    waveforms = torch.randn(4, 12_000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12_000, 9_000, 8_000, 12_000])
    long = chat.render(read_messages(conversation("word " * CONTEXT, "a", "b"))[0])
    prompts = ["Repeat: {speech}", long, "{speech}"]
    found = answer_where_it_fits(model.model, chat, hear(model.model, waveforms, lengths), prompts, options)
    assert isinstance(found[1], str) and f"the LLM reads {CONTEXT}" in found[1]
    alone = answer_speech(model.model, chat, waveforms[[0, 3]], lengths[[0, 3]], [prompts[0], prompts[2]], options)
    assert [found[0], found[2]] == alone


def test_an_answer_ends_with_the_context(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    model.model.llm.config.max_position_embeddings = 80
    prompt = "Say " + "a " * 4 + "{speech}"
    [[answer]] = answer_speech(
        model.model, model.chat_format, torch.randn(1, 8_000), torch.tensor([8_000]), [prompt],
        DecodingOptions(max_new_tokens=200, min_new_tokens=100),
    )  # fmt: skip
    assert 0 < len(answer.ids) < 40  # its prompt has more than half


def test_training_names_what_it_cannot_use(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, long=conversation("word " * CONTEXT, "a.flac"), many=conversation("", *["a.flac"] * 40))
    write_manifest(tmp_path / "train.tsv", rows, rows[0])
    manifest, chat = Manifest.load(tmp_path / "train.tsv"), ChatFormat(bpe_tokenizer())
    data = SpeechTextDataset(manifest, chat, context=CONTEXT)
    with pytest.raises(ManifestError, match=r"line 3 \(id long\): it has \d+ tokens, response included.*reads 512"):
        data[1]
    free = SpeechTextDataset(manifest, chat)
    assert len(free[2].waveforms) == 40  # 32 s in pieces of .8 s: each is heard by itself
    lenient = SpeechTextDataset(manifest, chat, context=CONTEXT, skip_bad_audio=True)
    assert "reads 512" in lenient[1].reason and not hasattr(lenient[0], "reason")
    with pytest.raises(ManifestError, match=r"line 2 \(id plain\): 0.8 s of audio are longer than 0.5 s"):
        SpeechTextDataset(manifest, chat, max_seconds=0.5)


def test_errors_of_the_chat_template_name_their_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, odd=conversation("Hear: ", "a.flac"))
    write_manifest(tmp_path / "train.tsv", rows, rows[0])
    refuses = "{% if 'Hear' in messages[-1].content %}{{ raise_exception('no hearing') }}{% endif %}"
    template = refuses + "{{ messages[-1].content }}<|im_end|>x"
    data = SpeechTextDataset(
        Manifest.load(tmp_path / "train.tsv"), ChatFormat(bpe_tokenizer(), chat_template=template), prompt="{speech}"
    )
    with pytest.raises(ManifestError, match=r"line 3 \(id odd\): .*no hearing"):
        data[1]


def test_one_row_without_room_costs_no_other_its_answer(tmp_path: Path) -> None:
    save_llm(tmp_path / "llm")
    save_whisper(tmp_path / "whisper")
    long = conversation("word " * CONTEXT, "a.flac")
    two = conversation("Hear: ", "a.flac", "a.flac")
    whole = rows_of(tmp_path, two=two)
    write_manifest(tmp_path / "train.tsv", whole, whole[0])
    write_manifest(tmp_path / "valid.tsv", whole[1:2], whole[0])
    options = ["--max-update", 1, "--eval-wer", "--eval-bleu", "--eval-max-tokens", 4]
    log = train(tmp_path, tmp_path / "save", tmp_path / "llm", tmp_path / "whisper", *options)
    assert '"valid_bleu"' in log or "bleu" in log
    assert "wer" not in log.split("begin validation")[-1]  # there was nothing to repeat
    rows = rows_of(tmp_path, long=long, two=two)
    write_manifest(tmp_path / "test.tsv", rows, rows[0])
    with pytest.raises(Exception, match="1 of 4"):
        fairseq("generate", tmp_path, "--gen-subset", "test", "--path", tmp_path / "save" / "checkpoint_last.pt",
                "--max-len-b", 4, "--results-path", tmp_path / "results")  # fmt: skip
    found = {one["id"]: one for one in read_jsonl(tmp_path / "results" / "generate-test.jsonl")}
    assert [name for name, one in found.items() if one.get("hypothesis")] == ["plain", "two", "last"]


def test_a_response_that_cannot_be_asked_for_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ResponseSettings(llm=str(save_llm(tmp_path / "llm")), prompt="continue: {speech}", max_new_tokens=4)
    backend = HuggingFaceBackend(settings)
    texts = {"a": "the cat", "b": "sat " * 600, "c": "on"}
    requests = [Request(name, text, settings.prompt) for name, text in texts.items()]
    answers = backend.answer(requests)
    assert [one.id for one in answers] == ["a", "b", "c"] and (answers[1].tgt_text == "") and answers[0].tgt_text
    assert "no response to b" in caplog.text
    assert answers[0] == backend.answer(requests[:1])[0]
