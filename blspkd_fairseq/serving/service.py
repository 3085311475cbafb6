"""The model behind the routes, and how its answers reach a client that may leave at any time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import StreamingResponse

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.audio_stream import Window
from blspkd_fairseq.data.prompts import PROMPTS
from blspkd_fairseq.data.vad import speech_windows
from blspkd_fairseq.generation.decoding import context_of
from blspkd_fairseq.generation.streaming import Sampling
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.serving.engine import Answers, Engine, as_api_error
from blspkd_fairseq.serving.errors import ApiError
from blspkd_fairseq.serving.limits import Limits
from blspkd_fairseq.serving.metrics import Metrics

_CHARACTERS_PER_TOKEN = 16


class Service:
    """A model that answers clients.

    Args:
        model: which one.
        name: by which clients ask for it.
        limits: of requests.
        vad: hear only where somebody speaks: "energy" or "silero".
        prompt: instruction of a transcription; the speech comes in place of its ``{speech}``. None: the LLM is not
            asked for one, and what is written are the tokens nearest to what is heard.

    Raises:
        ValueError: without a prompt, the adapter does not give one embedding for each token.

    Attributes:
        engine: answers. metrics: counts. created: seconds since 1970.
    """

    def __init__(
        self,
        model: BlspKd,
        name: str,
        limits: Limits,
        vad: str | None = None,
        prompt: str | None = PROMPTS["transcribe"],
    ) -> None:
        if prompt is None:
            model.check_counts_tokens()
        self.model = model
        self.name = name
        self.limits = limits
        self.vad = vad
        self.prompt = prompt
        self.created = int(time.time())
        self.engine = Engine(
            lambda: model.streaming_decoder(most_rows=limits.rows, kept_bytes=int(limits.kept_mib * 2**20)),
            limits.rows + limits.waiting,
            lambda deltas: self.metrics.note_step(deltas),
            lambda seconds: self.metrics.note_first_text(seconds),
        )
        self.metrics = Metrics(lambda: self.engine.active, limits.rows)

    def check_model(self, name: str) -> None:
        """Raises ApiError unless it is this model's name."""
        if name != self.name:
            raise ApiError(
                404, f"the model {name!r} does not exist: this server has {self.name!r}", "model_not_found", "model"
            )

    @property
    def has_times(self) -> bool:
        """Whether the adapter cuts tokens."""
        return self.model.counts_tokens

    @property
    def most_characters(self) -> int:
        """The longest text of a request: far more than fits into the LLM's context, and little to tokenize."""
        return _CHARACTERS_PER_TOKEN * (context_of(self.model.model) or 1 << 15)

    def windows(self, samples: np.ndarray) -> list[Window]:
        """Speech ``[samples]`` at 16 kHz in windows that are written down one by one; none in silence, with a VAD."""
        windows: list[Window] = []
        start = 0
        for window in self.model.windows((samples, SAMPLE_RATE)):
            inside = speech_windows(window, self.vad) if self.vad else [(0, window)]
            windows += [Window((start + begin) / SAMPLE_RATE, part) for begin, part in inside]
            start += len(window)
        return windows

    def ask(self, questions: Sequence[tuple[Sequence[Any], Sampling]], at_once: int | None = None) -> Answers:
        """An answer to each conversation, of messages in this package's shape; all of them, or so many, at once.

        Raises:
            ApiError: too many answers are being made.
        """
        return self.engine.ask(
            lambda: [self.model.request(messages, sampling, self.vad) for messages, sampling in questions],
            len(questions),
            self.limits.answer_seconds,
            at_once,
        )

    @contextlib.contextmanager
    def leaving(self, request: Request, answers: Answers) -> Iterator[None]:
        """Closes the answers when the client leaves, or the block fails."""
        watch = asyncio.create_task(_close_when_left(request, answers))
        try:
            yield
        except BaseException:
            answers.close()
            raise
        finally:
            watch.cancel()

    def stream(self, events: AsyncIterator[dict[str, Any]], request: Request, answers: Answers) -> StreamingResponse:
        """Events of the answers, as the server-sent events of the API."""

        async def lines() -> AsyncIterator[str]:
            with self.leaving(request, answers):
                try:
                    async for event in events:
                        yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
                    yield "data: [DONE]\n\n"
                except Exception as error:  # the status was sent: the error is an event
                    answers.close()
                    yield f"data: {json.dumps(as_api_error(error).body)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def service_of(request: Request) -> Service:
    """The service that the application was made with."""
    service: Service = request.app.state.service
    return service


async def _close_when_left(request: Request, answers: Answers) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answers.close()
