"""A server of a tiny model, and clients of it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import soundfile
from tiny import PATIENCE

from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.hub import BlspKd

REASON = "needs the extra serve, and for the client the extra dev"
pytest.importorskip("fastapi", reason=REASON)
pytest.importorskip("uvicorn", reason=REASON)
pytest.importorskip("openai", reason=REASON)

import openai  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402

from blspkd_fairseq.serving.app import create_app  # noqa: E402
from blspkd_fairseq.serving.limits import Limits  # noqa: E402
from blspkd_fairseq.serving.server import reserve  # noqa: E402
from blspkd_fairseq.serving.service import Service  # noqa: E402

NAME = "tiny"


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """``[samples]`` float32 at 16 kHz."""
    return np.random.default_rng(seed).normal(size=int(seconds * 16_000)).astype(np.float32) / 10


def as_file(samples: np.ndarray, kind: str = "WAV", rate: int = 16_000) -> bytes:
    """The bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def input_audio(content: bytes, kind: str = "wav") -> dict[str, Any]:
    """A part of a message."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": kind}}


class Served:
    """A server in a thread.

    Attributes:
        service: what it serves. url: where it is. client: OpenAI's own.
    """

    def __init__(self, service: Service, url: str, key: str | None) -> None:
        self.service = service
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=120)

    def chat(self, *content: Any, **options: Any) -> Any:
        """One turn of a chat."""
        options = {"model": NAME, "max_tokens": 12, **options}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": list(content)}], **options)


@contextmanager
def served(
    model: BlspKd,
    key: str | None = None,
    vad: str | None = None,
    change: Callable[[FastAPI], FastAPI] = lambda app: app,
    prompt: str | None = "transcribe",
    **limits: Any,
) -> Iterator[Served]:
    """Serves a model until the block ends; ``change`` adds to the application."""
    service = Service(model, NAME, Limits(**limits), vad, None if prompt is None else resolve_prompt(prompt))
    address = reserve("127.0.0.1", 0)
    app = change(create_app(service, key, ["127.0.0.1", "localhost"]))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([address],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    one = Served(service, f"http://127.0.0.1:{address.getsockname()[1]}", key)
    try:
        yield one
    finally:
        one.client.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
