"""Parts of examples/open_vocabulary, and all of its stages on a few rows."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import warm_python
from tiny import PATIENCE, write_split

ROOT = Path(__file__).resolve().parents[1]
OPEN = ROOT / "examples" / "open_vocabulary"
sys.path[:0] = [str(OPEN), str(ROOT / "examples" / "quickstart")]

import draw_parts  # noqa: E402
import exposures  # noqa: E402
import gather_sentences as gather  # noqa: E402
import mix_prompts  # noqa: E402
import no_speech  # noqa: E402
import publish  # noqa: E402
import recordings  # noqa: E402
import speak  # noqa: E402
import voices  # noqa: E402
import write_report  # noqa: E402

from blspkd_fairseq.data.audio import load_audio  # noqa: E402
from blspkd_fairseq.data.manifest import Manifest, write_manifest  # noqa: E402
from blspkd_fairseq.data.validate import sentence_key  # noqa: E402
from blspkd_fairseq.modules.trained_state import read_trained  # noqa: E402

# ---- sentences -----------------------------------------------------------------------------------------------------

WORDS = "dog run walk city box fly man big like the a stop stopped make in two"
DICTIONARY = gather.Dictionary(
    frozenset(WORDS.split()),
    frozenset(["i", "hi", "don't"]),
    gather.read_phrases("damn\nBig fly\nman in the box\n"),
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The dogs walked in cities.", ""),
        ("the boxes, flying, walked!", ""),
        ("Don't stop the men", ""),
        ("I stopped making the dog's box", ""),
        ("The dog runs", "not 4 to 18 words"),
        ("the dog " * 10, "not 4 to 18 words"),
        ("The dog runs 2 cities", "characters other than letters"),
        ("The dog runs: the city", "characters other than letters"),
        ("The damn dog runs.", "profanity"),
        ("the dog stops a BIG  fly", "profanity"),
        ("a man in the box", "profanity"),
        ("a big box, the man, in the fly", ""),  # the words of a phrase, one by one, are none
        ("I'll stop during the man's walk", ""),
        ("They won't stop the dog", "an unknown word"),
        ("Dogs won't stop the dogs themselves", ""),
        ("u like the dog", "slang"),
        ("The dog likes xyzzy", "an unknown word"),
    ],
)
def test_a_sentence_is_kept_or_left_out_for_a_reason(text: str, reason: str) -> None:
    assert gather.problem(text.strip(), DICTIONARY) == reason


def test_sentences_are_tidied_kept_once_and_counted() -> None:
    counts: Counter[str] = Counter()
    texts = ["the dog  runs in a city", "The dog runs in a city!", "i walk the dog?", "no", "i stopped 2 flies"]
    kept = list(gather.sift(texts, DICTIONARY, set(), counts))
    assert kept == ["The dog runs in a city.", "I walk the dog?", "I stopped two flies."]
    assert counts == {"kept": 3, "said before": 1, "not 4 to 18 words": 1}


def test_frequent_words_that_a_filter_lost_are_named() -> None:
    typed = ["She has a dog, u know", "she runs", "Some dogs run", "a dog"]
    assert gather.unsaid(typed, ["A dog runs."]) == ["she", "has", "know", "some", "dogs", "run"]
    assert gather.unsaid(typed, ["A dog runs."], 1) == ["she"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("2 dogs, 13 men and 40.", "two dogs, thirteen men and forty."),
        ("the 21 boxes of 99 men", "the twenty-one boxes of ninety-nine men"),
        ("0 or 10", "zero or ten"),
        ("at 7:30, 2nd of 3.5 and $5, 100 or 4-6", "at 7:30, 2nd of 3.5 and $5, 100 or 4-6"),
        ("covid19 and 5% of mp3", "covid19 and 5% of mp3"),
    ],
)
def test_small_numbers_are_written_as_they_are_said(typed: str, said: str) -> None:
    assert gather.spell_numbers(typed) == said


def test_a_sentence_belongs_to_one_split_and_more_of_them_change_no_order() -> None:
    texts = [f"the dog runs {'in ' * i}a city" for i in range(2000)]
    shares = Counter(map(gather.split_of, texts))
    assert shares["train"] > 1900 and 5 < shares["valid"] < 50 and 5 < shares["test"] < 50
    assert gather.split_of("The dog runs.") == gather.split_of("the dog runs!")
    few = gather.shuffled(texts[:50])
    assert few == [text for text in gather.shuffled(texts) if text in set(few)] != texts[:50]


def test_words_and_examples_are_read_from_wordnet(tmp_path: Path) -> None:
    (tmp_path / "index.noun").write_text("  1 a licence\ndog n 7 5 @ ~\nice_cream n 1\n", encoding="latin-1")
    (tmp_path / "verb.exc").write_text("ran run\n", encoding="latin-1")
    gloss = 'def; "the dog ran"; "a café was open"'
    (tmp_path / "data.noun").write_text(f"00001740 03 n 01 dog 0 | {gloss}\n", encoding="latin-1")
    assert gather.read_lemmas(tmp_path) == {"dog", "ice_cream", "ran"}
    assert list(gather.read_examples(tmp_path)) == ["the dog ran", "a café was open"]
    gloss = '(zoology) a domestic  animal (of man) that barks; one of many; "the dog ran; away"'
    (tmp_path / "data.noun").write_text(f"00001740 03 n 01 dog 0 | {gloss}\n", encoding="latin-1")
    assert list(gather.read_definitions(tmp_path)) == ["a domestic animal that barks", "one of many"]


def test_sentences_of_training_come_by_what_they_teach(tmp_path: Path) -> None:
    said = ["The dog runs in a city.", "The dog runs in the city.", "A big fly."]
    frequencies = gather.frequencies_of(said, ["A fly that flies."] * 4)
    assert frequencies["dog"] == 2 and frequencies["fly"] == 2 and frequencies["flies"] == 1
    exposures.write_frequencies(tmp_path / "frequencies.tsv", frequencies)
    assert exposures.read_frequencies(tmp_path / "frequencies.tsv") == frequencies
    texts = [*said, *(f"Word{i} is said." for i in range(9))]
    often = {word: 5.0 * count for word, count in exposures.count_words(texts).items()}
    every, lists = gather.teaching(texts, often, 0)
    assert sorted(every) == sorted(texts) and len(lists) == len(texts) // 3
    assert lists[0][0].isupper() and lists[0].endswith(".") and len(lists[0].split()) == exposures.LIST_WORDS
    assert gather.teaching(texts, often, 3) == (every[:3], lists[:1])


# ---- speech --------------------------------------------------------------------------------------------------------


def speak_nothing(text: str, length_scale: float) -> np.ndarray:
    return np.random.default_rng(len(text)).normal(size=int(8000 * length_scale)).astype(np.float32) * 0.1


def load_nothing() -> voices.Speak:
    return speak_nothing


def test_a_clip_depends_on_its_text_alone_and_stays_within_its_limits() -> None:
    clips = [speak.clip_of(f"sentence {i}", ["a", "b"]) for i in range(200)]
    assert clips == [speak.clip_of(f"sentence {i}", ["b", "a"]) for i in range(200)]
    assert {clip.voice for clip in clips} == {"a", "b"} and len({clip.name for clip in clips}) == 200
    for values, (low, high) in (
        ([c.length_scale for c in clips], speak.TEMPO),
        ([c.pitch for c in clips], speak.PITCH),
    ):
        assert low <= min(values) < max(values) <= high and max(values) / min(values) > 1.2


def test_speech_that_is_there_is_joined_with_what_is_spoken_and_no_sentence_is_in_two_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, sentences, out = tmp_path / "ready", tmp_path / "sentences", tmp_path / "out"
    for split, text in (("train", "one"), ("valid", "two"), ("test", "three"), ("test_unheard", "four")):
        write_split(ready, split, 2, texts=[f"{text} ready a", f"{text} ready b"], speaker="x")
    sentences.mkdir()
    for split in ("train", "valid", "test"):
        taken = ["four ready a"] if split == "train" else []
        (sentences / f"{split}.txt").write_text("\n".join([*taken, *(f"{split} {i} spoken" for i in range(9))]) + "\n")
    monkeypatch.setattr(speak, "speakers", lambda cache, names: dict.fromkeys(names, load_nothing))
    counts = {"train": 4, "valid": 2, "test": 2}
    speak.make(sentences, out, tmp_path, counts, ready, ["slt", "rms"], processes=1)
    manifests = {split: list(Manifest.load(out / f"{split}.tsv")) for split in speak.READY_SPLITS}
    assert {split: len(rows) for split, rows in manifests.items()} == {
        "train": 6, "valid": 4, "test": 4, "test_unheard": 2
    }  # fmt: skip
    said = [sentence_key(row["src_text"]) for rows in manifests.values() for row in rows]
    assert len(set(said)) == len(said)
    for rows in manifests.values():
        for row in rows:
            assert len(load_audio(row["audio"], out, int(row["n_frames"]))) == int(row["n_frames"])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.flac")}
    speak.make(sentences, out, tmp_path, counts, ready, ["slt", "rms"], processes=1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.flac")} == before
    (sentences / "lists.txt").write_text("Words of lists\nAnd more words\n")
    speak.make(sentences, out, tmp_path, counts, ready, ["slt", "rms"], processes=1, lists=1)
    (listed,) = (row for row in Manifest.load(out / "train.tsv") if row["id"].startswith(speak.LIST_ID))
    assert listed["src_text"] == "Words of lists"
    assert len(load_audio(listed["audio"], out, int(listed["n_frames"]))) == int(listed["n_frames"])
    with pytest.raises(ValueError, match=r"train\.txt has 9 sentences .* not 10: ask for fewer"):
        speak.make(sentences, out, tmp_path, counts | {"train": 10}, ready, ["slt"], processes=1)


@pytest.mark.parametrize(
    ("audio", "archive"), [("ready/a-0.zip:41:99", "ready/a-0.zip"), ("a/b.flac", "a/b.flac"), ("a:b.wav", "a:b.wav")]
)
def test_the_archive_of_a_clip(audio: str, archive: str) -> None:
    assert speak.archive_of(audio) == archive


# ---- prompts, and clips without speech -------------------------------------------------------------------------------


def test_prompts_are_drawn_with_their_shares_by_the_id_alone() -> None:
    mix = {"chat": 0.5, "continue": 0.3, "repeat": 0.2}
    drawn = Counter(mix_prompts.prompt_of(f"row {i}", mix) for i in range(2000))
    assert all(abs(drawn[name] / 2000 - share) < 0.05 for name, share in mix.items())
    rows = [{"id": str(i)} for i in range(100)]
    assert mix_prompts.chosen(rows, 10) == mix_prompts.chosen(rows[::-1], 20)[:10] != rows[:10]


def test_rows_in_which_nobody_speaks_have_another_text_for_the_teacher(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_split(tmp_path, split, 8, speaker="x", src_lang="en")
    mix_prompts.make(tmp_path, 6, 0, 4, {"chat": 1.0, "transcribe": 1.0})
    rows = list(Manifest.load(tmp_path / "asked" / "train.tsv"))
    silent = [row for row in rows if row["src_text"] == no_speech.NOTHING]
    assert len(rows) == 10 and {row["speaker"] for row in silent} == set(no_speech.KINDS)
    assert all(row["teacher_text"] == no_speech.TEACHER_TEXTS[row["prompt"]] for row in silent)
    assert {row["teacher_text"] for row in rows if row not in silent} == {""}
    test = list(Manifest.load(tmp_path / "asked" / "nothing.tsv"))
    assert len(test) == 100 and len({row["audio"] for row in [*test, *silent]}) == 104
    first = {row["id"]: load_audio(row["audio"], tmp_path) for row in silent}
    assert all(np.abs(samples).max() < 1 for samples in first.values())
    for path in (tmp_path / "audio").glob("nothing-*"):
        path.unlink()
    mix_prompts.make(tmp_path, 6, 0, 4, {"chat": 1.0, "transcribe": 1.0})
    assert all(np.array_equal(load_audio(row["audio"], tmp_path), first[row["id"]]) for row in silent)


def test_lists_of_words_are_asked_nothing(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_split(tmp_path, split, 8, speaker="x", src_lang="en")
    rows = list(Manifest.load(tmp_path / "train.tsv"))
    for row in rows[:3]:
        row["id"] = f"{speak.LIST_ID}{row['id']}"
    write_manifest(tmp_path / "train.tsv", rows)
    mix_prompts.make(tmp_path, 0, 0, 0, {"chat": 1.0})
    asked = [row["id"] for row in Manifest.load(tmp_path / "asked" / "train.tsv")]
    assert sorted(asked) == sorted(row["id"] for row in rows[3:])


def test_rows_to_repeat_need_no_llm_and_are_never_the_answered_ones(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_split(tmp_path, split, 8, speaker="x", src_lang="en")
    mix_prompts.make(tmp_path, 3, 0, 2, {"chat": 1.0})
    (tmp_path / "asked" / "responses").mkdir()
    for split in ("train", "valid"):
        rows = Manifest.load(tmp_path / "asked" / f"{split}.tsv")
        answered = [{**row, "tgt_text": "Yes.", "cut": "0"} for row in rows]
        write_manifest(
            tmp_path / "asked" / "responses" / f"{split}.tsv", answered, (*mix_prompts.COLUMNS, "tgt_text", "cut")
        )
    mix_prompts.add_repeats(tmp_path, 6)
    assert len(list(Manifest.load(tmp_path / "asked" / "distilled" / "train.tsv"))) == 5 + 5
    mix_prompts.main(["--data", str(tmp_path), "--repeats", "4"])
    rows = list(Manifest.load(tmp_path / "asked" / "distilled" / "train.tsv"))
    repeats = [row for row in rows if row["prompt"] == "repeat"]
    assert [len(rows), len(repeats), len({row["id"] for row in rows})] == [9, 4, 9]
    assert all(row["tgt_text"] == row["src_text"] and not row["teacher_text"] for row in repeats)
    assert len(list(Manifest.load(tmp_path / "asked" / "distilled" / "valid.tsv"))) == 8


@pytest.mark.parametrize(
    ("mix", "message"),
    [(["chat"], "has no share"), (["sing:1"], "give one of"), (["chat:-1"], "0 or more"), (["chat:0"], "the share 0")],
)
def test_a_mix_that_cannot_be_used_is_refused(mix: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix_prompts.read_mix(mix)


# ---- the game --------------------------------------------------------------------------------------------------------


def string(text: str, start: int, place: int) -> bytes:
    """As the game writes it: length, letters, zeros up to a multiple of four from the table's start."""
    raw = bytes([len(text)]) + text.encode("latin-1")
    return raw + bytes((start - place - len(raw)) % 4)


