"""``POST /v1/chat/completions``: requests into conversations, answers into the API's objects and events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.generation.streaming import Delta, Sampling, Usage
from blspkd_fairseq.serving.engine import Answers
from blspkd_fairseq.serving.errors import invalid
from blspkd_fairseq.serving.schemas import AudioPart, ChatRequest, Message, TextPart
from blspkd_fairseq.serving.service import Service, service_of
from blspkd_fairseq.serving.uploads import decode_base64

router = APIRouter()

_MOST_STOPS = 4


@router.post("/v1/chat/completions", response_model=None)
async def complete(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    if body.n > service.limits.choices:
        raise invalid(f"n must be at most {service.limits.choices}", "n")
    samplings = [_sampling(body, service, index) for index in range(body.n)]
    messages = await run_in_threadpool(_read_messages, body.messages, service)
    answers = service.ask([(messages, sampling) for sampling in samplings])
    reply = _Reply(service.name, answers)
    with service.leaving(request, answers):
        first = await anext(reply.deltas)
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return service.stream(reply.events(first, include_usage), request, answers)
        return JSONResponse(await reply.whole(first))


class _Reply:
    """The API's objects of some answers."""

    def __init__(self, model: str, answers: Answers) -> None:
        self.deltas = aiter(answers)
        self.count = answers.count
        self.usages: list[Usage] = []
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, first: tuple[int, Delta]) -> dict[str, Any]:
        """The answers at once."""
        texts = [""] * self.count
        ends: list[str | None] = [None] * self.count
        async for index, delta in self._all(first):
            texts[index] += delta.text
            ends[index] = delta.finish
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": end,
            }
            for index, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    async def events(self, first: tuple[int, Delta], include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The answers in chunks; ``include_usage``: a last one says what they took."""
        extra = {"usage": None} if include_usage else {}
        for index in range(self.count):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, extra)
        async for index, delta in self._all(first):
            if delta.text:
                yield self._chunk(index, {"content": delta.text}, None, extra)
            if delta.finish:
                yield self._chunk(index, {}, delta.finish, extra)
        if include_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, counted once, and of all answers."""
        prompt, answered = self.usages[0].prompt, sum(usage.answer for usage in self.usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answered,
            "total_tokens": prompt + answered,
            "prompt_tokens_details": {"cached_tokens": self.usages[0].reused},
        }

    async def _all(self, first: tuple[int, Delta]) -> AsyncIterator[tuple[int, Delta]]:
        self._note(first[1])
        yield first
        async for index, delta in self.deltas:
            self._note(delta)
            yield index, delta

    def _note(self, delta: Delta) -> None:
        if delta.usage is not None:
            self.usages.append(delta.usage)

    def _chunk(self, index: int, delta: dict[str, Any], end: str | None, extra: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": end}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **extra}


def _sampling(body: ChatRequest, service: Service, index: int) -> Sampling:
    """Returns the decoding options of the answer of this index."""
    if len(body.stop) > _MOST_STOPS:
        raise invalid(f"stop must be at most {_MOST_STOPS} texts", "stop")
    tokens = body.max_completion_tokens or body.max_tokens or service.limits.new_tokens
    try:
        return Sampling(
            max_new_tokens=min(tokens, service.limits.new_tokens),
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=None if body.seed is None else (body.seed + index) % 2**63,
            stop=tuple(body.stop),
        )
    except ValueError as error:
        raise invalid(str(error)) from error


def _read_messages(messages: Sequence[Message], service: Service) -> list[dict[str, Any]]:
    """The messages in this package's shape, speech as waveforms.

    Raises:
        ApiError: audio that cannot be used, or more of audio or text than a request may have.
    """
    read: list[dict[str, Any]] = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [
                _read_part(part, f"messages[{i}].content[{j}]", service) for j, part in enumerate(message.content)
            ],
        }
        for i, message in enumerate(messages)
    ]
    parts = [part for message in read for part in message["content"]]
    seconds = sum(len(part["audio"][0]) for part in parts if "audio" in part) / SAMPLE_RATE
    if seconds > service.limits.audio_seconds:
        raise invalid(f"all audio together is {seconds:.1f} s long; the limit is {service.limits.audio_seconds:g} s")
    if sum(len(part.get("text", "")) for part in parts) > service.most_characters:
        message = f"there is more text than the LLM can read: {service.most_characters} characters at most"
        raise invalid(message, "messages", "context_length_exceeded")
    service.metrics.note_audio(seconds)
    return read


def _read_part(part: TextPart | AudioPart, where: str, service: Service) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    samples = decode_base64(part.input_audio.data, service.limits.audio_seconds, f"{where}.input_audio.data")
    return {"type": "audio", "audio": (samples, SAMPLE_RATE)}
