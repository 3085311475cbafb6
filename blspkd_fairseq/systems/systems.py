"""The systems that are compared: each answers utterances under a prompt.

A trained checkpoint hears the speech; the *cascade* lets Whisper transcribe it and the LLM read that; the *text upper
bound* lets the LLM read the reference transcript.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES

from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.languages import code_of
from blspkd_fairseq.data.transcript import join_texts
from blspkd_fairseq.data.windows import cut_windows
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_speech, answer_text
from blspkd_fairseq.generation.identity import llm_identity, model_identity
from blspkd_fairseq.hub import BlspKd, read_options
from blspkd_fairseq.modules.build import SpeechLlmConfig, load_chat_format, load_llm
from blspkd_fairseq.modules.pretrained import load_pretrained
from blspkd_fairseq.modules.speech_llm import ChatLLM


class Utterance(NamedTuple):
    """What a system is given.

    Attributes:
        waveform: ``[S]`` float32 at 16 kHz; None for systems that read.
        transcript: the reference, for systems that read.
        prompt: text with one ``{speech}`` slot.
        language: code of the spoken language, or "".
    """

    waveform: np.ndarray | None
    transcript: str
    prompt: str
    language: str


class Answer(NamedTuple):
    """What a system says. Attributes: ``text``; ``heard``, the transcript it made on the way, if it makes one."""

    text: str
    heard: str | None = None


class System(Protocol):
    """One way to answer speech. ``hears`` says whether it needs the audio."""

    hears: bool

    def identity(self) -> dict[str, Any]:
        """What its answers depend on; answers of another identity are not mixed with these."""
        ...

    def load(self) -> None:
        """Loads the models; called once, before :meth:`answer`, and not at all when every answer is there."""
        ...

    def unload(self) -> None:
        """Makes room for the next system."""
        ...

    def answer(self, batch: Sequence[Utterance], options: DecodingOptions, is_asr: bool = False) -> list[Answer]:
        """Answers in the order of the batch; ``is_asr``: what is wanted is the transcript itself."""
        ...


class CheckpointSystem:
    """A trained model: a checkpoint of fairseq-train or a folder of ``save_pretrained``.

    Args:
        path: of the checkpoint.
        trust_remote_code: run code that comes with the LLM's files.
        overrides: options of the model in place of the checkpoint's, such as ``{"llm": "/models/qwen"}``.
    """

    hears = True

    def __init__(self, path: Path, trust_remote_code: bool = False, **overrides: Any) -> None:
        if not path.exists():
            raise ValueError(f"no checkpoint at {path}")
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.overrides = overrides
        self._model: BlspKd | None = None

    def identity(self) -> dict[str, Any]:
        files = sorted(p for p in self.path.rglob("*") if p.is_file()) if self.path.is_dir() else [self.path]
        digest = hashlib.sha256()
        for file in files:
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        options = {**read_options(self.path), **self.overrides}
        config = SpeechLlmConfig(**{name: options[name] for name in _NAMED if name in options})
        parts = {"speech_encoder": model_identity(config.speech_encoder, "speech-encoder"), **llm_identity(config)}
        return {"kind": "checkpoint", "sha256": digest.hexdigest(), **self.overrides, **parts}

    @property
    def model(self) -> BlspKd:
        """Between :meth:`load` and :meth:`unload`."""
        assert self._model is not None
        return self._model

    def load(self) -> None:
        if self._model is None:
            trust = self.trust_remote_code
            self._model = BlspKd.from_pretrained(self.path, trust_remote_code=trust, **self.overrides)

    def unload(self) -> None:
        self._model = None

    def answer(self, batch: Sequence[Utterance], options: DecodingOptions, is_asr: bool = False) -> list[Answer]:
        waveforms, lengths = _collate(batch, self.model.device)
        prompts = [utterance.prompt for utterance in batch]
        groups = answer_speech(self.model.model, self.model.chat_format, waveforms, lengths, prompts, options)
        return [Answer(group[0].text) for group in groups]


class TextSystem:
    """The LLM reading the reference transcript: what a student of it can reach."""

    hears = False

    def __init__(self, config: SpeechLlmConfig) -> None:
        if not config.llm:
            raise ValueError("the text upper bound and the cascade need --llm (or a checkpoint that names it)")
        self.config = config
        self._parts: tuple[ChatFormat, ChatLLM] | None = None

    def identity(self) -> dict[str, Any]:
        return {"kind": "text", **llm_identity(self.config)}

    def load(self) -> None:
        if self._parts is None:
            self._parts = _load_llm(self.config)

    def unload(self) -> None:
        self._parts = None

    def answer(self, batch: Sequence[Utterance], options: DecodingOptions, is_asr: bool = False) -> list[Answer]:
        return [Answer(text) for text in self.read(self.hear(batch), [u.prompt for u in batch], options)]

    def hear(self, batch: Sequence[Utterance], beam: int = 1) -> list[str]:
        """What the LLM is to read of each utterance, whatever it is asked."""
        return [utterance.transcript for utterance in batch]

    def read(self, texts: Sequence[str], prompts: Sequence[str], options: DecodingOptions) -> list[str]:
        """The LLM's answers to prompts, with these texts in place of the speech."""
        assert self._parts is not None
        chat, llm = self._parts
        groups = answer_text(llm, chat, texts, prompts, options)
        return [group[0].text for group in groups]