def table(start: int, texts: dict[int, str]) -> bytes:
    made = bytes(4)
    made += string("*FR", start, start + len(made))
    for number, text in texts.items():
        made += struct.pack(">HH", 0, number)
        made += string(text, start, start + len(made))
    return made


def archive(files: dict[str, bytes]) -> bytes:
    begin = 15 + 21 * len(files)
    directory = b"QTBLCEM10\0\0\0\1" + struct.pack(">H", len(files))
    content = b""
    for name, data in files.items():
        directory += struct.pack(">12sBII", name.encode(), 0, begin + len(content), len(data))
        content += data
    return directory + content


def dialogue(hero: dict[int, str], other: dict[int, str]) -> bytes:
    start = 32 + 96 * 2
    first = table(start, hero)
    head = struct.pack(">5h", -2, 0, 7, len(hero), len(other))
    second = start + len(first)
    head = head.ljust(22, b"\0") + struct.pack(">h", second)
    return bytes(20) + head.ljust(start, b"\0") + first + table(second, other)


def test_the_lines_of_the_game_are_read_with_their_sound() -> None:
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(800, np.float32), 11_025, format="WAV")
    hero = {6: "At least I am not wet.*15And I will not be soon.*03", 300: "Hello"}
    files = {"BOB1.DOG": dialogue(hero, {10: "You could not pilot a plane.*02"})}
    files |= dict.fromkeys(["070006J1.SB", "070006J2.SB", "07012CJ1.SB", "07000AP1.SB"], sound.getvalue())
    lines = recordings.spoken_lines(archive(files))
    assert [(line.audio, line.text, line.speaker) for line, _ in lines] == [
        ("070006J1.SB", "At least I am not wet.", "hero"),
        ("070006J2.SB", "And I will not be soon.", "hero"),
        ("07000AP1.SB", "You could not pilot a plane.", "bob"),
    ]
    assert all(data == sound.getvalue() for _, data in lines)


