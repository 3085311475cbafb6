"""Audio longer than the speech encoder's window, and audio in which nobody speaks."""

import difflib
import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from commands import fairseq, train
from tiny import read_jsonl, save_llm, save_whisper, tiny_model, write_split

from blspkd_fairseq import hub
from blspkd_fairseq.data.audio import SAMPLE_RATE, AudioError, audio_seconds, load_audio, stream_audio
from blspkd_fairseq.data.audio_stream import stream_windows
from blspkd_fairseq.data.chat import Marks
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.data.transcript import FORMATS, Segment, Transcript, Word, cues_of, join_texts, words_of
from blspkd_fairseq.data.vad import VadError, find_speech
from blspkd_fairseq.data.windows import WindowCutter, cut_windows, quietest_place, sounding, starts
from blspkd_fairseq.generation import hearing
from blspkd_fairseq.generation.decoding import answer_heard
from blspkd_fairseq.generation.hearing import hear_windows, nearest_texts
from blspkd_fairseq.hub import BlspKd

ROOT = Path(__file__).resolve().parent.parent


def tone(seconds: float, level: float = 0.3, seed: int = 0) -> np.ndarray:
    """What is as loud as speech, without its pauses."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time)
    return (level * syllables * rng.normal(size=len(time)) / 2).astype(np.float32)


def hiss(seconds: float, level: float = 1e-3) -> np.ndarray:
    return (level * np.random.default_rng(9).normal(size=int(seconds * SAMPLE_RATE))).astype(np.float32)


def speech_with_pauses(count: int, pause: float = 0.4, floor: float = 1e-3) -> tuple[np.ndarray, list[float]]:
    """``count`` utterances of 2 to 3 s, and the seconds at which they begin."""
    parts, begins, time = [], [], 0.0
    for number in range(count):
        part = tone(2 + number % 5 / 4, seed=number)
        begins.append(time)
        parts += [part, np.zeros(int(pause * SAMPLE_RATE), np.float32)]
        time += len(part) / SAMPLE_RATE + pause
    joined = np.concatenate(parts)
    return joined + hiss(len(joined) / SAMPLE_RATE + 1, floor)[: len(joined)], begins


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [0.0, 1e-4, 1e-3])
def test_windows_are_the_recording_and_begin_shortly_before_speech(floor: float) -> None:
    audio, begins = speech_with_pauses(30, floor=floor)
    windows = cut_windows(audio, 6.0)
    assert np.array_equal(np.concatenate(windows), audio)
    assert all(len(window) <= 6 * SAMPLE_RATE for window in windows) and len(windows) > 12
    for start in list(starts(windows))[1:]:
        assert min(abs(begin - 0.08 - start) for begin in begins) < 0.03


@pytest.mark.parametrize("portion", [7, 160, 5000, 100_000])
def test_cuts_do_not_depend_on_how_the_stream_came_in(portion: int) -> None:
    audio, _ = speech_with_pauses(8)
    expected = cut_windows(audio, 6.0)
    cutter = WindowCutter(6.0)
    portion = max(portion, len(audio) // 3000)
    windows = [w for i in range(0, len(audio), portion) for w in cutter.feed(audio[i : i + portion])]
    windows += cutter.flush()
    assert [len(one) for one in windows] == [len(one) for one in expected]
    assert cutter.flush() == []


def test_without_a_pause_the_quietest_place_is_cut() -> None:
    audio = tone(12.0)
    audio[int(4.5 * SAMPLE_RATE) : int(4.62 * SAMPLE_RATE)] *= 0.05  # too short for a pause
    first = cut_windows(audio, 6.0)[0]
    assert abs(len(first) / SAMPLE_RATE - 4.56) < 0.06
    assert quietest_place(np.zeros(1000, np.float32), 900) == 1000
    assert len(cut_windows(tone(5.9), 6.0)) == 1
    with pytest.raises(ValueError, match="windows need"):
        WindowCutter(0.1)


def test_silence_around_a_sound_is_found() -> None:
    first, last = sounding(np.concatenate([hiss(0.5), tone(1.0), hiss(0.7)]))
    assert (first, last) == (pytest.approx(0.5 * SAMPLE_RATE, abs=320), pytest.approx(1.5 * SAMPLE_RATE, abs=320))
    for silence in (np.zeros(500, np.float32), np.zeros(5, np.float32)):
        assert sounding(silence) == (0, len(silence))


@pytest.mark.parametrize(("rate", "form"), [(16_000, "wav"), (44_100, "flac"), (48_000, "wav"), (8_000, "flac")])
def test_a_file_is_decoded_window_by_window(tmp_path: Path, rate: int, form: str) -> None:
    seconds = 75.0
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 200 * time) * (np.sin(2 * np.pi * 0.3 * time) > -0.7)
    soundfile.write(tmp_path / f"a.{form}", np.stack([wave, 0.5 * wave], 1), rate)
    windows = list(stream_windows(tmp_path / f"a.{form}", 10.0))
    assert sum(len(one.samples) for one in windows) == pytest.approx(seconds * SAMPLE_RATE, abs=2)
    assert [one.start for one in windows] == pytest.approx(list(starts([one.samples for one in windows])))
    assert audio_seconds(tmp_path / f"a.{form}") == pytest.approx(seconds)


def as_container(path: Path, samples: np.ndarray, rate: int) -> None:
    """Writes ``[samples, channels]`` as AAC in MP4."""
    av = pytest.importorskip("av", reason="needs PyAV")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=rate)
        stream.layout = "stereo" if samples.shape[1] == 2 else "mono"
        for begin in range(0, len(samples), 1024):
            planes = np.ascontiguousarray(samples[begin : begin + 1024].T, np.float32)
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=stream.layout.name)
            frame.sample_rate, frame.pts = rate, begin
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.mark.parametrize("channels", ["one", "two", "two that cancel out"])
@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "ogg", "m4a"])
def test_a_stream_is_what_is_read_at_once(tmp_path: Path, form: str, channels: str) -> None:
    rate = 24_000
    time = np.arange(65 * rate) / rate
    wave = 0.3 * np.sin(2 * np.pi * 200 * time) * (np.sin(2 * np.pi * 0.3 * time) > -0.7)
    sides = {"one": [1.0], "two": [1.0, 0.5], "two that cancel out": [0.99, -1.0]}[channels]
    samples, path = np.stack([side * wave for side in sides], 1), tmp_path / f"a.{form}"
    as_container(path, samples, rate) if form == "m4a" else soundfile.write(path, samples, rate)
    blocks = list(stream_audio(path, 5.0))
    whole = load_audio(path, max_seconds=None)
    assert max(map(len, blocks)) < 12 * SAMPLE_RATE
    streamed = np.concatenate(blocks)
    assert len(streamed) == pytest.approx(len(whole), abs=2)
    common = min(len(streamed), len(whole))
    assert np.abs(streamed[:common] - whole[:common]).max() < 1e-3 and np.abs(whole).max() > 0.2
    assert audio_seconds(path) == pytest.approx(65, abs=0.2)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "that are NaN or infinite"), (5.0, r"of up to 5, which are to be in \[-1, 1\]")]
)
def test_what_is_wrong_in_a_stream_is_said_as_of_a_short_file(tmp_path: Path, value: float, message: str) -> None:
    audio = tone(70.0)
    audio[-1000] = value
    soundfile.write(tmp_path / "a.wav", audio, SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"a.wav holds samples {message}"):
        list(stream_windows(tmp_path / "a.wav", 10.0))


@pytest.mark.parametrize("samples", [100, 2_000])
def test_a_rate_at_which_nothing_is_heard_is_refused(tmp_path: Path, samples: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1.0)[:samples], 16)  # a rate in kHz
    with pytest.raises(AudioError, match="a.wav has the sample rate 16: give"):
        list(stream_windows(tmp_path / "a.wav", 10.0))


@pytest.mark.parametrize("form", ["flac", "wav", "mp3", "m4a"])
def test_a_damaged_long_file_is_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    if form == "m4a":
        as_container(path, tone(80.0)[:, None], SAMPLE_RATE)
    else:
        soundfile.write(path, tone(80.0), SAMPLE_RATE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(AudioError, match=f"a.{form}"):
        list(stream_windows(path, 10.0))
    assert audio_seconds(tmp_path / "none.flac") is None


# --- silence --------------------------------------------------------------------------------------

SECONDS = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
NOBODY = {
    "digital silence": np.zeros(5 * SAMPLE_RATE, np.float32),
    "hiss": hiss(5.0, 3e-3),
    "loud hiss": hiss(5.0, 0.1),
    "hum": (0.1 * np.sin(2 * np.pi * 50 * SECONDS)).astype(np.float32),
    "clicks": np.where(np.arange(len(SECONDS)) % 8000 < 16, 0.8, 0.0).astype(np.float32),
    "a constant": np.full(5 * SAMPLE_RATE, 0.2, np.float32),
    "nearly nothing": np.zeros(100, np.float32),
}


@pytest.mark.parametrize("kind", NOBODY)
def test_no_speech_is_found_where_nobody_speaks(kind: str) -> None:
    assert find_speech(NOBODY[kind]) == []


@pytest.mark.parametrize("floor", [0.0, 1e-3, 1e-2])
def test_speech_is_found_with_its_edges(floor: float) -> None:
    audio = np.concatenate(
        [np.zeros(SAMPLE_RATE, np.float32), tone(2.0), np.zeros(2 * SAMPLE_RATE, np.float32), tone(1)]
    )
    audio = audio + hiss(6.0, floor)[: len(audio)] if floor else audio
    (first, second) = find_speech(audio)
    assert np.array(first) / SAMPLE_RATE == pytest.approx([0.8, 3.2], abs=0.06)
    assert np.array(second) / SAMPLE_RATE == pytest.approx([4.8, 6.0], abs=0.06)
    with pytest.raises(VadError, match="choose from energy, silero"):
        find_speech(audio, "ears")


def test_silero_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(VadError, match="pip install 'blspkd-fairseq.vad.'"):
        find_speech(tone(1.0), "silero")


# --- transcripts ----------------------------------------------------------------------------------

TRANSCRIPT = Transcript(
    3661.5,
    (
        Segment(0.5, 3.0, "Hello there. How <are> you?", words_of(
            "Hello there. How <are> you?", ["Hel", "lo", " there", ".", " How", " <are>", " you?"],
            [0.7, 1.0, 1.4, 1.5, 2.0, 2.5, 3.0], 0.5)),
        Segment(3660.0, 3661.5, "Fine.", ()),
    ),
)  # fmt: skip


def test_words_get_the_times_of_their_tokens() -> None:
    assert TRANSCRIPT.words[:2] == [Word(0.5, 1.0, "Hello"), Word(1.0, 1.5, "there.")]
    assert [word.text for word in words_of("日本語", ["日", "", "本語"], [1.0, 2.0, 3.0])] == ["日", "本", "語"]
    assert join_texts(["今日は", "晴れ", "and ", " so", ""]) == "今日は晴れ and so"


def test_formats() -> None:
    assert FORMATS["text"](TRANSCRIPT) == "Hello there. How <are> you? Fine.\n"
    assert FORMATS["srt"](TRANSCRIPT) == (
        "1\n00:00:00,500 --> 00:00:01,500\nHello there.\n\n2\n00:00:01,500 --> 00:00:03,000\nHow <are> you?\n\n"
        "3\n01:01:00,000 --> 01:01:01,500\nFine.\n"
    )
    assert FORMATS["vtt"](TRANSCRIPT).startswith("WEBVTT\n\n00:00:00.500 --> 00:00:01.500\nHello there.\n\n")
    assert "How &lt;are&gt; you?" in FORMATS["vtt"](TRANSCRIPT)
    read = json.loads(FORMATS["json"](TRANSCRIPT))
    assert read["duration"] == 3661.5 and read["words"][0] == {"word": "Hello", "start": 0.5, "end": 1.0}
    long = tuple(Word(i, i + 1.0, f"word{i}") for i in range(14))
    assert [cue.end - cue.start for cue in cues_of(Transcript(14.0, (Segment(0, 14, "", long),)))] == [6.0, 6.0, 2.0]


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    return tiny_model(
        tmp_path_factory.mktemp("long"), window_seconds=6.0, adapter_pre_layers=4, adapter_post_layers=4, lora_rank=16
    )


def test_windows_are_heard_alike_whatever_they_are_batched_with(model: BlspKd) -> None:
    long, short = cut_windows(speech_with_pauses(12)[0], 6.0), [tone(1.3)]
    alone = hear_windows(model.model, [long])
    for seconds in (0.1, 7.0, 1000.0):
        together = hear_windows(model.model, [short, long, [], long[:1]], seconds)
        assert together.counts[1:3] == [*alone.counts, 0]
        torch.testing.assert_close(together.embeddings[1, : alone.counts[0]], alone.embeddings[0], rtol=1e-4, atol=1e-5)
        assert together.is_text.shape == together.embeddings.shape[:2] and not together.is_text.any()
    separate = torch.cat([hear_windows(model.model, [[one]]).embeddings[0] for one in long])
    torch.testing.assert_close(alone.embeddings[0], separate, rtol=1e-4, atol=1e-5)


def test_long_audio_in_every_call(model: BlspKd, tmp_path: Path) -> None:
    audio = speech_with_pauses(16)[0]  # 46 s
    soundfile.write(tmp_path / "a.wav", audio, SAMPLE_RATE, subtype="FLOAT")
    path = tmp_path / "a.wav"
    alone = model.generate(path, max_new_tokens=4)
    assert model.generate([tmp_path / "a.wav", (tone(1.0), SAMPLE_RATE)], max_new_tokens=4)[0] == alone
    tokens = model.align(path)
    assert [one.start for one in tokens] == sorted(one.start for one in tokens)
    assert tokens[-1].end == pytest.approx(len(audio) / SAMPLE_RATE, abs=0.5)
    spoken = "Turn on the light in the kitchen. " * 8
    assert "".join(one.token for one in model.align(path, spoken)) == spoken
    done: list[float] = []
    whole = model.transcripts([path, (audio, SAMPLE_RATE)], progress=done.append, max_new_tokens=4)
    assert whole[0] == whole[1] and sum(done) == pytest.approx(2 * whole[0].seconds)
    assert whole[0].seconds == pytest.approx(len(audio) / SAMPLE_RATE)
    assert model.transcribe(path, max_new_tokens=4) == whole[0].text
    with pytest.raises(ValueError, match="nobody speaks"):
        model.align((np.zeros(SAMPLE_RATE, np.float32), SAMPLE_RATE), "Hello", vad="energy")


def test_a_transcript_ends_where_far_more_is_written_than_was_heard(
    model: BlspKd, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = [tone(0.5), tone(5.0, seed=1)]
    heard = hear_windows(model.model, [[one] for one in speech])
    asked = [resolve_prompt("repeat")] * 2
    whole = [group[0].ids for group in answer_heard(model.model, model.chat_format, heard, asked)]
    limits = [2 * count + 16 for count in heard.counts]
    assert limits[0] < limits[1] and len(whole[0]) == 128  # the random LLM does not end by itself

    def written(*chosen: np.ndarray, prompt: str = "repeat") -> list[str]:
        return [one.text for one in model.transcripts([(each, SAMPLE_RATE) for each in chosen], prompt)]

    def texts(*ends: int | None) -> list[str]:
        return [model.chat_format.decode_answer(ids[:end]).strip() for ids, end in zip(whole, ends, strict=True)]

    assert written(*speech) == texts(None, None)  # reasoning may come first: this tokenizer has marks of it
    monkeypatch.setattr(model.chat_format, "marks", Marks(frozenset(), frozenset(), None, None))
    assert written(*speech) == texts(*limits) == [*written(speech[0]), *written(speech[1])]
    with monkeypatch.context() as other:
        other.setattr(model.chat_format.tokenizer, "chat_template", "<|assistant|><think>")
        assert written(*speech) == texts(None, None)
    own = "Answer this: {speech}"
    assert written(speech[0], prompt=own) == [model.generate((speech[0], SAMPLE_RATE), own).strip()]


def test_nothing_is_written_where_no_word_is_heard(model: BlspKd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked: the LLM would write that it could not hear."""
    speech = [(tone(seconds, seed=number), SAMPLE_RATE) for number, seconds in enumerate((2.0, 3.0, 4.0))]
    for prompt in (None, "repeat"):
        written = [one.text for one in model.transcripts(speech, prompt, max_new_tokens=8)]
        assert all(written)
        with monkeypatch.context() as changed:
            changed.setattr(hub, "nearest_texts", silent_second(hub.nearest_texts))
            found = model.transcripts(speech, prompt, max_new_tokens=8)
        assert [one.text for one in found] == [written[0], "", written[2]] and not found[1].segments


