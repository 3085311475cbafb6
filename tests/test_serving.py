"""The server: what OpenAI's own client gets from it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving_util import NAME, Served, as_file, input_audio, noise, served
from tiny import tiny_model

from blspkd_fairseq.generation.streaming import Delta, StreamingDecoder
from blspkd_fairseq.hub import BlspKd


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    return tiny_model(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(model: BlspKd) -> Iterator[Served]:
    with served(model) as one:
        yield one


SPEECH = noise(1.1)
SAID = input_audio(as_file(SPEECH))
TEXT = {"type": "text", "text": "Repeat: "}


def expected(model: BlspKd, *content: Any, **sampling: Any) -> str:
    parts = [{"type": "audio", "audio": (SPEECH, 16_000)} if part is SAID else part for part in content]
    return model.chat([{"role": "user", "content": parts}], **{"max_new_tokens": 12, **sampling})


def test_it_says_what_the_model_says(server: Served, model: BlspKd) -> None:
    for content in ([SAID], [TEXT, SAID], [SAID, TEXT, SAID], [TEXT]):
        reply = server.chat(*content)
        choice = reply.choices[0]
        assert choice.message.content == expected(model, *content) and choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length") and reply.model == NAME and reply.object == "chat.completion"
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert 0 < reply.usage.completion_tokens <= 12 < reply.usage.prompt_tokens


def test_a_stream_gives_the_same_text_in_chunks(server: Served, model: BlspKd) -> None:
    chunks = list(server.chat(TEXT, SAID, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(texts) == expected(model, TEXT, SAID) and len(texts) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] in ("stop", "length")
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    whole = server.chat(TEXT, SAID)
    used = (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens)
    assert chunks[-1].choices == [] and used == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert all(chunk.usage is None for chunk in server.chat(SAID, stream=True))


def test_several_answers_each_with_its_own_seed(server: Served) -> None:
    drawn = server.chat(SAID, n=3, temperature=1.5, seed=7)
    texts = [choice.message.content for choice in drawn.choices]
    assert [choice.index for choice in drawn.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [c.message.content for c in server.chat(SAID, n=3, temperature=1.5, seed=7).choices] == texts
    assert server.chat(SAID, temperature=1.5, seed=8).choices[0].message.content == texts[1]
    streamed = ["", "", ""]
    for chunk in server.chat(SAID, n=3, temperature=1.5, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    likeliest = server.chat(SAID).choices[0].message.content
    assert server.chat(SAID, temperature=1.5, top_p=1e-6).choices[0].message.content == likeliest
    assert {c.message.content for c in server.chat(SAID, n=2).choices} == {likeliest}


def test_an_answer_ends_at_a_stop_sequence_or_at_the_limit(server: Served) -> None:
    whole = server.chat(SAID, max_tokens=12).choices[0]
    text = whole.message.content
    assert whole.finish_reason == "length" and len(text) > 8
    for stop in (text[3:6], ["never said", text[3:6]]):
        cut = server.chat(SAID, stop=stop).choices[0]
        assert cut.message.content == text[: text.index(text[3:6])] and cut.finish_reason == "stop"
        pieces = server.chat(SAID, stop=stop, stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == cut.message.content
    for limit in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}):
        assert server.chat(SAID, **limit).usage.completion_tokens == 3


def test_turns_before_and_instructions_count(server: Served, model: BlspKd) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [SAID]},
        {"role": "assistant", "content": "Of what?"},
        {"role": "user", "content": [TEXT, SAID]},
    ]
    reply = server.client.chat.completions.create(model=NAME, messages=turns, max_tokens=12)  # type: ignore[arg-type]
    heard = [{"type": "audio", "audio": (SPEECH, 16_000)}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": heard},
        turns[2],
        {"role": "user", "content": [TEXT, *heard]},
    ]
    assert reply.choices[0].message.content == model.chat(messages, max_new_tokens=12)


def test_one_hundred_at_once_are_all_answered_as_each_by_itself(server: Served, model: BlspKd) -> None:
    speeches = [noise(0.4 + 0.03 * (i % 20), seed=i) for i in range(100)]

    def ask(i: int) -> str:
        said = input_audio(as_file(speeches[i], "FLAC"))
        if i % 2:
            return server.chat(said, max_tokens=3 + i % 9).choices[0].message.content
        return "".join(c.choices[0].delta.content or "" for c in server.chat(said, max_tokens=3 + i % 9, stream=True))

    with ThreadPoolExecutor(100) as clients:
        said = list(clients.map(ask, range(100)))
    for i, speech in enumerate(speeches):  # as a file, since FLAC has 16 bits
        turn = {"role": "user", "content": [{"type": "audio", "audio": as_file(speech, "FLAC")}]}
        assert said[i] == model.chat([turn], max_new_tokens=3 + i % 9)


def test_requests_that_come_together_share_the_steps(model: BlspKd, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    whole = StreamingDecoder.step

    def step(self: StreamingDecoder) -> list[Delta]:
        rows.append(self.active)
        return whole(self)

    monkeypatch.setattr(StreamingDecoder, "step", step)
    with served(model, rows=8) as one, ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda _: one.chat(SAID, max_tokens=60), range(8)))
    tokens = sum(reply.usage.completion_tokens for reply in replies)
    assert max(rows) > 1 and len(rows) < tokens / 2


def test_with_a_vad_silence_has_no_answer(model: BlspKd) -> None:
    silence = as_file(SPEECH * 0)
    with served(model, vad="energy") as one:
        assert one.chat(input_audio(silence)).choices[0].message.content == ""
        assert list(one.chat(input_audio(silence), stream=True))[-1].choices[0].finish_reason == "stop"
        assert one.chat(TEXT, input_audio(silence)).choices[0].message.content  # something was written
        create = one.client.audio.transcriptions.create
        upload = ("a.wav", silence, "audio/wav")
        assert create(model=NAME, file=upload).text == ""
        verbose = create(model=NAME, file=upload, response_format="verbose_json")
        assert verbose.text == "" and verbose.segments == [] and verbose.duration == pytest.approx(1.1)
        assert list(create(model=NAME, file=upload, stream=True))[-1].text == ""
