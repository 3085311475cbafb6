"""``POST /v1/audio/transcriptions`` and ``/v1/audio/translations``: window by window, in one batch with all else."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.audio_stream import Window
from blspkd_fairseq.data.prompts import SPEECH_SLOT, resolve_prompt
from blspkd_fairseq.data.transcript import Transcript, as_dict, as_srt, as_vtt, join_texts
from blspkd_fairseq.generation.streaming import Delta, Sampling, Usage
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
    """Transcribes speech."""
    return await _answer(request, "transcribe", service_of(request).prompt)


@router.post("/v1/audio/translations", response_model=None)
async def translate(request: Request) -> Response:
    """Translates speech into English."""
    return await _answer(request, "translate", resolve_prompt("translate", tgt_lang="English"))


async def _answer(request: Request, task: str, prompt: str | None) -> Response:
    service = service_of(request)
    body, content = await _read_form(request)
    service.check_model(body.model)
    if prompt is None and body.temperature > 0:
        message = "this server writes the tokens nearest to what is heard, which are not drawn: leave it at 0"
        raise invalid(message, "temperature")
    has_times = body.response_format in ("srt", "vtt", "verbose_json")
    if has_times and not service.has_times:
        message = "this model's adapter cuts no tokens, so there are no times: ask for json or text"
        raise invalid(message, "response_format")
    if has_times and body.stream:
        raise invalid("only json and text can be streamed", "stream")
    samples = await run_in_threadpool(decode_audio, content, service.limits.audio_seconds, "file")
    seconds = len(samples) / SAMPLE_RATE
    service.metrics.note_audio(seconds)
    transcription = _Transcription(await run_in_threadpool(service.windows, samples))
    answers = _ask(service, transcription.windows, prompt, body.temperature)
    if body.stream:
        return service.stream(_events(transcription, answers), request, answers)
    with service.leaving(request, answers):
        async for _ in transcription.follow(answers):
            pass
        if body.response_format == "text":
            return PlainTextResponse(f"{transcription.text}\n")
        if body.response_format == "json":
            return JSONResponse({"text": transcription.text, "usage": transcription.usage})
        transcript = await _with_words(service, transcription, seconds, answers)
    if body.response_format == "srt":
        return PlainTextResponse(as_srt(transcript))
    if body.response_format == "vtt":
        return PlainTextResponse(as_vtt(transcript), media_type="text/vtt")
    verbose = partial(_verbose, service, task, body, transcript, transcription)
    return JSONResponse(await service.engine.call(verbose))  # there the tokenizer is


class _Transcription:
    """Texts of the windows of a recording, while they are decoded.

    Attributes:
        windows: in order. texts: of each. usages: of those that are finished, by their number.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows
        self.texts = [""] * len(windows)
        self.usages: dict[int, Usage] = {}

    @property
    def text(self) -> str:
        """The whole text."""
        return join_texts(self.texts)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as the API counts them."""
        usages = self.usages.values()
        read, written = sum(usage.prompt for usage in usages), sum(usage.answer for usage in usages)
        return {"type": "tokens", "input_tokens": read, "output_tokens": written, "total_tokens": read + written}

    async def follow(self, answers: Answers) -> AsyncIterator[str]:
        """Takes the answers in and gives the text in its order: windows that are complete, and the one that grows."""
        finished: set[int] = set()
        shown = 0
        async for index, delta in answers:
            self._take(index, delta)
            if delta.finish:
                finished.add(index)
            growing = next((i for i in range(len(self.texts)) if i not in finished), len(self.texts))
            text = join_texts(self.texts[: growing + 1])
            yield text[shown:]
            shown = len(text)

    def _take(self, index: int, delta: Delta) -> None:
        self.texts[index] += delta.text
        if delta.usage is not None:
            self.usages[index] = delta.usage


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


def _ask(service: Service, windows: Sequence[Window], prompt: str | None, temperature: float) -> Answers:
    """Asks for the text of each window; without a prompt, for the tokens nearest to what is heard.

    Those of a long recording take half of the places at most, so that others are answered meanwhile.
    """
    if prompt is None:
        sampling = Sampling(nearest=True)
    else:
        repeats = temperature == 0 and service.model.repeats_by(prompt)
        if_spoken = service.model.counts_tokens
        sampling = Sampling(service.limits.new_tokens, temperature, repeats=repeats, if_spoken=if_spoken)
    before, _, after = (prompt or SPEECH_SLOT).partition(SPEECH_SLOT)
    texts = [{"type": "text", "text": text} for text in (before, after)]
    speeches = [{"type": "audio", "audio": (window.samples, SAMPLE_RATE)} for window in windows]
    contents = [[texts[0], speech, texts[1]] for speech in speeches]
    questions = [([{"role": "user", "content": content}], sampling) for content in contents]
    return service.ask(questions, at_once=max(1, service.limits.rows // 2))


async def _events(transcription: _Transcription, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    async for text in transcription.follow(answers):
        if text:
            yield {"type": "transcript.text.delta", "delta": text}
    yield {"type": "transcript.text.done", "text": transcription.text, "usage": transcription.usage}


async def _with_words(service: Service, transcription: _Transcription, seconds: float, answers: Answers) -> Transcript:
    """Adds the times at which CIF cuts the words, a window between two steps of the answers of others.

    Raises:
        ApiError: the time is over. ClientLeft: nobody waits.
    """
    segments = []
    for window, text in zip(transcription.windows, transcription.texts, strict=True):
        if text.strip():
            answers.check()
            segments.append(await service.engine.call(partial(service.model.segment, window, text.strip())))
    return Transcript(seconds, tuple(segments))


def _verbose(
    service: Service, task: str, body: SpeechRequest, transcript: Transcript, transcription: _Transcription
) -> dict[str, Any]:
    parts = as_dict(transcript)
    times = {name: parts.pop(name) for name in ("segments", "words")}
    usages = [transcription.usages[i] for i, text in enumerate(transcription.texts) if text.strip()]
    for segment, usage in zip(times["segments"], usages, strict=True):
        segment |= _figures(service, segment, usage) | {"temperature": body.temperature}
    granularities = {f"{granularity}s" for granularity in body.timestamp_granularities}
    shown = {name: times[name] for name in times if name in granularities}
    language = "english" if task == "translate" else body.language or "und"
    seconds = {"type": "duration", "seconds": round(transcript.seconds, 3)}
    return {"task": task, "language": language, **parts, **shown, "usage": seconds}


def _figures(service: Service, segment: dict[str, Any], usage: Usage) -> dict[str, Any]:
    """What the API's segments have besides; where nobody speaks there is no segment."""
    text = segment["text"].encode()
    probability = usage.log_probability
    return {
        "seek": round(100 * segment["start"]),
        "tokens": service.model.chat_format.encode_transcript(segment["text"]),
        "avg_logprob": None if probability is None else round(probability / usage.answer, 4),
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 4),
        "no_speech_prob": 0.0,
    }