def silent_second(nearest: Any) -> Any:
    """:func:`nearest_texts` as if nobody spoke in the second piece."""

    def changed(*args: Any) -> list[str]:
        texts = nearest(*args)
        return [*texts[:1], "", *texts[2:]]

    return changed


@pytest.mark.parametrize(
    ("tokens", "text"), [("...", ""), (" ?!", ""), ("..a", "..a"), ("7", "7"), ("é", "é"), ("\ufffd", "\ufffd")]
)
def test_a_word_has_a_letter_or_a_digit(model: BlspKd, monkeypatch: pytest.MonkeyPatch, tokens: str, text: str) -> None:
    monkeypatch.setattr(hearing, "nearest_tokens", lambda _, embeddings: [0] * len(embeddings))
    monkeypatch.setattr(model.chat_format, "decode", lambda ids: tokens)
    assert nearest_texts(model.model, model.chat_format, [[torch.zeros(2, 4)]]) == [text]


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_minutes(model: BlspKd, tmp_path: Path) -> None:
    def peak(minutes: int) -> int:
        with soundfile.SoundFile(tmp_path / "a.wav", "w", SAMPLE_RATE, 1) as file:
            for number in range(minutes):
                file.write(np.concatenate([tone(55.0, seed=number), hiss(5.0)]))
        transcript = model.transcripts([tmp_path / "a.wav"], vad="energy", max_new_tokens=2, with_words=False)[0]
        assert transcript.seconds == pytest.approx(60 * minutes)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    few = peak(3)
    assert peak(60) - few < 100_000  # KiB; its samples alone would be 230 MB