@pytest.mark.parametrize(
    ("data", "message"), [(b"QTBX" + bytes(20), "begin with QTBL"), (archive({"A.SB": b"x"}), "no dialogue with sound")]
)
def test_another_archive_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(recordings.GameError, match=message):
        recordings.spoken_lines(data)


def test_the_sentences_of_the_audio_book_are_those_with_a_recording(tmp_path: Path) -> None:
    lines = ["<s> he was a young man </s> (sense_64kb-0880)", "<s> nobody recorded it </s> (sense_64kb-1)", ""]
    (tmp_path / "transcription").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="no recording with a text"):
        recordings.book_rows(tmp_path)
    soundfile.write(tmp_path / "sense_64kb-0880.wav", np.zeros(1600, np.float32), 16_000)
    (row,) = recordings.book_rows(tmp_path)
    assert row["src_text"] == "he was a young man" and row["n_frames"] == "1600"
    assert len(load_audio(row["audio"])) == 1600


def test_recordings_are_copied_so_that_they_may_be_moved(tmp_path: Path) -> None:
    write_split(tmp_path / "cache", "recordings", 2)
    rows = [{**row, "audio": str(tmp_path / "cache" / row["audio"])}
            for row in Manifest.load(tmp_path / "cache" / "recordings.tsv")]  # fmt: skip
    made = recordings.copied(rows, tmp_path / "out")
    assert [row["audio"] for row in made] == [f"audio/{row['id']}.flac" for row in rows]
    for row, copy in zip(rows, made, strict=True):
        assert (tmp_path / "out" / copy["audio"]).read_bytes() == Path(row["audio"]).read_bytes()


