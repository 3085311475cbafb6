"""Trained models in Python, without fairseq: :class:`BlspKd`."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq.data.audio import AudioError, decode_audio, load_audio, prepare_waveform, warn_of_flaw
from blspkd_fairseq.data.batch import pad_waveforms
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.conversation import AudioPart, one_turn, read_messages
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_speech
from blspkd_fairseq.modules.build import DTYPES, SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.pretrained import show_base_models
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.trained_state import load_trained_state_dict, read_trained, write_trained
from blspkd_fairseq.modules.whisper_encoder import FRAMES_PER_SECOND

Audio = str | Path | tuple[Any, int] | Mapping[str, Any]
"""A path (or ``shard.zip:offset:length``); samples [S] (numpy, torch or list) with their rate in Hz; or an element of
an audio column of Hugging Face's data sets: ``{"array": ..., "sampling_rate": ...}``, ``{"bytes": ..., "path": ...}``,
or a decoder of torchcodec."""


class AlignedToken(NamedTuple):
    """One speech embedding. Attributes: the time it covers in seconds, and the LLM token nearest to it."""

    start: float
    end: float
    token: str


class BlspKd:
    """A trained model that answers speech::

        model = BlspKd.from_pretrained("checkpoints/checkpoint_best.pt")
        model.generate("question.wav")                      # the LLM answers what was said
        model.transcribe(["a.flac", "b.flac"])
        model.generate((samples, 44_100), instruction="Summarise this in one sentence: {speech}")
        model.generate(messages=[                           # earlier turns, several pieces of speech
            {"role": "user", "content": [{"type": "audio", "audio": "a.flac"}, {"type": "text", "text": " In short?"}]},
            {"role": "assistant", "content": "It is about the weather."},
            {"role": "user", "content": [{"type": "audio", "audio": "b.flac"}]},
        ])

    Attributes:
        model: the torch module. chat: the chat format of its LLM. config: its options.
    """

    def __init__(self, model: SpeechLLM, chat: ChatFormat, config: SpeechLlmConfig) -> None:
        self.model = model.eval()
        self.chat = chat
        self.config = config

    # ---- loading and saving ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        checkpoint_or_dir: str | os.PathLike[str],
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        **overrides: Any,
    ) -> "BlspKd":
        """Loads a trained model.

        Args:
            checkpoint_or_dir: a checkpoint of fairseq-train, a folder with ``checkpoint_best.pt`` or
                ``checkpoint_last.pt``, or a folder of :meth:`save_pretrained`.
            device: default: the GPU if there is one.
            trust_remote_code: run code that comes with the LLM's files; what the checkpoint says of it does not count.
            overrides: options in place of the checkpoint's, such as ``llm="/models/qwen"`` or ``llm_dtype="float32"``.

        Raises:
            ValueError: nothing to load there, an unknown option, other base models than in training, or one that needs
                code of its own.
        """
        options, state = read_trained(Path(checkpoint_or_dir))
        names = {field.name for field in dataclasses.fields(SpeechLlmConfig)}
        unknown = sorted(set(overrides) - names)
        if unknown:
            raise ValueError(f"unknown options {', '.join(unknown)}: choose from {', '.join(sorted(names))}")
        chosen = {**options, **overrides, "trust_remote_code": trust_remote_code}
        config = SpeechLlmConfig(**{k: v for k, v in chosen.items() if k in names})
        show_base_models(str(checkpoint_or_dir), LLM=config.llm, speech_encoder=config.speech_encoder)
        model, chat = build_speech_llm(config)
        load_trained_state_dict(model, state)
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), chat, config)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: str = "float32") -> None:
        """Writes ``config.json`` and ``model.safetensors`` (what was trained: a few MB) for :meth:`from_pretrained`.

        Args:
            folder: made if it is not there.
            dtype: of the weights: float32, or float16 or bfloat16 for half the size.

        Raises:
            ValueError: an unknown dtype.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown: choose from {', '.join(DTYPES)}")
        write_trained(Path(folder), dataclasses.asdict(self.config), self.model, DTYPES[dtype])

    # ---- answers -----------------------------------------------------------------------------------------------

    def generate(
        self,
        audio: Audio | Sequence[Audio] | None = None,
        instruction: str = "chat",
        batch_size: int = 16,
        messages: Sequence[Any] | None = None,
        **generation: Any,
    ) -> Any:
        """Answers speech.

        Args:
            audio: one utterance of up to 30 s, or a list of them. Digital silence and other flaws are warned about.
            instruction: text with a ``{speech}`` slot (else the speech follows it), or the name of a prompt; by
                default the speech itself is what the user says.
            batch_size: utterances at a time; it does not change the answers.
            messages: in place of audio and instruction, a conversation as chat LLMs take it, or a list of them; a part
                ``{"type": "audio", "audio": AUDIO}`` is a piece of speech.
            generation: fields of :class:`DecodingOptions` such as ``beam=4, max_new_tokens=64``.

        Returns:
            A string, or a list of strings for a list; with ``n_best`` > 1, a list of strings for each utterance.

        Raises:
            AudioError: audio that cannot be used; PromptError: an unknown prompt; ConversationError: other messages.
        """
        if messages is not None:
            if audio is not None or instruction != "chat":
                raise ValueError("give messages, or audio and an instruction: messages hold both")
            single = bool(messages) and isinstance(messages[0], Mapping)
            asked = [read_messages(one) for one in ([messages] if single else messages)]
        else:
            single, conversation = _is_single(audio), one_turn(resolve_prompt(instruction))
            asked = [(conversation, [AudioPart(one)]) for one in _as_list(audio)]
        options = DecodingOptions(**generation)
        answers: list[Any] = []
        for batch in _batches(asked, batch_size):
            speech = self._collate([piece.audio for _, pieces in batch for piece in pieces])
            conversations = [self.chat.render(conversation) for conversation, _ in batch]
            groups = answer_speech(self.model, self.chat, *speech, conversations, options)
            answers += [[h.text for h in group] if options.n_best > 1 else group[0].text for group in groups]
        return answers[0] if single else answers

    def transcribe(self, audio: Audio | Sequence[Audio], **generation: Any) -> Any:
        """:meth:`generate` with the prompt ``transcribe``."""
        return self.generate(audio, "transcribe", **generation)

    def translate(self, audio: Audio | Sequence[Audio], target: str = "German", **generation: Any) -> Any:
        """:meth:`generate` with the prompt ``translate``; ``target`` is a language's name or code."""
        return self.generate(audio, resolve_prompt("translate", tgt_lang=target), **generation)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.adapter.parameters()).device

    # ---- alignment ---------------------------------------------------------------------------------------------

    def align(self, audio: Audio | Sequence[Audio], transcript: str | Sequence[str] | None = None) -> Any:
        """Where CIF cuts the speech.

        Args:
            audio: as for :meth:`generate`.
            transcript: of each utterance, if known: CIF then cuts as many tokens as it has, and these are returned.
                Without it, CIF counts by itself and the tokens are the nearest ones.

        Returns:
            A list of :class:`AlignedToken`; a list of lists for a list of utterances.

        Raises:
            ValueError: the adapter has no token boundaries.
        """
        single = _is_single(audio)
        utterances = _as_list(audio)
        transcripts: Sequence[Any] = [None] * len(utterances)
        if transcript is not None:
            if isinstance(transcript, str) != single:
                raise ValueError("give one transcript (a string) for one utterance, and a list of them for a list")
            transcripts = [transcript] if isinstance(transcript, str) else transcript
            if len(transcripts) != len(utterances) or not all(isinstance(t, str) and t.strip() for t in transcripts):
                raise ValueError(f"{len(utterances)} utterances need as many transcripts, none of them empty")
        aligned = [self._align(*pair) for pair in zip(utterances, transcripts, strict=True)]
        return aligned[0] if single else aligned

    def _align(self, audio: Audio, transcript: str | None) -> list[AlignedToken]:
        ids = None if transcript is None else self.chat.encode_text(transcript)
        adapted = self.adapt(audio, None if ids is None else len(ids))
        if adapted.boundaries is None:
            raise ValueError(f"the adapter {self.config.adapter} has no token boundaries")
        ends = (adapted.boundaries[0] / FRAMES_PER_SECOND).tolist()
        tokens = [self.chat.tokenizer.decode([i]) for i in ids or self.nearest_tokens(adapted.embeddings[0])]
        return [AlignedToken(*row) for row in zip([0.0, *ends[:-1]], ends, tokens, strict=True)]

    @torch.no_grad()
    def adapt(self, audio: Audio, tokens: int | None = None) -> AdapterOutput:
        """The adapter's output for one utterance: embeddings, CIF weights, boundaries (of ``tokens`` tokens)."""
        lengths = None if tokens is None else torch.tensor([tokens], device=self.device)
        return self.model.adapt(*self._collate([audio]), lengths)

    @torch.no_grad()
    def nearest_tokens(self, embeddings: Tensor) -> list[int]:
        """For embeddings ``[U, D]`` the ids of the nearest input embeddings (Euclidean distance)."""
        table = self.model.llm.get_input_embeddings()
        words = torch.arange(table.num_embeddings, device=embeddings.device)
        vectors = table(words).float()
        closeness = embeddings.float() @ vectors.t() - vectors.square().sum(1) / 2
        ids: list[int] = closeness.argmax(1).tolist()
        return ids

    def _collate(self, batch: Sequence[Audio]) -> tuple[Tensor, Tensor]:
        waveforms = [torch.from_numpy(_samples(audio)) for audio in batch]
        device = self.device
        lengths = torch.tensor([len(waveform) for waveform in waveforms], device=device)
        return pad_waveforms(waveforms).to(device), lengths


