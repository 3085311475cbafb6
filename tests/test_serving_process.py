"""``blspkd serve`` as a process: signals, exit codes, and memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving_util import as_file, input_audio, noise, openai
from tiny import PATIENCE, tiny_model

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.serving.server import listen, reserve

NAME = "small"
SAID = input_audio(as_file(noise(0.6)))
COMMAND = [sys.executable, "-m", "blspkd_fairseq", "serve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("process")
    tiny_model(root).save_pretrained(root / NAME)
    return root / NAME


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    command = [*COMMAND, "--model", str(folder), "--port", "0", "--vad", "none", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None and running.stderr is not None
            line = running.stdout.readline()
            assert line.startswith(f"{NAME} on http://127.0.0.1:"), running.stderr.read()
            url = f"{line.split()[-1]}/v1"
            with openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE, max_retries=9) as client:
                yield running, client
        finally:
            running.kill()


def serve_with(*options: str) -> int:
    return run(["serve", *options])


def chat(client: openai.OpenAI, **options: object) -> object:
    messages = [{"role": "user", "content": [SAID]}]
    return client.chat.completions.create(model=NAME, messages=messages, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_when_what_runs_is_finished(folder: Path, number: signal.Signals) -> None:
    with process(folder) as (running, client):
        stream = chat(client, stream=True, max_tokens=400)
        first = next(iter(stream))  # type: ignore[call-overload]
        running.send_signal(number)
        address = client.base_url
        end = time.monotonic() + PATIENCE
        while True:  # new connections are refused
            try:
                socket.create_connection((str(address.host), address.port), timeout=10).close()
            except ConnectionRefusedError:
                break
            assert time.monotonic() < end
            time.sleep(0.01)
        assert running.poll() is None
        chunks = [first, *stream]  # type: ignore[misc]
        assert chunks[-1].choices[0].finish_reason and len(chunks) > 10
        assert running.wait(PATIENCE) == 0
        assert running.stderr is not None and "Traceback" not in running.stderr.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--port", "99999"], "cannot listen on 127.0.0.1 port 99999"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--prompt", "nonsense"], "there is no prompt 'nonsense'"),
        (["--rows", "0"], "the limit rows must be at least 1"),
        (["--audio-seconds", "nan"], "the limit audio_seconds"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve_with("--model", str(folder), "--port", "0", *options) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve_with("--model", str(folder), "--port", str(port)) == 1
    error = capsys.readouterr().err
    assert f"port {port}" in error and "choose others" in error


def test_of_two_that_load_at_once_the_later_one_says_that_the_port_is_taken() -> None:
    first, later = reserve("127.0.0.1", 0), None
    try:
        later = reserve("127.0.0.1", first.getsockname()[1])  # nobody serves there yet
        listen(first)
        with pytest.raises(ValueError, match="choose others"):
            listen(later)
    finally:
        for one in filter(None, (first, later)):
            one.close()


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resident(process_id: int) -> float:
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    # What else grows has its bounds: oneDNN keeps programs for 1,024 shapes, and malloc memory for each thread.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with process(folder, "--kept-mib", "1") as (running, client):

        def ask(i: int) -> None:
            if i % 10 == 9:  # some leave
                stream = chat(client, stream=True, max_tokens=100)
                next(iter(stream))  # type: ignore[call-overload]
                stream.close()  # type: ignore[attr-defined]
                return
            said = input_audio(as_file(noise(0.3 + 0.01 * (i % 50), seed=i)))  # no two alike, so that none is known
            client.chat.completions.create(
                model=NAME,
                messages=[{"role": "user", "content": [said]}],
                max_tokens=4,  # type: ignore[list-item]
            )

        with ThreadPoolExecutor(8) as clients:
            list(clients.map(ask, range(300)))
            before = resident(running.pid)
            list(clients.map(ask, range(300, 1300)))
        grown = resident(running.pid) - before
        print(f"{before:.0f} MiB, {grown:+.1f} MiB after 1,000 requests more")
        assert grown < 10
        running.terminate()
        assert running.wait(PATIENCE) == 0
