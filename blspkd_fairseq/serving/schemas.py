"""The API's requests: parameters that are supported, and those that are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _only(*neutral: Any) -> Any:
    """A parameter of the API that is not supported: taken where it asks for nothing, refused otherwise."""

    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise ValueError("it is not supported here: leave it out")
        return value

    return Annotated[Any, BeforeValidator(check)]


def _or(value: Any) -> Any:
    """A field that clients send as null when it is not set: it is this then."""
    return BeforeValidator(lambda given: value if given is None else given)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Request):
    """A piece of text."""

    type: Literal["text"]
    text: str


class InputAudio(_Request):
    """Base64 of a file; its content says what it is, whatever ``format`` says."""

    data: str
    format: str = ""


class AudioPart(_Request):
    """A piece of speech."""

    type: Literal["input_audio"]
    input_audio: InputAudio


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Request):
    """A turn. ``name`` is taken and ignored; clients send earlier answers back whole, with fields that are empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[TextPart | AudioPart, Field(discriminator="type")]], BeforeValidator(_as_parts)]
    name: str | None = None
    refusal: _only() = None  # type: ignore[valid-type]
    annotations: _only([]) = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    function_call: _only() = None  # type: ignore[valid-type]
    tool_calls: _only([]) = None  # type: ignore[valid-type]


def _as_texts(stop: Any) -> Any:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


class StreamOptions(_Request):
    """Options of a streamed answer."""

    include_usage: Annotated[bool, _or(False)] = False
    include_obfuscation: bool | None = None


class ChatRequest(_Request):
    """``POST /v1/chat/completions``. Without ``temperature`` the answer is the likeliest one (greedy)."""

    model: str
    messages: list[Message]
    stream: Annotated[bool, _or(False)] = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, _or(1), Field(ge=1)] = 1
    stop: Annotated[list[str], BeforeValidator(_as_texts)] = []
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = None

    # They change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None

    # They would.
    audio: _only() = None  # type: ignore[valid-type]
    frequency_penalty: _only(0) = None  # type: ignore[valid-type]
    function_call: _only("none") = None  # type: ignore[valid-type]
    functions: _only([]) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    logprobs: _only(False) = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    prediction: _only() = None  # type: ignore[valid-type]
    presence_penalty: _only(0) = None  # type: ignore[valid-type]
    reasoning_effort: _only("none") = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]
    tool_choice: _only("none", "auto") = None  # type: ignore[valid-type]
    tools: _only([]) = None  # type: ignore[valid-type]
    top_logprobs: _only() = None  # type: ignore[valid-type]
    verbosity: _only() = None  # type: ignore[valid-type]
    web_search_options: _only() = None  # type: ignore[valid-type]


ResponseFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]
Granularity = Literal["word", "segment"]


class SpeechRequest(_Request):
    """The fields of ``POST /v1/audio/transcriptions`` and ``/translations`` beside the file, which all are texts."""

    model_config = ConfigDict(strict=False)

    model: str
    language: str | None = None
    response_format: ResponseFormat = "json"
    temperature: float = Field(0.0, ge=0, le=2)
    timestamp_granularities: list[Granularity] = ["segment"]
    stream: bool = False
    prompt: _only("") = None  # type: ignore[valid-type]
    chunking_strategy: _only("auto") = None  # type: ignore[valid-type]
    include: _only([]) = None  # type: ignore[valid-type]