def test_lines_that_whisper_does_not_hear_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one two three four", "five six seven eight", "nine ten eleven twelve"]
    write_split(tmp_path, "recordings", 3, texts=texts)
    heard = iter(["one two three for", "something else altogether", "nine ten eleven twelve"])

    class Deaf:
        def __init__(self, name: str) -> None: ...

        def transcribe(self, waveforms: list[Any], languages: list[str]) -> list[str]:
            return [next(heard) for _ in waveforms]

    monkeypatch.setattr(recordings, "WhisperTranscriber", Deaf)
    rows = [{**row, "audio": str(tmp_path / row["audio"])} for row in Manifest.load(tmp_path / "recordings.tsv")]
    assert [row["src_text"] for row in recordings.heard_by_whisper(rows, "whisper", 2)] == [texts[0], texts[2]]


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_whole", [True, False])
def test_clips_to_test_on_are_made_of_any_voices(is_whole: bool, tmp_path: Path) -> None:
    voices = write_split(tmp_path / "voices", "train", 3)
    if is_whole:
        folder = tmp_path / "voices"
        rows = [{**row, "audio": str(folder / row["audio"])} for row in Manifest.load(voices)]
        voices = tmp_path / "whole.tsv"
        write_manifest(voices, rows, list(rows[0]))
    no_speech.main(["--out", str(tmp_path / "out"), "--count", "8", "--voices", str(voices)])
    made = Manifest.load(tmp_path / "out" / "nothing.tsv")
    assert len(made) == 8 and {row["speaker"] for row in made} == set(no_speech.KINDS)
    assert all(len(load_audio(row["audio"], tmp_path / "out")) == int(row["n_frames"]) for row in made)


