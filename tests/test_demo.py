"""The page's own requests: a picture of speech, the cascade's transcript, and files that ask no other machine."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import soundfile
from serving_util import Served, as_file, noise, served
from tiny import tiny_model

from blspkd_fairseq.cli.demo import _find_cascade
from blspkd_fairseq.demo.routes import STATIC, Cascade, add_demo
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.systems import systems


class _Whisper:
    """A cascade that says how much it heard."""

    name = "whisper-of-the-test"

    def transcribe(self, samples: np.ndarray) -> str:
        return f"{len(samples)} samples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlspKd:
    return tiny_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def server(model: BlspKd) -> Iterator[Served]:
    with served(model, change=lambda app: add_demo(app, _Whisper()), body_mib=2, audio_seconds=40) as one:  # type: ignore[arg-type]
        yield one


def fetch(server: Served, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and content."""
    request = urllib.request.Request(server.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_page_and_its_files_name_no_other_machine(server: Served) -> None:
    status, headers, page = fetch(server, "/")
    assert status == 200 and "connect-src 'self'" in headers["Content-Security-Policy"]
    files = sorted(path.name for path in STATIC.iterdir())
    assert {"app.js", "index.html", "style.css", "recorder.js"} <= set(files)
    for name in files:
        status, headers, content = fetch(server, f"/static/{name}")
        assert status == 200 and content == (STATIC / name).read_bytes() and headers["X-Content-Type-Options"]
        assert not re.search(rb"https?://|//cdn|@import", content), name
    assert fetch(server, "/static/../routes.py")[0] == fetch(server, "/static/%2e%2e/routes.py")[0] == 404
    assert set(re.findall(r'(?:src|href)="/static/([^"]+)"', page.decode())) <= set(files)


def test_it_says_what_it_compares(server: Served) -> None:
    assert json.loads(fetch(server, "/demo/info")[2]) == {
        "model": "tiny", "cascade": "whisper-of-the-test", "seconds": 40.0,
    }  # fmt: skip


def test_the_picture_of_speech_is_what_the_model_hears(server: Served, model: BlspKd) -> None:
    sound = as_file(noise(2.0))
    heard = json.loads(fetch(server, "/demo/hear", sound)[2])
    mel = np.frombuffer(base64.b64decode(heard["mel"]), np.uint8).reshape(heard["frames"], heard["bins"])
    assert mel.shape == (200, 80) and mel.max() == 255 and heard["seconds"] == 2.0
    tokens = model.align(sound)
    assert [(t["start"], t["end"]) for t in heard["tokens"]] == [(round(t.start, 3), round(t.end, 3)) for t in tokens]
    assert len(heard["weights"]) == 100
    alpha = model.adapt(sound).alpha
    assert alpha is not None and heard["weights"] == [round(one, 3) for one in alpha[0, :100].tolist()]


def test_the_picture_of_long_speech_has_its_windows_in_their_places(server: Served, model: BlspKd) -> None:
    sound = as_file(np.concatenate([noise(20, 1), np.zeros(8000, np.float32), noise(15, 2)]))
    heard = json.loads(fetch(server, "/demo/hear", sound)[2])
    assert len(model.windows(sound)) == 2 and heard["frames"] == 3550 and len(heard["weights"]) == 1775
    starts, ends = [t["start"] for t in heard["tokens"]], [t["end"] for t in heard["tokens"]]
    assert starts[1:] == ends[:-1] and ends[-1] == pytest.approx(35.5, abs=0.05)


def test_silence_has_a_picture_too_and_no_tokens(model: BlspKd) -> None:
    with served(model, change=add_demo, vad="energy") as server:
        heard = json.loads(fetch(server, "/demo/hear", as_file(np.zeros(16_000, np.float32)))[2])
        assert heard["tokens"] == [] and heard["weights"] is None and heard["frames"] == 100
        assert fetch(server, "/demo/transcript", as_file(noise(1)))[0] == 404  # there is no cascade
        assert json.loads(fetch(server, "/demo/info")[2])["cascade"] is None


def test_the_cascade_writes_down_what_is_said(server: Served) -> None:
    written = json.loads(fetch(server, "/demo/transcript", as_file(noise(1.5)))[2])
    assert written["text"] == "24000 samples" and written["milliseconds"] >= 0


def test_the_cascade_hears_long_speech_in_windows_that_end_in_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[np.ndarray] = []

    def hear(self: Any, windows: Sequence[np.ndarray], languages: Sequence[str], beam: int) -> list[str]:
        heard.extend(windows)
        return [f" word{len(heard)}" for _ in windows]

    monkeypatch.setattr(systems.WhisperTranscriber, "__init__", lambda *_: None)
    monkeypatch.setattr(systems.WhisperTranscriber, "_transcribe", hear)
    samples = np.concatenate([noise(20, 1), np.zeros(8000, np.float32), noise(25, 2)])
    assert Cascade("folder/whisper").transcribe(samples) == "word1 word2"
    assert np.array_equal(np.concatenate(heard), samples) and 20 < len(heard[0]) / 16_000 < 20.5


@pytest.mark.parametrize("path", ["/demo/hear", "/demo/transcript"])
def test_what_is_no_audio_is_said_to_be_so(server: Served, path: str) -> None:
    for body, status in ((b"%PDF-1.7", 400), (b"", 400), (as_file(noise(41)), 400), (bytes(3 << 20), 413)):
        found, _, content = fetch(server, path, body)
        assert found == status and json.loads(content)["error"]["message"]


def test_with_a_key_the_page_is_shown_and_its_requests_are_not_answered(model: BlspKd) -> None:
    with served(model, key="secret", change=add_demo) as server:
        assert fetch(server, "/")[0] == 200 and fetch(server, "/static/app.js")[0] == 200
        assert fetch(server, "/demo/info")[0] == 401
        assert fetch(server, "/demo/info", Authorization="Bearer secret")[0] == 200


def test_the_cascade_is_found_or_said_to_be_missing(model: BlspKd, capsys: pytest.CaptureFixture[str]) -> None:
    assert _find_cascade("none", model.config) is None and capsys.readouterr().err == ""
    assert _find_cascade(None, model.config) is None  # the Whisper of the test has no tokenizer
    assert "there is no cascade to compare with" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--cascade nowhere"):
        _find_cascade("nowhere", model.config)
    everywhere = dataclasses.replace(model.config, lora_scope="all")
    with pytest.raises(ValueError, match="acts on text"):
        _find_cascade("nowhere", everywhere)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the page's scripts without a browser")
def test_the_page_reads_streams_and_writes_wav_files() -> None:
    script = f"""
        import {{ events }} from "{STATIC}/api.js";
        import {{ toBase64, toWav }} from "{STATIC}/sound.js";
        const text = 'data: {{"a": "ä"}}\\n\\ndata: {{"b": 2}}\\n\\ndata: [DONE]\\n\\n';
        const bytes = new TextEncoder().encode(text);
        const stream = new ReadableStream({{
          start(controller) {{
            for (let i = 0; i < bytes.length; i += 3) controller.enqueue(bytes.slice(i, i + 3));
            controller.close();
          }},
        }});
        const found = [];
        for await (const event of events(stream)) found.push(event);
        const samples = new Float32Array([0, 0.5, -1, 2]);
        const wav = toWav({{ getChannelData: () => samples }});
        console.log(JSON.stringify({{ found, wav: toBase64(wav) }}));
    """
    command = ["node", "--input-type=module", "--eval", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["found"] == [{"a": "ä"}, {"b": 2}]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(result["wav"])), dtype="int16")
    assert rate == 16_000 and samples.tolist() == [0, 16383, -32767, 32767]