def read_options(checkpoint_or_dir: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The options of a trained model, without loading its base models.

    Raises:
        ValueError: there is no model at this path.
    """
    return read_trained(Path(checkpoint_or_dir))[0]


def _is_single(audio: Any) -> bool:
    if isinstance(audio, (str, os.PathLike, Mapping)) or hasattr(audio, "get_all_samples"):
        return True
    return isinstance(audio, tuple) and len(audio) == 2 and isinstance(audio[1], (int, float, np.number))


def _as_list(audio: Any) -> list[Any]:
    if audio is None:
        raise ValueError(f"there is no audio: {_ACCEPTED}")
    return [audio] if _is_single(audio) else list(audio)


_ACCEPTED = 'give a path, samples with their rate, (array, 16000), or {"array": ..., "sampling_rate": 16000}'


def _samples(audio: Audio) -> np.ndarray:
    """``[S]`` float32 at 16 kHz; warns if nothing can be heard in it."""
    name, waveform = _read_mapping(audio) if isinstance(audio, Mapping) else _read_audio(audio)
    warn_of_flaw(waveform, name)
    return waveform


def _read_audio(audio: Any) -> tuple[str, np.ndarray]:
    """Its name, and the waveform."""
    if isinstance(audio, (str, os.PathLike)):
        return str(audio), load_audio(os.fspath(audio))
    if hasattr(audio, "get_all_samples"):
        decoded = audio.get_all_samples()
        audio = (decoded.data, decoded.sample_rate)
    if not _is_single(audio):
        raise ValueError(_ACCEPTED)
    if not np.isfinite(audio[1]) or audio[1] != int(audio[1]):
        raise ValueError(f"the rate of audio must be a whole number of Hz, got {audio[1]}")
    return "audio", prepare_waveform(audio[0], int(audio[1]))


def _read_mapping(audio: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """Decoded or not, as a column of audio has it."""
    name = str(audio.get("path") or "audio")
    if audio.get("array") is not None:
        if audio.get("sampling_rate") is None:
            raise AudioError(f'{name} has an "array" and no "sampling_rate": give its number of samples per second')
        return name, _read_audio((audio["array"], audio["sampling_rate"]))[1]
    if audio.get("bytes") is not None:
        return name, decode_audio(audio["bytes"], name)
    if audio.get("path"):
        return _read_audio(audio["path"])
    raise AudioError(f"a mapping with {', '.join(map(repr, audio)) or 'nothing'} in it is no audio: {_ACCEPTED}")


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    if size < 1:
        raise ValueError(f"the batch size must be at least 1, got {size}")
    for start in range(0, len(items), size):
        yield items[start : start + size]