@pytest.mark.parametrize(
    ("answer", "admits"),
    [
        (no_speech.ANSWER, True),
        ("I couldn't hear anything.", True),
        ("I did not quite understand you.", True),
        ("Nobody said anything.", True),
        ("I hear you well.", False),
        ("The weather is fine.", False),
    ],
)
def test_an_answer_that_admits_that_nothing_was_heard(answer: str, admits: bool) -> None:
    found = {"chat": [answer, no_speech.ANSWER]}
    assert write_report.false_answers(found) == f"{0 if admits else 1} of 2"


def test_the_report_has_every_set_and_its_figures(tmp_path: Path) -> None:
    said = ["the dog runs home", "she likes big cities"]
    text = {"id": ["a", "b"], "said": said, "heard": said, "repeat": said, "chat": ["Fine, thank you all.", "Seven."]}
    model = text | {
        "heard": ["the dog runs hope", said[1]], "chat": text["chat"], "counted": [5, 4], "tokens": [4, 4],
        "response_kl": [1.0, 3.0], "response_tokens": [2, 2], "boundary_ms": [[10.0, -30.0], []],
    }  # fmt: skip
    silent = {"id": ["n"], "said": ["..."], "heard": ["you"], "repeat": ["you"], "chat": ["Thank you."]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "text.json").write_text(json.dumps({"sets": {"phone": text}}))
    (tmp_path / "results" / "model.json").write_text(
        json.dumps({"sets": {"phone": model, "test": model, "nothing": silent}})
    )
    log = '2026 | INFO | valid | {"epoch": 1, "valid_token_ce": "%s", "valid_num_updates": "%d", "valid_wps": "x"}\n'
    (tmp_path / "warm-up.log").write_text(log % (4.5, 100) + "| INFO | train | {}\n" + log % (3.5, 200))
    arguments = ["--results", tmp_path / "results", "--logs", tmp_path / "warm-up.log", "--out", tmp_path / "report"]
    write_report.main(list(map(str, arguments)))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    figures = {name: found["score"] for name, found in report["sets"]["phone"]["model"].items()}
    assert figures["WER heard"] == 12.5 and figures["WER repeat"] == 0 and figures["response KL"] == 1.0
    assert figures["boundary error, ms"] == 20
    assert figures["token-count error, %"] == 12.5 and figures["Self-BLEU of answers"] == pytest.approx(100)
    assert report["false_answers"] == {"model": "1 of 1"}
    assert [point["valid_token_ce"] for point in report["curves"]["warm-up"]] == [4.5, 3.5]
    assert (tmp_path / "report" / "curve.png").exists()
    text_of_report = (tmp_path / "report" / "report.md").read_text()
    assert "## phone (2 utterances)" in text_of_report
    results = {
        name: json.loads((tmp_path / "results" / f"{name}.json").read_text())["sets"] for name in ("text", "model")
    }
    results["cascade"] = {"phone": {**text, "heard": ["a dog runs home", said[1]]}}
    card = publish.table(results)
    assert "heard voices, other sentences | telephone prompts (a person) | clips in which nobody speaks" in card
    assert "| WER heard | this model | 12.5 [0.0, 25.0] | 12.5 [0.0, 25.0] | – |" in card
    assert "| WER heard | Whisper tiny.en, then the LLM | – | 12.5 [0.0, 25.0] | – |" in card
    assert "| answered as if somebody spoke | this model | – | – | 1 of 1 |" in card
    assert "| response KL | this model | 1.00 [" in card
    publish.check_rows(results)
    with pytest.raises(ValueError, match=r"set phone has other rows in each result \(text 2, model 2, cascade 1\)"):
        publish.check_rows({**results, "cascade": {"phone": {"id": ["a"]}}})
    assert publish.noise_table(tmp_path / "noise.json") == ""
    (tmp_path / "noise.json").write_text(json.dumps({"sets": {"test": model, "test white:10": model}}))
    noise = publish.noise_table(tmp_path / "noise.json")
    assert "WER heard of the heard voices" in noise and "| clean | white:10 |" in noise and noise.count("12.5 [") == 2
    shown = publish.front(results)
    assert "| telephone prompts (a person) | 2 | 12.5 [0.0, 25.0] | 12.5 [0.0, 25.0] | 0.0 [0.0, 0.0] | 0.0 " in shown
    assert "heard voices" not in shown and "answers 1 of 1 as if" in shown and "By the sound alone" not in shown
    results["sound"] = {"phone": {**model, "heard": said}}
    assert "| WER heard, by the sound alone | this model | – | 0.0 [0.0, 0.0] | – |" in publish.table(results)
    assert "By the sound alone, without what the LLM expects after the words before, it hears with 0.0." in (
        publish.front(results)
    )
    assert (
        text_of_report.count("| the dog runs home | the dog runs hope | Fine, thank you all. |") == 1
    )  # not of "phone"