@pytest.mark.real
@pytest.mark.slow
def test_three_minutes_of_known_utterances_come_back_in_order() -> None:
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    import sentences
    import voices

    from blspkd_fairseq.base_models import load_published

    speak, texts = voices.load_joe(), sentences.sentences(60, 7, "test")
    model = load_published()
    parts: list[np.ndarray] = []
    spans: list[tuple[float, float]] = []
    alone: list[tuple[str, int]] = []  # the words heard of each utterance by itself: the model errs, too
    time = 0
    for number, text in enumerate(texts):
        clip = np.asarray(speak(text, 1.0), np.float32)
        (sound,) = np.nonzero(np.abs(clip) > 0.02)  # the voice's own silence is no part of the utterance
        spans.append(((time + sound[0]) / SAMPLE_RATE, (time + sound[-1]) / SAMPLE_RATE))
        alone += [(piece, number) for token in model.align((clip, SAMPLE_RATE)) for piece in pieces_of(token.token)]
        parts += [clip, np.zeros(int((0.3, 0.5, 0.8)[number % 3] * SAMPLE_RATE), np.float32)]
        time += len(parts[-2]) + len(parts[-1])
    heard = model.align((np.concatenate(parts), SAMPLE_RATE), vad="energy")
    assert 170 < time / SAMPLE_RATE < 200 and all(
        a.end <= b.start + 1e-6 for a, b in zip(heard, heard[1:], strict=False)
    )
    words = [(piece, token) for token in heard for piece in pieces_of(token.token)]
    matcher = difflib.SequenceMatcher(a=[one for one, _ in alone], b=[one for one, _ in words], autojunk=False)
    pairs = [(a + i, b + i) for a, b, count in matcher.get_matching_blocks() for i in range(count)]
    # Windows hold parts of two sentences, among which a small model hears some words as others; it loses none.
    assert abs(len(words) - len(alone)) <= 0.03 * len(alone) and len(pairs) >= 0.85 * len(alone)
    differences = []
    for mine, its in pairs:
        number = alone[mine][1]
        if mine == 0 or alone[mine - 1][1] != number:
            differences.append(abs(words[its][1].start - spans[number][0]))
        elif mine + 1 == len(alone) or alone[mine + 1][1] != number:
            differences.append(abs(words[its][1].end - spans[number][1]))
    assert len(differences) > 100
    assert np.mean(np.array(differences) < 0.2) >= 0.95 and max(differences) < 1


