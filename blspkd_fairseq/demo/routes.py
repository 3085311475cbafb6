"""The page, and what it asks for besides the API: a picture of the speech, and the transcript of the cascade."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.demo.hearing import draw, hear_window
from blspkd_fairseq.serving.errors import ApiError
from blspkd_fairseq.serving.service import service_of
from blspkd_fairseq.serving.uploads import decode_audio
from blspkd_fairseq.systems.systems import WhisperTranscriber

STATIC = Path(__file__).parent / "static"

# The browser itself sees to it that the page asks no other machine, and that no other page holds this one.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; media-src 'self' blob:; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

router = APIRouter()


class Cascade:
    """Whisper, whose transcript the LLM then reads.

    Args:
        whisper: folder or name of the model.
    """

    def __init__(self, whisper: str) -> None:
        self.name = Path(whisper).name
        self._transcriber = WhisperTranscriber(whisper)
        self._one_at_a_time = threading.Lock()

    def transcribe(self, samples: np.ndarray) -> str:
        """Transcribes ``[samples]`` at 16 kHz."""
        with self._one_at_a_time:
            return self._transcriber.transcribe([samples], [""])[0]


def add_demo(app: FastAPI, cascade: Cascade | None = None) -> FastAPI:
    """Adds the page to the server's application.

    Args:
        app: of :func:`blspkd_fairseq.serving.app.create_app`.
        cascade: to compare with; None: the page shows the model alone.
    """
    app.state.cascade = cascade
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.middleware("http")(_add_headers)
    return app


@router.get("/", response_model=None)
async def show_page() -> Response:
    """The page."""
    return FileResponse(STATIC / "index.html")


@router.get("/demo/info")
async def describe(request: Request) -> dict[str, Any]:
    """Returns what the page shows of the server."""
    service = service_of(request)
    cascade: Cascade | None = request.app.state.cascade
    return {
        "model": service.name,
        "cascade": None if cascade is None else cascade.name,
        "seconds": service.limits.audio_seconds,
    }


@router.post("/demo/hear", response_model=None)
async def hear(request: Request) -> Response:
    """Returns the picture of a sound file, which is the body."""
    service = service_of(request)
    samples = await _read_samples(request)
    start = time.perf_counter()
    hearings = []
    for window in await run_in_threadpool(service.windows, samples):
        hearings.append(await service.engine.call(partial(hear_window, service.model, window)))
    milliseconds = round(1000 * (time.perf_counter() - start))
    return JSONResponse({**draw(hearings, len(samples) / SAMPLE_RATE), "milliseconds": milliseconds})


@router.post("/demo/transcript", response_model=None)
async def transcribe(request: Request) -> Response:
    """Transcribes a sound file, which is the body, by the cascade's Whisper."""
    cascade: Cascade | None = request.app.state.cascade
    if cascade is None:
        raise ApiError(404, "there is no Whisper to compare with: give one with --cascade", "not_found")
    samples = await _read_samples(request)
    start = time.perf_counter()
    text = await run_in_threadpool(cascade.transcribe, samples)
    return JSONResponse({"text": text, "milliseconds": round(1000 * (time.perf_counter() - start))})


async def _read_samples(request: Request) -> np.ndarray:
    content = await request.body()
    return await run_in_threadpool(decode_audio, content, service_of(request).limits.audio_seconds, "body")


async def _add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    if not request.url.path.startswith("/v1/"):
        response.headers.update(_HEADERS)
    return response
