"""``POST /v1/audio/transcriptions`` and ``/v1/audio/translations``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.prompts import SPEECH_SLOT, resolve_prompt
from blspkd_fairseq.generation.streaming import Delta, Sampling, Usage
from blspkd_fairseq.generation.transcript import Span, as_srt, as_vtt, cut_into_lines, join_tokens
from blspkd_fairseq.serving.engine import Answers
from blspkd_fairseq.serving.errors import as_invalid, invalid
from blspkd_fairseq.serving.schemas import SpeechRequest
from blspkd_fairseq.serving.service import Service, service_of
from blspkd_fairseq.serving.uploads import decode_audio

router = APIRouter()

_LISTS = ("timestamp_granularities", "include")  # fields that clients send as NAME[]
_MOST_FIELDS = 32


@router.post("/v1/audio/transcriptions", response_model=None)
async def transcribe(request: Request) -> Response:
    """Writes down what is said."""
    return await _answer(request, "transcribe", resolve_prompt("transcribe"))


@router.post("/v1/audio/translations", response_model=None)
async def translate(request: Request) -> Response:
    """Says it in English."""
    return await _answer(request, "translate", resolve_prompt("translate", tgt_lang="English"))


@dataclass
class _Transcript:
    """What is said in the windows of an utterance.

    Attributes:
        windows: ``[samples]`` each, one after another.
        texts: of each.
        usages: of each that is finished.
    """

    windows: Sequence[np.ndarray]
    texts: list[str] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.texts = [""] * len(self.windows)

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(text.strip() for text in self.texts if text.strip())

    @property
    def seconds(self) -> float:
        """Length of the utterance."""
        return sum(map(len, self.windows)) / SAMPLE_RATE

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as the API counts them."""
        read, written = sum(usage.prompt for usage in self.usages), sum(usage.answer for usage in self.usages)
        return {"type": "tokens", "input_tokens": read, "output_tokens": written, "total_tokens": read + written}

    async def follow(self, answers: Answers) -> AsyncIterator[str]:
        """Takes the answers in; gives the text in its order, as far as it is complete or growing at its end."""
        finished: set[int] = set()
        shown = 0
        async for index, delta in answers:
            self._take(index, delta)
            if delta.finish:
                finished.add(index)
            ready = next((i for i in range(len(self.texts)) if i not in finished), len(self.texts))
            text = " ".join(text.strip() for text in self.texts[:ready] if text.strip())
            if ready < len(self.texts) and (growing := self.texts[ready].strip()):
                text = f"{text} {growing}" if text else growing
            yield text[shown:]
            shown = len(text)

    def _take(self, index: int, delta: Delta) -> None:
        self.texts[index] += delta.text
        if delta.usage is not None:
            self.usages.append(delta.usage)


async def _answer(request: Request, task: str, prompt: str) -> Response:
    service = service_of(request)
    body, content = await _read_form(request)
    service.check_model(body.model)
    has_times = body.response_format in ("srt", "vtt", "verbose_json")
    if has_times and not service.has_times:
        raise invalid(
            "this model's adapter cuts no tokens, so there are no times: ask for json or text", "response_format"
        )
    if has_times and body.stream:
        raise invalid("only json and text can be streamed", "stream")
    samples = await run_in_threadpool(decode_audio, content, service.limits.audio_seconds, "file")
    service.metrics.note_audio(len(samples) / SAMPLE_RATE)
    transcript = _Transcript(await run_in_threadpool(service.model.windows, (samples, SAMPLE_RATE)))
    answers = _ask(service, transcript.windows, prompt, body.temperature)
    if body.stream:
        return service.stream(_events(transcript, answers), request, answers)
    with service.leaving(request, answers):
        async for _ in transcript.follow(answers):
            pass
    if not has_times:
        whole = {"text": transcript.text, "usage": transcript.usage}
        return JSONResponse(whole) if body.response_format == "json" else PlainTextResponse(f"{transcript.text}\n")
    words = await service.engine.call(lambda: find_words(service, transcript.windows, transcript.texts))
    lines = cut_into_lines(words)
    if body.response_format == "srt":
        return PlainTextResponse(as_srt(lines))
    if body.response_format == "vtt":
        return PlainTextResponse(as_vtt(lines), media_type="text/vtt")
    return JSONResponse(_verbose(task, body, transcript, words, lines))


async def _read_form(request: Request) -> tuple[SpeechRequest, bytes]:
    """The fields and the file.

    Raises:
        ApiError: a field is missing, unknown or wrong, or there is no file.
    """
    async with request.form(max_files=1, max_fields=_MOST_FIELDS) as form:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise invalid("the request must be multipart/form-data with an audio file in its field file", "file")
        content = await upload.read()
        names = dict.fromkeys(name for name in form if name != "file")
        fields = {name.removesuffix("[]"): form.getlist(name) for name in names}
    try:
        body = SpeechRequest.model_validate(
            {name: values if name in _LISTS else values[-1] for name, values in fields.items()}
        )
    except ValidationError as error:
        raise as_invalid(error.errors()) from error
    return body, content


def _ask(service: Service, windows: Sequence[np.ndarray], prompt: str, temperature: float) -> Answers:
    """An answer to each window."""
    sampling = Sampling(max_new_tokens=service.limits.new_tokens, temperature=temperature)
    before, _, after = prompt.partition(SPEECH_SLOT)
    texts = [{"type": "text", "text": text} for text in (before, after)]
    speeches = [{"type": "audio", "audio": (window, SAMPLE_RATE)} for window in windows]
    return service.ask([([{"role": "user", "content": [texts[0], speech, texts[1]]}], sampling) for speech in speeches])


async def _events(transcript: _Transcript, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    async for text in transcript.follow(answers):
        if text:
            yield {"type": "transcript.text.delta", "delta": text}
    yield {"type": "transcript.text.done", "text": transcript.text, "usage": transcript.usage}


def find_words(service: Service, windows: Sequence[np.ndarray], texts: Sequence[str]) -> list[Span]:
    """The words of the texts of an utterance's windows, with the times at which CIF cuts them."""
    words: list[Span] = []
    offset = 0.0
    chat = service.model.chat_format
    for window, text in zip(windows, texts, strict=True):
        if text.strip():
            ids = chat.encode_text(text.strip())
            tokens = service.model.align((window, SAMPLE_RATE), text.strip())
            words += join_tokens(ids, [(offset + token.start, offset + token.end) for token in tokens], chat)
        offset += len(window) / SAMPLE_RATE
    return words


def _verbose(
    task: str, body: SpeechRequest, transcript: _Transcript, words: Sequence[Span], lines: Sequence[Span]
) -> dict[str, Any]:
    verbose: dict[str, Any] = {
        "task": task,
        "language": "english" if task == "translate" else body.language or "und",
        "duration": round(transcript.seconds, 3),
        "text": transcript.text,
        "usage": transcript.usage,
    }
    if "segment" in body.timestamp_granularities:
        verbose["segments"] = [
            {"id": index, "start": round(line.start, 3), "end": round(line.end, 3), "text": line.text}
            for index, line in enumerate(lines)
        ]
    if "word" in body.timestamp_granularities:
        verbose["words"] = [
            {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)} for word in words
        ]
    return verbose