def pieces_of(text: str) -> list[str]:
    """Words and signs."""
    return re.findall(r"\w+|[^\w\s]", text)


def test_generation_from_a_manifest_hears_any_length(tmp_path: Path) -> None:
    llm, whisper = save_llm(tmp_path / "llm"), save_whisper(tmp_path / "whisper")
    write_split(tmp_path / "data", "train", 2)
    train(tmp_path / "data", tmp_path / "save", llm, whisper, "--max-update", 1, "--disable-validation")
    audio = speech_with_pauses(11)[0]  # 32 s
    soundfile.write(tmp_path / "data" / "long.flac", audio, SAMPLE_RATE)
    rows = list(Manifest.load(write_split(tmp_path / "data", "test", 1)))
    rows += [{**rows[0], "id": "long", "audio": "long.flac", "n_frames": str(len(audio))}]
    write_manifest(tmp_path / "data" / "test.tsv", rows, list(rows[0]))
    options = ["--path", tmp_path / "save" / "checkpoint_last.pt", "--beam", 1, "--max-len-b", 6, "--batch-size", 2]
    options += ["--results-path", tmp_path / "out", "--max-audio-seconds", 100, "--prompt", "repeat"]
    fairseq("generate", tmp_path / "data", *options)
    answers = {row["id"]: row["hypothesis"] for row in read_jsonl(tmp_path / "out" / "generate-test.jsonl")}
    model = BlspKd.from_pretrained(tmp_path / "save" / "checkpoint_last.pt")
    assert answers["long"] == model.generate(tmp_path / "data" / "long.flac", "repeat", max_new_tokens=6)
