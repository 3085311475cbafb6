"""Trained models in Python, without fairseq: :class:`BlspKd`."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from blspkd_fairseq.data.audio import (
    MAX_SECONDS,
    SAMPLE_RATE,
    AudioError,
    decode_audio,
    load_audio,
    prepare_waveform,
    warn_of_flaw,
)
from blspkd_fairseq.data.audio_stream import Window, stream_windows
from blspkd_fairseq.data.batch import pad_waveforms
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.conversation import AudioPart, one_turn, read_messages
from blspkd_fairseq.data.prompts import PROMPTS, resolve_prompt
from blspkd_fairseq.data.transcript import Segment, Transcript, words_of
from blspkd_fairseq.data.vad import speech_windows
from blspkd_fairseq.data.windows import cut_windows, sounding, starts
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_heard
from blspkd_fairseq.generation.hearing import hear_windows, most_written, nearest_texts, nearest_tokens
from blspkd_fairseq.generation.streaming import Request, Sampling, StreamingDecoder
from blspkd_fairseq.generation.text_stream import TextStream
from blspkd_fairseq.model_card import Card, write_card
from blspkd_fairseq.modules.build import DTYPES, SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.pretrained import show_base_models
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.trained_state import load_trained_state_dict, read_trained, write_trained
from blspkd_fairseq.modules.whisper_encoder import FRAMES_PER_SECOND

Audio = str | Path | bytes | BinaryIO | tuple[Any, int] | Mapping[str, Any]
"""A path (or ``shard.zip:offset:length``); the bytes of a file, or one that is open; samples [S] (numpy, torch or list)
with their rate in Hz; or an element of an audio column of Hugging Face's data sets: ``{"array": ...,
"sampling_rate": ...}``, ``{"bytes": ..., "path": ...}``, or a decoder of torchcodec."""


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
        model: the torch module. chat_format: the chat format of its LLM. config: its options.
    """

    def __init__(self, model: SpeechLLM, chat: ChatFormat, config: SpeechLlmConfig) -> None:
        self.model = model.eval()
        self.chat_format = chat
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
            ValueError: nothing to load there, an unknown option, other base models than in training, one that needs
                code of its own, or no such device.
        """
        chosen_device = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
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
        return cls(model.to(chosen_device), chat, config)

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

    def push_to_hub(self, repo: str, card: Card, private: bool = False, dtype: str = "float16") -> str:
        """Puts what was trained, with its card, on the hub that huggingface_hub is set to.

        Args:
            repo: ``OWNER/NAME``. card: what the weights do not say. private: of a new repository.
            dtype: as for :meth:`save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            CardError: the card lacks something. ValueError: the hub refuses, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "README.md").write_text(write_card(card, dataclasses.asdict(self.config)), encoding="utf-8")
            self.save_pretrained(folder, dtype)
            return push_folder(Path(folder), repo, private)

    # ---- answers -----------------------------------------------------------------------------------------------

    def generate(
        self,
        audio: Audio | Sequence[Audio] | None = None,
        instruction: str = "chat",
        batch_size: int = 16,
        messages: Sequence[Any] | None = None,
        vad: str | None = None,
        **generation: Any,
    ) -> Any:
        """Answers speech.

        Args:
            audio: one utterance, or a list of them. One longer than the speech encoder's window is heard in several,
                and is one piece of speech for the LLM. Digital silence and other flaws are warned about.
            instruction: text with a ``{speech}`` slot (else the speech follows it), or the name of a prompt; by
                default the speech itself is what the user says.
            batch_size: utterances at a time; it does not change the answers.
            messages: in place of audio and instruction, a conversation as chat LLMs take it, or a list of them; a part
                ``{"type": "audio", "audio": AUDIO}`` is a piece of speech.
            vad: "energy" or "silero": hear only where somebody speaks, and answer "" where nobody does.
            generation: fields of :class:`DecodingOptions` such as ``beam=4, max_new_tokens=64``.

        Returns:
            A string, or a list of strings for a list; with ``n_best`` > 1, a list of strings for each utterance.

        Raises:
            AudioError: audio that cannot be used; PromptError: an unknown prompt; ConversationError: other messages;
            ValueError: more tokens than the LLM can read.
        """
        if messages is not None:
            if audio is not None or instruction != "chat":
                raise ValueError("give messages, or audio and an instruction: messages hold both")
            is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
            single = not is_list or bool(messages) and isinstance(messages[0], Mapping)
            asked = [read_messages(one) for one in ([messages] if single else messages)]
        else:
            single, conversation = _is_single(audio), one_turn(resolve_prompt(instruction))
            asked = [(conversation, [AudioPart(one)]) for one in _as_list(audio)]
        options = DecodingOptions(**generation)
        answers: list[Any] = []
        for batch in _batches(asked, batch_size):
            speech = [[self.windows(piece.audio, vad) for piece in pieces] for _, pieces in batch]
            spoken = [i for i, one in enumerate(speech) if not (vad and one and not any(one))]
            given: list[Any] = [[""] * options.n_best if options.n_best > 1 else ""] * len(batch)
            if spoken:
                heard = hear_windows(self.model, [windows for i in spoken for windows in speech[i]])
                conversations = [self.chat_format.render(batch[i][0]) for i in spoken]
                groups = answer_heard(self.model, self.chat_format, heard, conversations, options)
                for i, group in zip(spoken, groups, strict=True):
                    given[i] = [h.text for h in group] if options.n_best > 1 else group[0].text
            answers += given
        return answers[0] if single else answers

    def transcribe(self, audio: Audio | Sequence[Audio], **generation: Any) -> Any:
        """What is said, of any length: the text of :meth:`transcripts`."""
        texts = [one.text for one in self.transcripts(_as_list(audio), with_words=False, **generation)]
        return texts[0] if _is_single(audio) else texts

    def transcripts(
        self,
        audio: Sequence[Audio],
        prompt: str | None = "transcribe",
        vad: str | None = None,
        with_words: bool = True,
        batch_size: int = 16,
        progress: Callable[[float], Any] | None = None,
        **generation: Any,
    ) -> list[Transcript]:
        """What is said and when, of recordings of any length, heard and written window by window.

        Where the tokens nearest to what is heard have no letter or digit, nobody speaks, and nothing is written.

        Args:
            audio: recordings.
            prompt: asks the LLM for the words; see :meth:`generate`. None: it is not asked, and the tokens nearest to
                the speech embeddings are written, which is faster and knows no grammar.
            vad: as for :meth:`generate`.
            with_words: find the time of each word, by CIF.
            batch_size: windows at a time.
            progress: called with the seconds of audio that were done since the last call.
            generation: fields of :class:`DecodingOptions`; ``max_new_tokens`` is for one window. Where CIF counts what
                is said, what is written ends at twice that and 16 tokens, even if the LLM would not: it invents then.

        Raises:
            AudioError: audio that cannot be used.
            ValueError: without a prompt, the adapter does not give one embedding for each token.
        """
        options, audio = DecodingOptions(**generation), _as_list(audio)
        _check_batch_size(batch_size)
        if prompt is not None:
            prompt = resolve_prompt(prompt)
        else:
            self.check_counts_tokens()
        found: list[list[Segment]] = [[] for _ in audio]
        lengths = [0.0] * len(audio)
        parts = ((index, window) for index, one in enumerate(audio) for window in self._stream(one))
        while batch := list(islice(parts, batch_size)):
            spoken = []
            for index, window in batch:
                lengths[index] = window.start + len(window.samples) / SAMPLE_RATE
                inside = speech_windows(window.samples, vad) if vad else [(0, window.samples)]
                spoken += [(index, Window(window.start + b / SAMPLE_RATE, samples)) for b, samples in inside]
            texts: list[str] = []
            for together in _batches([window.samples for _, window in spoken], batch_size):
                texts += self._write_down(together, prompt, options)
            for (index, window), text in zip(spoken, texts, strict=True):
                if text.strip():
                    found[index].append(self.segment(window, text.strip(), with_words))
            if progress is not None:
                progress(sum(len(window.samples) for _, window in batch) / SAMPLE_RATE)
        return [Transcript(seconds, tuple(one)) for seconds, one in zip(lengths, found, strict=True)]

    def _write_down(self, windows: Sequence[np.ndarray], prompt: str | None, options: DecodingOptions) -> list[str]:
        """The texts of ``[samples]``, asked for by a resolved prompt; they do not depend on what is heard together.

        Where no word is heard there is none: the LLM would say that it could not hear.
        """
        heard = hear_windows(self.model, [self.windows((window, SAMPLE_RATE)) for window in windows])
        texts = [""] * len(windows)
        spoken = list(range(len(windows)))
        if self.counts_tokens:
            pieces = [[one[:count]] for one, count in zip(heard.embeddings, heard.counts, strict=True)]
            texts = nearest_texts(self.model, self.chat_format, pieces)
            spoken = [place for place, text in enumerate(texts) if text]
        if prompt is None or not spoken:
            return texts
        heard = heard.of(spoken)
        limits = [options.max_new_tokens] * len(spoken)
        if options.takes_the_likeliest and self.repeats_by(prompt):
            limits = [min(limit, most_written(count)) for limit, count in zip(limits, heard.counts, strict=True)]
            options = dataclasses.replace(options, max_new_tokens=max(limits))
        groups = answer_heard(self.model, self.chat_format, heard, [prompt] * len(spoken), options)
        for place, group, limit in zip(spoken, groups, limits, strict=True):
            texts[place] = self.chat_format.decode_answer(group[0].ids[:limit])
        return texts

    def repeats_by(self, prompt: str) -> bool:
        """Whether the answer to a resolved prompt is as long as what is heard, which CIF counts."""
        return prompt in map(PROMPTS.get, _WRITES) and self.counts_tokens and not self.chat_format.may_reason

    @property
    def counts_tokens(self) -> bool:
        """Whether the adapter gives one embedding for each token."""
        return bool(self.model.adapter.one_to_one)

    def check_counts_tokens(self) -> None:
        """Raises ValueError where the tokens nearest to what is heard are none of the transcript's."""
        if not self.counts_tokens:
            raise ValueError(f"the adapter {self.config.adapter} has no embedding for each token: ask the LLM instead")

    def _stream(self, audio: Audio) -> Iterator[Window]:
        """Windows of a recording, decoded while they are needed if it is a file."""
        if isinstance(audio, (str, os.PathLike)):
            return stream_windows(audio, self.window_seconds)
        windows = self.windows(audio)
        return (Window(*one) for one in zip(starts(windows), windows, strict=True))

    def segment(self, window: Window, text: str, with_words: bool = True) -> Segment:
        """What was said in a window, with the times of its words where the adapter cuts tokens."""
        end = window.start + len(window.samples) / SAMPLE_RATE
        if not with_words or not self.counts_tokens:
            return Segment(window.start, end, text, ())
        ids = self.chat_format.encode_transcript(text)
        boundaries = self.adapt((window.samples, SAMPLE_RATE), len(ids), reads=False).boundaries
        assert boundaries is not None
        spans = self._spans(window, boundaries[0])
        return Segment(window.start, end, text, words_of(text, self._pieces(ids), [e for _, e in spans], spans[0][0]))

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds."""
        stream = TextStream(self.chat_format)
        pieces = [stream.push(token) for token in ids]
        return [*pieces[:-1], pieces[-1] + stream.finish()] if pieces else []

    def translate(self, audio: Audio | Sequence[Audio], target: str = "German", **generation: Any) -> Any:
        """:meth:`generate` with the prompt ``translate``; ``target`` is a language's name or code."""
        return self.generate(audio, resolve_prompt("translate", tgt_lang=target), **generation)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.adapter.parameters()).device

    # ---- conversations -----------------------------------------------------------------------------------------

    @overload
    def chat(
        self, messages: Sequence[Any], stream: Literal[False] = False, vad: str | None = None, **sampling: Any
    ) -> str: ...

    @overload
    def chat(
        self, messages: Sequence[Any], stream: Literal[True], vad: str | None = None, **sampling: Any
    ) -> Iterator[str]: ...

    def chat(
        self, messages: Sequence[Any], stream: bool = False, vad: str | None = None, **sampling: Any
    ) -> str | Iterator[str]:
        """Answers the last turn of a conversation; what it shares with earlier calls is not read again.

        Args:
            messages: as for :meth:`generate`; a piece of audio may have any length that the LLM has room for.
            stream: return an iterator of pieces of the answer, as they come; closing it ends the answer.
            vad: "energy" or "silero": hear only where somebody speaks; a last turn in which nobody does, and nothing is
                written, is answered by "".
            sampling: fields of :class:`Sampling` such as ``max_new_tokens=64, temperature=0.7, top_p=0.9, seed=1``.

        Raises:
            AudioError: audio that cannot be used; ConversationError: other messages; ValueError: no room for it all.
        """
        request = self.request(messages, Sampling(**sampling), vad)
        pieces = (delta.text for delta in self.decoder.stream(request) if delta.text)
        return pieces if stream else "".join(pieces)

    def request(self, messages: Sequence[Any], sampling: Sampling | None = None, vad: str | None = None) -> Request:
        """A conversation, checked, rendered, its audio decoded and cut into windows, for a :class:`StreamingDecoder`.

        Runs no model, so that it may be called from any thread. Arguments and errors are those of :meth:`chat`.
        """
        conversation, pieces = read_messages(messages)
        speech = [self.windows(piece.audio, vad) for piece in pieces]
        silent = not any(isinstance(part, str) or speech[part.piece] for part in conversation[-1].parts)
        return Request(self.chat_format.render(conversation), speech, sampling or Sampling(), silent)

    def windows(self, audio: Audio, vad: str | None = None) -> list[np.ndarray]:
        """Audio of any length as windows ``[samples]`` that the speech encoder can hear.

        Args:
            audio: as for :meth:`generate`, of one utterance.
            vad: leave out what is no speech; nothing may be left.
        """
        windows = cut_windows(_samples(audio, max_seconds=None), self.window_seconds)
        return windows if vad is None else [part for one in windows for _, part in speech_windows(one, vad)]

    @property
    def window_seconds(self) -> float:
        """The longest speech that is heard at once."""
        return self.model.window_seconds

    def streaming_decoder(self, **options: Any) -> StreamingDecoder:
        """A decoder that several requests share; ``options`` are those of :class:`StreamingDecoder`."""
        return StreamingDecoder(self.model, self.chat_format, **options)

    @cached_property
    def decoder(self) -> StreamingDecoder:
        """The decoder of :meth:`chat`."""
        return self.streaming_decoder()

    # ---- alignment ---------------------------------------------------------------------------------------------

    def align(
        self,
        audio: Audio | Sequence[Audio],
        transcript: str | Sequence[str] | None = None,
        vad: str | None = None,
    ) -> Any:
        """Where CIF cuts the speech.

        Args:
            audio: as for :meth:`generate`.
            transcript: of each utterance, if known: CIF then cuts as many tokens as it has, and these are returned.
                Without it, CIF counts by itself and the tokens are the nearest ones.
            vad: as for :meth:`generate`.

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
        aligned = [self._align(*pair, vad) for pair in zip(utterances, transcripts, strict=True)]
        return aligned[0] if single else aligned

    def _align(self, audio: Audio, transcript: str | None, vad: str | None) -> list[AlignedToken]:
        windows = self.timed_windows(audio, vad)
        ids = None if transcript is None else self.chat_format.encode_transcript(transcript)
        counts: Sequence[int | None] = [None] * len(windows)
        if ids is not None:
            counts = [len(ids)] if len(windows) == 1 else self._share([one.samples for one in windows], len(ids))
        times: list[tuple[float, float]] = []
        heard: list[Tensor] = []
        for window, count in zip(windows, counts, strict=True):
            if count == 0:
                continue
            adapted = self.adapt((window.samples, SAMPLE_RATE), count, reads=ids is None)
            if adapted.boundaries is None:
                raise ValueError(f"the adapter {self.config.adapter} has no token boundaries")
            times += self._spans(window, adapted.boundaries[0], whole=len(windows) == 1 and not vad)
            heard.append(adapted.embeddings[0])
        tokens = ids if ids is not None or not heard else self.nearest_tokens(torch.cat(heard))
        texts = [self.chat_format.tokenizer.decode([token]) for token in tokens or ()]
        return [AlignedToken(*span, text) for span, text in zip(times, texts, strict=True)]

    def timed_windows(self, audio: Audio, vad: str | None = None) -> list[Window]:
        """:meth:`windows`, and where each begins."""
        windows = self.windows(audio)
        timed = [Window(*one) for one in zip(starts(windows), windows, strict=True)]
        if vad is None:
            return timed
        return [
            Window(window.start + begin / SAMPLE_RATE, samples)
            for window in timed
            for begin, samples in speech_windows(window.samples, vad)
        ]

    def _spans(self, window: Window, boundaries: Tensor, whole: bool = False) -> list[tuple[float, float]]:
        """Seconds of a window's tokens; CIF gives the silence around them to the first and last, which is taken off."""
        first, last = (0, len(window.samples)) if whole else sounding(window.samples)
        begin, limit = window.start + first / SAMPLE_RATE, window.start + last / SAMPLE_RATE
        ends = [window.start + end / FRAMES_PER_SECOND for end in boundaries.tolist()]
        ends = ends if whole else [min(max(begin, end), limit) for end in ends]
        return list(zip([begin, *ends[:-1]], ends, strict=True))

    def _share(self, windows: Sequence[np.ndarray], tokens: int) -> list[int]:
        """Divides the tokens of a transcript among windows, by what CIF hears in each."""
        sums = [self.adapt((window, SAMPLE_RATE), reads=False).alpha_sum for window in windows]
        if not sums:
            raise ValueError("nobody speaks in this audio: there is nothing to align the transcript with")
        if any(one is None for one in sums):
            raise ValueError(f"the adapter {self.config.adapter} has no token boundaries")
        heard = np.cumsum([float(one) for one in sums if one is not None])
        return np.diff(np.rint(heard / heard[-1] * tokens).astype(int), prepend=0).tolist()

    @torch.no_grad()
    def adapt(self, audio: Audio, tokens: int | None = None, reads: bool = True) -> AdapterOutput:
        """The adapter's output for one utterance: embeddings, CIF weights, boundaries (of ``tokens`` tokens).

        If nobody ``reads`` the embeddings, the LLM is not asked what was said.
        """
        lengths = None if tokens is None else torch.tensor([tokens], device=self.device)
        return self.model.adapt(*self._collate([audio]), lengths, reads=reads)

    @torch.no_grad()
    def nearest_tokens(self, embeddings: Tensor) -> list[int]:
        """For embeddings ``[U, D]`` the ids of the nearest input embeddings (Euclidean distance)."""
        return nearest_tokens(self.model, embeddings)

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


def push_folder(folder: Path, repo: str, private: bool = False) -> str:
    """Puts a folder on the hub and returns the address of the commit.

    Raises:
        ValueError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model and card"))
    except (HfHubHTTPError, OSError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{repo} cannot be written on the hub ({what}): log in with `hf auth login`") from error


def _usable(device: str | torch.device) -> torch.device:
    """The device of this name; raises ValueError where there is none."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"there is no device {device} here: give cpu, or leave the device out ({reason})") from error


def _is_single(audio: Any) -> bool:
    if isinstance(audio, (str, os.PathLike, *_BYTES, Mapping)) or hasattr(audio, "get_all_samples"):
        return True
    return hasattr(audio, "read") or isinstance(audio, tuple) and len(audio) == 2 and _is_rate(audio[1])


def _is_rate(value: Any) -> bool:
    """A number, or an array or tensor of one, as data sets give it that are formatted so."""
    return isinstance(value, (int, float, np.number)) or getattr(value, "ndim", None) == 0


def _as_list(audio: Any) -> list[Any]:
    if audio is None:
        raise ValueError(f"there is no audio: {_ACCEPTED}")
    if not _is_single(audio) and not isinstance(audio, Iterable):
        raise ValueError(f"{audio!r} is no audio: {_ACCEPTED}")
    return [audio] if _is_single(audio) else list(audio)


_BYTES = (bytes, bytearray, memoryview)

_WRITES = ("repeat", "transcribe")
"""Prompts whose answer is what was said."""

_ACCEPTED = 'give a path, samples with their rate, (array, 16000), or {"array": ..., "sampling_rate": 16000}'


def _samples(audio: Audio, max_seconds: float | None = MAX_SECONDS) -> np.ndarray:
    """``[S]`` float32 at 16 kHz; warns if nothing can be heard in it."""
    if isinstance(audio, Mapping):
        name, waveform = _read_mapping(audio, max_seconds)
    else:
        name, waveform = _read_audio(audio, max_seconds)
    warn_of_flaw(waveform, name)
    return waveform


def _read_audio(audio: Any, max_seconds: float | None) -> tuple[str, np.ndarray]:
    """Its name, and the waveform."""
    if isinstance(audio, (str, os.PathLike)):
        return str(audio), load_audio(os.fspath(audio), max_seconds=max_seconds)
    if hasattr(audio, "read"):
        audio.seek(0)  # an earlier call may have read it
        return "audio", _decode(audio.read(), "audio", max_seconds)
    if isinstance(audio, _BYTES):
        return "audio", _decode(audio, "audio", max_seconds)
    if hasattr(audio, "get_all_samples"):
        decoded = audio.get_all_samples()
        audio = (decoded.data, decoded.sample_rate)
    if not _is_single(audio):
        raise ValueError(_ACCEPTED)
    rate = float(audio[1])
    if not rate.is_integer():
        raise ValueError(f"the rate of audio must be a whole number of Hz, got {rate}")
    return "audio", prepare_waveform(audio[0], int(rate), max_seconds=max_seconds)


def _decode(content: Any, name: str, max_seconds: float | None) -> np.ndarray:
    if not isinstance(content, _BYTES):
        raise AudioError(
            f"{name} is of type {type(content).__name__} where the bytes of a file are wanted: {_ACCEPTED}"
        )
    return decode_audio(bytes(content), name, max_seconds)


def _read_mapping(audio: Mapping[str, Any], max_seconds: float | None) -> tuple[str, np.ndarray]:
    """Decoded or not, as a column of audio has it."""
    name = str(audio.get("path") or "audio")
    if audio.get("array") is not None:
        if audio.get("sampling_rate") is None:
            raise AudioError(f'{name} has an "array" and no "sampling_rate": give its number of samples per second')
        if not _is_rate(audio["sampling_rate"]):
            raise AudioError(f'{name} has the "sampling_rate" {audio["sampling_rate"]!r}: give it as a number')
        return name, _read_audio((audio["array"], audio["sampling_rate"]), max_seconds)[1]
    if audio.get("bytes") is not None:
        return name, _decode(audio["bytes"], name, max_seconds)
    if audio.get("path"):
        return _read_audio(audio["path"], max_seconds)
    raise AudioError(f"a mapping with {', '.join(map(repr, audio)) or 'nothing'} in it is no audio: {_ACCEPTED}")


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    _check_batch_size(size)
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _check_batch_size(size: Any) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"the batch size must be a whole number of at least 1, got {size!r}")
