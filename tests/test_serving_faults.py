"""The server: requests that it cannot answer, clients that leave, and more of them than it may have."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serving_util import NAME, Served, as_file, input_audio, noise, openai, served, until
from tiny import tiny_model

from blspkd_fairseq.cli.serve import KEY_VARIABLE, chosen_key
from blspkd_fairseq.hub import BlspKd

WAV = as_file(noise(0.6))
SAID = input_audio(WAV)
LONG = {"type": "text", "text": "xyz " * 200}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    return tiny_model(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def server(model: BlspKd) -> Iterator[Served]:
    with served(model, body_mib=1, audio_seconds=5, body_seconds=2, new_tokens=400) as one:
        yield one


def post(server: Served, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and body of a raw request."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    return reply.status, answer


def url_part(kind: str, url: str) -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


PDF = b"%PDF-1.7\n" + bytes(1000)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ([input_audio(PDF)], {}, "truncated, damaged or no audio"),
        ([input_audio(WAV[:-9000])], {}, "it is truncated"),
        ([input_audio(as_file(noise(0.6), "FLAC")[:-2000])], {}, "truncated"),
        ([input_audio(b"")], {}, "empty file"),
        ([input_audio(as_file(noise(0.0)))], {}, "no samples"),
        ([input_audio(as_file(noise(5.2)))], {}, "the limit is 5 s"),
        ([input_audio(as_file(noise(3.0)))] * 2, {}, "all audio together is 6.0 s"),
        ([input_audio(as_file(np.zeros((200_000, 8)), "FLAC", 96_000))], {}, "8 channels at 96000 Hz"),
        ([{"type": "text", "text": "a " * 5000}], {}, "more text than the LLM can read"),
        ([{"type": "input_audio", "input_audio": {"data": "/etc/passwd", "format": "wav"}}], {}, "no path and no URL"),
        ([{"type": "input_audio", "input_audio": {"data": "file:///a"}}], {}, "no path and no URL"),
        ([{"type": "input_audio", "input_audio": {"format": "wav"}}], {}, "Field required"),
        ([{"type": "audio", "audio": "/tmp/a.wav"}], {}, "does not match any of the expected tags"),
        ([url_part("audio_url", "http://127.0.0.1/a.wav")], {}, "does not match any of the expected tags"),
        ([url_part("image_url", "file:///etc/passwd")], {}, "does not match any of the expected tags"),
        ([], {}, "is empty"),
        ([SAID], {"temperature": -1}, "temperature"),
        ([SAID], {"temperature": 3}, "temperature"),
        ([SAID], {"top_p": 0}, "top_p"),
        ([SAID], {"n": 0}, "n: "),
        ([SAID], {"n": 99}, "n must be at most 8"),
        ([SAID], {"max_tokens": 0}, "max_tokens"),
        ([SAID], {"stop": ["a", "b", "c", "d", "e"]}, "at most 4"),
        ([SAID], {"stop": [""]}, "not empty"),
        ([SAID], {"stop": [None]}, r"stop\[0\]: "),
        ([SAID], {"stop": 3}, "stop: "),
        ([SAID], {"stop": False}, "stop: "),
        ([SAID], {"seed": "x"}, "seed"),
        ([SAID], {"seed": 1.5}, "seed"),
        ([SAID], {"n": "2"}, "n: "),
        ([SAID], {"n": True}, "n: "),
        ([SAID], {"max_tokens": "4"}, "max_tokens"),
        ([SAID], {"temperature": "0.5"}, "temperature"),
        ([SAID], {"logprobs": True}, "not supported"),
        ([SAID], {"presence_penalty": 0.5}, "not supported"),
        ([SAID], {"response_format": {"type": "json_object"}}, "not supported"),
        ([SAID], {"modalities": ["text", "audio"]}, "not supported"),
        ([SAID], {"extra_body": {"guided_json": {}}}, "guided_json is unknown"),
        ([LONG, LONG, LONG, LONG], {}, "the LLM reads 512"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_said_to_be_so(
    server: Served, content: list[Any], options: dict[str, Any], message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            server.chat(*content, stream=stream, **options)
        assert caught.value.type == "invalid_request_error" and caught.value.code
        assert "/tmp" not in caught.value.message and "manifest" not in caught.value.message
    assert server.chat(SAID).choices  # the server lives on


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "must be a JSON object"),
        (b"{", 400, "must be a JSON object"),
        (b"[]", 400, "must be a JSON object"),
        (b"null", 400, "must be a JSON object"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}', 400, "half of a surrogate pair"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": "yes"}', 400, "stream: "),
        (b"[" * 100_000, 400, ""),
        (b'{"model": "tiny"}', 400, "messages"),
        (b'{"model": "tiny", "messages": []}', 400, "at least one"),
        (b'{"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]}', 400, "take turns"),
        (b'{"model": "tiny", "messages": [{"role": "tool", "content": "a"}]}', 400, "role"),
        (b'{"model": "gpt", "messages": [{"role": "user", "content": "a"}]}', 404, "this server has 'tiny'"),
        (b"\xff" * 100, 400, ""),
    ],
)
def test_a_wrong_body_is_an_error_object(server: Served, body: bytes, status: int, message: str) -> None:
    got, answer = post(server, "/v1/chat/completions", body)
    assert got == status and message in answer["error"]["message"] and set(answer["error"]) >= {"type", "code", "param"}


def test_other_paths_methods_and_types_are_error_objects(server: Served) -> None:
    assert post(server, "/v1/nothing", b"{}")[0] == 404
    assert post(server, "/v1/models", b"{}")[0] == 405
    status, answer = post(server, "/v1/chat/completions", b"a=b", {"Content-Type": "text/plain"})
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert "with Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize("narrow", [{"temperature": 1e-300}, {"temperature": 1, "top_p": 1e-300}], ids=str)
def test_the_narrowest_choice_does_not_end_the_answers_of_others(server: Served, narrow: dict[str, float]) -> None:
    with ThreadPoolExecutor(1) as clients:
        other = clients.submit(server.chat, SAID, max_tokens=100)
        until(lambda: server.service.engine.active == 1)
        assert server.chat(SAID, **narrow).choices[0].message.content == server.chat(SAID).choices[0].message.content
        assert other.result().usage.completion_tokens > 12


def test_an_answer_that_comes_too_late_names_the_option(model: BlspKd) -> None:
    with served(model, answer_seconds=0.01, new_tokens=400) as slow:
        with pytest.raises(openai.APIStatusError, match="larger --answer-seconds") as caught:
            slow.chat(SAID, max_tokens=400)
        assert caught.value.status_code == 504


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (("a.wav", PDF, "audio/wav"), {}, "no audio"),
        (("a.wav", b"\x89PNG\r\n\x1a\n" + bytes(99), "image/png"), {}, "no audio"),
        (("a.wav", WAV[:-9000], "audio/wav"), {}, "truncated"),
        (("a.wav", b"", "audio/wav"), {}, "empty"),
        (("a.wav", as_file(noise(5.2)), "audio/wav"), {}, "limit is 5 s"),
        (("a.wav", WAV, "audio/wav"), {"prompt": "Names: Ann"}, "not supported"),
        (("a.wav", WAV, "audio/wav"), {"temperature": 9}, "temperature"),
        (("a.wav", WAV, "audio/wav"), {"response_format": "docx"}, "response_format"),
        (("a.wav", WAV, "audio/wav"), {"response_format": "srt", "stream": True}, "only json and text"),
        (("a.wav", WAV, "audio/wav"), {"extra_body": {"beam": 5}}, "beam is unknown"),
    ],
)
def test_a_wrong_upload_is_said_to_be_so(server: Served, file: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        server.client.audio.transcriptions.create(model=NAME, file=file, **fields)
    assert "/tmp" not in caught.value.message
    whole = server.client.audio.transcriptions.create(model=NAME, file=("song.mp3", WAV, "text/plain"))
    assert isinstance(whole.text, str)  # the content decides, not what it is called


def test_an_upload_must_be_a_file(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="in its field file"):
        server.client.post("/audio/transcriptions", body={"model": NAME, "file": "/etc/passwd"}, cast_to=object)
    form = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n/etc/passwd\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, answer = post(server, "/v1/audio/transcriptions", form, headers)
    assert status == 400 and "in its field file" in answer["error"]["message"]
    assert post(server, "/v1/audio/transcriptions", form[:-30], headers)[0] == 400


def test_what_is_too_large_is_refused_whether_or_not_it_says_its_size(server: Served) -> None:
    large = bytes(3 << 20)
    with pytest.raises(openai.APIStatusError, match="larger than 1 MiB") as caught:
        server.chat(input_audio(large))
    assert caught.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match="larger than 1 MiB"):
        server.client.audio.transcriptions.create(model=NAME, file=("a.wav", large, "audio/wav"))
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    chunks = (bytes(1 << 16) for _ in range(1600))  # 100 MiB: far more than any buffer between them takes
    connection.request("POST", "/v1/chat/completions", chunks, encode_chunked=True)  # no Content-Length
    assert connection.getresponse().status == 413


def test_a_slow_sender_is_not_waited_for(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        start = time.monotonic()
        assert server.chat(SAID).choices  # others are answered meanwhile
        reply = slow.recv(1 << 16)
        while b"request_timeout" not in reply:
            more = slow.recv(1 << 16)
            assert more, reply
            reply += more
        assert reply.startswith(b"HTTP/1.1 408") and time.monotonic() - start > 1


def test_a_client_that_leaves_frees_its_place(server: Served) -> None:
    stream = server.chat(SAID, stream=True, max_tokens=400)
    next(iter(stream))
    assert server.service.engine.active == 1
    stream.close()
    until(lambda: server.service.engine.active == 0)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": NAME, "max_tokens": 400, "messages": [{"role": "user", "content": [SAID]}]}).encode()
    with socket.create_connection((host, int(port))) as client:
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", ""]
        client.sendall("\r\n".join(head).encode() + body)
        until(lambda: server.service.engine.active == 1)
    until(lambda: server.service.engine.active == 0)


def test_a_long_answer_does_not_hold_up_a_short_one(server: Served) -> None:
    ended: list[str] = []

    def ask(name: str, tokens: int) -> None:
        server.chat(SAID, max_tokens=tokens)
        ended.append(name)

    with ThreadPoolExecutor(2) as clients:
        long = clients.submit(ask, "long", 400)
        until(lambda: server.service.engine.active == 1)
        clients.submit(ask, "short", 2).result()
        long.result()
    assert ended == ["short", "long"]


def test_more_than_may_wait_are_refused_and_try_again(model: BlspKd) -> None:
    with served(model, rows=1, waiting=1, new_tokens=400) as server:
        streams = [server.chat(SAID, stream=True, max_tokens=400) for _ in range(1)]
        waiting = ThreadPoolExecutor(1).submit(server.chat, SAID, max_tokens=2)
        until(lambda: server.service.engine.active == 2)
        with pytest.raises(openai.InternalServerError, match="try again later") as caught:
            server.chat(SAID)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.InternalServerError, match="try again later"):
            server.chat(SAID, n=3)
        streams[0].close()
        assert waiting.result().choices


def test_an_answer_that_takes_too_long_is_ended(model: BlspKd) -> None:
    with served(model, answer_seconds=0.05, new_tokens=400) as server:
        with pytest.raises(openai.InternalServerError, match=r"not ready within 0.05 s") as caught:
            server.chat(SAID, SAID, max_tokens=400, n=8)
        assert caught.value.status_code == 504
        until(lambda: server.service.engine.active == 0)


def test_with_a_key_only_those_who_know_it_are_answered(model: BlspKd) -> None:
    with served(model, key="secret") as server:
        assert server.chat(SAID).choices
        for wrong in ("other", "secret2", "", "ä"):
            headers = {"Authorization": f"Bearer {wrong}".encode().decode("latin-1")}
            status, answer = post(server, "/v1/chat/completions", b"{}", headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key", wrong
        assert post(server, "/v1/audio/transcriptions", b"")[0] == 401
        assert post(server, "/v1/audio/transcriptions", bytes(100 << 20))[0] == 401  # told, having sent it all
        assert post(server, "/v1/chat/completions", b"{}", {"Authorization": "Basic secret"})[0] == 401


def test_a_key_is_what_clients_can_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert chosen_key(None) is None and chosen_key("") is None and chosen_key(" abc\n") == "abc"
    for wrong in (" ", "ä", "a\nb", "a\udcff"):
        with pytest.raises(ValueError, match="the key of --api-key must be printable ASCII"):
            chosen_key(wrong)
    monkeypatch.setenv(KEY_VARIABLE, "of the environment")
    assert chosen_key(None) == "of the environment" and chosen_key("given") == "given"


def test_null_is_what_is_left_out(server: Served) -> None:
    nulls = {"n": None, "stream": None, "stop": None, "seed": None, "temperature": None, "max_tokens": 2}
    body = {"model": NAME, "messages": [{"role": "user", "content": [SAID]}], **nulls, "stream_options": None}
    status, answer = post(server, "/v1/chat/completions", json.dumps(body).encode())
    assert status == 200 and len(answer["choices"]) == 1


def test_a_page_of_another_name_cannot_use_a_server_of_this_machine(server: Served) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("GET", "/v1/models", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 400


def test_a_page_of_another_site_cannot_use_it_either(server: Served) -> None:
    for path in ("/v1/audio/transcriptions", "/v1/chat/completions"):
        status, answer = post(server, path, b"{}", {"Origin": "https://evil.example"})
        assert status == 403 and answer["error"]["code"] == "wrong_origin"
    for body in (b"{}", bytes(100 << 20)):  # told, having sent it all
        assert post(server, "/v1/chat/completions", body, {"Origin": "null"})[0] == 403
    assert post(server, "/v1/chat/completions", b"{}", {"Origin": server.url})[0] == 400  # its own page's


def test_bodies_together_have_a_limit_and_give_back_what_they_took(server: Served, model: BlspKd) -> None:
    with served(model, body_mib=0.001) as small:
        held = [socket.create_connection(("127.0.0.1", int(small.url.rpartition(":")[2]))) for _ in range(17)]
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        for one in held:
            one.sendall(head + bytes(999))  # the last byte is still to come
        held[-1].settimeout(60)
        assert held[-1].recv(1 << 16).startswith(b"HTTP/1.1 503")
        for one in held:
            one.close()
        body = json.dumps({"model": NAME, "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}).encode()
        until(lambda: post(small, "/v1/chat/completions", body)[0] == 200)


class _Failing:
    """A decoder that fails at its second step."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def step(self) -> Any:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("out of memory, at /secret/place")
        return self.decoder.step()


def test_a_failure_of_the_model_is_said_without_its_inside_and_survived(
    model: BlspKd, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    whole = BlspKd.streaming_decoder

    def fail_first(self: BlspKd, **options: Any) -> Any:
        made.append(whole(self, **options) if made else _Failing(whole(self, **options)))
        return made[-1]

    monkeypatch.setattr(BlspKd, "streaming_decoder", fail_first)
    with served(model) as server:
        with pytest.raises(openai.InternalServerError, match="RuntimeError") as caught:
            server.chat(SAID)
        assert "secret" not in caught.value.message
        assert server.chat(SAID).choices and len(made) == 2
        assert threading.active_count() < 100