def test_a_readme_gets_the_figures_between_its_comments() -> None:
    text = f"one\n{publish.BEGIN}\nold\n{publish.END}\ntwo\n"
    assert publish.with_figures(text, "new\n") == f"one\n{publish.BEGIN}\n\nnew\n\n{publish.END}\ntwo\n"
    with pytest.raises(ValueError, match="no part for figures"):
        publish.with_figures("one", "new")


def test_the_readme_shows_the_figures_of_the_card() -> None:
    """Both come from one call of publish.py."""

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("|").split("|")]

    card = (ROOT / "blspkd_fairseq/pretrained/whisper-tiny.en-smollm2-135m/README.md").read_text(encoding="utf-8")
    table = card[card.index("| measure | system |") :].partition("\n\n")[0]  # noise has a table of its own
    rows = [cells(line) for line in table.splitlines()]
    columns = dict(zip(rows[0], zip(*rows[2:], strict=True), strict=True))
    wanted = [(measure, system) for measure in ("WER heard", "WER repeat") for system in publish.MEASURED.values()]
    places = [list(zip(columns["measure"], columns["system"], strict=True)).index(one) for one in wanted]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(publish.BEGIN)[2].partition(publish.END)[0]
    lines = [cells(line) for line in shown.splitlines() if line.startswith("| ")][1:]
    found = {line[0]: line[2:] for line in lines if set(line[0]) != {"-"}}
    assert list(found) == [publish.TITLES[name] for name in publish.FRONT]
    assert all(figures == [columns[name][place] for place in places] for name, figures in found.items())


