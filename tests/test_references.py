"""fairseq-generate's scores compare answers with the right reference, or there is none, and that is said."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import fairseq, train
from tiny import SENTENCES, save_llm, save_whisper, write_split

from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.generation.references import check_scorer, reference_column


def manifest(folder: Path, texts: tuple[str, ...] = ("a b", "c d"), **cells: str) -> Manifest:
    rows = [
        {"id": f"u{i}", "audio": "x.wav", "n_frames": 9, "src_text": text, "tgt_text": f"t {text}", **cells}
        for i, text in enumerate(texts)
    ]
    write_manifest(folder / "test.tsv", rows)
    return Manifest.load(folder / "test.tsv")


@pytest.mark.parametrize("scoring", ["wer", "sacrebleu", "bleu", "chrf"])
@pytest.mark.parametrize("prompt", ["transcribe", "repeat"])
@pytest.mark.parametrize("cut", [{}, {"cut": "0"}])
def test_transcripts_are_compared_with_what_was_said(
    prompt: str, scoring: str, cut: dict[str, str], tmp_path: Path
) -> None:
    assert reference_column(manifest(tmp_path, **cut), prompt, scoring) == "src_text"


@pytest.mark.parametrize("prompt", ["translate", "continue", "chat", "Sum up: {speech}"])
def test_other_answers_are_compared_with_references(prompt: str, tmp_path: Path) -> None:
    assert reference_column(manifest(tmp_path), prompt, "sacrebleu") == "tgt_text"
    with pytest.raises(ValueError, match="--scoring wer compares answers with what was said.*--prompt transcribe or"):
        reference_column(manifest(tmp_path), prompt, "wer")
    assert reference_column(manifest(tmp_path, prompt="repeat"), prompt, "wer") == "src_text"


def test_responses_are_no_references(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    responses = manifest(tmp_path, cut="0")
    assert reference_column(responses, "translate", "sacrebleu") == ""
    assert "no score: tgt_text of" in caplog.text and "no references for the prompt 'translate'" in caplog.text
    assert reference_column(responses, "continue", "sacrebleu") == "tgt_text"
    assert "how much answers are like these" in caplog.text


def test_a_missing_reference_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert reference_column(manifest(tmp_path, ("a b", " ")), "repeat", "wer") == ""
    assert re.search("no score: .*test.tsv line 3 .id u1. has no src_text", caplog.text)
    write_manifest(tmp_path / "test.tsv", [{"id": "a", "audio": "x.wav", "n_frames": 9, "src_text": "a"}])
    assert reference_column(Manifest.load(tmp_path / "test.tsv"), "chat", "sacrebleu") == ""
    assert re.search("no score: .*test.tsv has no tgt_text", caplog.text)


@pytest.mark.parametrize(
    ("language", "options", "said"),
    [
        ("zh-CN", {"sacrebleu_tokenizer": "13a"}, "--sacrebleu-tokenizer zh"),
        ("zho_Hans", {"sacrebleu_tokenizer": "13a"}, "--sacrebleu-tokenizer zh"),
        ("Thai", {"sacrebleu_tokenizer": "13a"}, "--sacrebleu-char-level"),
        ("de", {"sacrebleu_tokenizer": "zh"}, "--sacrebleu-tokenizer 13a"),
        ("zh", {"sacrebleu_tokenizer": "zh"}, ""),
        ("th", {"sacrebleu_tokenizer": "13a", "sacrebleu_char_level": True}, ""),
        ("de", {"sacrebleu_tokenizer": "13a"}, ""),
        ("", {"sacrebleu_tokenizer": "13a"}, ""),
    ],
)
def test_tokenizers_of_bleu(
    language: str, options: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scoring = SimpleNamespace(**{"_name": "sacrebleu", "sacrebleu_char_level": False, **options})
    check_scorer(manifest(tmp_path, tgt_lang=language), "tgt_text", scoring)
    assert (said in caplog.text and "BLEU takes the tokenizer" in caplog.text) if said else not caplog.records


@pytest.mark.parametrize(("language", "char_level", "warns"), [("ja", False, True), ("ja", True, False), ("en", 0, 0)])
def test_words_of_wer(
    language: str, char_level: bool, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scoring = SimpleNamespace(_name="wer", wer_char_level=char_level)
    check_scorer(manifest(tmp_path, src_lang=language), "src_text", scoring)
    assert ("--wer-char-level" in caplog.text) == bool(warns)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_split(root / "data", "train", 4)
    train(
        root / "data", root / "save", save_llm(root / "llm"), save_whisper(root / "whisper"), "--max-update", 1,
        "--disable-validation",
    )  # fmt: skip
    write_split(root / "data", "test", 3, SENTENCES[:3])
    rows = list(Manifest.load(root / "data" / "test.tsv"))
    for name, cells in (("responses", {"cut": "0"}), ("bare", {"tgt_text": None})):
        kept = [{k: v for k, v in {**row, **cells}.items() if v is not None} for row in rows]
        write_manifest(root / "data" / f"{name}.tsv", kept)
    return root


def generate(world: Path, subset: str, *options: Any) -> str:
    return fairseq(
        "generate", world / "data", "--gen-subset", subset, "--path", world / "save" / "checkpoint_last.pt",
        "--batch-size", 2, "--num-workers", 0, "--max-len-b", 4, *options,
    )  # fmt: skip


def targets(output: str) -> list[str]:
    return [line.partition("\t")[2] for line in sorted(output.splitlines()) if re.match(r"T-\d", line)]


@pytest.mark.parametrize("subset", ["test", "responses", "bare"])
def test_wer_of_transcribing_is_against_the_transcripts(world: Path, subset: str) -> None:
    output = generate(world, subset, "--prompt", "transcribe", "--scoring", "wer")
    assert targets(output) == list(SENTENCES[:3])
    assert re.search(r"with beam=\d+: WER: \d", output)


def test_without_a_reference_the_lack_of_a_score_is_said(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    output = generate(world, "bare", "--prompt", "chat", "--scoring", "sacrebleu")
    assert not targets(output) and "BLEU" not in output
    assert "no score:" in caplog.text + output and "bare.tsv has no tgt_text" in caplog.text + output


def test_wer_of_other_prompts_is_refused(world: Path) -> None:
    with pytest.raises((ValueError, SystemExit), match="--scoring wer compares answers"):
        generate(world, "test", "--scoring", "wer")
