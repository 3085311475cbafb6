"""The server: transcriptions and translations in all formats."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving_util import NAME, Served, as_file, noise, openai, served, until
from tiny import tiny_model

from blspkd_fairseq.data.chat import Marks
from blspkd_fairseq.data.transcript import join_texts
from blspkd_fairseq.generation import streaming
from blspkd_fairseq.hub import BlspKd

SPEECH = as_file(noise(1.3))
UPLOAD = ("a.wav", SPEECH, "audio/wav")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    return tiny_model(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def server(model: BlspKd) -> Iterator[Served]:
    with served(model, new_tokens=16) as one:
        yield one


@pytest.mark.filterwarnings("ignore:deprecated")
def test_it_writes_what_the_model_writes(server: Served, model: BlspKd) -> None:
    heard = server.client.audio.transcriptions.create(model=NAME, file=UPLOAD)
    text = model.transcribe(SPEECH, max_new_tokens=16)
    assert heard.text == text and text
    assert server.client.audio.transcriptions.create(model=NAME, file=UPLOAD, response_format="text").strip() == text
    english = server.client.audio.translations.create(model=NAME, file=UPLOAD)
    assert english.text == model.translate(SPEECH, target="English", max_new_tokens=16).strip()


@pytest.mark.parametrize("prompt", ["repeat", "transcribe", "Write down: {speech}"])
def test_it_writes_no_further_than_the_model_does(model: BlspKd, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.chat_format, "marks", Marks(frozenset(), frozenset(), None, None))  # nor may it reason
    monkeypatch.setattr(model.chat_format.tokenizer, "chat_template", "")
    with served(model, new_tokens=400, prompt=prompt) as server:
        whole, length = server.client.audio.transcriptions.create(model=NAME, file=UPLOAD), len(model.align(SPEECH))
    assert whole.text == model.transcribe(SPEECH, prompt=prompt, max_new_tokens=400)
    written, most = whole.usage.output_tokens, 2 * length + 16
    assert written > most if "{" in prompt else written == most


def test_words_have_the_times_at_which_cif_cuts(server: Served, model: BlspKd) -> None:
    create = server.client.audio.transcriptions.create
    verbose = create(model=NAME, file=UPLOAD, response_format="verbose_json",
                     timestamp_granularities=["word", "segment"], language="en")  # fmt: skip
    assert verbose.duration == pytest.approx(1.3, abs=0.01) and verbose.language == "en"
    assert [word.word for word in verbose.words] == verbose.text.split()
    tokens = model.align(SPEECH, transcript=verbose.text)
    ends = {round(token.end, 3) for token in tokens}
    assert {word.end for word in verbose.words} <= ends and verbose.words[-1].end == max(ends)
    assert " ".join(segment.text for segment in verbose.segments) == " ".join(verbose.text.split())
    bare = create(model=NAME, file=UPLOAD, response_format="verbose_json", timestamp_granularities=["word"])
    assert bare.words and not bare.segments
    bare = create(model=NAME, file=UPLOAD, response_format="verbose_json")
    assert bare.segments and not bare.words


def test_verbose_answers_have_the_shape_that_the_client_knows(server: Served, model: BlspKd) -> None:
    bare = server.client.with_raw_response.audio.transcriptions.create(
        model=NAME, file=UPLOAD, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )  # fmt: skip
    checked = openai.types.audio.TranscriptionVerbose.model_validate_json(bare.content)
    segment = checked.segments[0]
    assert checked.usage.type == "duration" and checked.usage.seconds == pytest.approx(1.3)
    assert segment.tokens == model.chat_format.encode_transcript(segment.text) and segment.seek == 0
    assert -12 < segment.avg_logprob < 0 and segment.temperature == 0 and segment.no_speech_prob == 0
    assert 0.1 < segment.compression_ratio < 20


def test_a_recording_has_more_windows_than_the_server_has_places(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model(tmp_path_factory.mktemp("windows"), window_seconds=1.0)
    long = as_file(noise(7.5))
    said = [model.transcribe((window, 16_000), max_new_tokens=4).strip() for window in model.windows(long)]
    assert len(said) >= 7
    for rows in (1, 4):
        with served(model, rows=rows, waiting=0, new_tokens=4) as server:
            create = server.client.audio.transcriptions.create
            assert create(model=NAME, file=("long.wav", long, "audio/wav")).text == join_texts(said)
            verbose = create(
                model=NAME, file=("long.wav", long, "audio/wav"), response_format="verbose_json",
                timestamp_granularities=["segment"],
            )  # fmt: skip
            assert len(verbose.segments) == len([one for one in said if one])
            assert server.service.engine.active == 0


def test_times_are_found_between_the_answers_of_others_and_within_the_time(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path_factory.mktemp("slow"), window_seconds=1.0)
    segment, found = model.segment, []

    def slow(*args: Any) -> Any:
        found.append(args)
        time.sleep(0.7)
        return segment(*args)

    monkeypatch.setattr(model, "segment", slow)
    upload = ("long.wav", as_file(noise(4.5)), "audio/wav")
    with served(model, new_tokens=4, answer_seconds=60.0) as server, ThreadPoolExecutor(1) as pool:
        create = server.client.audio.transcriptions.create
        whole = pool.submit(create, model=NAME, file=upload, response_format="srt")
        until(lambda: len(found) == 1)
        assert server.chat({"type": "text", "text": "Hello."}, max_tokens=1).choices
        assert len(found) < 4  # it did not wait for all of them
        assert whole.result()
    found.clear()
    with served(model, new_tokens=4, answer_seconds=1.0) as server:
        with pytest.raises(openai.InternalServerError, match="not ready within 1 s"):
            server.client.audio.transcriptions.create(model=NAME, file=upload, response_format="srt")
        assert len(found) < 4


def test_subtitles(server: Served) -> None:
    create = server.client.audio.transcriptions.create
    text = create(model=NAME, file=UPLOAD).text
    srt = create(model=NAME, file=UPLOAD, response_format="srt")
    assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n", srt) and srt.endswith("\n")
    vtt = create(model=NAME, file=UPLOAD, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:0") and text.split()[0][:3] in srt


def test_a_transcript_can_be_streamed(server: Served) -> None:
    create = server.client.audio.transcriptions.create
    events = list(create(model=NAME, file=UPLOAD, stream=True))
    whole = create(model=NAME, file=UPLOAD).text
    assert events[-1].type == "transcript.text.done" and events[-1].text == whole
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert "".join(deltas) == whole and len(deltas) > 1


def test_what_is_longer_than_the_encoder_hears_is_heard_window_by_window(server: Served, model: BlspKd) -> None:
    quiet, pieces = np.zeros(8_000, np.float32), [noise(20, 1), noise(18, 2)]
    long = np.concatenate([pieces[0], quiet, pieces[1]])
    verbose = server.client.audio.transcriptions.create(
        model=NAME, file=("long.flac", as_file(long, "FLAC"), "audio/flac"), response_format="verbose_json",
        timestamp_granularities=["word"],
    )  # fmt: skip
    windows = model.windows(as_file(long, "FLAC"))
    said = [model.transcribe((window, 16_000), max_new_tokens=16).strip() for window in windows]
    assert len(windows) == 2 and verbose.text == " ".join(said) and verbose.duration == pytest.approx(38.5)
    starts = [word.start for word in verbose.words]
    second = starts[len(said[0].split())]
    assert starts == sorted(starts) and len(windows[0]) / 16_000 - 0.01 <= second < 38.5
    assert [w.word for w in verbose.words] == verbose.text.split()
    streamed = server.client.audio.transcriptions.create(
        model=NAME, file=("long.flac", as_file(long, "FLAC"), "audio/flac"), stream=True
    )
    assert "".join(getattr(event, "delta", "") for event in streamed) == verbose.text


def test_it_can_write_what_is_heard_without_asking_the_llm(model: BlspKd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.model.llm, "get_decoder", None)
    monkeypatch.setattr(model.model.llm, "forward", None)
    long = as_file(np.concatenate([noise(20, 1), np.zeros(8_000, np.float32), noise(18, 2)]), "FLAC")
    upload = ("long.flac", long, "audio/flac")
    with served(model, prompt=None) as server:
        create = server.client.audio.transcriptions.create
        expected = model.transcripts([long], prompt=None)[0]
        verbose = create(
            model=NAME, file=upload, response_format="verbose_json", timestamp_granularities=["word", "segment"]
        )
        assert verbose.text == expected.text and len(verbose.segments) == len(expected.segments) == 2
        assert [(word.word, word.start, word.end) for word in verbose.words] == [
            (word.text, pytest.approx(word.start, abs=1e-3), pytest.approx(word.end, abs=1e-3))
            for segment in expected.segments for word in segment.words
        ]  # fmt: skip
        streamed = [event.delta for event in create(model=NAME, file=upload, stream=True) if hasattr(event, "delta")]
        assert "".join(streamed) == expected.text and len(streamed) == 2
        usage = create(model=NAME, file=upload).usage
        counted = [int(model.adapt((window, 16_000)).lengths[0]) for window in model.windows(long)]
        assert usage.input_tokens == usage.output_tokens == sum(counted)
        with pytest.raises(openai.BadRequestError, match="not drawn: leave it at 0"):
            create(model=NAME, file=upload, temperature=0.5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nothing_is_written_where_no_word_is_heard(
    model: BlspKd, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(streaming, "nearest_texts", lambda *args: [""] * len(args[2]))
    with served(model, new_tokens=6) as server:
        create = server.client.audio.transcriptions.create
        found = create(model=NAME, file=UPLOAD, response_format="verbose_json", temperature=temperature)
        assert found.text == "" and not found.segments and found.duration > 0
        assert create(model=NAME, file=UPLOAD, response_format="text", temperature=temperature).strip() == ""
        assert list(create(model=NAME, file=UPLOAD, stream=True))[-1].text == ""


def test_a_translation_is_asked_of_the_llm_all_the_same(model: BlspKd) -> None:
    with served(model, new_tokens=8, prompt=None) as server:
        english = server.client.audio.translations.create(model=NAME, file=UPLOAD)
    assert english.text == model.translate(SPEECH, target="English", max_new_tokens=8).strip()


def test_an_adapter_without_boundaries_gives_no_times(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model(tmp_path_factory.mktemp("cnn"), adapter="cnn")
    with pytest.raises(ValueError, match="cnn has no embedding for each token"), served(model, prompt=None):
        pass
    with served(model, new_tokens=4) as server:
        create = server.client.audio.transcriptions.create
        assert create(model=NAME, file=UPLOAD).text is not None
        for kind in ("srt", "vtt", "verbose_json"):
            with pytest.raises(openai.BadRequestError, match="no times: ask for json or text"):
                create(model=NAME, file=UPLOAD, response_format=kind)


def test_health_models_and_figures(server: Served) -> None:
    import urllib.request

    server.client.audio.transcriptions.create(model=NAME, file=UPLOAD)
    assert [one.id for one in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="this server has"):
        server.client.models.retrieve("other")
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        assert reply.status == 200
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        figures = reply.read().decode()
    values = dict(re.findall(r"^(blspkd_\S+) ([\d.e+]+)$", figures, re.MULTILINE))
    assert float(values['blspkd_requests_total{path="/v1/audio/transcriptions",status="200"}']) >= 1
    assert float(values["blspkd_answer_tokens_total"]) > 0 and float(values["blspkd_audio_seconds_total"]) > 1
    assert float(values["blspkd_answers_running"]) == 0 and float(values["blspkd_first_token_seconds_count"]) > 0