# ---- commands --------------------------------------------------------------------------------------------------------


def command(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(OPEN / name), *map(str, options)],
        capture_output=True,
        text=True,
        env=warm_python.environment(),
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("run.sh", ["--trian", "5"], "unknown option --trian"),
        ("run.sh", ["--train", "many"], "--train must be a whole number"),
        ("run.sh", ["--transcript-merges", "all"], "--transcript-merges must be a whole number"),
        ("run.sh", ["--speech", "/nowhere"], "--speech /nowhere holds no train.tsv"),
        ("run.sh", ["--sentences", "/nowhere"], "--sentences /nowhere holds no train.txt"),
        ("run.sh", ["--pretrained", "/nowhere"], "--pretrained /nowhere holds no config.json"),
        ("evaluate.sh", ["--model", "/nowhere"], "--model /nowhere does not exist"),
        ("evaluate.sh", ["--rows", "all"], "--rows must be a whole number"),
        ("evaluate.sh", ["--speech", "/nowhere"], "--speech /nowhere holds no test.tsv"),
        ("gpu.sh", ["fly"], "unknown command fly"),
        ("gpu.sh", ["pack"], "pack needs --to DIR"),
        ("gpu.sh", ["pack", "--train", "5"], "unknown option --train"),
        ("gpu.sh", ["load"], "load needs what to load"),
        ("gpu.sh", ["load", "00", "--from", "/nowhere"], "/nowhere/00 holds no piece"),
        ("gpu.sh", ["rows", "--seeds", "1"], "rows needs what to rows, such as all"),
        ("gpu.sh", ["rows", "mix", "--work", "/nowhere"], "holds no pieces: load them all first"),
        ("gpu.sh", ["train", "--work", "/nowhere"], "holds no pieces: load them all first"),
        ("gpu.sh", ["results", "--work", "/nowhere", "--to", "x"], "train first"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name: str, options: list[str], message: str, tmp_path: Path) -> None:
    more = [] if name == "gpu.sh" else ["--out", tmp_path / "out"]
    done = command(name, *options, *more)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_options_is_refused(tmp_path: Path) -> None:
    (tmp_path / "options").write_text("--speech  --train 5")
    done = command("run.sh", "--train", 6, "--out", tmp_path)
    assert done.returncode == 2 and "holds a run with other options" in done.stderr


def test_a_damaged_piece_is_refused_and_the_last_one_unpacks(tmp_path: Path) -> None:
    content = tmp_path / "bundle"
    (content / "out").mkdir(parents=True)
    (content / "out" / "x").write_text("x" * 100)
    whole = subprocess.run(["tar", "-C", content, "-cf", "-", "."], capture_output=True, check=True).stdout
    halves = [whole[:5000], whole[5000:]]
    for number, half in enumerate(halves):
        folder = tmp_path / "pieces" / f"0{number}"
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(half)
        (folder / "piece").write_text(f"2 {hashlib.sha256(half).hexdigest()}\n")
    there = ["--from", tmp_path / "pieces", "--work", tmp_path / "work", "--quick"]
    assert "1 of 2 are there" in command("gpu.sh", "load", "01", *there).stdout
    part = tmp_path / "pieces" / "00" / "part"
    part.write_bytes(halves[0][:-1] + b"y")
    done = command("gpu.sh", "load", "00", *there)
    assert done.returncode == 2 and "is damaged: carry it again" in done.stderr
    part.write_bytes(halves[0])
    assert "all pieces are unpacked" in command("gpu.sh", "load", "00", *there).stdout
    assert (tmp_path / "work" / "bundle" / "out" / "x").read_text() == "x" * 100


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.recordings
def test_all_stages_run_on_a_few_rows_and_a_second_run_skips_them(tmp_path: Path) -> None:
    few = ["--quick", "--mean", "--processes", 1, "--transcript-merges", 8000, "--out", tmp_path / "out"]
    first = command("run.sh", *few)
    assert first.returncode == 0, (first.stdout + first.stderr)[-4000:]
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert {"test", "phone", "game", "book", "test white:10"} <= set(report["sets"])
    assert "boundary error, ms" in report["sets"]["phone"]["model"]
    assert set(report["sets"]["phone"]) == {"before", "cascade", "model", "sound", "text", "warm-up"}
    assert set(report["false_answers"]) == {"before", "cascade", "model"}
    again = command("run.sh", *few)
    assert again.returncode == 0 and again.stdout.count("done before") == 8
    refused = command("run.sh", "--out", tmp_path / "out")
    assert refused.returncode == 2 and "other options" in refused.stderr

    model = tmp_path / "out" / "model" / "distillation-mean.pt"
    assert read_trained(model)[0]["transcript_merges"] == 8000
    options = ["--rows", 2, "--most-tokens", 8, "--model", model, "--out", tmp_path / "real"]
    measured = command("evaluate.sh", *options)
    assert measured.returncode == 0, (measured.stdout + measured.stderr)[-4000:]
    report = json.loads((tmp_path / "real" / "report" / "report.json").read_text())
    assert set(report["sets"]) == {"phone", "game", "book"} and set(report["sets"]["phone"]) == {
        "cascade",
        "model",
        "text",
    }
    assert report["false_answers"]["model"].endswith(" of 2")
    (tmp_path / "training.md").write_text("Four updates.")
    example = next((tmp_path / "real" / "sets" / "audio").glob("*.flac"))
    arguments = ["--checkpoint", model, "--results", tmp_path / "real" / "results", "--example", example]
    arguments += ["--said", "...", "--training", tmp_path / "training.md", "--out", tmp_path / "published"]
    publish.main(list(map(str, arguments)))
    card = (tmp_path / "published" / "README.md").read_text()
    assert "Four updates." in card and "| WER repeat | this model |" in card and "{" not in card.replace("{folder}", "")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert config["llm"] == "~/.cache/blspkd_fairseq/smollm2-135m-instruct" and config["window_seconds"] == 6
    (_, original), (_, published) = read_trained(model), read_trained(tmp_path / "published")
    assert original.keys() == published.keys()
    assert all(torch.equal(published[name], original[name].to(published[name].dtype)) for name in original)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.recordings