class CascadeSystem(TextSystem):
    """Whisper transcribes, the LLM reads that, both with the same beam.

    For speech recognition, Whisper's transcript is the answer. ``whisper`` may be a Whisper that was trained further on
    the same data as the systems it stands beside.
    """

    hears = True

    def __init__(self, whisper: str, config: SpeechLlmConfig) -> None:
        super().__init__(config)
        self.whisper = whisper
        self._transcriber: WhisperTranscriber | None = None

    def identity(self) -> dict[str, Any]:
        return {"kind": "cascade", "whisper": model_identity(self.whisper, "cascade"), **llm_identity(self.config)}

    def load(self) -> None:
        super().load()
        if self._transcriber is None:
            self._transcriber = WhisperTranscriber(self.whisper)

    def unload(self) -> None:
        super().unload()
        self._transcriber = None

    def answer(self, batch: Sequence[Utterance], options: DecodingOptions, is_asr: bool = False) -> list[Answer]:
        heard = self.hear(batch, options.beam)
        answers = heard if is_asr else self.read(heard, [u.prompt for u in batch], options)
        return [Answer(answer, text) for answer, text in zip(answers, heard, strict=True)]

    def hear(self, batch: Sequence[Utterance], beam: int = 1) -> list[str]:
        """Whisper's transcripts."""
        waveforms = [utterance.waveform for utterance in batch if utterance.waveform is not None]
        assert self._transcriber is not None
        return self._transcriber.transcribe(waveforms, [u.language for u in batch], beam)


