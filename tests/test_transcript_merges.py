"""Transcripts in frequent tokens: fewer merges of BPE, and a teacher that reads as ever."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fairseq, load, train
from tiny import SENTENCES, save_llm, save_whisper, write_split
from tokenizers_util import bpe_tokenizer, sentencepiece_tokenizer

from blspkd_fairseq import BlspKd
from blspkd_fairseq.data.batch import Layout
from blspkd_fairseq.data.bpe import common_ends, with_fewer_merges
from blspkd_fairseq.data.chat import ChatError, ChatFormat
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.generation.teacher_forced import teacher_forced
from blspkd_fairseq.modules.build import SpeechLlmConfig, adopt_options, build_speech_llm
from blspkd_fairseq.modules.speech_llm import SpeechLLM

MERGES = 12


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    words = [*" ".join(SENTENCES).split(), "Ünusual", "日本", "<|im_end|>", "  ", "don't", "4711", "\n", "🎙️"]
    return [" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(count)]


def merges_of(tokenizer: Any) -> int:
    return len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_fewer_merges_cut_every_token_and_join_none(kind: str, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(texts=SENTENCES) if kind == "bpe" else sentencepiece_tokenizer(tmp_path, texts=SENTENCES)
    whole = ChatFormat(tokenizer)
    counts = []
    for merges in (1, MERGES, merges_of(tokenizer)):
        chat = pickle.loads(pickle.dumps(ChatFormat(tokenizer, transcript_merges=merges)))
        pieces = [chat.encode_transcript(text) for text in random_texts(60)]
        tokens = [whole.encode_text(text) for text in random_texts(60)]
        assert [chat.encode_text(text) for text in random_texts(60)] == tokens
        assert [chat.decode(ids) for ids in pieces] == [chat.decode(ids) for ids in tokens]
        assert not any(whole.control_ids.intersection(ids) for ids in pieces)
        for fine, coarse in zip(pieces, tokens, strict=True):
            assert [place for _, place in chat.common_ends(fine, coarse)] == list(range(len(coarse)))
        counts.append(sum(map(len, pieces)))
    assert counts[0] > counts[1] > counts[2] == sum(map(len, tokens))
    assert whole.encode_transcript("Play some music.") == whole.encode_text("Play some music.")


def test_whole_words_of_the_vocabulary_are_cut_where_merges_are_ignored() -> None:
    tokenizer = bpe_tokenizer(texts=SENTENCES)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    chat = ChatFormat(tokenizer, transcript_merges=1)
    word = max((name for name in tokenizer.get_vocab() if name.isalpha() and name.isascii()), key=len)
    assert len(chat.encode_transcript(word)) > len(chat.encode_text(word)) == 1


def test_common_ends_are_those_of_the_characters() -> None:
    rng = random.Random(2)
    for _ in range(200):
        text = "".join(rng.choices("ab ", k=rng.randint(1, 20)))
        cuts = [sorted({*rng.sample(range(1, len(text) + 1), rng.randint(0, len(text))), len(text)}) for _ in range(2)]
        first, second = ([text[a:b] for a, b in zip([0, *ends], ends)] for ends in cuts)  # noqa: B905
        expected = [
            (i, j)
            for j in range(len(second))
            for i in range(len(first))
            if "".join(first[: i + 1]) == "".join(second[: j + 1])
        ]
        assert common_ends(first, second) == expected
    assert common_ends(["bal", "con", "y", "was"], ["balcony", "was"]) == [(2, 0), (3, 1)]


@pytest.mark.parametrize("merges", [-1, 10**6])
def test_more_merges_than_there_are_is_refused(merges: int) -> None:
    with pytest.raises(ChatError, match=rf"--transcript-merges {merges}: .* merges: give 1 to"):
        ChatFormat(bpe_tokenizer(), transcript_merges=merges)


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChatError, match=r"--transcript-merges 5: .* has no merges \(Unigram, not BPE\)"):
        ChatFormat(sentencepiece_tokenizer(tmp_path, "unigram"), transcript_merges=5)
    with pytest.raises(ValueError, match="no merges"):
        with_fewer_merges(sentencepiece_tokenizer(tmp_path, "unigram"), 5)


# ---- model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merges")
    save_llm(folder / "llm")
    save_whisper(folder / "whisper")
    for split in ("train", "valid"):
        write_split(folder / "data", split, 8)
    return folder


@torch.no_grad()
def test_the_teacher_reads_the_llms_own_tokens_and_words_are_compared_where_they_end(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SpeechLlmConfig(
        speech_encoder=str(world / "whisper"), llm=str(world / "llm"), llm_dtype="float32", adapter_heads=2,
        adapter_pre_layers=1, adapter_post_layers=1, transcript_merges=MERGES,
    )  # fmt: skip
    speech_llm, chat = build_speech_llm(config)
    speech_llm.eval()
    data = SpeechTextDataset(Manifest.load(world / "data/train.tsv"), chat)
    sample = data.collater([data[i] for i in range(3)])
    inputs = {name: sample["net_input"][name] for name in ("src_tokens", "src_lengths", "samples")}
    batch = sample["net_input"]["spec"].build(sample["net_input"]["plan"])
    output = speech_llm(inputs["src_tokens"], inputs["src_lengths"], batch, samples=inputs["samples"])
    decoder, embed = speech_llm.llm.get_decoder(), speech_llm.embed
    speech = iter(output.adapter.embeddings)
    student, teacher, targets, answers = [], [], [], []
    for row in sample["plan_rows"]:
        (pieces,), (tokens,) = row.transcripts, row.taught
        assert chat.decode(pieces) == chat.decode(tokens) and len(pieces) > len(tokens)
        at = next(i for i, one in enumerate(row.segments) if isinstance(one, Speech))
        before, after = list(row.segments[at - 1]), [*row.segments[at + 1], *row.response]
        heard = torch.cat([embed(torch.tensor(before)), next(speech)[: len(pieces)], embed(torch.tensor(after))])
        hearing = decoder(inputs_embeds=heard[None]).last_hidden_state[0]
        reading = decoder(input_ids=torch.tensor([[*before, *tokens, *after]])).last_hidden_state[0]
        ends = [next(n for n in range(1, len(pieces) + 1) if chat.decode(pieces[:n]) == chat.decode(tokens[: i + 1]))
                for i in range(len(tokens))]  # fmt: skip
        student += [hearing[len(before) + end - 1] for end in ends]
        teacher += list(reading[len(before) : len(before) + len(tokens)])
        targets += tokens
        answers += list(reading[-len(row.response) - 1 : -1])
    for found, expected in (
        (output.input.student, torch.stack(student)),
        (output.input.teacher, torch.stack(teacher)),
        (output.response.teacher, torch.stack(answers)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert output.input.targets.tolist() == targets
    # Where the adapter counts by itself, the teacher reads the same.
    by_hand = SpeechLLM.teach
    read: list[list[int]] = []

    def teach(self: SpeechLLM, layout: Layout) -> torch.Tensor:
        read.append(layout.ids[: layout.speech].tolist())
        return by_hand(self, layout)

    monkeypatch.setattr(SpeechLLM, "teach", teach)
    measured = teacher_forced(speech_llm, sample)
    assert read == [targets, targets] and len(measured["free_response_kl"]) == 3
    assert measured["input_tokens"] == [len(row.taught[0]) for row in sample["plan_rows"]]
    # Each embedding stands for a token of the transcript as it is written for the adapter.
    written = [token for row in sample["plan_rows"] for token in row.transcripts[0]]
    assert output.batch.transcript.targets.tolist() == written
    assert output.adapter.lengths.tolist() == [len(row.transcripts[0]) for row in sample["plan_rows"]]


def test_who_trains_on_takes_it_over() -> None:
    config = SpeechLlmConfig()
    assert adopt_options(config, {"transcript_merges": MERGES}) == {"transcript_merges": MERGES}
    given = SpeechLlmConfig(transcript_merges=7)
    assert adopt_options(given, {"transcript_merges": MERGES}) == {} and given.transcript_merges == 7


@pytest.mark.parametrize("warm_up", [True, False])
def test_it_trains_resumes_and_is_used(world: Path, tmp_path: Path, warm_up: bool) -> None:
    options = ("--transcript-merges", MERGES, "--max-update", 2)
    if warm_up:
        terms = "--token-ce-weight 1 --token-vocabulary train --input-kl-weight 0 --response-kl-weight 0"
        options += tuple(terms.split())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(world / "data", whole, world / "llm", world / "whisper", *options)
    train(world / "data", parts, world / "llm", world / "whisper", *options, "--max-update", 1)
    train(world / "data", parts, world / "llm", world / "whisper", *options)
    first, second = (load(folder / "checkpoint_last.pt")["model"] for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)

    model = BlspKd.from_pretrained(whole / "checkpoint_last.pt")
    model.save_pretrained(tmp_path / "saved")
    again = BlspKd.from_pretrained(tmp_path / "saved")
    assert model.config.transcript_merges == again.config.transcript_merges == MERGES
    wav, text = world / "data/audio/train-0.flac", SENTENCES[0]
    for one in (model, again):
        assert "".join(token.token for token in one.align(wav, transcript=text)) == text
        assert len(one.align(wav, transcript=text)) == len(one.chat_format.encode_transcript(text))
    assert model.generate(wav, "repeat", max_new_tokens=4) == again.generate(wav, "repeat", max_new_tokens=4)
    fairseq("generate", world / "data", "--path", whole / "checkpoint_last.pt", "--gen-subset", "valid",
            "--results-path", tmp_path / "results", "--max-len-b", 4)  # fmt: skip
    assert (tmp_path / "results/generate-valid.txt").read_text(encoding="utf-8").count("\nD-") == 8