def test_the_pieces_for_a_gpu_train_on_a_few_rows(tmp_path: Path) -> None:
    where = ["--work", tmp_path / "work", "--quick"]
    packed = command("gpu.sh", "pack", "--quick", "--piece-mib", 8, "--to", tmp_path / "pieces")
    assert packed.returncode == 0, packed.stderr[-2000:]
    pieces = sorted(path.name for path in (tmp_path / "pieces").iterdir())
    assert len(pieces) > 1 and all((tmp_path / "pieces" / name / "part").stat().st_size <= 8 << 20 for name in pieces)
    for name in pieces:
        loaded = command("gpu.sh", "load", name, "--from", tmp_path / "pieces", *where)
    assert "all pieces are unpacked" in loaded.stdout
    options = ["--processes", 1, "--seconds", PATIENCE]
    trained = command("gpu.sh", "train", *options, *where)
    assert trained.returncode == 0 and trained.stdout.endswith("trained\n"), (trained.stdout + trained.stderr)[-3000:]
    given = ["rows", "mix", "--jobs", 1, *where]
    in_pieces = command("gpu.sh", *given, "--seconds", 5)
    assert "the time is over" in in_pieces.stdout, (in_pieces.stdout + in_pieces.stderr)[-3000:]
    measured = command("gpu.sh", *given, "--seconds", PATIENCE)
    assert measured.stdout.endswith("measured\n"), (measured.stdout + measured.stderr)[-3000:]
    brought = command("gpu.sh", "results", "--to", tmp_path / "results", *where)
    assert brought.returncode == 0, brought.stderr[-2000:]
    size = sum(path.stat().st_size for path in (tmp_path / "results").rglob("*"))
    assert (tmp_path / "results" / "distillation" / "model.safetensors").exists() and size < 16 << 20
    with tarfile.open(tmp_path / "results" / "rows.tar.gz.00") as archive:
        archive.extractall(tmp_path, filter="data")
    result = json.loads((tmp_path / "rows" / "results" / "mix-seed1.json").read_text())
    assert {"test", "phone", "game"} <= set(result["sets"]) and len(result["curve"]) > 1


def test_the_picture_of_the_parts_is_that_of_the_guides_table(tmp_path: Path) -> None:
    parts = draw_parts.read_parts(draw_parts.GUIDE.read_text())
    assert [part.name for part in parts[:2]] == ["third part", "fourth"] and parts[-1].name.endswith(", as published")
    assert parts[0].figures[2] == (48.9, 44.9, 53.0)
    draw_parts.main(["--out", str(tmp_path / "new" / "parts.png")])
    assert (tmp_path / "new" / "parts.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no line of the table"):
        draw_parts.read_parts("| part | 1.0 [0.5, 1.5] |")