class WhisperTranscriber:
    """Whisper without timestamps, in float32 on the CPU and float16 on a GPU."""

    def __init__(self, name: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if device == "cuda" else torch.float32
        try:
            kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            raise ValueError(f"there is no model {name!r}: give a Whisper by Hugging Face name or directory") from error
        if kind != "whisper":
            raise ValueError(
                f"{name} is a {kind} model and no Whisper: give a Whisper by Hugging Face name or directory"
            )
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        loaded = load_pretrained(
            WhisperForConditionalGeneration, name, "cascade", "Whisper", can_trust=False, dtype=dtype
        )
        self.model: Any = loaded.to(device).eval()

    @torch.no_grad()
    def transcribe(self, waveforms: Sequence[np.ndarray], languages: Sequence[str], beam: int = 1) -> list[str]:
        """Transcripts of utterances; a language code makes a multilingual Whisper listen for it.

        One longer than Whisper's 30 s is cut in pauses, and no more windows than utterances are heard at a time.
        """
        windows = [cut_windows(waveform) for waveform in waveforms]
        parts = [(part, code) for cut, code in zip(windows, languages, strict=True) for part in cut]
        texts: list[str] = []
        for begin in range(0, len(parts), len(waveforms)):
            batch = parts[begin : begin + len(waveforms)]
            texts += self._transcribe([part for part, _ in batch], [code for _, code in batch], beam)
        remaining = iter(texts)
        return [join_texts(list(islice(remaining, len(cut)))) for cut in windows]

    def _transcribe(self, windows: Sequence[np.ndarray], languages: Sequence[str], beam: int) -> list[str]:
        options: dict[str, Any] = {"num_beams": beam}
        if self.model.generation_config.is_multilingual:
            options |= {"task": "transcribe", "language": [_whisper_language(code) for code in languages]}
            if not all(options["language"]):
                options["language"] = None
        ids = self.model.generate(**self._features(windows), **options)
        return list(self.processor.batch_decode(ids, skip_special_tokens=True))

    @torch.no_grad()
    def word_ends(self, waveform: np.ndarray, transcript: str = "") -> list[tuple[str, float]]:
        """Words of 30 s at most and the seconds at which they end, from cross-attention (Whisper's token timestamps).

        With a transcript, Whisper is forced to say that: all words are then timed, also those that it would mishear.
        transformers gives each token the time at which it ends, but 0 to the first one: a first word of one token is
        left out. Punctuation, whose times mean nothing, is not timed.
        """
        tokenizer = self.processor.tokenizer
        forced: dict[str, Any] = {}
        if transcript:
            ids = tokenizer(f" {transcript.strip()}", add_special_tokens=False).input_ids
            forced = {
                "logits_processor": LogitsProcessorList([_Forced([*ids, tokenizer.eos_token_id])]),
                "max_new_tokens": len(ids) + 1,
            }
        out = self.model.generate(
            **self._features([waveform]), return_token_timestamps=True, return_dict_in_generate=True, **forced
        )
        duration = len(waveform) / SAMPLE_RATE
        words: list[tuple[str, float]] = []
        for token, end in zip(out["sequences"][0].tolist(), out["token_timestamps"][0].tolist(), strict=True):
            if token >= tokenizer.eos_token_id:  # from here on, Whisper's vocabulary has control tokens and times only
                continue
            text = tokenizer.decode([token])
            if text.startswith(" ") or not words:
                words.append((text, min(end, duration)))
            elif any(letter.isalnum() for letter in text):
                words[-1] = (words[-1][0] + text, min(end, duration))
            else:
                words[-1] = (words[-1][0] + text, words[-1][1])
        return [(text.strip(), end) for text, end in words if text.strip() and end > 0]

    def _features(self, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
        made = self.processor.feature_extractor(
            list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True
        )
        return {
            "input_features": made.input_features.to(self.model.device, self.model.dtype),
            "attention_mask": made.attention_mask.to(self.model.device),  # of word_ends: not to look at the padding
        }


def _whisper_language(language: str) -> str | None:
    """Whisper's code of a language; None where it has none, and then listens for any."""
    code = code_of(language, "Whisper listens for any language")
    code = {"jv": "jw"}.get(code, code)  # it has the older one of Javanese
    return code if code in WHISPER_LANGUAGES else None


class _Forced(LogitsProcessor):
    """Only the next of these tokens is possible, of one utterance."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0
        return forced


# Besides the weights of a checkpoint.
_NAMED = ("speech_encoder", "llm", "llm_dtype", "llm_quantization", "system_prompt", "chat_template")


def _load_llm(config: SpeechLlmConfig) -> tuple[ChatFormat, ChatLLM]:
    chat = load_chat_format(config)
    llm: PreTrainedModel = load_llm(config, chat).eval()
    return chat, ChatLLM(llm.to("cuda" if torch.cuda.is_available() else "cpu"))


def _collate(batch: Sequence[Utterance], device: torch.device) -> tuple[Tensor, Tensor]:
    waveforms = [torch.from_numpy(u.waveform) for u in batch if u.waveform is not None]
    lengths = torch.tensor([len(waveform) for waveform in waveforms], device=device)
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True).to(device), lengths
