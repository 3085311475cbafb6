"""``POST /v1/audio/transcriptions`` and ``/v1/audio/translations``: window by window, in one batch with all else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
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
    transcript = await service.engine.call(lambda: _with_words(service, transcription, seconds))
    if body.response_format == "srt":
        return PlainTextResponse(as_srt(transcript))
    if body.response_format == "vtt":
        return PlainTextResponse(as_vtt(transcript), media_type="text/vtt")
    return JSONResponse(_verbose(task, body, transcript, transcription.usage))


class _Transcription:
    """Texts of the windows of a recording, while they are decoded.

    Attributes:
        windows: in order. texts: of each. usages: of those that are finished.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows
        self.texts = [""] * len(windows)
        self.usages: list[Usage] = []

    @property
    def text(self) -> str:
        """The whole text."""
        return join_texts(self.texts)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as the API counts them."""
        read, written = sum(usage.prompt for usage in self.usages), sum(usage.answer for usage in self.usages)
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
            self.usages.append(delta.usage)


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
    """Asks for the text of each window; without a prompt, for the tokens nearest to what is heard."""
    if prompt is None:
        sampling = Sampling(nearest=True)
    else:
        repeats = temperature == 0 and service.model.repeats_by(prompt)
        sampling = Sampling(service.limits.new_tokens, temperature, repeats=repeats)
    before, _, after = (prompt or SPEECH_SLOT).partition(SPEECH_SLOT)
    texts = [{"type": "text", "text": text} for text in (before, after)]
    speeches = [{"type": "audio", "audio": (window.samples, SAMPLE_RATE)} for window in windows]
    return service.ask([([{"role": "user", "content": [texts[0], speech, texts[1]]}], sampling) for speech in speeches])


async def _events(transcription: _Transcription, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    async for text in transcription.follow(answers):
        if text:
            yield {"type": "transcript.text.delta", "delta": text}
    yield {"type": "transcript.text.done", "text": transcription.text, "usage": transcription.usage}


def _with_words(service: Service, transcription: _Transcription, seconds: float) -> Transcript:
    """Adds the times at which CIF cuts the words."""
    pairs = zip(transcription.windows, transcription.texts, strict=True)
    spoken = [(window, text.strip()) for window, text in pairs if text.strip()]
    return Transcript(seconds, tuple(service.model.segment(window, text) for window, text in spoken))


def _verbose(task: str, body: SpeechRequest, transcript: Transcript, usage: dict[str, Any]) -> dict[str, Any]:
    parts = as_dict(transcript)
    granularities = {f"{granularity}s" for granularity in body.timestamp_granularities}
    times = {name: parts.pop(name) for name in ("segments", "words")}
    shown = {name: times[name] for name in times if name in granularities}
    language = "english" if task == "translate" else body.language or "und"
    return {"task": task, "language": language, **parts, **shown, "usage": usage}
